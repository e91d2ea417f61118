"""What blocks have in common that keep running averages of a few named tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import Block, BlockDamping, curvature_dtype, finite
from ngplugin.curvature.ranks import mean_over_ranks


class AveragedBlock(Block):
    """A block whose statistic is a few named tensors, each kept as a running average.

    A subclass adds tensors up as scores arrive (`_add`), says which statistic they make
    (`_statistic`), how large F is by the averages (`_scale`), and inverts them into more named
    tensors (`_invert`), from which it forms products. The rest is here: dropping, folding,
    growing, saving.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        self._dtype = curvature_dtype(self.parameters[0])
        self._added: dict[str, Tensor] = {}
        self._averages: dict[str, RunningAverage] = {}
        self._refreshed: dict[str, Tensor] = {}  # as of the last refresh
        self._refreshed_scale: Tensor | None = None
        self._growth: float | Tensor = 1.0  # the scale now, over that of the last refresh

    @abstractmethod
    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """What is to be folded into the averages of the same names."""

    @abstractmethod
    def _scale(self) -> Tensor:
        """The mean eigenvalue by the averages, one for each part that may grow by itself."""

    @abstractmethod
    def _invert(self, damping: BlockDamping) -> dict[str, Tensor] | None:
        """The tensors that products are formed with; None if a factorization failed."""

    def _add(self, name: str, value: Tensor) -> None:
        """Add to the sum of this name; the value may be kept."""
        if name in self._added:
            self._added[name].add_(value)
        else:
            self._added[name] = value

    def average(self, name: str) -> Tensor:
        """The present average of this name, a new tensor."""
        return self._averages[name].value

    def effective_count(self, name: str) -> float:
        """How many equally weighted statistics would vary as little as this average."""
        return self._averages[name].effective_count

    def discard(self) -> None:
        """Forget what was added and not folded."""
        self._added = {}

    def fold(self, total_weight: float, decay: float) -> bool:
        """Fold the statistic into the averages."""
        added, self._added = self._added, {}
        if not added:
            return True
        statistic = self._statistic(added, total_weight)
        statistic = {name: mean_over_ranks(value) for name, value in statistic.items()}
        if not finite(*statistic.values()):
            return False
        for name, value in statistic.items():
            self._averages.setdefault(name, RunningAverage()).update(value, decay)
        if self._refreshed_scale is not None:
            then = self._refreshed_scale
            self._growth = torch.where(then > 0, self._scale() / then, 1.0)
        return True

    @property
    def ready(self) -> bool:
        """Whether there is an average to refresh from."""
        return bool(self._averages)

    @property
    def inverted(self) -> bool:
        """Whether a refresh has succeeded."""
        return bool(self._refreshed)

    def mean_eigenvalue(self) -> Tensor:
        """The mean of the scales."""
        return self._scale().mean()

    def refresh(self, damping: BlockDamping) -> bool:
        """Invert the damped averages, as the block's class says."""
        refreshed = self._invert(damping)
        if refreshed is None:
            return False
        self._refreshed, self._refreshed_scale = refreshed, self._scale()
        self._growth = 1.0
        return True

    def numel(self) -> int:
        """Averages, and what the last refresh made of them."""
        averages = sum(average.numel() for average in self._averages.values())
        return averages + sum(t.numel() for t in self._refreshed.values())

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the tensors of the last refresh."""
        return {
            "kind": type(self).kind,
            "layout": self.layout(),
            "averages": {name: average.state_dict() for name, average in self._averages.items()},
            "refreshed": dict(self._refreshed),
            "refreshed_scale": self._refreshed_scale,
            "growth": self._growth,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        device = self.parameters[0].device

        def moved(t: Any) -> Any:
            return t.to(device, copy=True) if isinstance(t, Tensor) else t

        self._averages = {name: RunningAverage() for name in state["averages"]}
        for name, average in self._averages.items():
            average.load_state_dict(state["averages"][name], self.parameters[0])
        self._refreshed = {name: moved(t) for name, t in state["refreshed"].items()}
        self._refreshed_scale = moved(state["refreshed_scale"])
        self._growth = moved(state["growth"])
