"""One parameter's part of a step, and making it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Move:
    """One parameter's part of a step: θ ← θ - s · (lr · share · vector + decay · θ).

    Attributes:
        parameter: θ.
        vector: its part of the natural gradient, in whatever units.
        share: what makes it as long as it is to be, beside those of other blocks.
        lr: the step's upper limit.
        decay: the share of θ that a full step takes away.
    """

    parameter: Tensor
    vector: Tensor
    share: float
    lr: float
    decay: float

    @property
    def direction(self) -> Tensor:
        """Δ/-lr, a new tensor; θ being where it was when the step was proposed."""
        d = self.vector * self.share
        return d.add_(self.parameter, alpha=self.decay / self.lr) if self.decay else d


def move(moves: Sequence[Move], scale: float) -> None:
    """Make `scale` of a step."""
    for m in moves:
        if m.decay:
            m.parameter.mul_(1 - scale * m.decay)
        m.parameter.add_(m.vector, alpha=-m.lr * scale * m.share)


def restore(moves: Sequence[Move], before: Sequence[Tensor]) -> None:
    """Put the parameters back to what they were, bit for bit."""
    for m, old in zip(moves, before, strict=True):
        m.parameter.copy_(old)
