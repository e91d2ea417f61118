"""The exact block: its F, its products on both sides, when there is one, and what it achieves."""

import math

import mpmath
import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer, OptionError
from ngplugin.curvature.blocks import BlockDamping, ExactBlock
from ngplugin.curvature.exact_rows import ExactRows
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.jacobian import Jacobian
from tests.oracle import FAMILIES, dense_fisher, double, flat, observe, randn, unflat

F = torch.nn.functional

LOSSES = {
    "categorical": (F.cross_entropy, torch.arange(6) % 3),
    "bernoulli": (F.binary_cross_entropy_with_logits, (randn(6, 3, seed=9) > 0).double()),
    "gaussian": (F.mse_loss, randn(6, 3, seed=9)),
}


def exact_fisher(parameters, objective):
    fisher, _ = observe(parameters, objective, fisher=Fisher(exact=ExactRows(forced=True)))
    (block,) = fisher.blocks
    assert isinstance(block, ExactBlock)
    assert all(p is q for p, q in zip(block.parameters, parameters, strict=True))
    return block


def dense(block):
    rows = torch.cat(block._rows)
    return rows.T @ rows / block.total_weight


# -- its F ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_the_rows_square_to_the_dense_fisher_matrix_and_combine_to_the_gradient(name):
    net = double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    parameters, x, (loss, y) = [*net.parameters()], randn(6, 4), LOSSES[name]
    block = exact_fisher(parameters, lambda: 3 * loss(net(x), y))
    natural = net(x) if name == "categorical" else net(x).reshape(-1)
    expected = dense_fisher(FAMILIES[name], natural, parameters, torch.ones(len(natural)).double())
    torch.testing.assert_close(dense(block), expected, rtol=1e-10, atol=1e-12)
    gradient = flat(torch.autograd.grad(3 * loss(net(x), y), parameters))
    combined = torch.cat(block._rows).T @ block._residual
    torch.testing.assert_close(combined, gradient, rtol=1e-9, atol=1e-12)


def test_several_losses_with_weights_of_their_own_share_one_matrix():
    net = double(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)))
    parameters, inside, edge = [*net.parameters()], randn(6, 2), randn(3, 2, seed=1)

    def objective():
        return F.mse_loss(net(inside), randn(6, 1)) + 5 * F.mse_loss(net(edge), randn(3, 1))

    block = exact_fisher(parameters, objective)
    natural = net(torch.cat([inside, edge]))[:, 0]
    weights = torch.tensor([2 / 6] * 6 + [10 / 3] * 3, dtype=torch.float64)
    expected = dense_fisher(FAMILIES["gaussian"], natural, parameters, weights)
    torch.testing.assert_close(dense(block), expected, rtol=1e-10, atol=1e-13)


def test_a_model_of_which_no_rows_are_had_has_its_usual_blocks_and_says_why():
    net = nn.ConvTranspose1d(2, 1, 2)
    optimizer = NaturalGradientOptimizer(net.parameters(), structure="exact")
    for _ in range(2):
        with optimizer.observe():
            loss = F.mse_loss(net(torch.ones(3, 2, 2)), torch.ones(3, 1, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = optimizer.coverage().rows
    assert [row.block for row in rows] == ["kronecker", "diagonal"]
    assert all("not exact: nothing enters as known" in row.reason for row in rows)


# -- its products --------------------------------------------------------------------------------


def block_of(rows, residual, total, parameters):
    block = ExactBlock(parameters)
    half = len(rows) // 2
    block.add_rows(rows[:half], residual[:half])
    block.add_rows(rows[half:], residual[half:])
    assert block.fold(total, 0.9)
    return block


@pytest.mark.parametrize("n", [7, 20])
def test_both_sides_are_the_dense_solve(n):
    parameters = [nn.Parameter(torch.zeros(3, 4).double()), nn.Parameter(torch.zeros(2).double())]
    rows, residual = randn(n, 14), randn(n, seed=1)
    block = block_of(rows, residual, 2.5, parameters)
    assert block.kernel_side == (n < 14)
    assert block.refresh(BlockDamping(0.01)) is Remedy.NONE
    matrix = rows.T @ rows / 2.5
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(14).double()
    for g in (rows.T @ residual, randn(14, seed=2)):  # of the rows, and of something else
        d, product = block.precondition(unflat(g, parameters))
        expected = torch.linalg.solve(damped, g)
        torch.testing.assert_close(flat(d), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flat(product), matrix @ expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flat(block.product(unflat(g, parameters))), matrix @ g)
    low, high, damped_low, damped_high = block.spectrum().extremes
    eigenvalues = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(high, eigenvalues[-1])
    torch.testing.assert_close(low, eigenvalues[0].clamp_min(0), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(damped_high - high, damped_low - low)
    counts = block.spectrum().counts
    assert counts.sum() == 14
    assert counts[0] == 14 - torch.linalg.matrix_rank(matrix)


@pytest.mark.parametrize("n", [7, 20])
def test_momentum_solves_for_what_the_last_step_leaves(n):
    """SPRING, arXiv:2401.10190."""
    parameter, last = nn.Parameter(randn(14)), randn(14, seed=1)
    rows, residual = randn(n, 14), randn(n)
    block = block_of(rows, residual, 2.5, [parameter])
    block.refresh(BlockDamping(0.3, "absolute"))
    matrix, g = rows.T @ rows / 2.5, rows.T @ residual
    damped = matrix + 0.3 * torch.eye(14).double()
    for momentum, remembered in ((0.8, False), (0.0, True), (0.8, True)):
        block.momentum = momentum
        if remembered:
            block.remember([last])
        (d,), (product,) = block.precondition([g])
        carried = momentum * last if remembered else torch.zeros(14).double()
        expected = carried + torch.linalg.solve(damped, g - matrix @ carried)
        torch.testing.assert_close(d, expected)
        torch.testing.assert_close(product, matrix @ expected)
    resumed = ExactBlock([parameter])
    resumed.load_state_dict(block.state_dict())
    assert torch.equal(resumed._last, last)
    assert resumed._last.data_ptr() != block._last.data_ptr()


@pytest.mark.parametrize("n", [7, 20])
def test_an_average_is_of_the_larger_side_and_rows_are_of_one_batch(n):
    parameter = nn.Parameter(randn(14))
    block = block_of(randn(n, 14), randn(n), 2.0, [parameter])
    block.add_rows(3 * randn(n, 14, seed=1), randn(n))
    assert block.fold(4.0, 0.5)
    first, second = (s * randn(n, 14, seed=i).square().sum() for i, s in ((0, 1 / 2), (1, 9 / 4)))
    mean = second if n < 14 else (0.5 * 0.1 * first + 0.5 * second) / 0.55
    torch.testing.assert_close(block.mean_eigenvalue(), mean / 14)
    assert block.numel() == (7 * 14 + 2 * 7**2 if n < 14 else 20 * 14 + 3 * 14**2)


def test_tiny_damping_keeps_its_digits_on_the_kernel_side():
    """Rows of condition 1e5, λ of 1e-12: against 60 digits."""
    n, size = 6, 9
    u, v = torch.linalg.qr(randn(n, n))[0], torch.linalg.qr(randn(size, n, seed=1))[0]
    rows = u @ torch.diag(torch.logspace(0, -5, n, dtype=torch.float64)) @ v.T
    residual, parameter = randn(n, seed=2), nn.Parameter(torch.zeros(size).double())
    block = block_of(rows, residual, 1.0, [parameter])
    assert block.refresh(BlockDamping(1e-12, "absolute")) is Remedy.NONE
    (d,), _ = block.precondition([rows.T @ residual])
    with mpmath.workdps(60):
        R = mpmath.matrix(rows.tolist())
        rho = mpmath.matrix(residual.tolist())
        exact = R.T * mpmath.lu_solve(R * R.T + mpmath.mpf(1e-12) * mpmath.eye(n), rho)
        expected = torch.tensor([float(value) for value in exact], dtype=torch.float64)
    assert float((d - expected).norm() / expected.norm()) < 1e-9


def test_fold_says_whether_rows_were_finite():
    block = block_of(randn(7, 14), randn(7), 2.0, [nn.Parameter(randn(14))])
    rows = block._rows
    assert block.fold(2.0, 0.9) is True  # nothing was added
    block.add_rows(torch.full((7, 14), math.inf).double(), randn(7))
    assert block.fold(2.0, 0.9) is False
    assert block._rows is rows


def test_the_mean_eigenvalue_is_that_of_fewer_rows_after_a_batch_of_more():
    block = block_of(randn(20, 14), randn(20), 2.0, [nn.Parameter(randn(14))])
    rows = 3 * randn(7, 14, seed=1)
    block.add_rows(rows, randn(7))
    assert block.fold(4.0, 0.5)
    torch.testing.assert_close(block.mean_eigenvalue(), rows.square().sum() / 4 / 14)


def test_rounding_errors_of_the_gradient_are_not_divided_by_a_small_damping():
    rows, residual = randn(7, 14), randn(7, seed=1)
    block = block_of(rows.float(), residual.float(), 1.0, [nn.Parameter(torch.zeros(14))])
    block.refresh(BlockDamping(1e-6, "absolute"))
    (d,), _ = block.precondition([(rows.T @ residual).float()])
    expected = rows.T @ torch.linalg.solve(rows @ rows.T + 1e-6 * torch.eye(7).double(), residual)
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-4 * float(expected.norm()))


def test_a_singular_matrix_gets_more_damping_until_it_has_a_factor():
    rows = randn(1, 8).expand(4, 8).contiguous()
    block = block_of(rows, randn(4), 1.0, [nn.Parameter(torch.zeros(8).double())])
    assert block.refresh(BlockDamping(0.0)) is Remedy.JITTER
    (d,), _ = block.precondition([rows[0]])
    assert d.isfinite().all()


# -- when there is one ---------------------------------------------------------------------------


def train(net, x, y, steps=3, loss=F.mse_loss, **options):
    optimizer = NaturalGradientOptimizer(net.parameters(), **options)
    for _ in range(steps):
        with optimizer.observe():
            objective = loss(net(x), y)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return optimizer


def kinds(optimizer):
    return {row.block for row in optimizer.coverage().rows}


def test_a_small_model_with_a_large_batch_is_exact_of_itself():
    net = double(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = train(net, randn(300, 2), randn(300, 1))
    assert kinds(optimizer) == {"exact"}


@pytest.mark.parametrize(("sizes", "batch"), [((2, 16, 1), 100), ((64, 256, 10), 256)])
def test_few_rows_or_much_work_leave_the_usual_blocks(sizes, batch):
    a, b, c = sizes
    net = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c))
    optimizer = train(net, randn(batch, a).float(), torch.randn(batch, c))
    assert kinds(optimizer) == {"kronecker"}
    assert "wanted" in optimizer._engine.fisher.exact.refused


def test_without_room_exact_is_refused_with_numbers():
    net = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1))
    with pytest.raises(OptionError, match=r"structure='exact'.*1,002,001 parameters.*GiB"):
        train(net, torch.randn(300, 1000), torch.randn(300, 1), 1, structure="exact")


def test_examples_that_meet_get_the_usual_blocks_and_are_told_why():
    net = double(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = train(net, randn(40, 2), randn(40, 1), structure="exact")
    assert "exact" not in kinds(optimizer)
    assert "depends on several examples" in optimizer.coverage().rows[0].reason
    assert optimizer.report.step == 2


def test_rows_that_are_not_the_gradient_s_are_found_out(monkeypatch):
    rows = Jacobian.rows
    monkeypatch.setattr(Jacobian, "rows", lambda *given: rows(*given).roll(1, 0))
    net = double(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = train(net, randn(40, 2), randn(40, 1), 1, structure="exact")
    assert kinds(optimizer) == {"kronecker"}
    assert "do not add up to the gradient" in optimizer.coverage().rows[0].reason


def test_a_parameter_of_which_no_rows_are_had_has_its_usual_block_beside():
    head, odd = double(nn.Linear(4, 1)), nn.Parameter(randn(3, 4))
    net = nn.Module()
    net.head, net.odd = head, odd
    net.forward = lambda x: head(torch.einsum("ni,io->no", x, odd).tanh())
    optimizer = train(net, randn(40, 3), randn(40, 1), structure="exact")
    assert kinds(optimizer) == {"exact", "kronecker"}
    (row,) = [row for row in optimizer.coverage().rows if row.block == "kronecker"]
    assert "Bmm" in row.reason


def test_gradients_are_the_user_s_own_bit_for_bit():
    net = double(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)))
    x, y = randn(30, 2), randn(30, 1)
    F.mse_loss(net(x), y).backward()
    alone = [p.grad.clone() for p in net.parameters()]
    optimizer = NaturalGradientOptimizer(net.parameters(), structure="exact")
    optimizer.zero_grad()
    with optimizer.observe():
        loss = F.mse_loss(net(x), y)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), alone, strict=True))


def test_a_resumed_run_goes_on_bit_for_bit():
    x, y = randn(30, 2), randn(30, 1).sin()

    def net():
        return double(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))

    whole = net()
    train(whole, x, y, 6, structure="exact")
    half = net()
    first = train(half, x, y, 3, structure="exact")
    second = NaturalGradientOptimizer(half.parameters(), structure="exact")
    second.load_state_dict(first.state_dict())
    assert kinds(second) == {"exact"}
    for _ in range(3):
        with second.observe():
            loss = F.mse_loss(half(x), y)
        second.zero_grad()
        loss.backward()
        second.step()
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


# -- what it achieves ----------------------------------------------------------------------------


def test_the_poisson_equation_is_solved_in_a_few_steps():
    net = double(
        nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    )
    g = torch.Generator().manual_seed(0)
    inside = torch.rand(200, 2, generator=g, dtype=torch.float64)
    edge = torch.rand(80, 2, generator=g, dtype=torch.float64)
    edge[torch.arange(80), torch.arange(80) % 2] = (torch.arange(80) // 2 % 2).double()

    def solution(x):
        return (math.pi * x).sin().prod(1)

    def residual():
        x = inside.clone().requires_grad_()
        (first,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        second = [
            torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)
        ]
        return -sum(second)

    optimizer = NaturalGradientOptimizer(net.parameters())
    for _ in range(90):
        with optimizer.observe():
            loss = F.mse_loss(residual(), 2 * math.pi**2 * solution(inside))
            loss = loss + F.mse_loss(net(edge)[:, 0], solution(edge))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert kinds(optimizer) == {"exact"}
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 30, dtype=torch.float64)] * 2)
    with torch.no_grad():
        error = (net(grid)[:, 0] - solution(grid)).norm() / solution(grid).norm()
    assert error < 1e-3


def test_a_loss_by_hand_has_the_rows_of_its_twin():
    def residuals(net, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return slope.sum(1) - x.detach()[:, 0], net(2 * x.detach()[:7]).squeeze(1)

    def by_hand(inside, edge):
        return inside.square().mean() + 3 * edge.square().sum()

    def known(inside, edge):
        inner, outer = torch.zeros_like(inside), torch.zeros_like(edge)
        return F.mse_loss(inside, inner) + 3 * F.mse_loss(edge, outer, reduction="sum")

    ends = []
    for loss in (by_hand, known):
        net = double(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
        optimizer = NaturalGradientOptimizer(net.parameters(), structure="exact")
        with optimizer.observe():
            value = loss(*residuals(net, randn(40, 3)))
        value.backward()
        optimizer.step()
        assert kinds(optimizer) == {"exact"}
        (block,) = optimizer._engine.fisher.blocks
        ends.append(block)
    ours, theirs = (torch.cat(block._rows) for block in ends)
    torch.testing.assert_close(ours.mT @ ours, theirs.mT @ theirs)


def test_a_loss_that_says_nothing_at_any_output_has_no_rows():
    """Such as one by hand whose every term is masked in one batch."""
    model = double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    optimizer = NaturalGradientOptimizer(model.parameters(), structure="exact")
    for seed, mask in enumerate((1.0, 0.0, 1.0)):
        with optimizer.observe():
            loss = (F.softplus(model(randn(300, 4, seed=seed))) * mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert optimizer.report.step == 2
    assert {row.block for row in optimizer.coverage().rows} == {"exact"}
