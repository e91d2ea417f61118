"""The Bernoulli distribution: binary cross-entropy losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood
from ngplugin.curvature.likelihoods.loss_call import LossCall, divisor_of, flat, last, reduction_of


class Bernoulli(Likelihood):
    """p(y = 1 | η) = sigmoid(η), with η the logits `[terms]`."""

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """sigmoid(η) - y, y ~ Bernoulli(sigmoid(η))."""
        p = self.natural.sigmoid()
        return p - torch.bernoulli(p, generator=generator)

    def root(self, vector: Tensor) -> Tensor:
        """√(p (1 - p)) v."""
        # sigmoid(-η) is 1 - p without the cancellation.
        return (self.natural.sigmoid() * (-self.natural).sigmoid()).sqrt() * vector

    def information(self, vector: Tensor) -> Tensor:
        """p (1 - p) v."""
        return self.natural.sigmoid() * (-self.natural).sigmoid() * vector

    def kl(self, other: Likelihood) -> Tensor:
        """p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))."""
        a, b = self.natural, other.natural
        zero = a.sigmoid() * (F.logsigmoid(a) - F.logsigmoid(b))
        return zero + (-a).sigmoid() * (F.logsigmoid(-a) - F.logsigmoid(-b))

    def nll(self, target: Tensor) -> Tensor:
        """y (log y - log p) + (1 - y) (log(1 - y) - log(1 - p)), with y in [0, 1], `[terms]`."""
        other = 1 - target
        one = torch.xlogy(target, target) - target * F.logsigmoid(self.natural)
        return one + torch.xlogy(other, other) - other * F.logsigmoid(-self.natural)


def _log_odds(p: Tensor) -> Tensor:
    # The bounds keep the pulled-back score finite where a probability has rounded to 0 or 1.
    p = p.reshape(-1)
    p = p.clamp(torch.finfo(p.dtype).tiny, 1 - torch.finfo(p.dtype).eps)
    return p.log() - (-p).log1p()


def _binary(
    name: str,
    natural: Callable[[Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> LossCall | None:
    """-ρ y log p - (1 - y) log(1 - p): mass ρ y + 1 - y, of which ρ y fell on y = 1."""
    if not input.requires_grad:
        return None
    y = target.to(torch.promote_types(input.dtype, torch.float32))
    positive = y if pos_weight is None else y * pos_weight
    mass = positive + (1 - y)
    scored = positive / mass.clamp_min(torch.finfo(mass.dtype).tiny)  # mass 0: pos_weight is 0
    if weight is not None:
        mass = mass * weight
    divisor = divisor_of(reduction, input.numel(), input)
    mass = mass.expand(input.shape).reshape(-1)
    return LossCall(
        name,
        Bernoulli,
        (input,),
        natural,
        scored.reshape(-1),
        mass,
        divisor,
        apart=last(input.shape),
    )


def read_binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossCall | None:
    """Binary cross-entropy of probabilities."""
    reduction = reduction_of(size_average, reduce, reduction)
    return _binary("binary_cross_entropy", _log_odds, input, target, weight, None, reduction)


def read_binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossCall | None:
    """Binary cross-entropy of logits."""
    reduction = reduction_of(size_average, reduce, reduction)
    return _binary(
        "binary_cross_entropy_with_logits", flat, input, target, weight, pos_weight, reduction
    )


def read_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossCall | None:
    """log(1 + exp(-y η)) with y = ±1: the same as binary cross-entropy with labels (1 + y)/2."""
    if not input.requires_grad:
        return None
    shape = torch.broadcast_shapes(input.shape, target.shape)
    y = target.to(torch.promote_types(input.dtype, torch.float32)).expand(shape).reshape(-1)
    divisor = divisor_of(reduction_of(size_average, reduce, reduction), y.numel(), input)
    return LossCall(
        "soft_margin_loss",
        Bernoulli,
        (input,),
        lambda logits: logits.expand(shape).reshape(-1),
        (1 + y) / 2,
        torch.ones_like(y),
        divisor,
        apart=last(shape),
    )
