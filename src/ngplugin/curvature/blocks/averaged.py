"""What blocks have in common that keep running averages of a few named tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import Block, BlockDamping, curvature_dtype, finite
from ngplugin.curvature.blocks.symmetric import mean_eigenvalue
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.ranks import ranks


class Inversion(NamedTuple):
    """What inverting a block came to.

    Attributes:
        tensors: by name, that products are formed with; empty where those of before stay.
        remedy: what it took.
    """

    tensors: dict[str, Tensor]
    remedy: Remedy = Remedy.NONE


class AveragedBlock(Block):
    """A block whose statistic is a few named tensors, each kept as a running average.

    A subclass adds tensors up as scores arrive (`_add`), says which statistic they make
    (`_statistic`), how large F is by the averages (`scale`), and inverts them into more named
    tensors (`_invert`), from which it forms products. The rest is here: dropping, folding, growing,
    saving.

    Statistics are sums over examples and nothing else, so that those of several processes, or of
    several steps, add up. They are `[group, d, d]`, or `[group, d]` for diagonals, or
    `[group, 1, 1]` for counts.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        self._dtype = curvature_dtype(self.parameters[0])
        self._added: dict[str, Tensor] = {}
        self._averages: dict[str, RunningAverage] = {}
        self._refreshed: dict[str, Tensor] = {}  # as of the last refresh
        self._refreshed_scale: Tensor | None = None
        self._growth: float | Tensor = 1.0  # the scale now, over that of the last refresh
        self._diagonal = False  # for want of a factorization

    @abstractmethod
    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """What is to be folded into the averages of the same names."""

    @abstractmethod
    def scale(self, means: Mapping[str, Tensor]) -> Tensor:
        """The mean eigenvalue of F/Σw, one for each part that may grow by itself.

        Args:
            means: the mean eigenvalue of each average, `[group, 1, 1]`.
        """

    @abstractmethod
    def _invert(self, damping: BlockDamping, diagonal: bool) -> Inversion | None:
        """The tensors that products are formed with; None if a factorization failed.

        Args:
            damping: λ and how to apply it.
            diagonal: of each matrix only its diagonal, for which there is nothing to factorize.
        """

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
        """How many equally weighted statistics would vary as little as this average.

        Of several processes each has its own.
        """
        return self._averages[name].effective_count * ranks()

    def discard(self) -> None:
        """Forget what was added and not folded."""
        self._added = {}

    def fold(self, total_weight: float, decay: float) -> bool:
        """Fold the statistic into the averages."""
        statistic = self.statistic(total_weight)
        if statistic is None:
            return False
        if statistic:
            self.average_in(statistic, decay)
            self.grow(self.means())
        return True

    def statistic(self, total_weight: float) -> dict[str, Tensor] | None:
        """What was added, to be folded; None if it is not finite, empty if there is nothing."""
        added, self._added = self._added, {}
        statistic = self._statistic(added, total_weight) if added else {}
        return statistic if not statistic or finite(*statistic.values()) else None

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """A statistic that says nothing."""
        return torch.zeros(shape, dtype=self._dtype, device=self.parameters[0].device)

    def average_in(self, statistic: Mapping[str, Tensor], decay: float) -> None:
        """Fold a statistic into the averages of the same names."""
        for name, value in statistic.items():
            self._averages.setdefault(name, RunningAverage()).update(value, decay)

    def sums(self) -> list[Tensor]:
        """What the averages are kept in; processes put their mean there."""
        return [average.sum for average in self._averages.values()]

    def memory(self) -> dict[str, float]:
        """The weight that each average rests on."""
        return {name: average.weight for name, average in self._averages.items()}

    def means(self) -> dict[str, Tensor]:
        """The mean eigenvalue of each average, `[group, 1, 1]`."""
        # Of the sums, which are not as large to read as averages are to write out.
        return {name: mean_eigenvalue(a.sum) / a.weight for name, a in self._averages.items()}

    def grow(self, means: Mapping[str, Tensor]) -> None:
        """Scale products with F to what the averages have become since the last refresh."""
        then = self._refreshed_scale
        if then is not None:
            growth = torch.where(then > 0, self.scale(means) / then, 1.0)
            self._growth = growth.clamp_max(torch.finfo(growth.dtype).max)  # for it is saved

    @property
    def growth(self) -> float | Tensor:
        """The mean over parts that may grow by themselves, a scalar."""
        return self._growth.mean() if isinstance(self._growth, Tensor) else self._growth

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
        return self.scale(self.means()).mean()

    def refresh(self, damping: BlockDamping) -> Remedy:
        """Invert the damped averages, as the block's class says."""
        return self.take(self.invert(damping))

    def invert(self, damping: BlockDamping) -> Inversion:
        """The damped averages inverted, for `take`, by whatever remedy it takes."""
        inversion = self._invert(damping, diagonal=False)
        if inversion is not None:
            return inversion
        if self.inverted:
            return Inversion({}, Remedy.OLD_INVERSE)
        inversion = self._invert(damping, diagonal=True)
        assert inversion is not None, "a diagonal has nothing to factorize"
        return inversion._replace(remedy=Remedy.DIAGONAL)

    def take(self, inversion: Inversion) -> Remedy:
        """Form products with what `invert` returned, here or in another process."""
        if inversion.tensors:
            self._refreshed, self._refreshed_scale = inversion.tensors, self.scale(self.means())
            self._growth = 1.0
            self._curvature_share = None
            self._diagonal = inversion.remedy is Remedy.DIAGONAL
        return inversion.remedy

    def note(self) -> str:
        """Whether there was no other way than to keep a diagonal."""
        return "; its diagonal only, since it could not be factorized" if self._diagonal else ""

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
            "curvature_share": self._curvature_share,
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
        self._curvature_share = moved(state.get("curvature_share"))
