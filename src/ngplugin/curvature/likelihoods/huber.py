"""The Huber density: losses that are squared near zero and absolute far from it."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.laplace import read_l1_loss
from ngplugin.curvature.likelihoods.likelihood import Likelihood, random_signs
from ngplugin.curvature.likelihoods.loss_call import (
    Location,
    LossCall,
    divisor_of,
    last,
    reduction_of,
)

_ROUNDS = 30  # each makes the error of the scale several times smaller
_NODES = 32  # of the quadrature of the KL


def _rho(error: Tensor, a: Tensor) -> Tensor:
    """½x² up to a, a(x - ½a) beyond."""
    near = error.clamp_max(a)
    return near * (error - 0.5 * near)


def _masses(a: Tensor) -> tuple[Tensor, Tensor]:
    """∫ exp(-ρ_a(x)) dx over [-a, a], and over the rest."""
    inside = math.sqrt(2 * math.pi) * torch.erf(a * math.sqrt(0.5))
    return inside, 2 / a * (-0.5 * a.square()).exp()


class Huber(Likelihood):
    """p(y | η) ∝ exp(-ρ_a(y - η)), with η the location in units of the scale, `[terms]`.

    It is the least informative density of given contamination (Huber 1964, Robust Estimation of a
    Location Parameter). As E[ρ'²] = E[ρ''], the Fisher information of the location is the
    probability of an error below a: the generalized Gauss-Newton matrix, averaged over the model's
    own errors. It vanishes for no data, however far they are from the prediction.

    Args:
        natural: η.
        threshold: a, a scalar.
    """

    def __init__(self, natural: Tensor, threshold: Tensor) -> None:
        super().__init__(natural)
        self.threshold = threshold

    def _at(self, natural: Tensor) -> Huber:
        return Huber(natural, self.threshold)

    def _inside(self) -> Tensor:
        inside, outside = _masses(self.threshold)
        return inside / (inside + outside)

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """-ρ'(x) with x = y - η: a truncated normal draw inside, ±a outside."""
        a = self.threshold
        uniform = torch.empty_like(self.natural).uniform_(generator=generator)
        x = math.sqrt(2) * torch.erfinv(uniform * torch.erf(a * math.sqrt(0.5)))
        inside = torch.empty_like(uniform).uniform_(generator=generator) < self._inside()
        return torch.where(inside, x.clamp_max(a), a) * random_signs(uniform, generator)

    def root(self, vector: Tensor) -> Tensor:
        """√P(|x| ≤ a) v."""
        return self._inside().sqrt() * vector

    def information(self, vector: Tensor) -> Tensor:
        """P(|x| ≤ a) v."""
        return self._inside() * vector

    def kl(self, other: Likelihood) -> Tensor:
        """∫₀^Δ (Δ - u) P(|x - u| ≤ a) du.

        The second derivative of E[ρ(x - u)] is the probability under the integral. No closed form
        keeps the digits of a small step.
        """
        distance = (self.natural - other.natural).abs()
        total = torch.zeros_like(distance)
        for node, weight in _gauss_legendre(_NODES):
            u = node * distance
            total += (
                weight
                * (1 - node)
                * (self._cdf(u + self.threshold) - self._cdf(u - self.threshold))
            )
        return distance.square() * total

    def _cdf(self, t: Tensor) -> Tensor:
        """P(x ≤ t), for t of at least -a."""
        a = self.threshold
        inside, outside = _masses(a)
        total = inside + outside
        near = t.abs().clamp_max(a)
        core = 0.5 * math.sqrt(2 * math.pi) * torch.erf(near * math.sqrt(0.5))
        far = (t - a).clamp_min(0)
        tail = -0.5 * outside * (-a * far).expm1()
        return 0.5 + t.sign() * (core + tail) / total

    def nll(self, target: Tensor) -> Tensor:
        """ρ_a(y - η)."""
        return _rho((self.natural - target).abs(), self.threshold)


def _gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1] (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return list(zip(((1 + nodes) / 2).tolist(), vectors[0].square().tolist(), strict=True))


def _likeliest_scale(mean_loss: Tensor, delta: float) -> Tensor:
    """S under which p ∝ exp(-ρ_δ/s) makes the data likeliest: E_s[ρ_δ] is the data's mean.

    E_s[ρ_δ] = s (1 - ½ P_s(|x| ≤ δ)), so s lies between one and two mean losses.
    """
    s = mean_loss
    for _ in range(_ROUNDS):
        inside, outside = _masses(delta / s.sqrt())
        s = mean_loss / (1 - 0.5 * inside / (inside + outside))
    return s


def _read(
    name: str,
    input: Tensor,
    target: Tensor,
    delta: float,
    weight: Tensor | None,
    factor: float,
    reduction: str,
) -> LossCall | None:
    """Factor · ρ_δ(a - b): s times the -log p of the density of scale s, as ρ_δ(x)/s = ρ_a(x/√s).

    With a large δ this is squared error with the variance estimated, with a small one absolute
    error.
    """
    location = Location.of(input, target)
    if location is None:
        return None
    element = location.elements(weight)
    error = location.error()
    counted = element * error.isfinite()  # a masked target may be nan
    rho = _rho(error.nan_to_num(0, 0, 0), error.new_tensor(delta))
    mean_loss = (counted * rho).sum() / counted.sum()
    s = _likeliest_scale(mean_loss.clamp_min(torch.finfo(rho.dtype).tiny ** 0.5), delta)
    root = s.sqrt()
    return LossCall(
        name,
        partial(Huber, threshold=delta / root),
        location.predictions,
        lambda *sides: location(*sides) / root,
        location.observed / root,
        factor * s * element,
        divisor_of(reduction, element.numel(), input),
        apart=last(location.shape),
    )


def read_huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> LossCall | None:
    """ρ_δ; unlike in other losses, a mean with weights divides by the number of elements."""
    return _read("huber_loss", input, target, delta, weight, 1.0, reduction)


def read_smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> LossCall | None:
    """ρ_β/β; the absolute error where β is 0."""
    reduction = reduction_of(size_average, reduce, reduction)
    if beta == 0:
        return read_l1_loss(input, target, reduction=reduction)
    return _read("smooth_l1_loss", input, target, beta, None, 1 / beta, reduction)
