"""The momentum average of the gradient, in the convention of `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class GradientMomentum:
    """m ← μ m + g, read as m, or as g + μ m (Nesterov).

    The average is of the gradient and not of the step, so that the step is one product with the
    inverse and its predicted KL comes at no further cost.
    """

    def __init__(self, nesterov: bool) -> None:
        self._nesterov = nesterov
        self._average: dict[int, Tensor] = {}  # id of a parameter -> m

    def update(self, p: Tensor, mu: float) -> Tensor:
        """Take in the gradient of `p`; returns what to step along, not to be changed in place."""
        g = p.grad
        assert g is not None
        if mu == 0:
            return g
        m = self._average.get(id(p))
        if m is None:
            m = self._average[id(p)] = g.clone()
        else:
            m.mul_(mu).add_(g)
        return g.add(m, alpha=mu) if self._nesterov else m

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
