"""Normalizations: scale and offset of a feature share a 2x2 block, whatever the norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.blocks import BlockDamping
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    observe,
    randn,
    units_dense,
)

NORMS = {
    "layer_norm": lambda: nn.LayerNorm([4, 3]),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "batch_norm in evaluation": lambda: nn.BatchNorm1d(4).eval(),
    "instance_norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "rms_norm": lambda: nn.RMSNorm([4, 3]),
}
X = randn(3, 4, 3, seed=1)


@pytest.mark.parametrize("name", NORMS)
def test_the_block_is_the_fisher_s_in_the_mean(name):
    model = double(nn.Sequential(NORMS[name](), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)))
    if "evaluation" in name:
        model.eval()
    norm = model[0]
    with torch.no_grad():
        norm.weight.view(-1)[0] = 0.0  # an output that does not reveal its normalized input
    parameters = [*norm.parameters()]
    dense = dense_fisher(FAMILIES["categorical"], model(X), parameters, torch.ones(3).double())
    y, samples = torch.arange(3), []
    for seed in range(60):
        fisher, _ = observe(
            parameters,
            lambda: F.cross_entropy(model(X), y, reduction="sum"),
            "sampled",
            draws=8,
            seed=seed,
        )
        samples.append(dense_average(fisher.blocks[0]))
    kind = name.split()[0]
    assert fisher.reason(norm.weight) == f"weight of {kind}"
    (block,) = fisher.blocks
    if name == "rms_norm":
        assert block.kind == "diagonal"
        dense = torch.diag(dense.diagonal())
    else:
        assert block.kind == "unit-wise"
        assert fisher.reason(norm.bias) == f"bias of {kind}"
        n = norm.weight.numel()
        units = [[dense[i : i + n, j : j + n].diagonal() for j in (0, n)] for i in (0, n)]
        dense = units_dense(torch.stack([torch.stack(row, -1) for row in units], 1))
    assert_mean_is(torch.stack(samples), dense)


def objective(function):
    return lambda: F.mse_loss(function(X), torch.zeros(3, 4, 3).double())


def test_parameters_that_are_used_with_several_partners_stay_apart():
    scale, one, two = (nn.Parameter(randn(3, seed=i)) for i in range(3))
    fisher, _ = observe(
        [scale, one, two],
        objective(
            lambda x: F.layer_norm(F.layer_norm(x, [3], scale, one), [3], weight=scale, bias=two)
        ),
    )
    assert [fisher.block(p).kind for p in (scale, one, two)] == ["diagonal"] * 3
    assert fisher.reason(two) == "bias of layer_norm"


@pytest.mark.parametrize("missing", ["frozen", "not followed", "none"])
def test_a_scale_or_offset_alone_has_a_diagonal_block(missing):
    scale = nn.Parameter(randn(3))
    offset = None if missing == "none" else nn.Parameter(randn(3), missing != "frozen")
    fisher, _ = observe([scale], objective(lambda x: F.layer_norm(x, [3], scale, offset)))
    assert [block.parameters for block in fisher.blocks] == [(scale,)]
    assert fisher.blocks[0].kind == "diagonal"
    assert fisher.reason(scale) == "weight of layer_norm"


def test_a_normalization_of_nothing_that_is_watched_is_not_noted():
    scale, offset = nn.Parameter(randn(3)), nn.Parameter(randn(3))
    _, observation = observe(
        [scale],
        objective(lambda x: F.layer_norm(x * scale, [3], None, offset)),
    )
    assert observation.norms == []


def test_draws_are_averaged_and_not_added():
    norm = double(nn.LayerNorm(1))  # a normalized input of zero: only the offset acts

    def loss():
        return F.mse_loss(norm(randn(5, 1)), torch.zeros(5, 1).double())

    fisher, _ = observe([*norm.parameters()], loss, draws=400)
    # The square of a sum of five signs has the mean 5; per Σw it is 1, and 0 for the scale.
    assert float(fisher.blocks[0].mean_eigenvalue()) == pytest.approx(0.5, rel=0.3)


def test_a_saved_matrix_gives_the_same_directions():
    norm = double(nn.GroupNorm(2, 4))
    fisher, _ = observe([*norm.parameters()], objective(norm))
    fisher.refresh(BlockDamping(0.1))
    other = type(fisher)()
    other.parameters = [*norm.parameters()]
    other.load_state_dict(fisher.state_dict())
    g = {id(p): randn(*p.shape, seed=3) for p in norm.parameters()}
    for ours, theirs in zip(fisher.precondition(g), other.precondition(g), strict=True):
        assert ours.keys() == g.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
