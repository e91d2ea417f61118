"""The Poisson distribution: counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood
from ngplugin.curvature.likelihoods.loss_call import LossCall, divisor_of, last, reduction_of


class Poisson(Likelihood):
    """y ~ Poisson(λ) with η = log λ `[terms]`."""

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """λ - y, y ~ Poisson(λ)."""
        rate = self.natural.exp()
        return rate - torch.poisson(rate, generator=generator)

    def root(self, vector: Tensor) -> Tensor:
        """√λ v."""
        return (0.5 * self.natural).exp() * vector

    def information(self, vector: Tensor) -> Tensor:
        """λ v."""
        return self.natural.exp() * vector

    def kl(self, other: Likelihood) -> Tensor:
        """λ (η - η') - λ + λ'."""
        change = other.natural - self.natural
        # expm1 keeps the digits of a small step.
        return self.natural.exp() * (change.expm1() - change)

    def nll(self, target: Tensor) -> Tensor:
        """λ - y η - (y - y log y)."""
        least = target - torch.xlogy(target, target)
        return self.natural.exp() - target * self.natural - least


def read_poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossCall | None:
    """λ - y log λ; `full` adds what does not depend on the prediction.

    Without `log_input` the loss is r - y log(r + eps), up to eps the -log p of a rate r + eps.
    """
    if not input.requires_grad:
        return None
    shape = torch.broadcast_shapes(input.shape, target.shape)

    def natural(prediction: Tensor) -> Tensor:
        log_rate = prediction if log_input else (prediction + eps).log()
        return log_rate.expand(shape).reshape(-1)

    y = target.to(torch.promote_types(input.dtype, torch.float32)).expand(shape).reshape(-1)
    divisor = divisor_of(reduction_of(size_average, reduce, reduction), y.numel(), input)
    mass = torch.ones_like(y)
    return LossCall(
        "poisson_nll_loss", Poisson, (input,), natural, y, mass, divisor, apart=last(shape)
    )
