"""A factor of a Kronecker product, damped and inverted: dense, or a diagonal only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplugin.curvature.blocks.block import finite


@dataclass(frozen=True)
class Factor(ABC):
    """One symmetric factor X of each group, as of a refresh.

    Attributes:
        matrix: X undamped, `[group, d, d]`, or its diagonal, `[group, d]`.
        damping: what is added to its diagonal, `[group, 1, 1]`.
    """

    matrix: Tensor
    damping: Tensor

    @abstractmethod
    def times(self, M: Tensor) -> Tensor:
        """X M, undamped, for M `[group, d, n]`."""

    @abstractmethod
    def solve(self, M: Tensor) -> Tensor:
        """(X + damping)⁻¹ M."""

    @abstractmethod
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest eigenvalue of X, `[group]`."""

    def named(self, name: str) -> dict[str, Tensor]:
        """The tensors under names beginning with `name`, for `read_factor`."""
        return {name: self.matrix, f"{name}_damping": self.damping}


@dataclass(frozen=True)
class DenseFactor(Factor):
    """A whole matrix.

    Attributes:
        inverse: of the damped matrix.
    """

    inverse: Tensor

    def times(self, M: Tensor) -> Tensor:
        """X M."""
        return self.matrix @ M

    def solve(self, M: Tensor) -> Tensor:
        """(X + damping)⁻¹ M."""
        return self.inverse @ M

    def extremes(self) -> tuple[Tensor, Tensor]:
        """By a factorization."""
        # Rounding may leave a tiny negative eigenvalue of a positive semi-definite matrix.
        eigenvalues = torch.linalg.eigvalsh(self.matrix).clamp_min(0)  # ascending
        return eigenvalues[:, 0], eigenvalues[:, -1]

    def named(self, name: str) -> dict[str, Tensor]:
        """The inverse too."""
        return {**super().named(name), f"{name}_inverse": self.inverse}


@dataclass(frozen=True)
class DiagonalFactor(Factor):
    """A diagonal, all that a side has room for that is too large."""

    def times(self, M: Tensor) -> Tensor:
        """X M."""
        return self.matrix[:, :, None] * M

    def solve(self, M: Tensor) -> Tensor:
        """(X + damping)⁻¹ M; what the prediction does not depend on (0/0) does not move."""
        damped = self.matrix[:, :, None] + self.damping
        return torch.where(damped > 0, M / damped, 0.0)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The diagonal's."""
        return self.matrix.amin(1), self.matrix.amax(1)


def damped_factor(matrix: Tensor, damping: Tensor) -> Factor | None:
    """Invert by Cholesky, in float64 if the first try fails; None if that fails too."""
    if is_diagonal(matrix):
        return DiagonalFactor(matrix, damping)
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.squeeze(-1))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():  # once more, on the CPU because not every device knows float64
        factor, failed = torch.linalg.cholesky_ex(damped.cpu().double())
        if failed.any():  # the inverse of a factor with a zero on its diagonal would raise
            return None
    inverse = torch.cholesky_inverse(factor).to(matrix)
    return DenseFactor(matrix, damping, inverse) if finite(inverse) else None


def read_factor(tensors: Mapping[str, Tensor], name: str) -> Factor:
    """The factor that was named so; see `Factor.named`."""
    matrix, damping = tensors[name], tensors[f"{name}_damping"]
    if is_diagonal(matrix):
        return DiagonalFactor(matrix, damping)
    return DenseFactor(matrix, damping, tensors[f"{name}_inverse"])


def is_diagonal(M: Tensor) -> bool:
    """Whether `M` is the diagonals of its matrices, `[group, d]`."""
    return M.dim() == 2


def second_moment(rows: Tensor, diagonal: bool) -> Tensor:
    """Σ_r x_r x_rᵀ of rows `[group, rows, d]`, or its diagonal."""
    return rows.square().sum(1) if diagonal else rows.mT @ rows


def mean_eigenvalue(M: Tensor) -> Tensor:
    """tr M / d of each matrix, `[group, 1, 1]`."""
    diagonal = M if is_diagonal(M) else M.diagonal(dim1=-2, dim2=-1)
    return diagonal.mean(-1)[:, None, None]
