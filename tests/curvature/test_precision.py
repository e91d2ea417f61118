"""Products in bfloat16, and statistics of some of the rows: near what they stand for."""

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature import products
from ngplugin.curvature.blocks.factor import damped_factor
from ngplugin.curvature.blocks.symmetric import second_moment
from ngplugin.curvature.products import inverse_dtype, multiply, quick_float32
from ngplugin.curvature.taps import read_map_call

F = torch.nn.functional


@pytest.fixture(name="fast")
def fast_hardware(monkeypatch):
    """Whatever the tests run on."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda device: True)


def spread(size, seed=0):
    """A factor with eigenvalues over four orders of magnitude, mean 1."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(-2, 2, size, dtype=torch.float64)
    return (U * (eigenvalues / eigenvalues.mean())) @ U.T, U


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("size", "dtype", "choice", "kept"),
    [
        (128, torch.float32, "auto", torch.bfloat16),
        (127, torch.float32, "auto", torch.float32),
        (128, torch.float64, "auto", torch.float64),
        (128, torch.float32, "full", torch.float32),
    ],
)
def test_large_float32_factors_are_kept_in_bfloat16_unless_asked_otherwise(
    size, dtype, choice, kept
):
    matrix = torch.eye(size, dtype=dtype)[None]
    assert inverse_dtype(matrix, choice) == kept
    factor, _ = damped_factor(matrix, matrix.new_ones(1, 1, 1), choice)
    assert factor.inverse.dtype == factor.computed == kept
    assert factor.solve(matrix).dtype == dtype


def test_without_the_hardware_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda device: False)
    assert inverse_dtype(torch.eye(256)[None], "auto") == torch.float32


@pytest.mark.usefixtures("fast")
def test_a_direction_in_bfloat16_is_half_a_percent_off():
    A, _ = spread(160)
    M = torch.randn(1, 160, 160, generator=torch.Generator().manual_seed(1))
    damping = torch.full((1, 1, 1), 0.1)
    exact, _ = damped_factor(A.float()[None], damping)
    rounded, _ = damped_factor(A.float()[None], damping, "auto")
    for one, other in (
        (exact.solve(M), rounded.solve(M)),
        (exact.solve_right(M), rounded.solve_right(M)),
        (exact.times(M), rounded.times(M)),
        (exact.times_right(M), rounded.times_right(M)),
    ):
        assert 1e-4 < (one - other).norm() / one.norm() < 5e-3
    torch.testing.assert_close(exact.solve_right(M), exact.solve(M.mT).mT, rtol=1e-3, atol=1e-4)


def test_multiply_gives_back_the_wider_precision():
    X, M = torch.randn(4, 4), torch.randn(4, 4)
    assert multiply(X.bfloat16(), M, torch.bfloat16).dtype == torch.float32
    assert multiply(X.bfloat16(), M.bfloat16(), torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(multiply(X, M, torch.float32), X @ M)


def test_second_moments_stay_positive_semi_definite_and_leave_torch_s_setting():
    rows = torch.randn(1, 300, 200) * torch.logspace(0, 3, 200)
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if backend is None:
        pytest.skip("this torch has no such setting")
    before = backend.fp32_precision
    moment = second_moment(rows, diagonal=False)
    assert backend.fp32_precision == before
    exact = rows.double().mT @ rows.double()
    assert (moment - exact).norm() <= 5e-3 * exact.norm()
    assert (
        torch.linalg.eigvalsh(moment.double()).min() > -1e-5 * moment.diagonal(dim1=1, dim2=2).max()
    )
    with pytest.raises(ZeroDivisionError), quick_float32():
        raise ZeroDivisionError
    assert backend.fp32_precision == before


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("choice", ["auto", "full"])
def test_the_bound_on_the_kl_holds_in_either_precision(choice):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 160), nn.Tanh(), nn.Linear(160, 160), nn.Tanh(),
                          nn.Linear(160, 10))  # fmt: skip
    x, y = torch.randn(64, 20), torch.arange(64) % 10
    optimizer = NaturalGradientOptimizer(model.parameters(), measure_every=1, products=choice)
    losses = []
    for _ in range(15):
        with optimizer.observe():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert optimizer.report.kl <= optimizer.report.kl_radius
        assert optimizer.report.kl > 0
    assert losses[-1] < 0.5 * losses[0]


# -- some rows for all ----------------------------------------------------------------------------


@pytest.mark.parametrize("fewest", [1, 100, 800, 10**9])
def test_some_rows_are_those_of_evenly_spaced_examples(fewest):
    x, weight = torch.randn(64, 3, 8, 8), torch.randn(5, 3, 3, 3, requires_grad=True)
    call = read_map_call(F.conv2d, (x, weight), {"padding": 1})
    score = torch.randn(64, 5, 8, 8)
    a, g, stands_for = call.some_rows(score, fewest)
    every = {1: 8, 100: 8, 800: 5, 10**9: 1}[fewest]  # 8 examples at least
    if fewest == 800:  # of 4,096 rows
        assert len(a[0]) == 13
    torch.testing.assert_close(a, call.input_rows()[:, ::every])
    torch.testing.assert_close(g, call.score_rows(score)[:, ::every])
    assert stands_for == 64 / len(a[0])


def test_a_layer_s_rows_are_thinned_too():
    x, weight = torch.randn(4000, 6), torch.randn(5, 6, requires_grad=True)
    call = read_map_call(F.linear, (x, weight), {})
    a, g, stands_for = call.some_rows(torch.randn(4000, 5), 1000)
    assert a.shape == (1, 1000, 1, 6)
    assert g.shape == (1, 1000, 1, 5)
    assert stands_for == 4


def test_statistics_of_some_rows_are_unbiased():
    """Of the same size as those of all rows, within what sampling makes them vary."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(256, 3, 12, 12)

    def traces():
        optimizer = NaturalGradientOptimizer(model.parameters(), structure="kronecker")
        with optimizer.observe():
            loss = model(x).square().mean() + F.mse_loss(model(x), torch.zeros(256, 4, 12, 12))
        loss.backward()
        optimizer.step()
        (block,) = optimizer._engine.fisher.blocks
        return [X.diagonal(dim1=1, dim2=2).sum().item() for X in block.averaged_factors()]

    some = traces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ngplugin.curvature.blocks.kronecker._FEWEST_ROWS", 10**9)
        every = traces()
    assert some == pytest.approx(every, rel=0.1)
    assert some != every
