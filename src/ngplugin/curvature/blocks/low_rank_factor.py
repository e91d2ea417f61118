"""A factor of a Kronecker product by its leading eigenvectors, the rest a multiple of I."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplugin.curvature.blocks.block import finite
from ngplugin.curvature.blocks.factor import DenseFactor, DiagonalFactor, Factor
from ngplugin.curvature.blocks.symmetric import eigenvalues, is_diagonal, mean_eigenvalue
from ngplugin.curvature.factorization import Remedy, factorized

_FIRST_SWEEPS = 3  # of the iteration from random vectors; from those of the last refresh, one


@dataclass(frozen=True)
class LowRankFactor(Factor):
    """X ≈ Q T Qᵀ + τ (I - Q Qᵀ), with Q `[group, d, r]` orthonormal; `matrix` is T `[group, r, r]`.

    Its inverse, damped, and a product with it take 4 d r multiplications a column and not d²:

        (X + a)⁻¹ = (I - Q K Qᵀ) / (τ + a),   K = I - (τ + a) (T + a)⁻¹

    Source: Puiu 2022, Randomized K-FACs (arXiv:2206.15397), for a low rank and the reason why it is
    enough: a running average over batches has a spectrum that decays.

    Attributes:
        basis: Q.
        rest: τ, the mean of the other eigenvalues, `[group, 1, 1]`.
        taken_off: K.
        size: d, without what was padded.
    """

    basis: Tensor
    rest: Tensor
    taken_off: Tensor
    size: int

    def times(self, M: Tensor) -> Tensor:
        """X M."""
        within = self._beside_rest(self.basis.mT @ M)
        return torch.baddbmm(self.rest * M, self.basis, within)

    def solve(self, M: Tensor) -> Tensor:
        """(X + damping)⁻¹ M."""
        within = self.taken_off @ (self.basis.mT @ M)
        return torch.baddbmm(M, self.basis, within, alpha=-1).div_(self.rest + self.damping)

    def times_right(self, M: Tensor) -> Tensor:
        """M X."""
        within = self._beside_rest((M @ self.basis).mT).mT
        return torch.baddbmm(self.rest * M, within, self.basis.mT)

    def solve_right(self, M: Tensor) -> Tensor:
        """M (X + damping)⁻¹."""
        within = (M @ self.basis) @ self.taken_off
        return torch.baddbmm(M, within, self.basis.mT, alpha=-1).div_(self.rest + self.damping)

    def padded(self, size: int) -> LowRankFactor:
        """With rows of zeros below Q."""
        return replace(self, basis=F.pad(self.basis, (0, 0, 0, size - self.basis.shape[1])))

    def _beside_rest(self, within: Tensor) -> Tensor:
        """(T - τ) z, for z `[group, r, n]`."""
        return self.matrix @ within - self.rest * within

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Of T, and τ as often as there are others."""
        found = torch.cat([eigenvalues(self.matrix), self.rest[:, 0]], 1)
        times = torch.ones_like(found[0])
        times[-1] = self.size - self.matrix.shape[-1]
        return found, times

    def named(self, name: str) -> dict[str, Tensor]:
        """Also the others."""
        return {
            **super().named(name),
            f"{name}_basis": self.basis,
            f"{name}_rest": self.rest,
            f"{name}_taken_off": self.taken_off,
        }


def low_rank_factor(
    X: Tensor, damping: Tensor, rank: int, start: Tensor | None
) -> tuple[Factor | None, Remedy]:
    """Find the leading eigenvectors by orthogonal iteration, and by `factorized` if that fails.

    Only the space that they span is wanted, not each of them: one sweep from that of the last
    refresh, since when the average has changed little, is enough.

    Args:
        X: the factors, `[group, d, d]`.
        damping: to be added to their diagonals, `[group, 1, 1]`.
        rank: r < d.
        start: Q of the last refresh, if there was one.

    Returns:
        None if that fails too.

    Source: Golub & Van Loan 2013, Matrix Computations, §8.2.4 (orthogonal iteration).
    """
    sweeps = 1
    if start is None or start.shape[-1] != rank:
        sweeps = _FIRST_SWEEPS
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(X), X.shape[-1], rank, generator=generator).to(X)
    first, size = start, X.shape[-1]

    def compute(M: Tensor, added: Tensor) -> Factor | None:
        Q = first.to(M)
        for _ in range(sweeps):
            Q = torch.linalg.qr(M @ Q)[0]
        T = Q.mT @ (M @ Q)
        T = (T + T.mT) / 2
        rest = (mean_eigenvalue(M) * size - mean_eigenvalue(T) * rank).clamp_min(0) / (size - rank)
        damped = T.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(added.squeeze(-1))
        inverse, failed = torch.linalg.inv_ex(damped)
        if failed.any():
            return None
        K = -(rest + added) * inverse
        K.diagonal(dim1=-2, dim2=-1).add_(1)
        T, added, Q, rest, K = (t.to(X) for t in (T, added, Q, rest, K))
        if not finite(Q, K, 1 / (rest + added)):
            return None
        return LowRankFactor(T, added, Q, rest, K, size)

    return factorized(compute, X, damping)


def read_factor(tensors: Mapping[str, Tensor], name: str, size: int) -> Factor:
    """The factor of this size that was named so; see `Factor.named`."""
    matrix, damping = tensors[name], tensors[f"{name}_damping"]
    if f"{name}_basis" in tensors:
        basis, rest, off = (tensors[f"{name}_{part}"] for part in ("basis", "rest", "taken_off"))
        return LowRankFactor(matrix, damping, basis, rest, off, size)
    if is_diagonal(matrix):
        return DiagonalFactor(matrix, damping, size)
    return DenseFactor(matrix, damping, tensors[f"{name}_inverse"], size)
