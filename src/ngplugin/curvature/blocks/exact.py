"""The exact block: F of all its parameters together, from the rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import Block, BlockDamping, finite
from ngplugin.curvature.blocks.symmetric import eigenvalues
from ngplugin.curvature.factorization import Remedy, factorized
from ngplugin.curvature.spectrum import Spectrum, spectrum

_TILE = 128  # rows of a product of which only the lower triangle is wanted
_ROUNDING = 1e-10  # a share of the gradient below this is no more than rounding


class ExactBlock(Block):
    """F/Σw = R̃ᵀR̃ of several parameters, nothing between them left out.

    A row of R̃ is a column of √(w H) times a term's Jacobian, over √Σw; the batch has n rows and
    the block P parameters. What is inverted is the smaller of two matrices:

    *kernel*, n < P: K = R̃R̃ᵀ, of this batch alone. The gradient of the scored losses is a
    combination of the rows, g = R̃ᵀρ, so that

        (R̃ᵀR̃ + λ)⁻¹ g = R̃ᵀ (K + λ)⁻¹ ρ

    has no difference of nearly equal vectors over a small λ, unlike Woodbury's formula; that one
    serves only for the part of a gradient that comes from elsewhere. One round of refinement with
    R̃ itself makes good what K, whose condition is that of R̃ squared, lost to rounding.

    *dense*, n ≥ P: a running average of R̃ᵀR̃.

    Momentum is in what the damping draws the step to (SPRING): not to zero, but to a share μ of the
    last step p,

        d = argmin ½‖R̃d - ρ‖² + ½λ‖d - μp‖² = μp + (R̃ᵀR̃ + λ)⁻¹ (g - R̃ᵀR̃ μp),

    so that directions with little curvature, which λ holds back in any one step, are gone on with
    over several. What is carried over does not get shorter as λ grows, so a step that failed is to
    be tried again with μ = 0.

    Source: the push-through identity in the kernel form of natural gradient: arXiv:2505.12149;
    momentum: Goldshlager, Abrahamsen & Lin 2024 (arXiv:2401.10190).

    Attributes:
        momentum: μ, of the next product with the inverse.
        total_weight: Σw of the rows.
    """

    kind = "exact"
    every_step = True

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        self.remainder = 0.0  # share of the last gradient that is no combination of the rows
        self.momentum = 0.0
        self.total_weight = 1.0
        self._last: Tensor | None = None  # p, as a direction
        self._size = sum(p.numel() for p in parameters)
        self._added: list[tuple[Tensor, Tensor]] = []
        self._rows: list[Tensor] = []  # R = √Σw R̃, [n_k, P] each
        self._residual: Tensor | None = None  # of all rows, [n], d(objective) = Rᵀ residual
        self._average = RunningAverage()  # of R̃ᵀR̃, dense side
        self._matrix: Tensor | None = None  # K or F, as of the last refresh
        self._factor: Tensor | None = None  # Cholesky factor of it, damped
        self._damping = 0.0
        self._diagonal = False  # the factor, for want of one of the whole matrix

    @classmethod
    def made(cls, parameters: Sequence[Tensor], layout: dict[str, Any]) -> ExactBlock:
        """A block without rows."""
        return cls(parameters)

    # -- statistics ------------------------------------------------------------------------------

    def add_rows(self, rows: Tensor, residual: Tensor) -> None:
        """Add rows `[n, P]` of R and their coefficients in the gradient, `[n]`."""
        self._added.append((rows, residual.to(rows.dtype)))

    def discard(self) -> None:
        """Forget what was added and not folded."""
        self._added = []

    @property
    def kernel_side(self) -> bool:
        """Whether the batch has fewer rows than the block has parameters."""
        return sum(map(len, self._rows)) < self._size

    def fold(self, total_weight: float, decay: float) -> bool:
        """Take over the rows, and average their matrix if it is the smaller one."""
        added, self._added = self._added, []
        if not added:
            return True
        if not finite(*(rows for rows, _ in added)):
            return False
        self._rows = [rows for rows, _ in added]
        self._residual = torch.cat([residual for _, residual in added])
        self.total_weight = total_weight
        self._matrix = self._factor = None
        if not self.kernel_side:
            rows = torch.cat(self._rows) if len(self._rows) > 1 else self._rows[0]
            self._average.update(gram([rows.mT]).div_(total_weight), decay)
        return True

    @property
    def ready(self) -> bool:
        """Whether there are rows."""
        return bool(self._rows)

    @property
    def inverted(self) -> bool:
        """Whether a refresh has succeeded with the present rows."""
        return self._factor is not None

    def mean_eigenvalue(self) -> Tensor:
        """Σ R̃² / P."""
        if not self.kernel_side and self._average:
            return self._average.value.diagonal().mean()
        squares = torch.stack([torch.linalg.vector_norm(rows).square() for rows in self._rows])
        return squares.sum() / (self.total_weight * self._size)

    def refresh(self, damping: BlockDamping) -> Remedy:
        """Factorize K + λ or F + λ; where nothing helps, the diagonal of either.

        No old inverse is of this batch.
        """
        if self._matrix is None:
            if self.kernel_side:
                self._matrix = gram(self._rows).div_(self.total_weight)
            else:
                self._matrix = self._average.value
        unit = 1.0
        if damping.mode == "relative":
            unit = max(float(self.mean_eigenvalue()), damping.floor)
        matrix = self._matrix

        def compute(X: Tensor, added: Tensor) -> tuple[Tensor, Tensor] | None:
            damped = X[0].clone()
            damped.diagonal().add_(added[0, 0])
            factor, failed = torch.linalg.cholesky_ex(damped)
            return None if failed.any() else (factor.to(matrix), added)

        added = matrix.new_full((1, 1, 1), damping.value * unit)
        found, remedy = factorized(compute, matrix[None], added)
        if found is None:
            diagonal = matrix.diagonal() + added[0, 0]
            found, remedy = (diagonal.sqrt().diag(), added), Remedy.DIAGONAL
        self._factor, self._damping = found[0], float(found[1])
        self._diagonal = remedy is Remedy.DIAGONAL
        return remedy

    # -- products --------------------------------------------------------------------------------

    def precondition(
        self, gradients: Sequence[Tensor], curved: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """D = (F/Σw + λ)⁻¹ g, and F/Σw d."""
        g = self._flat(gradients)
        carried = None
        if self._last is not None and self.momentum > 0:
            carried = self.momentum * self._last
        if self.kernel_side:
            direction = self._kernel_direction(g, carried)
        elif carried is None:
            direction = self._solve(g)
        else:
            direction = carried + self._solve(g - self._F(carried))
        directions = self._parts(direction, gradients)
        return directions, self._parts(self._F(direction), gradients) if curved else []

    def remember(self, direction: Sequence[Tensor]) -> None:
        """Take the step that was made, as a direction, for p."""
        self._last = self._flat(direction)

    def rows_times(self, vectors: Sequence[Tensor]) -> Tensor:
        """R̃ v, `[n]`."""
        return self._R(self._flat(vectors))

    def solve_rows(self, z: Tensor) -> list[Tensor]:
        """(R̃ᵀR̃ + λ)⁻¹ R̃ᵀ z."""
        solved = self._RT(self._solve(z)) if self.kernel_side else self._solve(self._RT(z))
        return self._parts(solved, self.parameters)

    def _kernel_direction(self, g: Tensor, carried: Tensor | None) -> Tensor:
        assert self._residual is not None
        rho = math.sqrt(self.total_weight) * self._residual
        rest = g - self._RT(rho)
        norm, left_over = torch.stack([g.norm(), rest.norm()]).tolist()
        if norm == 0:  # with rows of an earlier batch and a small λ, rounding would not say so
            return torch.zeros_like(g)
        self.remainder = left_over / norm
        if carried is not None:
            rho = rho - self._R(carried)
        z = self._solve(rho)
        if not self._diagonal:
            # K + λ as it acts, and not as it was rounded when K was formed.
            z = z + self._solve(rho - self._R(self._RT(z)) - self._damping * z)
        direction = self._RT(z)
        if self.remainder > _ROUNDING and self._damping > 0:
            direction = direction + (rest - self._RT(self._solve(self._R(rest)))) / self._damping
        return direction if carried is None else direction + carried

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """F/Σw v."""
        return self._parts(self._F(self._flat(vectors)), vectors)

    def _F(self, v: Tensor) -> Tensor:
        if self.kernel_side:
            return self._RT(self._R(v))
        assert self._matrix is not None
        return self._matrix @ v

    def _R(self, v: Tensor) -> Tensor:
        """R̃ v, `[n]`."""
        return torch.cat([rows @ v for rows in self._rows]) / math.sqrt(self.total_weight)

    def _RT(self, z: Tensor) -> Tensor:
        """R̃ᵀ z, `[P]`."""
        result = torch.zeros_like(self._rows[0][0])
        for rows, part in zip(self._rows, z.split([len(r) for r in self._rows]), strict=True):
            result.addmv_(rows.mT, part)
        return result / math.sqrt(self.total_weight)

    def _solve(self, v: Tensor) -> Tensor:
        assert self._factor is not None
        return torch.cholesky_solve(v[:, None], self._factor)[:, 0]

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors]).to(self._rows[0].dtype)

    def _parts(self, vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        parts = vector.split([t.numel() for t in like])
        return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]

    # -- looking at it, saving -------------------------------------------------------------------

    def spectrum(self) -> Spectrum:
        """Of K or F; where n < P, F has zeros too."""
        assert self._matrix is not None
        found = eigenvalues(self._matrix)
        low, high = found[0], found[-1]
        if self.kernel_side:
            low = torch.zeros_like(low)
        extremes = (low, high, low + self._damping, high + self._damping)
        return spectrum(found, extremes, zeros=self._size - len(found))

    def note(self) -> str:
        """Whether there was no other way than to keep a diagonal."""
        return "; its diagonal only, since it could not be factorized" if self._diagonal else ""

    def numel(self) -> int:
        """Rows; matrix and factor; on the dense side the average."""
        n = sum(map(len, self._rows))
        return n * self._size + (2 * n**2 if self.kernel_side else 3 * self._size**2)

    def state_dict(self) -> dict[str, Any]:
        """The average and the last step; rows are of one batch, and come anew with the next."""
        return {
            "kind": self.kind,
            "layout": self.layout(),
            "average": self._average.state_dict(),
            "last": self._last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._average.load_state_dict(state["average"], self.parameters[0])
        last = state.get("last")
        self._last = None if last is None else last.to(self.parameters[0].device, copy=True)


def gram(parts: Sequence[Tensor]) -> Tensor:
    """M Mᵀ of M = the parts one under another; torch has no symmetric product.

    Computed tile by tile up to the diagonal and mirrored, half the multiplications.
    """
    tiles = [tile for part in parts for tile in part.split(_TILE)]
    n = sum(map(len, tiles))
    result = parts[0].new_empty(n, n)
    start = 0
    for tile in tiles:
        stop, left = start + len(tile), 0
        for part in parts:
            if left >= stop:
                break
            width = min(len(part), stop - left)
            result[start:stop, left : left + width] = tile @ part[:width].mT
            left += width
        start = stop
    return result.tril_().add_(result.tril(-1).mT)
