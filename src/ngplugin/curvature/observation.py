"""What one observed training step showed: its losses, its maps, and its tape."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngplugin.curvature.likelihoods import Prediction, ScoredCall
from ngplugin.curvature.likelihoods.loss_calls import RECOGNISED
from ngplugin.curvature.recorded_call import Mark
from ngplugin.curvature.tape import Tape
from ngplugin.curvature.taps import LookupCall, MapCall, NormCall


@dataclass
class ScoredLoss:
    """A loss that turned out to be part of the objective.

    Attributes:
        call: how to read its predictions (detached: no graph is kept).
        likelihood: p_θ, as predicted.
        weights: w of each term, `[terms]`.
        mark: where the tape has the predictions.
    """

    call: ScoredCall
    likelihood: Prediction
    weights: Tensor
    mark: Mark

    def kl(self, predictions: tuple[Tensor, ...]) -> Tensor:
        """Σ_i w_i KL(p_θ ‖ p_new) at unit dispersion, nats; a scalar."""
        return self._sum(self.likelihood.kl(self.call.likelihood(predictions)))

    def reduction(self, predictions: tuple[Tensor, ...]) -> Tensor:
        """Σ_i w_i (-log p_θ + log p_new)(target): how far this loss fell; a scalar."""
        new = self.call.likelihood(predictions)
        return self._sum(self._nll - new.nll(self.call.target))

    def nll(self) -> Tensor:
        """Σ_i w_i KL(data ‖ p_θ) at unit dispersion, nats; a scalar."""
        return self._sum(self.likelihood.divergence(self.call.target, self._nll))

    @functools.cached_property
    def _nll(self) -> Tensor:
        """-log p_θ(target) of every term, `[terms]`."""
        return self.likelihood.nll(self.call.target)

    def dispersion(self, noise_variance: float | Literal["auto"]) -> Tensor:
        """The likelihood's dispersion, as given or estimated from these targets; a scalar."""
        return self.likelihood.dispersion(self.call.target, self.weights, noise_variance)

    def _sum(self, terms: Tensor) -> Tensor:
        """Σ_i w_i x_i; a term that does not count may be anything, such as a missing label's."""
        return torch.where(self.weights > 0, self.weights * terms, 0.0).sum()


@dataclass(eq=False)
class Observation:
    """What one forward and backward pass showed."""

    tape: Tape
    recorded: bool  # whether it is to be replayed
    counted: bool = True  # whether it is a statistic of F
    maps: list[tuple[MapCall | LookupCall, GradientEdge]] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    elsewhere: dict[int, Tensor] = field(default_factory=dict)  # entered what is no known map
    scored: list[ScoredLoss] = field(default_factory=list)
    recognised: int = 0  # loss calls seen, scored or not
    seconds: float = 0.0  # spent on the Fisher backward
    silenced: set[int] = field(default_factory=set)  # memory of losses that a declared one replaces
    claimed: set[int] = field(default_factory=set)  # memory that an objective was computed from
    joined: bool = False  # in a model that processes leave when their batches end
    spent: bool = False  # its backward pass was run, and its gradients were zeroed
    hooks: list[weakref.ref[Any]] = field(default_factory=list)  # as long as the graph has them

    def replay(
        self, leaves: Mapping[int, Tensor] | None = None
    ) -> list[tuple[ScoredLoss, tuple[Tensor, ...]]]:
        """Each scored loss with the predictions that the parameters' present values give.

        With `leaves` in the parameters' places, as differentiable functions of them: see `Tape`.
        """
        losses = sorted(self.scored, key=lambda loss: loss.mark.position)
        marks = [loss.mark for loss in losses]
        return list(zip(losses, self.tape.replay(marks, leaves), strict=True))

    @property
    def over(self) -> bool:
        """Whether no backward pass can come to a loss any more, its graph being gone."""
        return all(hook() is None for hook in self.hooks)

    def forget_scores(self) -> None:
        """Drop what a backward pass has told, its gradients having been zeroed."""
        self.spent = self.spent or bool(self.scored)
        self.scored.clear()

    def release(self) -> None:
        """Let the graph go."""
        self.maps.clear()
        self.tape.release()

    def claim(self, value: Mark) -> bool:
        """Whether a value is an objective: no other one that has a gradient was made from it."""
        memory = self.tape.upstream(value)
        new = not memory <= self.claimed
        self.claimed |= memory
        return new


def why_no_fisher(observations: Sequence[Observation]) -> str:
    """What to tell a user whose observed training step gave no Fisher information."""
    if not observations:
        return (
            "step() before any observed training step. Wrap the forward pass and the loss in "
            "`with optimizer.observe():`, or, with Lightning, pass "
            "`callbacks=[ngplugin.NaturalGradient()]` to the Trainer."
        )
    if not any(observation.scored for observation in observations):
        return (
            "what backward() was called on was not computed inside observe() by torch functions "
            "from the optimizer's parameters, so what the model predicts is unknown. Usual causes: "
            "the loss is the result of a custom autograd.Function or of a scripted module, it was "
            "computed outside the observed region, or backward() was given a tensor of several "
            f"elements. Reduce it to a scalar there. Recognised losses: {', '.join(RECOGNISED)}; "
            "log_prob of any torch.distributions.Distribution that can be sampled; and any "
            "function of the model's outputs that is written in torch functions."
        )
    return (
        "the first batches gave no Fisher information: the losses weigh nothing or are not finite. "
        "Usual causes: inf or nan in the data or the loss, or a loss multiplied by zero or by a "
        "negative number."
    )
