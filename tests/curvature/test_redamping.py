"""Another λ without another factorization, where eigenvalues are known."""

import functools

import pytest
import torch
from torch import nn

from ngplugin.curvature.block_choice import BlockRule
from ngplugin.curvature.blocks import BlockDamping, DiagonalBlock, EigenBlock, KroneckerBlock
from ngplugin.curvature.fisher import Fisher
from tests.oracle import double, observe, randn

F = torch.nn.functional
DAMPINGS = [
    BlockDamping(3.0, "relative", sampling=1.0),
    BlockDamping(1e-3, "relative"),
    BlockDamping(0.7, "absolute"),
]
MODELS = {
    "dense": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "groups": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 3)
    ),
}


def seen(structure, model, max_factor):
    """A Fisher matrix with two statistics, refreshed after the first."""
    fisher = Fisher(BlockRule(structure, max_factor=max_factor))
    for seed in range(2):
        x = randn(12, 4, seed=seed)
        loss = functools.partial(lambda x: F.cross_entropy(model(x), torch.arange(12) % 3), x)
        observe([*model.parameters()], loss, fisher=fisher)
        if seed == 0:
            fisher.refresh(BlockDamping(0.1, "relative", sampling=1.0))
    return fisher


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("max_factor", [8192, 4])
@pytest.mark.parametrize("structure", ["eigen", "diagonal"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_as_a_refresh_with_the_new_damping(
    model, structure, max_factor, damping, monkeypatch
):
    network = double(MODELS[model]())
    fisher = seen(structure, network, max_factor)
    fisher.refresh(BlockDamping(0.1, "relative", sampling=1.0))
    vectors = {id(p): randn(*p.shape, seed=3) for p in fisher.parameters}
    with monkeypatch.context() as without:
        for name in ("eigh", "cholesky_ex"):
            without.setattr(torch.linalg, name, None)  # to call it is an error
        changed = fisher.redamp(damping)
    kinds = {type(block) for block in fisher.blocks}
    assert changed == len(fisher.blocks)
    assert kinds <= {EigenBlock, DiagonalBlock}
    found = fisher.precondition(vectors)
    fisher.refresh(damping)
    for ours, wanted in zip(found, fisher.precondition(vectors), strict=True):
        for key, part in wanted.items():
            torch.testing.assert_close(ours[key], part, rtol=1e-10, atol=1e-12)


def test_what_would_need_a_factorization_waits_for_the_next_refresh():
    network = double(MODELS["dense"]())
    fisher = seen("kronecker", network, 8192)
    vectors = {id(p): randn(*p.shape, seed=3) for p in fisher.parameters}
    before = fisher.precondition(vectors)[0]
    assert fisher.redamp(DAMPINGS[0]) == 0
    assert {type(block) for block in fisher.blocks} == {KroneckerBlock}
    for key, part in fisher.precondition(vectors)[0].items():
        assert torch.equal(part, before[key])
