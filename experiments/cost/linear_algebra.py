"""What a refresh, a statistic and a preconditioned gradient could be made of, by size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.cost.timing import medians
from ngplugin.curvature.products import multiplies_bfloat16, quick_float32

SIZES = (64, 128, 256, 512, 1024, 2048)
STACKED = (16, 32, 64, 128, 256)  # sizes of matrices that could be done in one call
COUNT = 8  # matrices of a stack
ROWS = (128, 512, 4096)  # of a statistic
LARGEST_EMULATED = 256  # product of bfloat16 where the hardware has none: they take seconds
COLUMNS = 128  # solved for without an inverse, beside d of them
MORE = (0, 1, 16)  # inputs: none, a bias, and as many as keep a multiple of 16
DTYPES = {"float32": torch.float32, "float64": torch.float64}

#: What everything is divided by.
PRODUCT = "product"

_DAMPING = 0.1  # in units of the mean eigenvalue, the default of ngplugin

Runs = dict[str, Callable[[], Any]]


def measure(quick: bool) -> dict[str, Any]:
    """Seconds of everything, by dtype and size, and how exact the iterations are."""
    sizes = SIZES[:2] if quick else SIZES
    stacked = STACKED[:2] if quick else STACKED
    seconds = 0.2 if quick else 3.0
    torch.manual_seed(0)
    times: dict[str, dict[str, dict[str, float]]] = {}
    stacks: dict[str, dict[str, dict[str, float]]] = {}
    inputs: dict[str, dict[str, dict[str, float]]] = {}
    residuals: dict[str, dict[str, dict[str, float]]] = {}
    for name, dtype in DTYPES.items():
        for d in sizes:
            problem = Problem.of(d, dtype)
            times.setdefault(name, {})[str(d)] = medians(_runs(problem), seconds)
            inputs.setdefault(name, {})[str(d)] = medians(_inputs(problem), seconds / 3)
            residuals.setdefault(name, {})[str(d)] = problem.residuals()
        for d in stacked:
            stacks.setdefault(name, {})[str(d)] = medians(_stacked(d, dtype), seconds / 3)
    bfloat16 = multiplies_bfloat16(torch.device("cpu"))
    return {
        "bfloat16": bfloat16,
        "times": times,
        "inputs": inputs,
        "stacks": stacks,
        "residuals": residuals,
    }


@dataclass(frozen=True)
class Problem:
    """A damped factor as it is at a refresh, and what is left of the one before.

    The average has meanwhile moved as one with a decay of 0.95 does by four batches of 128 rows.
    The variance of the rows falls as 1/k along random directions.

    Attributes:
        matrix: to be inverted, `[d, d]`.
        inverse: of the last refresh.
        basis: the eigenvectors of the last refresh, the largest eigenvalue's first: so each sweep
            of orthogonal iteration takes a column of what the ones before it have left.
        gradient: to be preconditioned, `[d, d]`.
    """

    matrix: Tensor
    inverse: Tensor
    basis: Tensor
    gradient: Tensor

    @staticmethod
    def of(d: int, dtype: torch.dtype) -> Problem:
        """A random one, made in float64."""
        deviations = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
        directions, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))

        def second_moment(rows: int) -> Tensor:
            X = torch.randn(rows, d, dtype=torch.float64) * deviations @ directions
            return X.mT @ X / rows

        def damped(X: Tensor) -> Tensor:
            return X + _DAMPING * X.diagonal().mean() * torch.eye(d, dtype=X.dtype)

        kept = 0.95**4
        before = second_moment(4 * d)
        now = kept * before + (1 - kept) * second_moment(512)
        before = damped(before)
        basis = torch.linalg.eigh(before).eigenvectors.flip(1).contiguous()
        found = damped(now), torch.linalg.inv(before), basis, torch.randn(d, d)
        return Problem(*(t.to(dtype) for t in found))

    @property
    def square(self) -> tuple[Tensor, Tensor]:
        """The matrix and the old inverse."""
        return self.matrix, self.inverse

    def residuals(self) -> dict[str, float]:
        """‖I - M X‖ / √d of each way to X = M⁻¹; of a basis, the share of M off its diagonal."""
        M, d = self.matrix.double(), len(self.matrix)

        def off(X: Tensor) -> float:
            return float((torch.eye(d, dtype=M.dtype) - M @ X.double()).norm() / d**0.5)

        def off_diagonal(U: Tensor) -> float:
            turned = U.double().mT @ M @ U.double()
            return float((turned - turned.diagonal().diag()).norm() / turned.norm())

        return {
            "the old inverse": off(self.inverse),
            "Newton-Schulz, one turn": off(newton_schulz(self.matrix, self.inverse, 1)),
            "Newton-Schulz, two turns": off(newton_schulz(self.matrix, self.inverse, 2)),
            "Cholesky": off(inverse_by_cholesky(self.matrix)),
            "the old basis": off_diagonal(self.basis),
            "orthogonal iteration, QR": off_diagonal(by_qr(self.matrix, self.basis)),
            "orthogonal iteration, Cholesky-QR": off_diagonal(
                by_cholesky_qr(self.matrix, self.basis)
            ),
        }


# -- the alternatives ----------------------------------------------------------------------------


def inverse_by_cholesky(M: Tensor) -> Tensor:
    """M⁻¹ of a positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(M).L)


def newton_schulz(M: Tensor, X: Tensor, turns: int) -> Tensor:
    """X ← X (2 I - M X), which squares the residual I - M X each turn (Schulz 1933)."""
    for _ in range(turns):
        X = torch.addmm(X, X, M @ X, beta=2, alpha=-1)
    return X


def by_qr(M: Tensor, U: Tensor) -> Tensor:
    """One sweep of orthogonal iteration: an orthogonal basis of M U."""
    return torch.linalg.qr(M @ U).Q


def by_cholesky_qr(M: Tensor, U: Tensor) -> Tensor:
    """The same with R of (M U)ᵀ(M U) = RᵀR; orthogonal as far as its condition lets it be."""
    Y = M @ U
    R = torch.linalg.cholesky_ex(Y.mT @ Y, upper=True).L
    return torch.linalg.solve_triangular(R, Y, upper=True, left=False)


def solve(M: Tensor, B: Tensor) -> Tensor:
    """M⁻¹ B by two triangular systems, without an inverse."""
    L = torch.linalg.cholesky_ex(M).L
    Y = torch.linalg.solve_triangular(L, B, upper=False)
    return torch.linalg.solve_triangular(L.mT, Y, upper=True)


def _quick(run: Callable[[], Any]) -> Callable[[], Any]:
    """By oneDNN, as second moments are taken; operands may be rounded to bfloat16."""

    def through_onednn() -> Any:
        with quick_float32():
            return run()

    return through_onednn


def _runs(problem: Problem) -> Runs:
    M, X, U, V = problem.matrix, problem.inverse, problem.basis, problem.gradient
    few = V[:, :COLUMNS].contiguous()
    runs: Runs = {
        PRODUCT: lambda: M @ V,
        "cholesky_ex": lambda: torch.linalg.cholesky_ex(M),
        "cholesky_ex, cholesky_inverse": lambda: inverse_by_cholesky(M),
        f"cholesky_ex, triangular solves of {COLUMNS} columns": lambda: solve(M, few),
        "cholesky_ex, triangular solves of d columns": lambda: solve(M, V),
        "inv_ex": lambda: torch.linalg.inv_ex(M),
        "eigh": lambda: torch.linalg.eigh(M),
        "eigvalsh": lambda: torch.linalg.eigvalsh(M),
        "orthogonal iteration, QR": lambda: by_qr(M, U),
        "orthogonal iteration, Cholesky-QR": lambda: by_cholesky_qr(M, U),
        "Newton-Schulz, two turns": lambda: newton_schulz(M, X, 2),
        "G⁻¹ V A⁻¹": lambda: X @ V @ X,
    }
    if M.dtype == torch.float32:
        runs |= dict(_in_less_precision(M, X, V))
    for n in ROWS:
        runs |= dict(_second_moments(torch.randn(n, len(M), dtype=M.dtype)))
    return runs


def _inputs(problem: Problem) -> Runs:
    """A of so many inputs more, as a bias makes one; G and the outputs as they are."""
    runs: Runs = {}
    d, dtype = len(problem.matrix), problem.matrix.dtype
    for more in MORE:
        wide = torch.randn(d, d + more, dtype=dtype)
        M, X = (torch.block_diag(t, torch.eye(more, dtype=dtype)) for t in problem.square)
        runs |= {
            f"{PRODUCT}, d + {more}": lambda V=wide, X=X: V @ X,
            f"G⁻¹ V A⁻¹, d + {more}": lambda V=wide, X=X: problem.inverse @ V @ X,
            f"cholesky_ex, cholesky_inverse, d + {more}": lambda M=M: inverse_by_cholesky(M),
        }
    return runs


def _in_less_precision(M: Tensor, X: Tensor, V: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    half, low = M.bfloat16(), X.bfloat16()
    columns = V.bfloat16()

    def preconditioned() -> Tensor:
        return (low @ V.bfloat16() @ low).float()

    yield f"{PRODUCT} by oneDNN", _quick(lambda: M @ V)
    yield "float32 to bfloat16", lambda: M.bfloat16()
    yield "bfloat16 to float32", lambda: half.float()
    yield "Newton-Schulz, two turns, by oneDNN", _quick(lambda: newton_schulz(M, X, 2))
    yield "G⁻¹ V A⁻¹ by oneDNN", _quick(lambda: X @ V @ X)
    if multiplies_bfloat16(M.device) or len(M) <= LARGEST_EMULATED:
        yield f"{PRODUCT} of bfloat16", lambda: half @ columns
        yield "G⁻¹ V A⁻¹ of bfloat16, converted there and back", preconditioned


def _second_moments(rows: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """XᵀX by itself, and added to a running average in the same call or in another."""
    n, d = rows.shape
    average = torch.zeros(d, d, dtype=rows.dtype)

    def added() -> None:
        average.mul_(0.95).add_(rows.mT @ rows, alpha=0.05)

    def in_one_call() -> None:
        torch.addmm(average, rows.mT, rows, beta=0.95, alpha=0.05, out=average)

    ways: Runs = {"": lambda: rows.mT @ rows, ", then averaged": added, ", addmm": in_one_call}
    for way, run in ways.items():
        yield f"XᵀX of {n} rows{way}", run
        if rows.dtype == torch.float32:
            yield f"XᵀX of {n} rows{way}, by oneDNN", _quick(run)


def _stacked(d: int, dtype: torch.dtype) -> Runs:
    """One call for a stack of matrices, and one call for each."""
    M = torch.stack([Problem.of(d, dtype).matrix for _ in range(COUNT)])
    L = torch.linalg.cholesky_ex(M).L
    V = torch.randn_like(M)
    runs: Runs = {}

    def both(name: str, stack: Tensor, run: Callable[[Tensor], Any]) -> None:
        runs[f"{name}, one call"] = lambda: run(stack)
        runs[f"{name}, {COUNT} calls"] = lambda: [run(x) for x in stack.unbind()]

    both("cholesky_ex", M, torch.linalg.cholesky_ex)
    both("cholesky_inverse", L, torch.cholesky_inverse)
    both("eigh", M, torch.linalg.eigh)
    runs["matmul, one call"] = lambda: M @ V
    runs[f"matmul, {COUNT} calls"] = lambda: [
        x @ y for x, y in zip(M.unbind(), V.unbind(), strict=True)
    ]
    return runs
