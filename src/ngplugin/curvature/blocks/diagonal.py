"""The diagonal block: one Fisher entry an element, for parameters that no known map uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import (
    Block,
    BlockDamping,
    as_parameter,
    as_real,
    curvature_dtype,
    finite,
)


class DiagonalBlock(Block):
    """diag(F)/Σw of one parameter; a complex one is its real and imaginary parts.

    With independent scores of mean zero, the gradient g of their weighted sum has covariance F, so
    g² is an unbiased estimate of diag(F): no per-example gradients are needed.

    Args:
        parameter: the parameter.
        empirical: the scores will be gradients of the data's own labels, so that this is the
            empirical Fisher; it only changes the block's name.
    """

    kind = "diagonal"

    def __init__(self, parameter: Tensor, empirical: bool = False) -> None:
        self.parameters = (parameter,)
        self.empirical = empirical
        if empirical:
            self.kind = "empirical diagonal"
        self._dtype = curvature_dtype(parameter)
        self._added: Tensor | None = None
        self._average = RunningAverage()
        self._fisher: Tensor | None = None  # as of the last refresh
        self._damping: Tensor | None = None  # a scalar
        self._growth: float | Tensor = 1.0  # tr F now, over that of the last refresh

    def add_gradient_score(self, score: Tensor, share: float) -> None:
        """Add `share` of g², with g = d(Σ √w s)/d(parameter)."""
        squared = as_real(score).to(self._dtype).square().mul_(share)
        self._added = squared if self._added is None else self._added.add_(squared)

    def discard(self) -> None:
        """Forget what was added and not folded."""
        self._added = None

    def fold(self, total_weight: float, decay: float) -> bool:
        """Fold g²/Σw into the average."""
        added, self._added = self._added, None
        if added is None:
            return True
        added = added / total_weight
        if not finite(added):
            return False
        self._average.update(added, decay)
        if self._fisher is not None:
            now, then = self._average.value.sum(), self._fisher.sum()
            self._growth = torch.where(then > 0, now / then, 1.0)
        return True

    @property
    def ready(self) -> bool:
        """Whether there is an average to refresh from."""
        return bool(self._average)

    @property
    def inverted(self) -> bool:
        """Whether there was a refresh."""
        return self._fisher is not None

    def mean_eigenvalue(self) -> Tensor:
        """The mean of the diagonal."""
        return self._average.value.mean()

    def refresh(self, damping: BlockDamping) -> bool:
        """Take over the average, and damp it.

        `"relative"`: (λ + γ/n) max(mean(diag F), floor), with n the number of statistics in the
        average: the square of a single draw is near zero by chance for many an element, which must
        not be taken for a flat direction. `"absolute"`: λ.
        """
        self._fisher = self._average.value
        if damping.mode == "relative":
            n = max(1.0, self._average.effective_count)
            unit = self._fisher.mean().clamp_min(damping.floor)
            self._damping = (damping.value + damping.sampling / n) * unit
        else:
            self._damping = damping.value * self._fisher.new_ones(())
        self._growth = 1.0
        return True

    def precondition(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """g / (diag F + λ), and diag(F) times it."""
        (g,) = gradients
        assert self._fisher is not None
        assert self._damping is not None
        denominator = self._fisher + self._damping
        # A parameter that the prediction does not depend on (0/0) does not move.
        direction = torch.where(denominator > 0, as_real(g).to(self._dtype) / denominator, 0.0)
        product = self._fisher * self._growth * direction
        return [as_parameter(direction, g)], [as_parameter(product, g)]

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """diag(F) v."""
        assert self._fisher is not None
        (v,) = vectors
        return [as_parameter(self._fisher * self._growth * as_real(v).to(self._dtype), v)]

    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Smallest and largest element, without and with damping."""
        assert self._fisher is not None
        assert self._damping is not None
        low, high = self._fisher.min(), self._fisher.max()
        return low, high, low + self._damping, high + self._damping

    def numel(self) -> int:
        """Average and diagonal."""
        return 2 * as_real(self.parameters[0]).numel()

    def state_dict(self) -> dict[str, Any]:
        """The average, and the diagonal and damping as of the last refresh."""
        return {
            "kind": self.kind,
            "empirical": self.empirical,
            "average": self._average.state_dict(),
            "fisher": self._fisher,
            "damping": self._damping,
            "growth": self._growth,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        like = self.parameters[0]
        self._average.load_state_dict(state["average"], like)
        for name in ("fisher", "damping", "growth"):
            saved = state[name]
            moved = saved.to(like.device, copy=True) if isinstance(saved, Tensor) else saved
            setattr(self, f"_{name}", moved)
