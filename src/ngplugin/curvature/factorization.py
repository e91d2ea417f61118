"""What is done where a symmetric matrix cannot be factorized: the remedies, least harm first."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_JITTERS = 5  # from a rounding error of the largest element up to some hundredths of it


class Remedy(enum.IntEnum):
    """What it took to invert a block."""

    NONE = 0
    FLOAT64 = 1  #: the same in double precision
    JITTER = 2  #: more damping
    OLD_INVERSE = 3  #: it stays; further products are with the last one
    DIAGONAL = 4  #: there was none: the diagonal of each matrix stands for it


def factorized(
    compute: Callable[[Tensor, Tensor], _T | None], X: Tensor, damping: Tensor
) -> tuple[_T | None, Remedy]:
    """The first of several tries that succeeds: as it is, in float64, with more damping.

    Args:
        compute: of the matrices and what is added to their diagonals. It fails by returning None
            or by a RuntimeError, as torch's factorizations do.
        X: positive semi-definite but for rounding, `[group, d, d]`.
        damping: `[group, 1, 1]`.

    Returns:
        None if none did.
    """
    for remedy, matrix, added in _tries(X, damping):
        try:
            found = compute(matrix, added)
        except RuntimeError:
            continue
        if found is not None:
            return found, remedy
    return None, Remedy.JITTER


def _tries(X: Tensor, damping: Tensor) -> Iterator[tuple[Remedy, Tensor, Tensor]]:
    yield Remedy.NONE, X, damping
    # On the CPU because not every device knows float64.
    double, damping = X.cpu().double(), damping.cpu().double()
    yield Remedy.FLOAT64, double, damping
    largest = double.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    largest = torch.where(largest > 0, largest, largest.amax())
    epsilon = torch.finfo(X.dtype).eps
    for i in range(_JITTERS):
        yield Remedy.JITTER, double, damping + epsilon ** (1 - i / _JITTERS) * largest


def eigh(X: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Remedy]:
    """Eigenvalues `[group, d]`, ascending, and eigenvectors as columns `[group, d, d]`.

    More on the diagonal leaves the eigenvectors as they are and is taken off the eigenvalues.

    Returns:
        None if it fails whatever is tried, as it does for a matrix with elements that are no
        numbers.
    """

    def compute(M: Tensor, added: Tensor) -> tuple[Tensor, Tensor] | None:
        values, vectors = torch.linalg.eigh(M + added * torch.eye(M.shape[-1]).to(M))
        values, vectors = (values - added[:, :, 0]).to(X), vectors.to(X)
        return (values, vectors) if bool(vectors.sum().isfinite()) else None

    if not bool(X.sum().isfinite()):
        return None, Remedy.JITTER
    return factorized(compute, X, X.new_zeros(len(X), 1, 1))
