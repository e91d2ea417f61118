"""The Gaussian whose mean and variance are both predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood
from ngplugin.curvature.likelihoods.loss_call import Location, LossCall, divisor_of, last


class Normal(Likelihood):
    """y ~ N(m, v) with η = (m, v) `[terms, 2]`.

    These are not the natural parameters of the family, in which the Fisher matrix would be full; in
    these it is diag(1/v, 1/(2v²)). The Fisher matrix of a model is the same in any coordinates.
    """

    def _split(self) -> tuple[Tensor, Tensor]:
        return self.natural[:, 0], self.natural[:, 1]

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """(-z/√v, (1 - z²)/(2v)) with y = m + √v z, z ~ N(0, 1)."""
        mean, v = self._split()
        z = torch.empty_like(mean).normal_(generator=generator)
        return torch.stack([-z / v.sqrt(), 0.5 * (1 - z.square()) / v], -1)

    def root(self, vector: Tensor) -> Tensor:
        """(v₁/√v, v₂/(√2 v))."""
        v = self._split()[1]
        return torch.stack([v.rsqrt(), 0.5**0.5 / v], -1) * vector

    def information(self, vector: Tensor) -> Tensor:
        """(v₁/v, v₂/(2v²))."""
        v = self._split()[1]
        return torch.stack([1 / v, 0.5 / v.square()], -1) * vector

    def kl(self, other: Likelihood) -> Tensor:
        """½ (v/v' - 1 - log(v/v') + (m - m')²/v')."""
        assert isinstance(other, Normal)
        (m, v), (n, u) = self._split(), other._split()
        excess = (v - u) / u  # v/v' - 1, without the loss of the digits of a small step
        return 0.5 * (excess - excess.log1p() + (m - n).square() / u)

    def nll(self, target: Tensor) -> Tensor:
        """½ (log v + (y - m)²/v), which has no smallest value."""
        mean, v = self._split()
        return 0.5 * (v.log() + (target - mean).square() / v)

    def divergence(self, target: Tensor, nll: Tensor | None = None) -> Tensor:
        """½ (y - m)²/v, the `nll` less its smallest value at the predicted variance."""
        mean, v = self._split()
        return 0.5 * (target - mean).square() / v


def read_gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> LossCall | None:
    """½ (log v + (y - m)²/v); `full` adds a constant. A variance without grad is taken as known."""
    variance = var if isinstance(var, Tensor) else input.detach().new_tensor(var)
    one_a_row = variance.dim() > 0 and variance.shape == input.shape[:-1] != input.shape

    def rows(v: Tensor) -> Tensor:  # as torch lines it up with the means
        return v.unsqueeze(-1) if one_a_row else v

    shape = torch.broadcast_shapes(input.shape, target.shape, rows(variance).shape)
    mean = Location.of(input, target, shape)
    means = 0 if mean is None else len(mean.predictions)
    if mean is None:
        if not variance.requires_grad:
            return None
        fixed = (input - target).expand(shape).reshape(-1)

    def natural(*predictions: Tensor) -> Tensor:
        v = predictions[-1] if variance.requires_grad else variance.detach()
        # A variance below eps counts as eps, with the gradient of its own: torch's rule.
        v = rows(v + (v.clamp_min(eps) - v).detach())
        v = v.expand(shape).reshape(-1)
        m = fixed.to(v.dtype) if mean is None else mean(*predictions[:means])
        return torch.stack(torch.broadcast_tensors(m, v), -1)

    if mean is None:
        predictions: tuple[Tensor, ...] = (variance,)
        observed = torch.zeros_like(fixed)
    else:
        predictions = (*mean.predictions, *([variance] if variance.requires_grad else []))
        observed = mean.observed
    divisor = divisor_of(reduction, observed.numel(), input)
    mass = torch.ones_like(observed)
    return LossCall(
        "gaussian_nll_loss",
        Normal,
        predictions,
        natural,
        observed,
        mass,
        divisor,
        apart=last(shape),
    )
