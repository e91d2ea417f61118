"""The Laplace distribution: absolute-error losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood, random_signs
from ngplugin.curvature.likelihoods.loss_call import (
    Location,
    LossCall,
    divisor_of,
    last,
    reduction_of,
)


class Laplace(Likelihood):
    """p(y | η) = ½ exp(-|y - η|), with η the location in units of the scale, `[terms]`."""

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """sign(η - y): either sign with probability one half."""
        return random_signs(self.natural, generator)

    def root(self, vector: Tensor) -> Tensor:
        """The vector itself: the Fisher information of the location is 1."""
        return vector

    def information(self, vector: Tensor) -> Tensor:
        """V itself."""
        return vector

    def kl(self, other: Likelihood) -> Tensor:
        """|Δη| + exp(-|Δη|) - 1."""
        distance = (self.natural - other.natural).abs()
        return distance + (-distance).expm1()

    def nll(self, target: Tensor) -> Tensor:
        """|y - η|."""
        return (self.natural - target).abs()


def read_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossCall | None:
    """|a - b|: b times the -log p of a Laplace distribution of scale b.

    The absolute error has no curvature of its own, so that its generalized Gauss-Newton matrix is
    zero and libraries of those refuse it. Its Fisher matrix is not, and depends on b: the
    information of the location is 1/b². It is the scale under which the data are likeliest, the
    mean absolute error (Kotz, Kozubowski & Podgórski 2001, The Laplace Distribution, §2.6).
    """
    location = Location.of(input, target)
    if location is None:
        return None
    element = location.elements(weight)
    error = location.error()
    counted = element * error.isfinite()  # a masked target may be nan
    scale = (counted * error.nan_to_num()).sum() / counted.sum()
    scale = scale.clamp_min(torch.finfo(scale.dtype).eps)
    divisor = divisor_of(reduction_of(size_average, reduce, reduction), element.sum(), input)
    return LossCall(
        "l1_loss",
        Laplace,
        location.predictions,
        lambda *sides: location(*sides) / scale,
        location.observed / scale,
        scale * element,
        divisor,
        apart=last(location.shape),
    )
