"""The categorical distribution: cross-entropy and nll losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood
from ngplugin.curvature.likelihoods.loss_call import (
    LossCall,
    divisor_of,
    reduction_of,
    widened,
)


class Categorical(Likelihood):
    """p(y = c | η) = softmax(η)_c, with η the logits `[terms, classes]`.

    Log-probabilities are logits too: softmax leaves them as they are.
    """

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """softmax(η) - onehot(y), y ~ softmax(η)."""
        p = self.natural.softmax(-1)
        y = torch.multinomial(p, 1, generator=generator)  # [terms, 1]
        return p.scatter_add(-1, y, p.new_full((1, 1), -1.0).expand_as(y))

    def root(self, vector: Tensor) -> Tensor:
        """√p∘v - p (√pᵀv): R Rᵀ = diag(p) - ppᵀ."""
        p = self.natural.softmax(-1)
        scaled = p.sqrt() * vector
        return scaled - p * scaled.sum(-1, keepdim=True)

    def information(self, vector: Tensor) -> Tensor:
        """(diag(p) - ppᵀ) v."""
        p = self.natural.softmax(-1)
        weighted = p * vector
        return weighted - p * weighted.sum(-1, keepdim=True)

    def kl(self, other: Likelihood) -> Tensor:
        """Σ_c p_c (log p_c - log q_c)."""
        log_p = self.natural.log_softmax(-1)
        log_q = other.natural.log_softmax(-1)
        p = log_p.exp()
        # A class of probability 0 (a masked logit of -inf) contributes nothing, not nan.
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)

    def nll(self, target: Tensor) -> Tensor:
        """KL from class indices `[terms]` or class probabilities `[terms, classes]`."""
        log_p = self.natural.log_softmax(-1)
        if target.is_floating_point():
            return torch.where(target > 0, target * (target.log() - log_p), 0.0).sum(-1)
        return -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _class_rows(t: Tensor) -> Tensor:
    """`[N, C, d1, ...]` or `[C]` to `[terms, C]`."""
    return t.movedim(1, -1).flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def read_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    name: str = "cross_entropy",
) -> LossCall | None:
    """Σ_c -q_c log p_c with class weights and smoothing in q; its mass is Σ_c q_c."""
    if not input.requires_grad:
        return None
    classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    dtype = torch.promote_types(input.dtype, torch.float32)
    class_weight = input.new_ones(classes, dtype=dtype) if weight is None else weight.to(dtype)
    if target.is_floating_point():
        q = _class_rows(target).to(dtype)
        q = (1 - label_smoothing) * q + label_smoothing / classes
        q = q * class_weight
        mass = q.sum(-1)
        divisor = divisor_of(
            reduction := reduction_of(size_average, reduce, reduction), len(q), input
        )
        scored = q / mass.clamp_min(torch.finfo(dtype).tiny).unsqueeze(-1)
    else:
        y = target.reshape(-1)
        counted = y != ignore_index
        y = torch.where(counted, y, 0)
        own = class_weight[y] * counted
        reduction = reduction_of(size_average, reduce, reduction)
        divisor = divisor_of(reduction, own.sum(), input)
        mass, scored = own, y
        if label_smoothing:
            spread = label_smoothing / classes * class_weight
            mass = (1 - label_smoothing) * own + spread.sum() * counted
            q = spread.expand(len(y), classes).clone()
            q.scatter_add_(1, y.unsqueeze(1), ((1 - label_smoothing) * own).unsqueeze(1))
            scored = q / mass.clamp_min(torch.finfo(dtype).tiny).unsqueeze(-1)
    return LossCall(name, Categorical, (input,), _class_rows, scored, mass, divisor)


def read_nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossCall | None:
    """Cross-entropy of log-probabilities, which are logits of themselves."""
    return read_cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, name="nll_loss"
    )


def _class_dimension(log_p: Tensor) -> int | None:
    """The dimension over which log-probabilities add up to 1, the last or second for choice."""
    tolerance = torch.finfo(log_p.dtype).eps ** 0.5
    others: list[int] = [*range(log_p.dim())][::-1]
    for dim in dict.fromkeys([*others[:1], *others[-2:-1], *others]):
        if bool((widened(log_p).logsumexp(dim).abs() <= tolerance).all()):
            return dim
    return None


def read_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> LossCall | None:
    """Σ_c q_c (log q_c - log p_c), with one element of the loss a class.

    A term is the prediction, not its elements: the same as `cross_entropy` with soft targets. Where
    `input` is not normalized over any dimension it is no prediction.
    """
    if not input.requires_grad or input.dim() == 0:
        return None
    dim = _class_dimension(input)
    if dim is None:
        return None

    def rows(t: Tensor) -> Tensor:  # [..., C, ...] -> [terms, C]
        return t.movedim(dim, -1).flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)

    q = widened(target).expand(input.shape)
    mass = rows(q.exp() if log_target else q)
    total = mass.sum(-1, keepdim=True)
    scored = mass / total.clamp_min(torch.finfo(mass.dtype).tiny)
    if reduction == "batchmean":  # whatever the deprecated arguments say
        mass = mass / input.shape[0]
    reduction = reduction_of(size_average, reduce, reduction)
    divisor = divisor_of(reduction, input.numel(), input)
    return LossCall("kl_div", Categorical, (input,), rows, scored, mass, divisor, rows)
