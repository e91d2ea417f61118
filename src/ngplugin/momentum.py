"""The momentum average of the gradient, in the convention of `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_SAME = 1e-4  # relative difference of Σw that is none


class GradientMomentum:
    """m ← μ m + g, read as m, or as g + μ m (Nesterov).

    The average is of the gradient and not of the step, so that the step is one product with the
    inverse and its predicted KL comes at no further cost. What a step was proposed with counts from
    `keep` on: a step that is refused leaves the averages as they were, bit for bit.

    Gradients of objectives that were scaled differently, as that of the last micro-batches of an
    epoch is, are brought to the scale of the present one.
    """

    def __init__(self, nesterov: bool) -> None:
        self._nesterov = nesterov
        self._average: dict[int, Tensor] = {}  # id of a parameter -> m
        self._proposed: dict[int, Tensor] = {}
        self._scale: float | None = None  # Σw of the objective that m is in units of

    def rescale(self, total_weight: float) -> None:
        """Have the averages in units of an objective of this Σw."""
        if self._scale is None or abs(total_weight / self._scale - 1) > _SAME:
            for m in self._average.values():
                m.mul_(total_weight / (self._scale or total_weight))
            self._scale = total_weight

    def propose(self, p: Tensor, mu: float) -> Tensor:
        """What to step along with the gradient of `p`, not to be changed in place."""
        g = p.grad
        assert g is not None
        if mu == 0:
            return g
        m = self._average.get(id(p))
        m = self._proposed[id(p)] = g.clone() if m is None else m.mul(mu).add_(g)
        return g.add(m, alpha=mu) if self._nesterov else m

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

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """M of each parameter, None where there is none yet, and in units of what."""
        return {"average": [self._average.get(id(p)) for p in parameters], "scale": self._scale}

    def load_state_dict(
        self, state: Sequence[Tensor | None], scale: float | None, parameters: Sequence[Tensor]
    ) -> None:
        """Take over saved averages, one a parameter, and their units."""
        self._scale = scale
        self._average = {
            id(p): m.to(p.device, copy=True)
            for p, m in zip(parameters, state, strict=True)
            if m is not None
        }
