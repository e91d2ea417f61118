"""How a step is shared out among blocks: each rule's formula, and what none of them changes."""

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.blocks import BlockDamping
from ngplugin.curvature.fisher import Fisher
from ngplugin.layer_balance import balance
from tests.oracle import double, flat, observe, randn

F = torch.nn.functional
RULES = ["natural", "orthogonal", "balanced", "equal"]


def network():
    return double(
        nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3, bias=False))
    )


@pytest.fixture(name="problem")
def made_problem():
    """A Fisher matrix of three blocks, and a step by it."""
    model = network()
    x = randn(20, 5, seed=1)
    fisher, _ = observe(
        [*model.parameters()], lambda: F.cross_entropy(model(x), torch.arange(20) % 3)
    )
    fisher.refresh(BlockDamping(0.1))
    vectors = {id(p): randn(*p.shape, seed=i) for i, p in enumerate(model.parameters())}
    return fisher, vectors


def shares(fisher: Fisher, natural, curved):
    """Length and dᵀFd of each block."""
    lengths, q = [], []
    for block in fisher.blocks:
        d, Fd = (flat([part[id(p)] for p in block.parameters]) for part in (natural, curved))
        lengths.append(d.norm())
        q.append(d @ Fd)
    return torch.stack(lengths), torch.stack(q)


@pytest.mark.parametrize("how", RULES)
def test_every_block_has_the_share_that_the_rule_says(problem, how):
    fisher, vectors = problem
    natural, curved = fisher.precondition(vectors)
    before = {key: part.clone() for key, part in natural.items()}
    lengths, q = shares(fisher, natural, curved)
    balance(fisher.blocks, natural, curved, how)
    new_lengths, new_q = shares(fisher, natural, curved)
    assert [len(block.parameters) for block in fisher.blocks] == [2, 1, 2]
    r = torch.tensor([5.0, 3.0, 0.1 * 14]).double().sqrt()  # min(7, 5); min(3, 7); 14 numbers
    wanted = {
        "natural": lengths,
        "orthogonal": r,
        "balanced": (r * lengths).sqrt(),
        "equal": lengths / q.sqrt(),
    }[how]
    torch.testing.assert_close(new_lengths / new_lengths.sum(), wanted / wanted.sum())
    torch.testing.assert_close(new_q.sum(), q.sum())  # the predicted KL as a whole
    for key, part in natural.items():  # directions within a block
        torch.testing.assert_close(part / part.norm(), before[key] / before[key].norm())
    products = fisher.product(natural)
    for key, part in curved.items():
        torch.testing.assert_close(part, products[key], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_block_that_does_not_move_or_is_no_number_leaves_the_others_alone(problem, how, value):
    fisher, vectors = problem
    natural, curved = fisher.precondition(vectors)
    first = fisher.blocks[0]
    for p in first.parameters:
        natural[id(p)].fill_(value)
        curved[id(p)].fill_(value)
    balance(fisher.blocks, natural, curved, how)
    for block in fisher.blocks[1:]:
        for p in block.parameters:
            assert torch.isfinite(natural[id(p)]).all()
            assert natural[id(p)].any()
    stays = natural[id(first.parameters[0])]
    assert torch.equal(stays, torch.full_like(stays, value)) or bool(stays.isnan().all())


@pytest.mark.parametrize("structure", ["kronecker", "eigen", "diagonal"])
def test_scaling_the_loss_changes_no_step(structure):
    steps = []
    for scale in (1.0, 1000.0):
        model = network()
        optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure)
        for seed in range(3):
            with optimizer.observe():
                loss = scale * F.cross_entropy(model(randn(20, 5, seed=seed)), torch.arange(20) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        steps.append(flat([*model.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-8, atol=1e-10)


def test_an_exact_block_knows_its_layers():
    ends = []
    for how in ("natural", "orthogonal"):
        model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
        optimizer = NaturalGradientOptimizer(
            model.parameters(), structure="exact", layer_balance=how
        )
        with optimizer.observe():
            loss = F.mse_loss(model(randn(40, 3)), randn(40, 1, seed=2))
        loss.backward()
        optimizer.step()
        ends.append(flat([*model.parameters()]))
    assert torch.equal(*ends)
