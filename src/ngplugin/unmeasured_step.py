"""A step whose KL was not measured, and how to take it back when it led to no number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_IN_A_ROW = 2  # one batch without a finite gradient may be the data's fault


class UnmeasuredStep:
    """The parameters as they were before the last step, if its KL was only predicted.

    A measured step that leads to nan is shortened. One between measurements may lead there too:
    along a direction that no prediction depends on, such as the deviation of a weight that a
    Bayesian network draws, a step within the bound has any length, until a softplus underflows.
    Without a way back all further gradients would be nan. It costs a copy of the parameters; a
    checkpoint does not have it.
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
