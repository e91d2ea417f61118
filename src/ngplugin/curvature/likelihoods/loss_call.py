"""What an observed loss says about a prediction, and the arithmetic that its readers share.

A *term* is one element of the loss as `reduction="none"` would return it.

All scaling of the Fisher matrix is settled here and by the readers: class weights,
`ignore_index`, label smoothing, `pos_weight` and the reduction go into `LossCall.weights`; what the
user did to the loss value afterwards is in the gradient that arrives at it.

A reader has the signature of the torch function it reads, so Python itself sorts the arguments out,
and returns a `LossCall`, or None where the loss says nothing about a model (no side requires grad).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import (
    FisherKind,
    Likelihood,
    Prediction,
    check_passes,
)


def flat(t: Tensor) -> Tensor:
    """`[terms]`."""
    return t.reshape(-1)


class ScoredCall(ABC):
    """One observed call that scores a prediction.

    Attributes:
        name: of the function.
        predictions: what the model computed, with its graph.
        target: what the prediction's `nll` scores.
    """

    name: str
    predictions: tuple[Tensor, ...]
    target: Tensor

    @abstractmethod
    def likelihood(self, predictions: tuple[Tensor, ...] | None = None) -> Prediction:
        """The predictive distribution, detached, in float32 or wider."""

    @abstractmethod
    def weights(self, gradient: Tensor) -> Tensor:
        """w, `[terms]`: how often the objective counts each term's -log p.

        A term that is subtracted from the objective still has a positive Fisher information, so
        the sign is dropped.

        Args:
            gradient: d(objective)/d(the call's value), of the value's shape.
        """

    @abstractmethod
    def scores(
        self, kind: FisherKind, weights: Tensor, draws: int, generator: torch.Generator
    ) -> Iterator[tuple[list[Tensor], float]]:
        """Σ_i √w_i s_i as d/d(each prediction), with its share; the shares add up to 1.

        On average over the shares, s_i s_iᵀ is the Fisher information of term i and s_i s_jᵀ is
        zero: by chance, or over all passes of an exact one.

        Args:
            kind: how the scores s_i are chosen.
            weights: w, `[terms]`.
            draws: how many random ones; an exact Fisher has the number it needs.
            generator: source of all randomness.

        Raises:
            ValueError: an exact one would take absurdly many.
        """

    @abstractmethod
    def information(self, weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t with H = Σ_i w_i H_i, what the scores that `draw` gives have for a covariance.

        Args:
            weights: of each term, `[terms]`.
            tangents: t, a derivative of each prediction, of its shape; so are the results.
        """

    @abstractmethod
    def detached(self) -> ScoredCall:
        """The same without any graph."""

    def parts(self, weights: Tensor) -> Sequence[tuple[RootedCall, Tensor]]:
        """The call by independent terms, with their weights: itself, where it is made of such."""
        return [(self, weights)]

    def outputs(self) -> int | None:
        """How many columns the root of a term's H has, None where no root is known."""
        return None

    def fisher_root(self, weights: Tensor) -> FisherRoot | None:
        """√w H^½ of every term, None where no root of H is known."""
        return None


class RootedCall(Protocol):
    """Independent terms of a prediction with a square root of their Fisher information."""

    name: str
    predictions: tuple[Tensor, ...]

    def outputs(self) -> int | None:
        """How many columns the root of a term's H has, None where no root is known."""

    def fisher_root(self, weights: Tensor) -> FisherRoot | None:
        """√w H^½ of every term, None where no root of H is known."""


@dataclass(frozen=True)
class FisherRoot:
    """w H = B Bᵀ of every term, with B = √w H^½.

    Attributes:
        columns: B's columns, each of η's shape `[terms, ...]`.
        residuals: ρ of each column, `[terms]`: d(objective)/dη = Σ_c B_c ρ_c.
        pull_back: carries d/dη to d/d(each prediction).
    """

    columns: list[Tensor]
    residuals: list[Tensor]
    pull_back: Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class LossCall(ScoredCall):
    """One observed loss.

    Attributes:
        name: of the torch function.
        family: makes the predictive distribution of natural parameters.
        predictions: the arguments that the model computed, with their graph.
        natural: maps `predictions` to the natural parameters `[terms, ...]`, differentiably.
        target: what the family's `nll` scores, a row a term.
        mass: `[terms]`, how many units of the family's `nll` one element of the unreduced loss is;
            `[terms, elements]` where a term has several.
        divisor: what the reduction divides the sum of all elements by; None for `"none"`.
        layout: maps a gradient of the unreduced loss to the shape of `mass`.
        apart: how many neighbouring terms, those along the prediction's last dimension, an exact
            Fisher keeps apart.
    """

    name: str
    family: Callable[[Tensor], Likelihood]
    predictions: tuple[Tensor, ...]
    natural: Callable[..., Tensor]
    target: Tensor
    mass: Tensor
    divisor: Tensor | None
    layout: Callable[[Tensor], Tensor] = flat
    apart: int = 1

    def likelihood(self, predictions: tuple[Tensor, ...] | None = None) -> Likelihood:
        """The family at the natural parameters."""
        tensors = self.predictions if predictions is None else predictions
        return self.family(self.natural(*map(fixed, tensors)))

    def weights(self, gradient: Tensor) -> Tensor:
        """|d(objective)/d(element)| times the element's mass."""
        gradient = widened(gradient).abs()
        if self.divisor is None:
            weights = self.layout(gradient) * self.mass
        else:
            weights = gradient * self.mass / self.divisor
        return weights if weights.dim() == 1 else weights.sum(-1)

    def scores(
        self, kind: FisherKind, weights: Tensor, draws: int, generator: torch.Generator
    ) -> Iterator[tuple[list[Tensor], float]]:
        """Scores of the natural parameters, carried back to the predictions.

        An exact Fisher takes a pass for each natural parameter of a term and each term along the
        last dimension. So each row of an `[N, D]` output is exact, and with it Kronecker factors of
        maps that act on rows; where terms of other dimensions meet in one gradient, in a
        convolution, an attention or a bias, they do so with random signs.
        """
        root_w = weights.sqrt()
        for score, share in self._natural_scores(kind, draws, generator):
            row_w = root_w.reshape(-1, *[1] * (score.dim() - 1))
            # A term that does not count may have any score, nan included.
            yield self.pull_back(torch.where(row_w > 0, row_w * score, 0.0)), share

    def _natural_scores(
        self, kind: FisherKind, draws: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        likelihood = self.likelihood()
        if kind == "exact":
            passes = self.apart * likelihood.natural.shape[1:].numel()
            check_passes(passes, self.name)
            for score in likelihood.exact_scores(self.apart, generator):
                yield score, 1 / passes
            return
        for _ in range(draws):
            if kind == "sampled":
                yield likelihood.sampled_score(generator), 1 / draws
            elif kind == "propagated":
                yield likelihood.propagated_score(generator), 1 / draws
            else:
                yield likelihood.empirical_score(self.target, generator), 1 / draws

    def outputs(self) -> int:
        """As many as a term has natural parameters."""
        return self.likelihood().natural.shape[1:].numel()

    def fisher_root(self, weights: Tensor) -> FisherRoot | None:
        """From the family's own root; ρ = √w H^-½ s is the least solution, s the residual."""
        likelihood = self.likelihood()
        root, s = likelihood.root_matrix(), likelihood.residual(self.target)
        sqrt = weights.sqrt()
        if root.shape[1:] == (1, 1):
            (column,) = root.reshape(1, -1)
            rho = torch.where(column == 0, 0.0, s / column)
            return FisherRoot([sqrt * column], [sqrt * rho], self.pull_back)
        rho = (torch.linalg.pinv(root) @ s[:, :, None])[:, :, 0] * sqrt[:, None]
        columns = [*(root * sqrt[:, None, None]).unbind(-1)]
        return FisherRoot(columns, [*rho.unbind(-1)], self.pull_back)

    def detached(self) -> LossCall:
        """The same with detached predictions."""
        return replace(self, predictions=tuple(t.detach() for t in self.predictions))

    def information(self, weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Forward to the natural parameters, times their Fisher information, and back."""
        likelihood = self.likelihood()
        leaves = [t.detach().requires_grad_() for t in self.predictions]
        with torch.enable_grad():
            natural = self.natural(*(widened(t) for t in leaves))
            dual = torch.zeros_like(natural, requires_grad=True)
            pulled = torch.autograd.grad(natural, leaves, dual, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, dual, [*tangents], retain_graph=True)
        weights = weights.reshape(-1, *[1] * (natural.dim() - 1))
        score = weights * likelihood.information(pushed)
        return list(torch.autograd.grad(natural, leaves, score))

    def pull_back(self, score: Tensor) -> list[Tensor]:
        """Carry d/d(natural parameters), of η's shape, to d/d(each prediction)."""
        leaves = [t.detach().requires_grad_() for t in self.predictions]
        with torch.enable_grad():
            natural = self.natural(*(widened(t) for t in leaves))
        return list(torch.autograd.grad(natural, leaves, score))


def last(shape: torch.Size) -> int:
    """How many elements follow one another along the last dimension; 1 if it is the batch's."""
    return shape[-1] if len(shape) > 1 else 1


def widened(t: Tensor) -> Tensor:
    """In float32 or wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def fixed(t: Tensor) -> Tensor:
    """Detached, in float32 or wider, and not in the memory of a leaf, which a step writes to."""
    wide, origin = widened(t.detach()), t if t._base is None else t._base
    if not (origin.is_leaf and origin.requires_grad):
        return wide
    shared = wide.untyped_storage().data_ptr() == origin.untyped_storage().data_ptr()
    return wide.clone() if shared else wide


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction, which torch's deprecated arguments override."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def divisor_of(reduction: str, count: Tensor | float, like: Tensor) -> Tensor | None:
    """What a reduction divides the sum of `count` elements by."""
    if reduction == "none":
        return None
    return torch.as_tensor(count if reduction == "mean" else 1.0, device=like.device)


@dataclass(frozen=True)
class Location:
    """Which side of a loss of a difference a - b the model predicts.

    Either side may be the model's; where both are, the prediction is their difference, and the
    observation that it is zero.

    Attributes:
        predictions: the sides that require grad.
        observed: what the location is compared with, `[terms]`, float32 or wider.
        shape: of the unreduced loss.
    """

    predictions: tuple[Tensor, ...]
    observed: Tensor
    shape: torch.Size

    @staticmethod
    def of(input: Tensor, target: Tensor, shape: torch.Size | None = None) -> Location | None:
        """Sort out the sides; None if neither requires grad."""
        shape = torch.broadcast_shapes(input.shape, target.shape) if shape is None else shape
        if input.requires_grad and target.requires_grad:
            predictions: tuple[Tensor, ...] = (input, target)
            observed = input.new_zeros(())
        elif input.requires_grad or target.requires_grad:
            predictions, observed = (
                ((input,), target) if input.requires_grad else ((target,), input)
            )
        else:
            return None
        dtype = torch.promote_types(predictions[0].dtype, torch.float32)
        return Location(predictions, observed.detach().to(dtype).expand(shape).reshape(-1), shape)

    def __call__(self, *sides: Tensor) -> Tensor:
        """The location `[terms]` that `predictions` give, differentiably."""
        location = sides[0] if len(sides) == 1 else sides[0] - sides[1]
        return location.expand(self.shape).reshape(-1)

    def error(self) -> Tensor:
        """|prediction - observation|, `[terms]`."""
        return (self(*(widened(t.detach()) for t in self.predictions)) - self.observed).abs()

    def elements(self, weight: Tensor | None) -> Tensor:
        """The loss's own weight of each term, `[terms]`."""
        one = self.observed.new_ones(()) if weight is None else weight.to(self.observed.dtype)
        return one.expand(self.shape).reshape(-1)
