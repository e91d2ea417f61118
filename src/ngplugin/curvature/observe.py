"""Watches one training step: which losses were scored, and through which maps they were reached.

`Observer` is a `TorchFunctionMode`: while it is active every torch call of the user's code passes
through it. It notes the maps whose weight is one of the watched parameters (by identity, so tied
weights, functional code and layers called many times are all the same to it) and the losses that
score a prediction. Nothing of the user's code is replaced or called twice.

The Fisher information is formed inside the user's own backward pass. A hook on each loss value
receives d(objective)/d(loss), which is how much that loss counts whatever was done to it; a loss
that is no part of the objective never gets one. There a random score is drawn from the model's own
prediction and carried back to the outputs of the maps. That backward pass computes no weight
gradients and leaves `.grad` and distributed reducers alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from ngplugin.curvature.composites import opened
from ngplugin.curvature.likelihoods import FisherKind as FisherKind
from ngplugin.curvature.likelihoods import (
    Prediction,
    ScoredCall,
    read_log_prob,
    read_loss_call,
    watching_log_prob,
)
from ngplugin.curvature.likelihoods.loss_calls import RECOGNISED
from ngplugin.curvature.tape import Mark, Tape
from ngplugin.curvature.taps import LookupCall, MapCall, NormCall, read_map_call, read_norm_call


class ScoreSink(Protocol):
    """What takes the scores in: the Fisher matrix under construction."""

    def add_rows(self, loss: ScoredCall, weights: Tensor) -> None:
        """Take what is wanted of a loss beside scores, while its graph is there."""

    def takes(self, p: Tensor) -> bool:
        """Whether scores are wanted of a parameter."""

    def assign(self, calls: Sequence[MapCall | LookupCall], norms: Sequence[NormCall]) -> None:
        """Learn which parameters act through which maps and normalizations."""

    def unmapped(self) -> list[Tensor]:
        """The parameters whose score is wanted as a plain gradient."""

    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Take d(score)/d(output of a map), counting `share` of a draw."""

    def add_gradient_scores(self, scores: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
        """Take each parameter with its d(score)/d(parameter), counting `share` of a draw."""


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
    mark: Mark | None

    def kl(self, predictions: tuple[Tensor, ...]) -> Tensor:
        """Σ_i w_i KL(p_θ ‖ p_new) at unit dispersion, nats; a scalar."""
        return (self.weights * self.likelihood.kl(self.call.likelihood(predictions))).sum()

    def reduction(self, predictions: tuple[Tensor, ...]) -> Tensor:
        """Σ_i w_i (-log p_θ + log p_new)(target): how far this loss fell; a scalar."""
        new = self.call.likelihood(predictions)
        target = self.call.target
        return (self.weights * (self.likelihood.nll(target) - new.nll(target))).sum()

    def nll(self) -> Tensor:
        """Σ_i w_i KL(data ‖ p_θ) at unit dispersion, nats; a scalar."""
        return (self.weights * self.likelihood.divergence(self.call.target)).sum()

    def dispersion(self, noise_variance: float | Literal["auto"]) -> Tensor:
        """The likelihood's dispersion, as given or estimated from these targets; a scalar."""
        return self.likelihood.dispersion(self.call.target, self.weights, noise_variance)


@dataclass
class Observation:
    """What one forward and backward pass showed."""

    tape: Tape | None
    maps: list[tuple[MapCall | LookupCall, GradientEdge]] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    scored: list[ScoredLoss] = field(default_factory=list)
    recognised: int = 0  # loss calls seen, scored or not
    seconds: float = 0.0  # spent on the Fisher backward

    def replay(self) -> list[tuple[ScoredLoss, tuple[Tensor, ...]]]:
        """Each scored loss with the predictions that the parameters' present values give."""
        assert self.tape is not None
        losses = sorted(
            (loss for loss in self.scored if loss.mark is not None),
            key=lambda loss: loss.mark.position,  # type: ignore[union-attr]
        )
        marks = [loss.mark for loss in losses if loss.mark is not None]
        return list(zip(losses, self.tape.replay(marks), strict=True))


class Observer(TorchFunctionMode):
    """The context in which one training step is observed; may be entered for each micro-batch.

    Args:
        parameters: whose Fisher information is wanted.
        sink: takes the scores; None if only the prediction is to be recorded.
        record: keep a tape, so that the predictions can be computed again.
        kind: how scores are drawn.
        draws: number of scores for each loss.
        generator: private source of randomness for the scores.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        sink: ScoreSink | None,
        record: bool,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._parameters = {id(p): p for p in parameters}
        self._sink = sink
        self._kind = kind
        self._draws = draws
        self._generator = generator
        self._paused = False
        self._in_log_prob = False
        self._contexts = ExitStack()
        self.observation = Observation(Tape(parameters) if record else None)

    def __enter__(self) -> Any:
        """Start watching."""
        if "torch._dynamo" in sys.modules:
            # Compiled code would hide its calls; the unobserved steps still run compiled.
            self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
        self._contexts.enter_context(watching_log_prob(self._log_prob))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        """Stop watching; the hooks on the losses stay until the backward pass has fired them."""
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._contexts.close()

    def restart(self) -> Observation:
        """Begin a new observation, the step of the old one having been made; returns the new."""
        self.observation = Observation(
            None if self.observation.tape is None else Tape([*self._parameters.values()])
        )
        return self.observation

    def paused(self) -> AbstractContextManager[None]:
        """A context in which nothing is observed, for our own torch calls."""
        return _Paused(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch call of the user's code, and note what it was."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        body = opened(func) if self._sink is not None else None
        if body is not None:  # its parts are recorded, and not the whole
            with _Again(self):
                return body(*args, **kwargs)
        looked_for = torch.is_grad_enabled() and not self._in_log_prob
        loss = read_loss_call(func, args, kwargs) if looked_for else None
        tape = self.observation.tape
        mark = tape.mark(loss.predictions) if tape is not None and loss is not None else None
        result = func(*args, **kwargs) if tape is None else tape.run(func, args, kwargs)
        if loss is not None and result.requires_grad:
            self._watch_loss(loss, mark, result)
        elif self._sink is not None and isinstance(result, Tensor) and result.requires_grad:
            call = read_map_call(func, args, kwargs)
            if call and call.weight.requires_grad and id(call.weight) in self._parameters:
                # The edge is taken now: an in-place activation may rewrite the output's history.
                self.observation.maps.append((call, get_gradient_edge(result)))
            norm = read_norm_call(func, args, kwargs)
            if norm and any(id(p) in self._parameters for p in (norm.weight, norm.bias)):
                self.observation.norms.append(norm)
        return result

    def _log_prob(
        self, compute: Callable[[], Tensor], distribution: Distribution, value: Tensor
    ) -> Tensor:
        """Run one `log_prob` of the user's code, which is no torch function, and note what it was.

        What it calls in turn, be it another distribution's `log_prob`, is part of it.
        """
        if self._paused or self._in_log_prob or not torch.is_grad_enabled():
            return compute()
        call = read_log_prob(distribution, value)
        if call is None:
            return compute()
        tape = self.observation.tape
        mark = None if tape is None else tape.mark(call.predictions)
        self._in_log_prob = True
        try:
            result = compute()
        finally:
            self._in_log_prob = False
        if result.requires_grad:
            self._watch_loss(replace(call, shape=result.shape), mark, result)
        return result

    def _watch_loss(self, loss: ScoredCall, mark: Mark | None, value: Tensor) -> None:
        observation = self.observation
        observation.recognised += 1

        def on_gradient(gradient: Tensor) -> None:
            # With grad mode on this is a derivative taken inside the objective (create_graph=True),
            # not the training step's own backward.
            if torch.is_grad_enabled():
                return
            started = time.perf_counter()
            with torch.no_grad(), self.paused():
                weights = loss.weights(gradient)
                likelihood = loss.likelihood()
                if self._sink is not None:
                    self._backward(observation, loss, weights)
            observation.scored.append(ScoredLoss(loss.detached(), likelihood, weights, mark))
            observation.seconds += time.perf_counter() - started

        value.register_hook(on_gradient)

    def _backward(self, observation: Observation, loss: ScoredCall, weights: Tensor) -> None:
        """F = Σ_i w_i J_iᵀ H_i J_i, from scores s_i of mean 0 and covariance H_i.

        Terms are independent, so the gradient of Σ_i √w_i s_i has the covariance F.
        """
        assert self._sink is not None
        self._sink.add_rows(loss, weights)
        maps = [m for m in observation.maps if self._sink.takes(m[0].weight)]
        norms = [n for n in observation.norms if n.weight is None or self._sink.takes(n.weight)]
        self._sink.assign([call for call, _ in maps], norms)
        unmapped = [p for p in self._sink.unmapped() if p.requires_grad]
        inputs: Any = [*(edge for _, edge in maps), *unmapped]
        if not inputs:
            return
        for _ in range(self._draws):
            scores = torch.autograd.grad(
                loss.predictions,
                inputs,
                [
                    g.to(p.dtype)
                    for g, p in zip(
                        loss.draw(self._kind, weights, self._generator),
                        loss.predictions,
                        strict=True,
                    )
                ],
                retain_graph=True,
                allow_unused=True,
            )
            for (call, _), score in zip(maps, scores, strict=False):
                if score is not None:
                    self._sink.add_map_score(call, score, 1 / self._draws)
            gradients = zip(unmapped, scores[len(maps) :], strict=True)
            self._sink.add_gradient_scores(
                [(p, score) for p, score in gradients if score is not None], 1 / self._draws
            )


class _Again(AbstractContextManager[None]):
    """Puts a mode that is handling a call back on, for the calls inside it."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self._observer)

    def __exit__(self, *exc: Any) -> None:
        TorchFunctionMode.__exit__(self._observer, *exc)


class _Paused(AbstractContextManager[None]):
    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __enter__(self) -> None:
        self._was = self._observer._paused
        self._observer._paused = True

    def __exit__(self, *exc: Any) -> None:
        self._observer._paused = self._was


def why_no_fisher(observations: Sequence[Observation]) -> str:
    """What to tell a user whose observed training step gave no Fisher information."""
    known = (
        "Recognised losses: "
        + ", ".join(RECOGNISED)
        + "; and log_prob of any torch.distributions.Distribution that can be sampled."
    )
    if not observations:
        return (
            "step() before any observed training step. Wrap the forward pass and the loss in "
            "`with optimizer.observe():`, or, with Lightning, pass "
            "`callbacks=[ngplugin.NaturalGradient()]` to the Trainer."
        )
    if not any(observation.recognised for observation in observations):
        return (
            "the observed training step called no loss function that reveals what the model "
            "predicts, so its Fisher information is unknown. Usual cause: a loss written by hand. "
            f"Call the torch function instead. {known}"
        )
    if not any(observation.scored for observation in observations):
        return (
            "no recognised loss of the observed step is part of what backward() was called on. "
            f"Usual cause: the objective is computed by hand beside it. {known}"
        )
    return (
        "the statistics of the first observed step are not finite. Usual cause: inf or nan in the "
        "batch or the loss."
    )
