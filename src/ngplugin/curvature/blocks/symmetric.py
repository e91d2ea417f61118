"""Symmetric matrices, one for each group: `[group, d, d]`, or their diagonals `[group, d]`."""

from __future__ import annotations

import torch
from torch import Tensor

from ngplugin.curvature.products import quick_float32


def is_diagonal(M: Tensor) -> bool:
    """Whether `M` is the diagonals of its matrices, `[group, d]`."""
    return M.dim() == 2


def second_moment(rows: Tensor, diagonal: bool) -> Tensor:
    """Σ_r x_r x_rᵀ of rows `[group, rows, d]`, or its diagonal."""
    if diagonal:
        return rows.square().sum(1)
    with quick_float32():
        return rows.mT @ rows


def eigenvalues(M: Tensor) -> Tensor:
    """Of positive semi-definite `[group, d, d]`, ascending, `[group, d]`; nan where that fails.

    Rounding may leave a tiny negative one, which counts as zero.
    """
    try:
        found: Tensor = torch.linalg.eigvalsh(M)
    except RuntimeError:  # once more, on the CPU because not every device knows float64
        try:
            found = torch.linalg.eigvalsh(M.cpu().double()).to(M)
        except RuntimeError:
            return torch.full_like(M[..., 0], torch.nan)
    return found.clamp_min(0)


def diagonal_of(M: Tensor) -> Tensor:
    """`[group, d]`, a new tensor."""
    return M if is_diagonal(M) else M.diagonal(dim1=-2, dim2=-1).clone()


def mean_eigenvalue(M: Tensor) -> Tensor:
    """tr M / d of each matrix, `[group, 1, 1]`."""
    diagonal = M if is_diagonal(M) else M.diagonal(dim1=-2, dim2=-1)
    return diagonal.mean(-1)[:, None, None]
