"""Exact blocks follow a valley that bends: the second-order part of a step, and momentum."""

import copy

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.blocks import BlockDamping, ExactBlock
from ngplugin.curvature.exact_rows import ExactRows, root_products
from ngplugin.curvature.fisher import Fisher
from ngplugin.geodesic_acceleration import accelerated
from ngplugin.move import Move
from tests.oracle import double, flat, jacobian, moved, observe, randn, unflat

F = torch.nn.functional
X = randn(30, 3, seed=1)
LOSSES = {
    "mse": lambda z: F.mse_loss(z, randn(30, 2, seed=2)),
    "cross entropy": lambda z: F.cross_entropy(z, torch.arange(30) % 2),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, (randn(30, 2, seed=2) > 0).double()),
}


def network():
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def observed(model, loss):
    fisher, observation = observe(
        [*model.parameters()], lambda: LOSSES[loss](model(X)), fisher=Fisher(exact=ExactRows(True))
    )
    fisher.refresh_every_step(BlockDamping(0.01, "absolute"))
    return fisher.exact_block, observation


@torch.no_grad()
def bend(moves, scale, observation, block):
    return accelerated(moves, scale, [observation], block)


def moves_of(model, size):
    n = flat([*model.parameters()]).numel()
    direction = unflat(size * randn(n, seed=5), [*model.parameters()])
    return [Move(p, d, 1.0, 0.5, 0.0) for p, d in zip(model.parameters(), direction, strict=True)]


# -- the acceleration -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_products_with_the_root_are_in_the_order_of_the_rows(loss):
    model = network()
    block, observation = observed(model, loss)
    v = randn(flat([*model.parameters()]).numel(), seed=3)
    J = jacobian(model(X), [*model.parameters()])
    (scored,) = observation.scored
    products = root_products(scored.call, scored.weights, [(J @ v).reshape(30, 2)], [])
    wanted = block.rows_times(unflat(v, [*model.parameters()])) * block.total_weight**0.5
    torch.testing.assert_close(torch.cat(products), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_second_order_part_undoes_what_the_prediction_bends(loss):
    """a = -½ (JᵀHJ + λ)⁻¹ JᵀH f'', all of it dense and f'' by autograd."""
    model = network()
    parameters = [*model.parameters()]
    block, observation = observed(model, loss)
    moves = moves_of(model, 0.05)
    before = flat(parameters)
    bent = bend(moves, 0.8, observation, block)
    assert torch.equal(flat(parameters), before)
    a = flat(
        [-0.5 * 0.8 * (m.direction - old.direction) for m, old in zip(bent, moves, strict=True)]
    )

    v = -0.5 * 0.8 * flat([m.direction for m in moves])
    parts = dict(zip(dict(model.named_parameters()), unflat(v, parameters), strict=True))

    def along(t):
        moved_to = {name: p.detach() + t * parts[name] for name, p in model.named_parameters()}
        return torch.func.functional_call(model, moved_to, (X,))

    def slope(t):
        return torch.func.jvp(along, (t,), (torch.ones_like(t),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    second = torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))[1]
    R = torch.cat(block._rows) / block.total_weight**0.5
    (scored,) = observation.scored
    z = (
        torch.cat(root_products(scored.call, scored.weights, [second], []))
        / block.total_weight**0.5
    )
    exact = -0.5 * torch.linalg.solve(R.T @ R + 0.01 * torch.eye(len(v)), R.T @ z)
    assert (a - exact).norm() < 0.1 * exact.norm()  # a difference over h = 0.1 is third order off
    assert exact.norm() > 0


def test_it_gets_nearer_to_the_prediction_that_was_aimed_at():
    model = network()
    block, observation = observed(model, "mse")
    start, aim = model(X).detach(), None
    moves = moves_of(model, 0.1)
    v = -0.5 * flat([m.direction for m in moves])
    aim = start + (jacobian(model(X), [*model.parameters()]) @ v).reshape(30, 2)
    errors = []
    for chosen in (moves, bend(moves, 1.0, observation, block)):
        with moved([*model.parameters()], -0.5 * flat([m.direction for m in chosen])):
            errors.append((model(X) - aim).norm().item())
    assert errors[1] < 0.75 * errors[0]


def test_one_that_is_long_beside_the_step_is_left_out():
    model = network()
    block, observation = observed(model, "mse")
    moves = moves_of(model, 50.0)
    assert bend(moves, 1.0, observation, block) == moves


def test_where_the_order_of_terms_is_not_that_of_the_predictions_there_is_none():
    layer = double(nn.Conv1d(2, 3, 1))
    fisher, observation = observe(
        [*layer.parameters()],
        lambda: F.cross_entropy(layer(randn(6, 2, 5)), torch.arange(30).reshape(6, 5) % 3),
        fisher=Fisher(exact=ExactRows(True)),
    )
    (scored,) = observation.scored
    assert root_products(scored.call, scored.weights, scored.call.predictions, []) is None
    moves = moves_of(layer, 0.1)
    fisher.refresh_every_step(BlockDamping(0.01))
    assert bend(moves, 1.0, observation, fisher.exact_block) == moves


# -- momentum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 30])  # fewer than parameters, and more
def test_momentum_draws_the_step_to_a_share_of_the_last_one(rows):
    """D = argmin ½‖R̃d - ρ‖² + ½λ‖d - μp‖², solved densely."""
    p = nn.Parameter(torch.zeros(10).double())
    block = ExactBlock([p])
    R, rho = randn(rows, 10), randn(rows, seed=2)
    block.add_rows(R, rho)
    block.fold(1.0, 0.0)
    block.refresh(BlockDamping(0.3, "absolute"))
    last = randn(10, seed=3)
    block.remember([last])
    for mu in (0.0, 0.7):
        block.momentum = mu
        (d,), (Fd,) = block.precondition([R.T @ rho])
        stacked = torch.cat([R, 0.3**0.5 * torch.eye(10).double()])
        wanted = torch.linalg.lstsq(stacked, torch.cat([rho, 0.3**0.5 * mu * last])[:, None])
        torch.testing.assert_close(d, wanted.solution[:, 0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(Fd, R.T @ (R @ d), rtol=1e-8, atol=1e-10)


def train(model, steps, **options):
    """Squared error of a product of layers: the valleys of such a loss bend."""
    x = randn(60, 2, seed=1)
    y = (3 * x[:, :1]).sin() * x[:, 1:]
    optimizer = NaturalGradientOptimizer(model.parameters(), structure="exact", **options)
    for _ in range(steps):
        with optimizer.observe():
            loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), optimizer


def deep():
    return double(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                                nn.Linear(8, 1)))  # fmt: skip


def test_both_save_steps(monkeypatch):
    both, _ = train(deep(), 40)
    without_momentum, _ = train(deep(), 40, momentum=0.0)
    monkeypatch.setattr("ngplugin.step_length.accelerated", lambda moves, *_: [*moves])
    neither, _ = train(deep(), 40, momentum=0.0)
    assert both < 0.5 * neither
    assert without_momentum < 0.5 * neither


def test_a_resumed_run_has_the_momentum_of_the_one_before():
    model = deep()
    _, optimizer = train(model, 6)
    twin = copy.deepcopy(model)
    other = NaturalGradientOptimizer(twin.parameters(), structure="exact")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    x = randn(60, 2, seed=1)
    for m, o in ((model, optimizer), (twin, other)):
        with o.observe():
            loss = F.mse_loss(m(x), x.prod(1, keepdim=True))
        o.zero_grad()
        loss.backward()
        o.step()
    assert torch.equal(flat([*model.parameters()]), flat([*twin.parameters()]))
