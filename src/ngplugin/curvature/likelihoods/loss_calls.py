"""Reads a call of a torch loss function: what was predicted, and how much each term counts.

A *term* is one element of the loss as `reduction="none"` would return it. Each reader below has
the signature of the torch function it reads, so Python itself sorts the arguments out, and
returns a `LossCall`, or None where the loss says nothing about a model (no side requires grad).

All scaling of the Fisher matrix is settled here: class weights, `ignore_index`, label smoothing,
`pos_weight` and the reduction go into `LossCall.weights`; what the user did to the loss value
afterwards is in the gradient that arrives at it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplugin.curvature.likelihoods.bernoulli import Bernoulli
from ngplugin.curvature.likelihoods.categorical import Categorical
from ngplugin.curvature.likelihoods.gaussian import Gaussian
from ngplugin.curvature.likelihoods.likelihood import Likelihood


@dataclass(frozen=True)
class LossCall:
    """One observed loss.

    Attributes:
        name: of the torch function.
        family: the predictive distribution.
        predictions: the arguments that the model computed, with their graph.
        natural: maps `predictions` to the natural parameters `[terms, ...]`, differentiably.
        target: what the family's `nll` scores, a row a term.
        mass: `[terms]`, how many units of the family's `nll` one element of the unreduced loss is.
        divisor: what the reduction divides the sum of all elements by; None for `"none"`.
    """

    name: str
    family: type[Likelihood]
    predictions: tuple[Tensor, ...]
    natural: Callable[..., Tensor]
    target: Tensor
    mass: Tensor
    divisor: Tensor | None

    def likelihood(self, predictions: tuple[Tensor, ...] | None = None) -> Likelihood:
        """The predictive distribution, detached, in float32 or wider."""
        tensors = self.predictions if predictions is None else predictions
        return self.family(self.natural(*(_widened(t.detach()) for t in tensors)))

    def weights(self, gradient: Tensor) -> Tensor:
        """w, `[terms]`: how often the objective counts each term's -log p.

        Args:
            gradient: d(objective)/d(loss value), of the loss value's shape.

        A term that is subtracted from the objective still has a positive Fisher information, so
        the sign is dropped.
        """
        gradient = _widened(gradient).abs()
        if self.divisor is None:
            return gradient.reshape(-1) * self.mass
        return gradient * self.mass / self.divisor

    def pull_back(self, score: Tensor) -> list[Tensor]:
        """Carry d/d(natural parameters), of η's shape, to d/d(each prediction)."""
        leaves = [t.detach().requires_grad_() for t in self.predictions]
        with torch.enable_grad():
            natural = self.natural(*(_widened(t) for t in leaves))
        return list(torch.autograd.grad(natural, leaves, score))


def _widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def _divisor(reduction: str, count: Tensor | float, like: Tensor) -> Tensor | None:
    if reduction == "none":
        return None
    return torch.as_tensor(count if reduction == "mean" else 1.0, device=like.device)


def _class_rows(t: Tensor) -> Tensor:
    """`[N, C, d1, ...]` or `[C]` to `[terms, C]`."""
    return t.movedim(1, -1).flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def _cross_entropy(
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
        divisor = _divisor(reduction := _reduction(size_average, reduce, reduction), len(q), input)
        scored = q / mass.clamp_min(torch.finfo(dtype).tiny).unsqueeze(-1)
    else:
        y = target.reshape(-1)
        counted = y != ignore_index
        y = torch.where(counted, y, 0)
        own = class_weight[y] * counted
        reduction = _reduction(size_average, reduce, reduction)
        divisor = _divisor(reduction, own.sum(), input)
        mass, scored = own, y
        if label_smoothing:
            spread = label_smoothing / classes * class_weight
            mass = (1 - label_smoothing) * own + spread.sum() * counted
            q = spread.expand(len(y), -1) + (1 - label_smoothing) * F.one_hot(
                y, classes
            ) * own.unsqueeze(-1)
            scored = q / mass.clamp_min(torch.finfo(dtype).tiny).unsqueeze(-1)
    return LossCall(name, Categorical, (input,), _class_rows, scored, mass, divisor)


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossCall | None:
    """Cross-entropy of log-probabilities, which are logits of themselves."""
    return _cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, name="nll_loss"
    )


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1)


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
    divisor = _divisor(reduction, input.numel(), input)
    mass = mass.expand(input.shape).reshape(-1)
    return LossCall(name, Bernoulli, (input,), natural, scored.reshape(-1), mass, divisor)


def _binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossCall | None:
    reduction = _reduction(size_average, reduce, reduction)
    return _binary("binary_cross_entropy", _log_odds, input, target, weight, None, reduction)


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossCall | None:
    reduction = _reduction(size_average, reduce, reduction)
    return _binary(
        "binary_cross_entropy_with_logits", _flat, input, target, weight, pos_weight, reduction
    )


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossCall | None:
    """(a - b)², twice the -log p of a unit-variance Gaussian.

    Either side may be the model's; where both are, the prediction is their difference, and the
    observation that it is zero.
    """
    shape = torch.broadcast_shapes(input.shape, target.shape)
    if input.requires_grad and target.requires_grad:
        predictions: tuple[Tensor, ...] = (input, target)
        observed = input.new_zeros(())
    elif input.requires_grad or target.requires_grad:
        predictions, observed = ((input,), target) if input.requires_grad else ((target,), input)
    else:
        return None

    def natural(*sides: Tensor) -> Tensor:
        mean = sides[0] if len(sides) == 1 else sides[0] - sides[1]
        return mean.expand(shape).reshape(-1)

    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    element = input.new_ones((), dtype=dtype) if weight is None else weight.to(dtype)
    element = element.expand(shape).reshape(-1)
    divisor = _divisor(_reduction(size_average, reduce, reduction), element.sum(), input)
    scored = observed.detach().to(dtype).expand(shape).reshape(-1)
    return LossCall("mse_loss", Gaussian, predictions, natural, scored, 2 * element, divisor)


_READERS: dict[Callable[..., Any], Callable[..., LossCall | None]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.binary_cross_entropy: _binary_cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
    F.mse_loss: _mse_loss,
}

#: Names of the loss functions that are recognised.
RECOGNISED = tuple(function.__name__ for function in _READERS)


def read_loss_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LossCall | None:
    """What a call of a torch function says about the model's prediction, None if nothing."""
    reader = _READERS.get(function)
    if reader is None:
        return None
    with torch.no_grad():
        return reader(*args, **kwargs)
