"""How a step is shared out among blocks: each rule's formula, and what none of them changes."""

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.blocks import BlockDamping
from ngplugin.curvature.fisher import Fisher
from ngplugin.layer_balance import balance
from ngplugin.solver import of_blocks
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


def pieces(fisher: Fisher, vectors):
    """Of the natural gradient: r, ‖d‖² and vᵀd of each block."""
    found = of_blocks(fisher, vectors)
    squares = [sum(float(found.natural[i].square().sum()) for i in p.ids) for p in found.pieces]
    along = [float(p.along) for p in found.pieces]
    return [p.length for p in found.pieces], squares, along


@pytest.mark.parametrize("how", RULES)
def test_every_block_has_the_share_that_the_rule_says(problem, how):
    fisher, vectors = problem
    lengths, squares, along = map(torch.tensor, pieces(fisher, vectors))
    assert [len(block.parameters) for block in fisher.blocks] == [2, 1, 2]
    r = torch.tensor([5.0, 3.0, 0.1 * 14]).sqrt()  # min(7, 5); min(3, 7); 14 numbers
    torch.testing.assert_close(lengths, r)
    shares = torch.tensor(balance(lengths.tolist(), squares.tolist(), along.tolist(), how))
    new = shares * squares.sqrt()
    wanted = {
        "natural": squares.sqrt(),
        "orthogonal": r,
        "balanced": (r * squares.sqrt()).sqrt(),
        "equal": squares.sqrt() / along.sqrt(),
    }[how]
    torch.testing.assert_close(new / new.sum(), wanted / wanted.sum())
    torch.testing.assert_close((shares.square() * along).sum(), along.sum())  # the damped KL


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_block_that_does_not_move_or_is_no_number_leaves_the_others_alone(problem, how, value):
    lengths, squares, along = pieces(*problem)
    squares[0] = along[0] = value
    shares = balance(lengths, squares, along, how)
    assert shares[0] == 1.0
    assert all(0 < share < float("inf") for share in shares[1:])
    before = sum(along[1:])
    after = sum(s**2 * q for s, q in zip(shares[1:], along[1:], strict=True))
    assert after == pytest.approx(before)


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
