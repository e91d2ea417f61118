"""Exponential average of a tensor, without the bias towards its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RunningAverage:
    """S_t = β S_{t-1} + (1 - β) x_t, read as S_t / (1 - βᵗ).

    After one value the average is that value; after few it is nearly their plain mean. The weight
    1 - βᵗ is itself averaged, so β may change and values may be skipped.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0
        self._squares = 0.0  # sum of the squared weights of the values

    @property
    def sum(self) -> Tensor:
        """Σ of the values by their weights, itself."""
        assert self._sum is not None
        return self._sum

    @property
    def weight(self) -> float:
        """Σ of the weights: the average is `sum / weight`."""
        return self._weight

    def __bool__(self) -> bool:
        """Whether there is any value yet."""
        return self._weight > 0

    def update(self, value: Tensor, decay: float) -> None:
        """Fold `value` in, keeping `decay` of the old average."""
        if self._sum is None:
            self._sum = torch.zeros_like(value)
        self._sum.mul_(decay).add_(value, alpha=1 - decay)
        self._weight = decay * self._weight + (1 - decay)
        self._squares = decay**2 * self._squares + (1 - decay) ** 2

    def replace(self, value: Tensor, like: RunningAverage) -> None:
        """Become `value`, with the memory of another average: as if made of its statistics."""
        self._sum = value * like._weight
        self._weight, self._squares = like._weight, like._squares

    @property
    def effective_count(self) -> float:
        """How many equally weighted values would vary as little: (Σ w)²/Σ w²."""
        return self._weight**2 / self._squares if self._squares else 0.0

    @property
    def value(self) -> Tensor:
        """The average, a new tensor."""
        assert self._sum is not None
        return self._sum / self._weight

    def numel(self) -> int:
        """How many numbers are kept."""
        return 0 if self._sum is None else self._sum.numel()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {"sum": self._sum, "weight": self._weight, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Take over a saved average, on the device of `like`."""
        saved = state["sum"]
        self._sum = None if saved is None else saved.to(like.device, copy=True)
        self._weight = float(state["weight"])
        self._squares = float(state["squares"])
