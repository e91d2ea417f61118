"""A factor of a Kronecker product, damped and inverted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ngplugin.curvature.blocks.block import finite


@dataclass(frozen=True)
class DampedFactor:
    """One Kronecker factor as of a refresh.

    Attributes:
        matrix: undamped, `[group, d, d]`.
        damping: what is added to its diagonal, `[group, 1, 1]`.
        inverse: of the damped matrix.
    """

    matrix: Tensor
    damping: Tensor
    inverse: Tensor

    @staticmethod
    def of(matrix: Tensor, damping: Tensor) -> DampedFactor | None:
        """Invert by Cholesky, in float64 if the first try fails; None if that fails too."""
        damped = matrix.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping.squeeze(-1))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed.any():  # once more, on the CPU because not every device knows float64
            factor, failed = torch.linalg.cholesky_ex(damped.cpu().double())
            if failed.any():  # the inverse of a factor with a zero on its diagonal would raise
                return None
        inverse = torch.cholesky_inverse(factor).to(matrix)
        return DampedFactor(matrix, damping, inverse) if finite(inverse) else None


def mean_eigenvalue(M: Tensor) -> Tensor:
    """tr M / d of each matrix, `[group, 1, 1]`."""
    return M.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
