"""One parameter's part of a step, and making it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Move:
    """One parameter's part of a step: θ ← θ - s · lr · direction."""

    parameter: Tensor
    gradient: Tensor
    natural_gradient: Tensor
    curved: Tensor | None  # F/Σw times the natural gradient, where that came with it
    direction: Tensor  # the natural gradient, and the weight decay's part
    lr: float
    decay: float


def move(moves: Sequence[Move], scale: float) -> None:
    """Make `scale` of a step."""
    for m in moves:
        m.parameter.add_(m.direction, alpha=-m.lr * scale)


def restore(moves: Sequence[Move], before: Sequence[Tensor]) -> None:
    """Put the parameters back to what they were, bit for bit."""
    for m, old in zip(moves, before, strict=True):
        m.parameter.copy_(old)
