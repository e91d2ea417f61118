"""The unit-wise block: a 2x2 matrix for the scale and the offset of each normalized feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import Block, BlockDamping, curvature_dtype, finite
from ngplugin.curvature.blocks.factor import DampedFactor


class UnitBlock(Block):
    """F/Σw of a scale γ and an offset β, for each feature c a matrix over (γ_c, β_c).

    With independent scores of mean zero, the gradient g of their weighted sum has covariance F, so
    (g_γc, g_βc)(g_γc, g_βc)ᵀ is an unbiased estimate of the matrix, whatever the examples and
    positions that share the feature, and in batch normalization too, where examples meet. It needs
    no normalized input, which could not be had from the output where γ_c = 0.

    A single draw gives a matrix of rank one, which is why the damping counts statistics.

    Source: Osawa et al. 2019 (arXiv:1811.12019) §3.4.
    """

    kind = "unit-wise"

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        self.parameters = (scale, offset)
        self._dtype = curvature_dtype(scale)
        self._added: Tensor | None = None  # [feature, 2, 2]
        self._average = RunningAverage()
        self._refreshed: DampedFactor | None = None
        self._growth: float | Tensor = 1.0  # tr F now, over that of the last refresh

    def add_gradient_scores(self, scores: Sequence[Tensor], share: float) -> None:
        """Add `share` of ggᵀ, with g = d(Σ √w s)/d(scale, offset), one tensor each."""
        g = self._columns(scores)  # [feature, 2, 1]
        outer = (g @ g.mT).mul_(share)
        self._added = outer if self._added is None else self._added.add_(outer)

    def discard(self) -> None:
        """Forget what was added and not folded."""
        self._added = None

    def fold(self, total_weight: float, decay: float) -> bool:
        """Fold ggᵀ/Σw into the average."""
        added, self._added = self._added, None
        if added is None:
            return True
        added = added / total_weight
        if not finite(added):
            return False
        self._average.update(added, decay)
        if self._refreshed is not None:
            now, then = _traces(self._average.value).sum(), _traces(self._refreshed.matrix).sum()
            self._growth = torch.where(then > 0, now / then, 1.0)
        return True

    @property
    def ready(self) -> bool:
        """Whether there is an average to refresh from."""
        return bool(self._average)

    @property
    def inverted(self) -> bool:
        """Whether a refresh has succeeded."""
        return self._refreshed is not None

    def mean_eigenvalue(self) -> Tensor:
        """The mean over all diagonals."""
        return _traces(self._average.value).mean() / 2

    def refresh(self, damping: BlockDamping) -> bool:
        """Damp each feature's matrix and invert it.

        `"relative"`: λ times the mean eigenvalue of all features, or the floor, and to each
        feature's γ 2/n times its own mean eigenvalue, with n the number of statistics in the
        average: what `KroneckerBlock` does with a factor of size 2 and as many rows.
        """
        F = self._average.value
        own = _traces(F)[:, None, None] / 2  # [feature, 1, 1]
        if damping.mode == "relative":
            mean = own.mean().clamp_min(damping.floor)
            n = max(1.0, self._average.effective_count)
            added = damping.value * mean + damping.sampling * 2 / n * own
        else:
            added = torch.full_like(own, damping.value)
        refreshed = DampedFactor.of(F, added)
        if refreshed is None:
            return False
        self._refreshed, self._growth = refreshed, 1.0
        return True

    def precondition(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(F + damping)⁻¹ g feature by feature, and F times it."""
        factor = self._factor()
        direction = factor.inverse @ self._columns(gradients)
        product = self._growth * (factor.matrix @ direction)
        return self._as_parameters(direction, gradients), self._as_parameters(product, gradients)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """F v feature by feature."""
        product = self._growth * (self._factor().matrix @ self._columns(vectors))
        return self._as_parameters(product, vectors)

    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Over all features' matrices."""
        factor = self._factor()
        # Rounding may leave a tiny negative eigenvalue of a positive semi-definite matrix.
        eigenvalues = torch.linalg.eigvalsh(factor.matrix).clamp_min(0)  # [feature, 2]
        damped = eigenvalues + factor.damping.squeeze(-1)
        return eigenvalues.min(), eigenvalues.max(), damped.min(), damped.max()

    def numel(self) -> int:
        """Average, matrix and inverse."""
        return 3 * 4 * self.parameters[0].numel()

    def state_dict(self) -> dict[str, Any]:
        """The average, and matrices, dampings and inverses as of the last refresh."""
        r = self._refreshed
        return {
            "kind": self.kind,
            "average": self._average.state_dict(),
            "refreshed": None if r is None else (r.matrix, r.damping, r.inverse),
            "growth": self._growth,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        device = self.parameters[0].device
        self._average.load_state_dict(state["average"], self.parameters[0])
        self._refreshed = None
        if state["refreshed"] is not None:
            self._refreshed = DampedFactor(*(t.to(device, copy=True) for t in state["refreshed"]))
        growth = state["growth"]
        self._growth = growth.to(device, copy=True) if isinstance(growth, Tensor) else growth

    def _factor(self) -> DampedFactor:
        assert self._refreshed is not None, "refresh() comes first"
        return self._refreshed

    def _columns(self, tensors: Sequence[Tensor]) -> Tensor:
        """Scale and offset to `[feature, 2, 1]`."""
        return torch.stack([t.reshape(-1) for t in tensors], 1)[:, :, None].to(self._dtype)

    @staticmethod
    def _as_parameters(columns: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        return [columns[:, i, 0].reshape(t.shape).to(t.dtype) for i, t in enumerate(like)]


def _traces(M: Tensor) -> Tensor:
    """tr of each matrix, `[feature]`."""
    return M.diagonal(dim1=-2, dim2=-1).sum(-1)
