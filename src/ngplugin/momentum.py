"""The momentum average of the gradient, in the convention of `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientMomentum:
    """m ← μ m + g/Σw, read as m, or as g/Σw + μ m (Nesterov); what is returned is Σw times that.

    The average is of the gradient and not of the step, so that the step is one product with the
    inverse and its predicted KL comes at no further cost. It is of the gradient over the weight of
    its objective, so that one which is scaled down, as that of an epoch's last micro-batches is,
    counts as much as others. What a step was proposed with counts from `keep` on: a step that is
    refused leaves the averages as they were, bit for bit.

    Each average is kept as Σw m, with the Σw of the last step: where that stays as it is, no
    number has to be divided.
    """

    def __init__(self, nesterov: bool) -> None:
        self._nesterov = nesterov
        self._average: dict[int, Tensor] = {}  # id of a parameter -> Σw m
        self._weight = 1.0  # Σw
        self._proposed: dict[int, Tensor] = {}
        self._proposed_weight = 1.0

    def propose(self, parameters: Sequence[Tensor], mu: float, total_weight: float) -> list[Tensor]:
        """What to step along with the gradients, in their units; not to be changed in place.

        Args:
            parameters: with a gradient each.
            mu: μ.
            total_weight: Σw of the objective, the same for all calls of a step.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._proposed_weight = total_weight
        if mu == 0 or not gradients:
            return gradients
        known = [p for p in parameters if id(p) in self._average]
        averages = {id(p): p.grad.clone() for p in parameters if id(p) not in self._average}  # type: ignore[union-attr]
        if known:
            old = [self._average[id(p)] for p in known]
            share = mu * total_weight / self._weight
            new = torch._foreach_add([p.grad for p in known], old, alpha=share)  # type: ignore[arg-type]
            averages.update(zip(map(id, known), new, strict=True))
        self._proposed.update(averages)
        averaged = [averages[id(p)] for p in parameters]
        if not self._nesterov:
            return averaged
        return list(torch._foreach_add(gradients, averaged, alpha=mu))

    def keep(self) -> None:
        """Take what was proposed for the averages."""
        if self._proposed_weight != self._weight:
            scale = self._proposed_weight / self._weight
            for key in self._average.keys() - self._proposed.keys():
                self._average[key] = self._average[key] * scale
        self._average.update(self._proposed)
        self._weight = self._proposed_weight
        self._proposed = {}

    def discard(self) -> None:
        """Forget what was proposed."""
        self._proposed = {}

    def forget(self) -> None:
        """Start anew."""
        self._average = {}

    def state_dict(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Σw m of each parameter, None where there is none yet."""
        return [self._average.get(id(p)) for p in parameters]

    @property
    def weight(self) -> float:
        """The Σw that is in the averages, part of a saved state."""
        return self._weight

    def load_state_dict(
        self, state: Sequence[Tensor | None], weight: float, parameters: Sequence[Tensor]
    ) -> None:
        """Take over saved averages."""
        self._weight = weight
        self._average = {
            id(p): m.to(p.device, copy=True)
            for p, m in zip(parameters, state, strict=True)
            if m is not None
        }
