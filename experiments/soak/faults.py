"""What goes wrong in the soak: faults of a batch, of its loss, of curvature, and of a logger."""

from __future__ import annotations

import errno
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngplugin.curvature.blocks import AveragedBlock

Batch = tuple[Tensor, ...]


class Faults:
    """In a share of the steps, a fault of a kind drawn at random.

    Args:
        seed: of which step has which. Each process has another: what ended one would end the next.
        kinds: to draw from; none for a clean run.
        rate: share of the steps.

    Attributes:
        counts: how often each came about.
    """

    def __init__(self, seed: int, kinds: Sequence[str], rate: float) -> None:
        self.counts: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._kinds, self._rate = kinds, rate
        self._kind, self._left, self._counted = "", 0.0, False
        if kinds:
            self._stand_between()

    def begin(self) -> None:
        """A step begins: draw what goes wrong in it."""
        wrong = self._kinds and self._chance.random() < self._rate
        self._kind = self._chance.choice(self._kinds) if wrong else ""
        self._left = {
            "a factorization that fails": self._chance.choice([1.0, 2.0, 5.0]),
            "factorizations that fail": math.inf,
            "a factor of nan": 1.0,
        }.get(self._kind, 0.0)
        self._counted = False

    def batch(self, batch: Batch) -> Batch:
        """Spoil it, or take most of its examples away."""
        if self._kind not in _BATCHES:
            return batch
        self._happened()
        return _BATCHES[self._kind](batch)

    def loss(self, loss: Tensor) -> Tensor:
        """Scale it."""
        if self._kind not in _FACTORS:
            return loss
        self._happened()
        return _FACTORS[self._kind] * loss

    def gradients(self, module: nn.Module) -> None:
        """Spoil one element."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if self._kind in _GRADIENTS and gradients:
            self._happened()
            gradients[0].view(-1)[:1].fill_(_GRADIENTS[self._kind])

    def log(self) -> None:
        """Have no room on the disk."""
        if self._kind == _FULL_DISK:
            self._happened()
            raise OSError(errno.ENOSPC, "No space left on device")

    def _happened(self) -> None:
        """Count the step's fault, once."""
        self.counts[self._kind] += not self._counted
        self._counted = True

    def _due(self, kind: str) -> bool:
        """Whether it is to happen, here and now."""
        if not (self._kind.startswith(kind) and self._left > 0):
            return False
        self._left -= 1
        self._happened()
        return True

    def _stand_between(self) -> None:
        """Between blocks and their statistics, and torch and its factorizations."""
        statistic = AveragedBlock.statistic

        def spoiled(block: AveragedBlock, total_weight: float) -> dict[str, Tensor] | None:
            if block._added and self._due("a factor of nan"):
                next(iter(block._added.values())).view(-1)[:1].fill_(math.nan)
            return statistic(block, total_weight)

        def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def factorization(X: Tensor, **settings: Any) -> Any:
                if not (self._due("a factorization") or self._due("factorizations")):
                    return real(X, **settings)
                if not name.endswith("_ex"):
                    raise torch.linalg.LinAlgError(f"{name} was made to fail")
                return torch.full_like(X, math.nan), torch.ones(X.shape[:-2], dtype=torch.int32)

            return factorization

        AveragedBlock.statistic = spoiled  # type: ignore[method-assign]
        for name in ("cholesky_ex", "inv_ex", "qr"):
            setattr(torch.linalg, name, failing(name, getattr(torch.linalg, name)))


def _first(value: float) -> Callable[[Batch], Batch]:
    def spoiled(batch: Batch) -> Batch:
        x, *rest = batch
        return (x.index_fill(0, torch.tensor(0), value), *rest)

    return spoiled


def _only(count: int) -> Callable[[Batch], Batch]:
    return lambda batch: tuple(t[:count] for t in batch)


_BATCHES: dict[str, Callable[[Batch], Batch]] = {
    "nan in the inputs": _first(math.nan),
    "inf in the inputs": _first(math.inf),
    "an input of 1e30": _first(1e30),
    "one example": _only(1),
    "seven examples": _only(7),
    "identical examples": lambda batch: tuple(t[:1].expand(t.shape) for t in batch),
}
_FACTORS = {
    "a loss of nan": math.nan,
    "a loss times 0": 0.0,
    "a loss times 1e30": 1e30,
    "a loss times 1e-30": 1e-30,
}
_GRADIENTS = {"a gradient of nan": math.nan, "a gradient of 1e30": 1e30}
#: These come about only where statistics or inverses are due in that step.
_CURVATURE = ("a factor of nan", "a factorization that fails", "factorizations that fail")
_FULL_DISK = "a full disk under the logger"

#: Numbers without a meaning, which any optimizer learns from.
NONSENSE = ("an input of 1e30", "identical examples", "one example", "seven examples")
#: All of which a run ends as well as without. From an input of 1e30 the running averages of
#: BatchNorm do not recover, whatever the optimizer.
FAULTS = tuple(
    kind
    for kind in (*_BATCHES, *_FACTORS, *_GRADIENTS, *_CURVATURE, _FULL_DISK)
    if kind != "an input of 1e30"
)
