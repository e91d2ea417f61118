"""A factor of a Kronecker product, damped and inverted: dense, or a diagonal only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplugin.curvature.blocks.block import finite
from ngplugin.curvature.blocks.symmetric import eigenvalues, is_diagonal
from ngplugin.curvature.factorization import Remedy, factorized
from ngplugin.curvature.products import Products, inverse_dtype, multiply


@dataclass(frozen=True)
class Factor(ABC):
    """One symmetric factor X of each group, as of a refresh.

    Attributes:
        matrix: X undamped, `[group, d, d]`, or its diagonal, `[group, d]`, or what a subclass says.
        damping: what is added to its diagonal, `[group, 1, 1]`.
    """

    matrix: Tensor
    damping: Tensor

    @property
    def computed(self) -> torch.dtype:
        """In what products are computed."""
        return self.matrix.dtype

    @abstractmethod
    def times(self, M: Tensor) -> Tensor:
        """X M, undamped, for M `[group, d, n]`."""

    @abstractmethod
    def solve(self, M: Tensor) -> Tensor:
        """(X + damping)⁻¹ M."""

    @abstractmethod
    def times_right(self, M: Tensor) -> Tensor:
        """M X, undamped, for M `[group, n, d]`."""

    @abstractmethod
    def solve_right(self, M: Tensor) -> Tensor:
        """M (X + damping)⁻¹."""

    @abstractmethod
    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Those of X, `[group, n]`, and how often each counts, `[n]`."""

    @abstractmethod
    def padded(self, size: int) -> Factor:
        """The same for matrices to which rows or columns of zeros were added, up to `size`."""

    def named(self, name: str) -> dict[str, Tensor]:
        """The tensors under names beginning with `name`, for `read_factor`."""
        return {name: self.matrix, f"{name}_damping": self.damping}


@dataclass(frozen=True)
class DenseFactor(Factor):
    """A whole matrix.

    Attributes:
        inverse: of the damped matrix.
        size: d, without what was padded.
    """

    inverse: Tensor
    size: int

    @property
    def computed(self) -> torch.dtype:
        """In that of the inverse."""
        return self.inverse.dtype

    def times(self, M: Tensor) -> Tensor:
        """X M."""
        return multiply(self.matrix, M, self.computed)

    def solve(self, M: Tensor) -> Tensor:
        """(X + damping)⁻¹ M."""
        return multiply(self.inverse, M, self.computed)

    def times_right(self, M: Tensor) -> Tensor:
        """M X; X being symmetric, without writing out a transpose."""
        return multiply(M, self.matrix, self.computed)

    def solve_right(self, M: Tensor) -> Tensor:
        """M (X + damping)⁻¹."""
        return multiply(M, self.inverse, self.computed)

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """By a factorization."""
        found = eigenvalues(self.matrix[:, : self.size, : self.size])
        return found, torch.ones_like(found[0])

    def padded(self, size: int) -> DenseFactor:
        """With zeros all around."""
        more = (0, size - self.size, 0, size - self.size)
        return replace(self, matrix=F.pad(self.matrix, more), inverse=F.pad(self.inverse, more))

    def named(self, name: str) -> dict[str, Tensor]:
        """The inverse too."""
        return {**super().named(name), f"{name}_inverse": self.inverse}


@dataclass(frozen=True)
class DiagonalFactor(Factor):
    """A diagonal, all that a side has room for that is too large.

    Attributes:
        size: d, without what was padded.
    """

    size: int

    def times(self, M: Tensor) -> Tensor:
        """X M."""
        return self.matrix[:, :, None] * M

    def solve(self, M: Tensor) -> Tensor:
        """(X + damping)⁻¹ M; what the prediction does not depend on (0/0) does not move."""
        damped = self.matrix[:, :, None] + self.damping
        return torch.where(damped > 0, M / damped, 0.0)

    def times_right(self, M: Tensor) -> Tensor:
        """M X."""
        return self.times(M.mT).mT

    def solve_right(self, M: Tensor) -> Tensor:
        """M (X + damping)⁻¹."""
        return self.solve(M.mT).mT

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """The diagonal."""
        diagonal = self.matrix[:, : self.size]
        return diagonal, torch.ones_like(diagonal[0])

    def padded(self, size: int) -> DiagonalFactor:
        """With zeros behind."""
        return replace(self, matrix=F.pad(self.matrix, (0, size - self.size)))


def damped_factor(
    matrix: Tensor, damping: Tensor, products: Products = "full"
) -> tuple[Factor | None, Remedy]:
    """Invert by Cholesky, and by `factorized` if that fails.

    Args:
        matrix: the factors, `[group, d, d]`, or their diagonals `[group, d]`.
        damping: to be added to the diagonals, `[group, 1, 1]`.
        products: in what they are to be multiplied.

    Returns:
        None if that fails too; of a diagonal it cannot.
    """
    if is_diagonal(matrix):
        return DiagonalFactor(matrix, damping, matrix.shape[-1]), Remedy.NONE

    def compute(X: Tensor, added: Tensor) -> Factor | None:
        damped = X.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(added.squeeze(-1))
        root, failed = torch.linalg.cholesky_ex(damped)
        if failed.any():  # the inverse of a factor with a zero on its diagonal would raise
            return None
        inverse = torch.cholesky_inverse(root).to(matrix)
        if not finite(inverse):
            return None
        # Row by row in memory, as products want it; LAPACK leaves it the other way round.
        inverse = inverse.to(inverse_dtype(matrix, products)).contiguous()
        return DenseFactor(matrix, added.to(matrix), inverse, matrix.shape[-1])

    return factorized(compute, matrix, damping)
