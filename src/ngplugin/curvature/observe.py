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

What an objective says beside the recognised losses is known as a function of the outputs of the
model's last layers: the tape has the calls between. The first value to get a gradient is the
objective itself; a hook there measures the curvature of this function, before the recognised
losses get their gradients.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ngplugin.curvature.activation_checkpointing import reentrant_checkpoints_opened
from ngplugin.curvature.composites import examples, opened
from ngplugin.curvature.dependence import depends
from ngplugin.curvature.hidden_backward import gradients_set_aside
from ngplugin.curvature.likelihoods import FisherKind as FisherKind
from ngplugin.curvature.likelihoods import (
    OutputCurvature,
    OwnLoss,
    ScoredCall,
    read_log_prob,
    read_loss_call,
    watching_log_prob,
)
from ngplugin.curvature.likelihoods.loss_call import widened
from ngplugin.curvature.observation import Observation, ScoredLoss
from ngplugin.curvature.process_wide import ProcessWide
from ngplugin.curvature.ranks import joined, several_ranks
from ngplugin.curvature.recorded_call import Mark, tensors_in
from ngplugin.curvature.score_backward import ScoreBackward, ScoreSink
from ngplugin.curvature.static_graph import unannounced
from ngplugin.curvature.subclasses import plain
from ngplugin.curvature.tail import Tail
from ngplugin.curvature.tape import Tape
from ngplugin.curvature.taps import (
    LAYERS,
    LookupCall,
    MapCall,
    read_map_call,
    read_norm_call,
)

_SAME = 1e-2  # relative difference of a value that is computed again, in any precision

# Compiled code would hide its calls; the unobserved steps still run compiled.
_EAGER = ProcessWide(lambda: torch.compiler.set_stance("force_eager"))
_ACTIVE: list[Observer] = []  # those that watch now


_OVERWRITTEN = (
    "ngplugin: what `{0}` scored was written to between the loss and backward(), so this step "
    "gives no Fisher information. Usual cause: a metric that works in place, such as "
    "`logits.sigmoid_()` or an assignment to `logits.detach()[...]`. Have it work on a clone, or "
    "after backward()."
)

_NO_SCALER = (
    "ngplugin: what `{0}` scored is in float16, and no loss scaler is known. If a "
    "torch.amp.GradScaler multiplies the loss before backward(), tell it: "
    "`with optimizer.observe(scaler=scaler):`. Otherwise steps are too short by its factor. "
    "(Lightning's callback does so by itself.)"
)

_NO_WAY_BACK = (
    "ngplugin: the derivative of `{0}` cannot be had by torch.autograd.grad, so parameters get the "
    "empirical Fisher of their gradients, as a diagonal. Usual cause: a custom autograd.Function "
    "that checkpoints, as those of DeepSpeed and fairscale. torch.utils.checkpoint is seen "
    "through, with use_reentrant either way. It says: {1}"
)


class LossScaler(Protocol):
    """What of `torch.amp.GradScaler` is of interest."""

    def get_scale(self) -> float:
        """The present factor."""


def active(thread: int | None = None) -> list[Observer]:
    """Those that watch a thread now, the innermost last; None for this one."""
    thread = threading.get_ident() if thread is None else thread
    return [observer for observer in tuple(_ACTIVE) if observer._thread == thread]


class Observer(TorchFunctionMode):
    """The context in which one training step is observed; may be entered for each micro-batch.

    Args:
        parameters: whose Fisher information is wanted.
        sink: takes the scores; None if only the prediction is to be recorded.
        record: keep a tape, so that the predictions can be computed again.
        kind: how scores are drawn.
        draws: number of scores for each loss.
        generator: private source of randomness for the scores.
        scaler: what multiplies the objective before its backward pass, if anything does, and
            divides the gradients afterwards.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        sink: ScoreSink | None,
        record: bool,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
        scaler: LossScaler | None = None,
    ) -> None:
        super().__init__()
        self._parameters = {id(p): p for p in parameters}
        self._kind = kind
        self._draws = draws
        self._generator = generator
        self._scaler = scaler
        self._thread = threading.get_ident()  # a mode watches that alone
        self._paused = False
        self._examples: int | None = None  # inside a composite, where rows have them last
        self._in_log_prob = False
        self._differentiating = False  # inside a torch.autograd.grad of the user's
        self._contexts = ExitStack()
        self.restart(sink, record)

    def __enter__(self) -> Any:
        """Start watching."""
        if "torch._dynamo" in sys.modules:
            self._contexts.enter_context(_EAGER.made())
        self._contexts.enter_context(watching_log_prob(self._log_prob))
        self._contexts.enter_context(reentrant_checkpoints_opened())
        _ACTIVE.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        """Stop watching; the hooks on the losses stay until the backward pass has fired them."""
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        _ACTIVE.remove(self)
        self._contexts.close()

    def restart(self, sink: ScoreSink | None, record: bool) -> Observation:
        """Begin a new observation, the step of the old one having been made; returns the new.

        Args:
            sink: as in the constructor, for this step.
            record: likewise; without either, the calls pass by unseen.
        """
        self._backward = None
        if sink is not None:
            self._backward = ScoreBackward(sink, self._kind, self._draws, self._generator)
        self._idle = sink is None and not record
        tape = Tape([*self._parameters.values()], LAYERS)
        self.observation = Observation(tape, record, sink is not None)
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
        if self._paused or self._idle:
            return func(*args, **kwargs)
        if any(map(is_lazy, args)):  # a parameter that has yet to be made
            return func(*args, **kwargs)
        body = opened(func) if self._backward is not None else None
        if body is not None:  # its parts are recorded, and not the whole
            with _Again(self, examples(*args, **kwargs)):
                return body(*args, **kwargs)
        looked_for = torch.is_grad_enabled() and not self._in_log_prob and self._kind != "ggn"
        tape = self.observation.tape
        read, named = tape.plain((args, kwargs)) if types else (args, kwargs)
        loss = read_loss_call(func, read, named) if looked_for else None
        mark = tape.mark(loss.predictions) if loss is not None else None
        with self._differentiation(func is torch.autograd.grad):
            result = tape.run(func, args, kwargs)
        if _is_scalar(result) and result.requires_grad:
            self._watch_objective(result)
        if loss is not None and mark is not None and result.requires_grad:
            self._watch_loss(loss, mark, result)
        elif self._backward is not None and isinstance(result, Tensor) and result.requires_grad:
            call = read_map_call(func, read, named, self._parameters)
            if call is None:
                self._note_other_use(args, kwargs, result)
            elif call.weight.requires_grad and not call.weight.is_complex():
                if self._examples is not None and isinstance(call, MapCall):
                    call = call.with_examples_last(self._examples)
                if not self.observation.maps:
                    self.observation.joined = joined()
                # The edge is taken now: an in-place activation may rewrite the output's history.
                self.observation.maps.append(_with_edge(call, result))
            norm = read_norm_call(func, read, named)
            if norm and any(id(p) in self._parameters for p in (norm.weight, norm.bias)):
                self.observation.norms.append(norm)
        return result

    def _note_other_use(self, args: Any, kwargs: Any, result: Tensor) -> None:
        for t in tensors_in((args, kwargs)):
            weight = t if t.is_leaf or t._base is None else t._base
            if id(weight) in self._parameters and result._base is not weight:
                self.observation.elsewhere[id(weight)] = weight

    def _log_prob(
        self, compute: Callable[[], Tensor], distribution: Distribution, value: Tensor
    ) -> Tensor:
        """Run one `log_prob` of the user's code, which is no torch function, and note what it was.

        What it calls in turn, be it another distribution's `log_prob`, is part of it.
        """
        ignored = self._paused or self._idle or self._in_log_prob or self._kind == "ggn"
        if ignored or not torch.is_grad_enabled():
            return compute()
        call = read_log_prob(distribution, value)
        if call is None:
            return compute()
        tape = self.observation.tape
        mark = tape.mark(call.predictions)
        self._in_log_prob = True
        try:
            result = compute()
        finally:
            self._in_log_prob = False
        if result.requires_grad:
            self._watch_loss(replace(call, shape=result.shape), mark, result)
        return result

    def declare(
        self,
        loss: Tensor,
        distribution: Distribution,
        observed: Tensor,
        weight: Tensor | float | None,
    ) -> bool:
        """Take a distribution for what the model predicts, whatever the loss was computed of.

        Returns:
            False if the loss or the distribution does not depend on the model.
        """
        observation = self.observation
        call, place = read_log_prob(distribution, observed), observation.tape.place(loss)
        if call is None or place is None or not loss.requires_grad:
            return False
        mark = observation.tape.mark(call.predictions)
        with torch.no_grad(), self.paused():
            one = call.predictions[0].new_ones(distribution.log_prob(observed).shape)
            weights = one / one.numel() if weight is None else weight * one
            observation.tape.score(loss)
        call = replace(call, shape=one.shape)
        memory = observation.tape.upstream(place)
        observation.silenced |= memory
        observation.claimed |= memory
        self._on_gradient(loss, lambda g: self._score(observation, call, mark, g * weights))
        return True

    def _watch_loss(self, loss: ScoredCall, mark: Mark, value: Tensor) -> None:
        observation = self.observation
        observation.recognised += 1
        with self.paused():
            observation.tape.score(value)
        place = observation.tape.place(value)
        versions = [t._version for t in loss.predictions]

        def on_gradient(gradient: Tensor) -> None:
            if place is not None and observation.tape.memory(place) <= observation.silenced:
                return
            if not depends(loss.predictions, self._parameters):
                return  # the objective of another optimizer's parameters
            if versions == [t._version for t in loss.predictions]:
                self._score(observation, loss, mark, gradient)
            else:
                warnings.warn(_OVERWRITTEN.format(loss.name), stacklevel=2)

        self._on_gradient(value, on_gradient)

    def _watch_objective(self, value: Tensor) -> None:
        """Look at what a scalar is made of beside recognised losses, if it is an objective."""
        observation, place = self.observation, self.observation.tape.place(value)
        # It may be the objective of another optimizer, of what these parameters made, detached.
        if place is None or not depends([value], self._parameters):
            return
        with torch.no_grad(), self.paused():  # it may be written to
            seen = widened(plain(torch.clone(torch.detach(value)))).reshape(())

        def on_gradient(gradient: Tensor) -> None:
            if not observation.claim(place):
                return
            tail, loss = self._own_loss(observation, place, seen)
            if tail is not None and loss is not None:
                self._score(observation, loss, tail.mark, gradient)

        self._on_gradient(value, on_gradient)

    def _on_gradient(self, value: Tensor, act: Callable[[Tensor], None]) -> None:
        """Act when the training step's own backward reaches a value."""
        observation = self.observation

        def hook(gradient: Tensor) -> None:
            # With grad mode on this is a derivative taken inside the objective (create_graph=True);
            # while paused, it is our own.
            if torch.is_grad_enabled() or self._differentiating or self._paused:
                return
            started = time.perf_counter()
            gradient = plain(gradient)
            if self._scaler is not None:
                gradient = gradient / self._scaler.get_scale()
            tape = observation.tape
            with ExitStack() as context:
                context.enter_context(torch.no_grad())
                context.enter_context(self.paused())
                context.enter_context(tape.keeping_buffers())
                if tape.hides_functions:
                    context.enter_context(gradients_set_aside(self._parameters.values()))
                act(gradient)
            observation.seconds += time.perf_counter() - started

        value.register_hook(hook)
        observation.hooks.append(weakref.ref(hook))

    def _score(
        self, observation: Observation, loss: ScoredCall, mark: Mark, gradient: Tensor
    ) -> None:
        if self._scaler is None and any(p.dtype == torch.float16 for p in loss.predictions):
            warnings.warn(_NO_SCALER.format(loss.name), stacklevel=2)
        weights = loss.weights(gradient)
        likelihood = loss.likelihood()
        if self._backward is not None and weights.numel():  # a batch may be empty
            try:
                with unannounced(loss.predictions):
                    self._backward.run(observation, loss, weights)
            except (RuntimeError, ValueError) as refusal:
                known = type(refusal) is RuntimeError and observation.tape.hides_functions
                # Of several processes it may be a message that never came.
                if known and not (several_ranks() and ".grad" not in str(refusal)):
                    warnings.warn(_NO_WAY_BACK.format(loss.name, refusal), stacklevel=2)
                elif all(bool(t.isfinite().all()) for t in loss.predictions):
                    # Of others no label can be drawn, as some samplers say by an error.
                    raise
        observation.scored.append(ScoredLoss(loss.detached(), likelihood, weights, mark))

    def _own_loss(
        self, observation: Observation, place: Mark, seen: Tensor
    ) -> tuple[Tail | None, OwnLoss | None]:
        """What an objective says of the outputs of the last layers beside recognised losses.

        Args:
            observation: of the step.
            place: of the objective.
            seen: its value, a scalar.
        """
        found, known = None, None
        for deep in (False, True):
            tail = Tail(observation.tape, place, deep)
            begins = [*map(id, tail.mark.tensors)]
            if not tail.outputs or begins == known:
                continue
            if any(t.is_complex() for t in tail.outputs):
                continue
            curvature = OutputCurvature(tail, tail.outputs, self._generator)
            if not torch.isclose(curvature.value, seen, rtol=_SAME, equal_nan=True):
                continue  # the calls that were seen are not all that made it
            found, known = (tail, OwnLoss(tail.outputs, curvature, not tail.fixed)), begins
            if curvature.straight < 1.0:
                break
        return found or (None, None)

    @contextmanager
    def _differentiation(self, on: bool) -> Iterator[None]:
        self._differentiating = on
        try:
            yield
        finally:
            self._differentiating = False


def _with_edge(
    call: MapCall | LookupCall, result: Tensor
) -> tuple[MapCall | LookupCall, GradientEdge]:
    """A call and where its score is met; of a view, as `einsum` returns, that is its base.

    What is written to a view rewrites the view's history, and takes up that of its base.
    """
    base = result._base
    if base is None or base.numel() != result.numel() or not base.is_contiguous():
        return call, get_gradient_edge(result)
    offset = int(result.storage_offset() - base.storage_offset())
    shape, strides, rows = result.shape, result.stride(), call.score_rows

    def score_rows(score: Tensor) -> Tensor:
        score = score.contiguous()  # it may lie in the middle of another tensor all the same
        return rows(score.as_strided(shape, strides, int(score.storage_offset()) + offset))

    return replace(call, score_rows=score_rows), get_gradient_edge(base)


def _is_scalar(result: Any) -> bool:
    return isinstance(result, Tensor) and result.numel() == 1 and result.is_floating_point()


class _Again(AbstractContextManager[None]):
    """Puts a mode that is handling a call back on, for the calls inside it."""

    def __init__(self, observer: Observer, examples: int) -> None:
        self._observer = observer
        self._examples = examples

    def __enter__(self) -> None:
        self._observer._examples = self._examples
        TorchFunctionMode.__enter__(self._observer)

    def __exit__(self, *exc: Any) -> None:
        self._observer._examples = None
        TorchFunctionMode.__exit__(self._observer, *exc)


class _Paused(AbstractContextManager[None]):
    """None of our own calls is seen, by whichever optimizer's observer.

    The backward pass may be in a thread of the device's, where our calls are seen by nobody.
    """

    def __init__(self, observer: Observer) -> None:
        self._observers = {observer, *active(observer._thread)}

    def __enter__(self) -> None:
        self._were = {observer: observer._paused for observer in self._observers}
        for observer in self._observers:
            observer._paused = True

    def __exit__(self, *exc: Any) -> None:
        for observer, was in self._were.items():
            observer._paused = was
