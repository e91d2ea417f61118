"""Factorizations that fail, made to: each remedy in its turn, counted, and never an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.blocks import BlockDamping, ExactBlock
from ngplugin.curvature.factorization import Remedy, eigh, factorized
from ngplugin.tracking.metrics import metrics
from tests.oracle import flat, generator

FACTORIZATIONS = ("cholesky_ex", "inv_ex", "qr", "eigh", "eigvalsh")
Fails = Callable[[Tensor], bool]


def make_fail(monkeypatch: pytest.MonkeyPatch, fails: Fails, names: Any = FACTORIZATIONS) -> None:
    """Have torch's factorizations fail of some matrices, each in its own way."""

    def failing(name: str, real: Any) -> Any:
        def factorization(X: Tensor, **settings: Any) -> Any:
            if not fails(X):
                return real(X, **settings)
            if not name.endswith("_ex"):
                raise torch.linalg.LinAlgError(f"linalg.{name}: made to fail")
            return torch.full_like(X, torch.nan), torch.ones(X.shape[:-2], dtype=torch.int32)

        return factorization

    for name in names:
        monkeypatch.setattr(torch.linalg, name, failing(name, getattr(torch.linalg, name)))


class Times:
    """Fails so many times."""

    def __init__(self, left: float) -> None:
        self.left = left

    def __call__(self, X: Tensor) -> bool:
        self.left -= 1
        return self.left >= 0


always: Fails = lambda X: True  # noqa: E731


# -- the tries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fails", range(8))
def test_tries_are_as_it_is_in_float64_and_with_more_and_more_damping(fails, dtype):
    X, damping = 4 * torch.eye(3, dtype=dtype)[None], torch.full((1, 1, 1), 0.5, dtype=dtype)
    seen: list[tuple[torch.dtype, float]] = []

    def compute(matrix: Tensor, added: Tensor) -> str | None:
        seen.append((matrix.dtype, added.item() - 0.5))
        return None if len(seen) <= fails else "found"

    found, remedy = factorized(compute, X, damping)
    assert found == (None if fails == 7 else "found")
    assert remedy is [Remedy.NONE, Remedy.FLOAT64, *[Remedy.JITTER] * 6][fails]
    epsilon = torch.finfo(dtype).eps
    jitters = [4 * epsilon ** (1 - i / 5) for i in range(5)]
    assert [d for d, _ in seen] == [dtype, *[torch.float64] * 6][: fails + 1]
    assert [a for _, a in seen] == pytest.approx([0, 0, *jitters][: fails + 1], abs=1e-16)
    assert jitters[-1] < 0.05 * 4


def test_a_group_of_zeros_is_jittered_as_the_largest_is():
    X = torch.stack([torch.zeros(2, 2), 3 * torch.eye(2)]).double()
    last: list[Tensor] = []
    factorized(lambda _, added: last.append(added), X, torch.zeros(2, 1, 1).double())
    assert last[-1][0] == last[-1][1] > 0


def test_each_matrix_of_a_group_is_jittered_by_its_own_size():
    X = torch.stack([1e-3 * torch.eye(2), 3 * torch.eye(2)]).double()
    last: list[Tensor] = []
    factorized(lambda _, added: last.append(added), X, torch.zeros(2, 1, 1).double())
    assert float(last[-1][1] / last[-1][0]) == pytest.approx(3000)


@pytest.mark.parametrize("fails", [0, 1, 2, 4])
def test_eigenvectors_are_the_same_whatever_it_took(fails, monkeypatch):
    X = torch.randn(2, 5, 5, generator=generator(0)).double()
    X = X @ X.mT
    values, vectors = torch.linalg.eigh(X)
    make_fail(monkeypatch, Times(fails), ["eigh"])
    found, remedy = eigh(X)
    assert found is not None
    assert remedy == min(fails, 2)
    torch.testing.assert_close(found[0], values)
    torch.testing.assert_close(found[1].abs(), vectors.abs())


def test_eigenvectors_that_are_no_numbers_are_not_taken(monkeypatch):
    real, X = torch.linalg.eigh, torch.diag(torch.tensor([1.0, 2.0]))[None]

    def eigh_without_vectors(M: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = real(M)
        return values, vectors * (torch.nan if M.dtype is torch.float32 else 1.0)

    monkeypatch.setattr(torch.linalg, "eigh", eigh_without_vectors)
    found, remedy = eigh(X)
    assert remedy is Remedy.FLOAT64
    assert found is not None
    torch.testing.assert_close(found[1].abs(), torch.eye(2)[None])


def test_of_no_numbers_there_are_no_eigenvectors():
    assert eigh(torch.full((1, 2, 2), torch.nan))[0] is None


# -- blocks --------------------------------------------------------------------------------------

X = torch.randn(64, 10, generator=generator(1))
Y = (X[:, 0] * X[:, 1] > 0).long()
WIDE = 160  # a factor so large is kept by its leading eigenvectors
STRUCTURES: dict[str, dict[str, Any]] = {
    "kronecker": {"structure": "kronecker", "overhead": 1e9},
    "low rank": {"structure": "kronecker", "overhead": 0.0},
    "eigen": {"structure": "eigen"},
    "exact, rows": {"structure": "exact"},
    "exact, dense": {"structure": "exact"},
    "matrix-free": {"structure": "matrix-free"},
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


class Run:
    """A network with a normalization, and its optimizer."""

    def __init__(self, structure: str, **options: Any) -> None:
        torch.manual_seed(0)
        width = {"low rank": WIDE, "exact, dense": 2}.get(structure, 12)
        self.model = nn.Sequential(
            nn.Linear(10, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 2)
        )
        if structure.startswith("exact"):
            del self.model[1]
        options = {**STRUCTURES[structure], "refresh_every": 1, **options}
        self.optimizer = NaturalGradientOptimizer(self.model.parameters(), **options)

    def step(self) -> float:
        with self.optimizer.observe():
            loss = F.cross_entropy(self.model(X), Y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.report = self.optimizer.report
        assert flat([*self.model.parameters()]).isfinite().all()
        assert self.report.kl is None or self.report.kl <= self.report.kl_radius * (1 + 1e-6)
        return loss.item()

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    @property
    def blocks(self) -> Any:
        return self.optimizer._engine.fisher.blocks


@every_structure
@pytest.mark.parametrize("at", [0, 3])
def test_training_goes_on_while_every_factorization_fails(structure, at, monkeypatch):
    run = Run(structure)
    run.steps(at)
    with monkeypatch.context() as patch:
        make_fail(patch, always)
        losses, reports = [], []
        for _ in range(4):
            losses.append(run.step())
            reports.append(run.report)
        diagonal = not at or "exact" in structure  # an exact block has no old inverse of a batch
        worst = Remedy.DIAGONAL if diagonal else Remedy.OLD_INVERSE
        assert max(report.remedy for report in reports) == worst
        logged = metrics(next(report for report in reports if report.remedy))
        assert logged["natgrad/remedy"] == worst
        assert logged["natgrad/failed_factorizations"] >= len(run.blocks)
        assert ("diagonal only" in str(run.optimizer.coverage())) == diagonal
    later = run.steps(16)
    assert later[-1] < 0.9 * losses[0]
    assert (run.report.remedy, run.report.failed_factorizations) == (0, 0)
    assert "diagonal only" not in str(run.optimizer.coverage())


@every_structure
def test_a_factorization_that_fails_once_is_done_in_float64(structure, monkeypatch):
    """Which changes next to nothing, and is no failure."""
    run, usual = Run(structure), Run(structure)
    before = flat([*run.model.parameters()])
    for each in (run, usual):
        each.step()
    name = {"eigen": "eigh", "low rank": "inv_ex"}.get(structure, "cholesky_ex")
    make_fail(monkeypatch, Times(1), [name])
    for each in (run, usual):
        each.step()
    assert (run.report.remedy, run.report.failed_factorizations) == (Remedy.FLOAT64, 0)
    moved, usually = (flat([*each.model.parameters()]) - before for each in (run, usual))
    assert (moved - usually).norm() < 0.02 * usually.norm()


@every_structure
def test_one_that_fails_in_either_precision_gets_more_damping(structure, monkeypatch):
    run = Run(structure)
    run.steps(2)
    name = {"eigen": "eigh", "low rank": "inv_ex"}.get(structure, "cholesky_ex")
    make_fail(monkeypatch, Times(2), [name])
    run.step()
    assert (run.report.remedy, run.report.failed_factorizations) == (Remedy.JITTER, 1)


@pytest.mark.parametrize("structure", ["kronecker", "eigen"])
def test_a_block_that_always_fails_leaves_the_others_alone(structure, monkeypatch):
    run = Run(structure)
    run.steps(3)
    first, others = run.blocks[0], run.blocks[1:]
    before = [block._refreshed for block in run.blocks]
    make_fail(monkeypatch, lambda X: X.shape[-1] == 11)  # inputs and bias of the first layer
    losses = run.steps(6)
    assert (run.report.remedy, run.report.failed_factorizations) == (Remedy.OLD_INVERSE, 1)
    old = before[0]["U_A" if structure == "eigen" else "A_inverse"]
    assert first._refreshed["U_A" if structure == "eigen" else "A_inverse"] is old
    for block, of_before in zip(others, before[1:], strict=True):
        assert block._refreshed is not of_before
    assert losses[-1] < losses[0]


def test_without_an_inverse_of_before_the_diagonals_of_the_factors_stand_for_them(monkeypatch):
    run = Run("kronecker", damping=0.3, sampling_damping=0.0, refresh_every=1000)
    make_fail(monkeypatch, always)
    run.step()
    block = run.blocks[0]
    A, G = block.averaged_factors()
    a, g = A[0].diagonal(), G[0].diagonal()
    a, g = a + 0.3 * a.mean(), g + 0.3 * g.mean()
    W, b = torch.randn(12, 10, generator=generator(2)), torch.randn(12, generator=generator(3))
    (direction, offset), _ = block.precondition([W, b])
    torch.testing.assert_close(direction, W / (g[:, None] * a[:10]))
    torch.testing.assert_close(offset, b / (g * a[10]))


def test_eigenvectors_come_after_axes_and_keep_what_was_measured_along_them(monkeypatch):
    """M is carried from the axes to the first real basis as it is from one basis to the next."""
    run = Run("eigen", statistics_every=1000)
    with monkeypatch.context() as patch:
        make_fail(patch, always)
        run.step()
    block = run.blocks[0]
    old = block.average("M")
    block.refresh(BlockDamping(0.1))
    U_A, U_G = block._bases()
    kept = torch.einsum("gij,goi,gop->gpj", U_A.square(), old, U_G.square())
    torch.testing.assert_close(block.average("M"), kept)


@pytest.mark.parametrize("n", [5, 20])
def test_an_exact_block_has_the_diagonal_of_its_matrix_at_worst(n, monkeypatch):
    block = ExactBlock([nn.Parameter(torch.zeros(9).double())])
    rows, residual = torch.randn(n, 9, generator=generator(4)).double(), torch.randn(n).double()
    block.add_rows(rows, residual)
    block.fold(1.0, 0.9)
    make_fail(monkeypatch, always)
    assert block.refresh(BlockDamping(0.01, "absolute")) is Remedy.DIAGONAL
    (d,), _ = block.precondition([rows.T @ residual])
    if n < 9:
        expected = rows.T @ (residual / ((rows @ rows.T).diagonal() + 0.01))
    else:
        expected = (rows.T @ residual) / ((rows.T @ rows).diagonal() + 0.01)
    torch.testing.assert_close(d, expected)


# -- likelihoods ---------------------------------------------------------------------------------


def test_a_loss_whose_hessian_cannot_be_factorized_has_its_diagonal(monkeypatch):
    """A loss that is not recognised, whose Hessian is over several outputs at once."""
    torch.manual_seed(0)
    model = nn.Linear(10, 3)
    optimizer = NaturalGradientOptimizer(model.parameters(), structure="kronecker")

    def loss() -> Tensor:
        z = model(X)
        return ((z.sum(1) - 1).square() + z.square().sum(1).cosh()).mean()

    make_fail(monkeypatch, always, ["eigh"])
    losses = []
    for _ in range(8):
        with optimizer.observe():
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
