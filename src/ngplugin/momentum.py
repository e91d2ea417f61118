"""The momentum average of the gradient, in the convention of `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientMomentum:
    """m ← μ m + g/Σw, read as m, or as g/Σw + μ m (Nesterov).

    The average is of the gradient and not of the step, so that the step is one product with the
    inverse and its predicted KL comes at no further cost. It is of the gradient over the weight of
    its objective, so that one which is scaled down, as that of an epoch's last micro-batches is,
    counts as much as others. What a step was proposed with counts from `keep` on: a step that is
    refused leaves the averages as they were, bit for bit.
    """

    def __init__(self, nesterov: bool) -> None:
        self._nesterov = nesterov
        self._average: dict[int, Tensor] = {}  # id of a parameter -> m
        self._proposed: dict[int, Tensor] = {}

    def propose(self, parameters: Sequence[Tensor], mu: float, total_weight: float) -> list[Tensor]:
        """What to step along with the gradients, not to be changed in place.

        Args:
            parameters: with a gradient each.
            mu: μ.
            total_weight: Σw of the objective.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if total_weight != 1 and gradients:
            gradients = list(torch._foreach_div(gradients, total_weight))
        if mu == 0 or not gradients:
            return gradients
        old = [self._average.get(id(p)) for p in parameters]
        if any(m is None for m in old):
            old = [
                torch.zeros_like(g) if m is None else m for m, g in zip(old, gradients, strict=True)
            ]
        # All at once: a call for each would cost more than what it does to a small one.
        averages = torch._foreach_add(gradients, old, alpha=mu)  # type: ignore[arg-type]
        self._proposed.update(zip(map(id, parameters), averages, strict=True))
        return list(
            torch._foreach_add(gradients, averages, alpha=mu) if self._nesterov else averages
        )

    def keep(self) -> None:
        """Take what was proposed for the averages."""
        self._average.update(self._proposed)
        self._proposed = {}

    def discard(self) -> None:
        """Forget what was proposed."""
        self._proposed = {}

    def forget(self) -> None:
        """Start anew."""
        self._average = {}

    def state_dict(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """M of each parameter, None where there is none yet."""
        return [self._average.get(id(p)) for p in parameters]

    def load_state_dict(self, state: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        """Take over saved averages."""
        self._average = {
            id(p): m.to(p.device, copy=True)
            for p, m in zip(parameters, state, strict=True)
            if m is not None
        }
