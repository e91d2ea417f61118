"""Factors by their leading eigenvectors: what they stand for, how they are found, and when."""

import copy

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.blocks import BlockDamping, KroneckerBlock
from ngplugin.curvature.blocks.factor import damped_factor
from ngplugin.curvature.blocks.low_rank_factor import LowRankFactor, low_rank_factor, read_factor
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.taps import read_map_call
from tests.oracle import double, flat, observe, randn

F = torch.nn.functional


def spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues, `[1, d, d]`, and its eigenvectors."""
    U = torch.linalg.qr(randn(len(values), len(values), seed=seed))[0]
    return (U * torch.as_tensor(values).double()) @ U.T[None], U


def low_rank(*arguments, remedy=Remedy.NONE):
    factor, taken = low_rank_factor(*arguments)
    assert taken is remedy
    return factor


def whole(*arguments):
    return damped_factor(*arguments)[0]


def dense(factor: LowRankFactor):
    """Q T Qᵀ + τ (I - Q Qᵀ), written out."""
    Q, T, rest = factor.basis, factor.matrix, factor.rest
    return Q @ T @ Q.mT + rest * (torch.eye(Q.shape[1]).double() - Q @ Q.mT)


A = torch.full((1, 1, 1), 0.3).double()


def test_a_matrix_of_low_rank_beside_a_multiple_of_the_identity_is_kept_whole():
    X, U = spectrum([50.0, 20, 7, *[0.5] * 37])
    factor, exact = low_rank(X, A, 3, U[None, :, :3]), whole(X, A)
    torch.testing.assert_close(dense(factor), X)
    torch.testing.assert_close(factor.rest.squeeze(), torch.tensor(0.5).double())
    M = randn(1, 40, 6)
    for ours, theirs in (
        (factor.solve(M), exact.solve(M)),
        (factor.times(M), exact.times(M)),
        (factor.solve_right(M.mT), exact.solve_right(M.mT)),
        (factor.times_right(M.mT), exact.times_right(M.mT)),
    ):
        torch.testing.assert_close(ours, theirs)
    values, times = factor.eigenvalues()
    assert values.tolist() == [pytest.approx([7.0, 20, 50, 0.5])]
    assert times.tolist() == [1, 1, 1, 37]


@pytest.mark.parametrize("groups", [1, 3])
def test_products_are_those_of_the_matrix_that_it_stands_for(groups):
    X = torch.cat([spectrum(torch.logspace(2, -3, 30), seed=i)[0] for i in range(groups)])
    factor = low_rank(X, A.expand(groups, 1, 1), 8, None)
    stands_for = dense(factor)
    damped = stands_for + 0.3 * torch.eye(30).double()
    M = randn(groups, 30, 5)
    torch.testing.assert_close(factor.solve(M), torch.linalg.solve(damped, M))
    torch.testing.assert_close(factor.times(M), stands_for @ M)
    torch.testing.assert_close(factor.solve_right(M.mT), torch.linalg.solve(damped, M).mT)
    torch.testing.assert_close(factor.times_right(M.mT), M.mT @ stands_for)
    torch.testing.assert_close(
        stands_for.diagonal(dim1=-2, dim2=-1).sum(-1), X.diagonal(dim1=-2, dim2=-1).sum(-1)
    )
    values, times = factor.eigenvalues()
    for found, exact in zip(values, torch.linalg.eigvalsh(stands_for), strict=True):
        torch.testing.assert_close(found.repeat_interleave(times.long()).sort()[0], exact)


def test_padding_adds_rows_that_stay_zero():
    X, _ = spectrum(torch.logspace(2, -3, 30))
    for factor in (low_rank(X, A, 8, None), whole(X, A), whole(X[0], A)):
        M = randn(1, 30, 5)
        wide = torch.cat([M, torch.zeros(1, 2, 5).double()], 1)
        padded = factor.padded(32)
        for ours, theirs in (
            (padded.solve(wide), factor.solve(M)),
            (padded.times(wide), factor.times(M)),
            (padded.solve_right(wide.mT).mT, factor.solve_right(M.mT).mT),
            (padded.times_right(wide.mT).mT, factor.times_right(M.mT).mT),
        ):
            torch.testing.assert_close(ours[:, :30], theirs)
            assert not ours[:, 30:].any()
        torch.testing.assert_close(padded.eigenvalues(), factor.eigenvalues())
        again = read_factor(padded.named("A"), "A", 30)
        assert type(again) is type(factor)
        assert torch.equal(again.solve(wide), padded.solve(wide))
        torch.testing.assert_close(again.eigenvalues(), factor.eigenvalues())


def test_one_sweep_follows_a_matrix_that_changes_a_little():
    X, _ = spectrum(torch.logspace(2, -3, 60))
    start = low_rank(X, A, 10, None).basis
    X = 0.9 * X + 0.1 * spectrum(torch.logspace(2, -3, 60), seed=1)[0]
    best = torch.linalg.eigvalsh(X)[0, -10:].sum()
    seen = low_rank(X, A, 10, start).matrix.diagonal(dim1=-2, dim2=-1).sum()
    assert 0.98 * best < seen <= best * (1 + 1e-9)
    cold = torch.linalg.qr(randn(1, 60, 10, seed=9))[0]  # as many sweeps from anywhere
    assert low_rank(X, A, 10, cold).matrix.diagonal(dim1=-2, dim2=-1).sum() < seen


def test_a_singular_one_without_damping_gets_some():
    values = torch.tensor([3.0, 1.0, *[0.0] * 18]).double()
    X, axes, none = values.diag()[None], torch.eye(20).double()[None, :, :2], torch.zeros(1, 1, 1)
    factor = low_rank(X, none.double(), 2, axes, remedy=Remedy.JITTER)
    assert 0 < factor.damping.item() < 1e-12
    solved = factor.solve(torch.ones(1, 20, 1).double())[0, :2, 0]  # the others by next to nothing
    torch.testing.assert_close(solved, 1 / values[:2])
    assert low_rank(X, A, 2, axes) is not None


def test_one_of_zeros_without_damping_has_no_inverse():
    axes, none = torch.eye(20).double()[None, :, :2], torch.zeros(1, 1, 1).double()
    assert low_rank(torch.zeros(1, 20, 20).double(), none, 2, axes, remedy=Remedy.JITTER) is None


def test_random_vectors_to_begin_with_are_not_of_the_program_s_own_generator():
    X, _ = spectrum([50.0, 20, 7, *[0.5] * 37])
    before = torch.get_rng_state()
    one, other = (low_rank(X, A, 3, None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.basis, other.basis)


# -- blocks that have such factors ----------------------------------------------------------------


def seen(inputs=200, outputs=150, rows=40, bias=True):
    layer = double(nn.Linear(inputs, outputs, bias=bias))
    x = randn(rows, inputs, seed=1) * torch.logspace(1, -2, inputs).double()
    fisher, _ = observe([*layer.parameters()], lambda: F.mse_loss(layer(x), randn(rows, outputs)))
    (block,) = fisher.blocks
    return block


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", [(200, 150), (150, 200), (200, 20), (20, 200)])
@pytest.mark.parametrize("value", [0.01, 1.0])
def test_a_block_solves_with_the_factors_that_it_keeps(sides, bias, value):
    block = seen(*sides, bias=bias)
    assert block.refresh(BlockDamping(value, share=0.15)) is Remedy.NONE
    sizes = {"A": sides[0] + bias, "G": sides[1]}
    kept, damped = {}, {}
    for name, size in sizes.items():
        factor = read_factor(block._refreshed, name, size)
        assert isinstance(factor, LowRankFactor) == (size > 128)
        whole = dense(factor) if isinstance(factor, LowRankFactor) else factor.matrix
        kept[name] = whole[0, :size, :size]
        damped[name] = kept[name] + factor.damping[0] * torch.eye(size).double()
    g = [randn(*p.shape, seed=i) for i, p in enumerate(block.parameters)]
    direction, product = block.precondition(g)

    def matrix(parts):
        return torch.cat([parts[0], *(part[:, None] for part in parts[1:])], 1)

    V = torch.linalg.solve(damped["G"], torch.linalg.solve(damped["A"], matrix(g).T).T)
    torch.testing.assert_close(matrix(direction), V)
    torch.testing.assert_close(matrix(product), kept["G"] @ V @ kept["A"])
    torch.testing.assert_close(matrix(block.product(direction)), kept["G"] @ V @ kept["A"])
    only, nothing = block.precondition(g, curved=False)
    assert nothing == []
    assert torch.equal(flat(only), flat(direction))


@pytest.mark.parametrize(
    ("rows", "overhead", "ranks"),
    [
        (40, 0.15, (32, 32)),  # no room: the lowest rank
        (240, 0.125, (45, 45)),  # as many as there is room for
        (400, 0.15, (64, None)),  # 3 · 0.15 · 400 = 180
        (400, 0.2, (None, None)),  # 240
        (40, 1e9, (None, None)),
        (10_000, 0.0, (32, 32)),
    ],
)
def test_which_factors_are_whole_follows_from_the_rows_of_a_step(rows, overhead, ranks):
    block = seen(rows=rows)
    assert block.rows == rows  # whatever the statistics were of
    block.refresh(BlockDamping(0.1, share=overhead))
    for name, rank in zip("AG", ranks, strict=True):
        basis = block._refreshed.get(f"{name}_basis")
        assert (None if basis is None else basis.shape[-1]) == rank


def test_rows_are_those_of_all_calls_of_a_step_in_each_group():
    conv = double(nn.Conv2d(4, 6, 3, groups=2))
    x = randn(5, 4, 6, 6)
    fisher, _ = observe([*conv.parameters()], lambda: (conv(x) + conv(2 * x)).square().mean())
    (block,) = fisher.blocks
    assert isinstance(block, KroneckerBlock)
    assert block.rows == 2 * 5 * 16


def test_a_small_factor_is_whole_whatever_the_rows():
    block = seen(127, 128, rows=2)
    block.refresh(BlockDamping(0.1, share=0.0))
    assert not any("basis" in name for name in block._refreshed)


# -- training with them ---------------------------------------------------------------------------


def trained(steps, state=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 200), nn.Tanh(), nn.Linear(200, 4))
    optimizer = NaturalGradientOptimizer(model.parameters(), **options)
    first = 0
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
        first = state[2]
    losses = []
    for i in range(first, steps):
        x = randn(30, 150, seed=i % 7).float()
        with optimizer.observe():
            loss = F.cross_entropy(model(x), (x.sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def test_they_learn_as_whole_ones_do():
    ends = [trained(40, overhead=overhead)[2][-1] for overhead in (0.0, 1e9)]
    assert ends[0] < 0.05
    assert ends[1] < 0.05


@pytest.mark.parametrize("at", [3, 24, 29])  # among the first steps, and in the middle of turns
def test_a_resumed_run_goes_on_bit_for_bit(at):
    whole, _, _ = trained(50)
    model, optimizer, _ = trained(at)
    again, _, _ = trained(50, (model.state_dict(), optimizer.state_dict(), at))
    assert torch.equal(flat([*again.parameters()]), flat([*whole.parameters()]))


def test_a_block_that_was_never_seen_has_no_rows_of_its_own():
    fisher = Fisher()
    assert fisher.due(0, 20, 5) is None  # all of none
    assert list(fisher.due(25, 20, 5)) == []


def test_the_coverage_table_says_which_factors_they_are():
    _, optimizer, _ = trained(1)
    first = optimizer.coverage().rows[0]
    assert "inputs 151 by 32 eigenvectors; outputs 200 by 32 eigenvectors" in first.reason


def test_gradients_in_half_precision_meet_factors_in_single():
    block = KroneckerBlock(nn.Parameter(torch.randn(150, 200).bfloat16()), None, 1)
    x, score = randn(40, 200).float().bfloat16(), randn(40, 150, seed=1).bfloat16()
    block.add_map_score(read_map_call(F.linear, (x, *block.parameters), {}), score, 1.0)
    assert block.fold(1.0, 0.0)
    assert block.refresh(BlockDamping(0.1, share=0.15)) is Remedy.NONE
    assert all(isinstance(factor, LowRankFactor) for factor in block.factors)
    (d,), (product,) = block.precondition([torch.randn(150, 200).bfloat16()])
    assert d.dtype == product.dtype == torch.bfloat16
    assert d.isfinite().all()
