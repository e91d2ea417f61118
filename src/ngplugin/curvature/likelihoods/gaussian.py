"""The Gaussian with one variance for all terms: squared-error losses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood
from ngplugin.curvature.likelihoods.loss_call import (
    Location,
    LossCall,
    divisor_of,
    last,
    reduction_of,
)


class Gaussian(Likelihood):
    """y = η + noise, with η the mean `[terms]`, scored at unit variance.

    The variance σ² is the family's dispersion. It does not enter the Fisher matrix of an objective
    Σ w ½(η - y)², only what a nat is: the same objective is Σ (w σ²) · ½(η - y)²/σ², so with the
    variance σ² there are σ² Σ w terms' worth of weight, and KL = ½(Δη)²/σ² a term.
    """

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """η - y with y ~ N(η, 1): a standard normal draw."""
        return torch.empty_like(self.natural).normal_(generator=generator)

    def root(self, vector: Tensor) -> Tensor:
        """The vector itself: the Fisher information of the mean is 1."""
        return vector

    def information(self, vector: Tensor) -> Tensor:
        """V itself."""
        return vector

    def kl(self, other: Likelihood) -> Tensor:
        """½ (η - η')² at unit variance."""
        return 0.5 * (self.natural - other.natural).square()

    def nll(self, target: Tensor) -> Tensor:
        """½ (η - y)² at unit variance."""
        return 0.5 * (self.natural - target).square()

    def dispersion(
        self, target: Tensor, weight: Tensor, noise_variance: float | Literal["auto"]
    ) -> Tensor:
        """σ². `"auto"`: the weighted mean squared error, under which the data are likeliest."""
        if noise_variance != "auto":
            return self.natural.new_tensor(noise_variance)
        squared = (self.natural - target).square()
        return torch.where(weight > 0, weight * squared, 0.0).sum() / weight.sum()


def read_mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossCall | None:
    """(a - b)², twice the -log p of a unit-variance Gaussian."""
    mean = Location.of(input, target)
    if mean is None:
        return None
    element = mean.elements(weight)
    divisor = divisor_of(reduction_of(size_average, reduce, reduction), element.sum(), input)
    return LossCall(
        "mse_loss",
        Gaussian,
        mean.predictions,
        mean,
        mean.observed,
        2 * element,
        divisor,
        apart=last(mean.shape),
    )
