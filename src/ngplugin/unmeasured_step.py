"""A step whose KL was not measured, and how to take it back when it led to no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_IN_A_ROW = 2  # one batch without a finite gradient may be the data's fault


class UnmeasuredStep:
    """The parameters as they were before the last step, if its KL was only predicted.

    A measured step that leads to nan is shortened. One between measurements may lead there too:
    along a direction that no prediction depends on, such as the deviation of a weight that a
    Bayesian network draws, a step within the bound has any length, until a softplus underflows.
    Without a way back all further gradients would be nan. It costs a copy of the parameters, in a
    checkpoint too: one that was written right after such a step would otherwise be of no use.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []  # each parameter, and what it was
        self._bad = 0  # gradients in a row, since then

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Learn of a step that is about to be made."""
        self._before = [(p, p.clone()) for p in parameters]

    def trust(self) -> None:
        """Learn that the gradient where it led to is finite."""
        self._before, self._bad = [], 0

    @torch.no_grad()
    def taken_back(self) -> bool:
        """Learn that it is not; whether the step was taken back for it, bit for bit."""
        self._bad += 1
        if not self._before or self._bad < _IN_A_ROW:
            return False
        for p, before in self._before:
            p.copy_(before)
        self.trust()
        return True

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """What each parameter was, None where the last step is trusted, and the bad gradients."""
        before = {id(p): was for p, was in self._before}
        return {"before": [before.get(id(p)) for p in parameters], "bad": self._bad}

    def load_state_dict(
        self, before: Sequence[Tensor | None], bad: int, parameters: Sequence[Tensor]
    ) -> None:
        """Take over a saved state."""
        pairs = zip(parameters, before, strict=True)
        self._before = [(p, was.to(p.device, copy=True)) for p, was in pairs if was is not None]
        self._bad = bad
