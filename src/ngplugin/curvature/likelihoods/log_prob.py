"""Any `torch.distributions` object that is scored by its `log_prob`.

`log_prob` is no torch function, so it is watched by wrapping the method of every class of
distributions for a while. The parameters of a distribution are the tensors found in it that require
grad, also in the distributions and transforms that it is made of. Cut there, the distribution is a
function of them alone: a copy with other tensors in their place gives scores (the gradient of its
`log_prob` at its own samples) and, with the tensors that a changed model predicts, the KL.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, kl_divergence

from ngplugin.curvature.likelihoods.distribution_parts import rebuilt, tensors_in, trees
from ngplugin.curvature.likelihoods.distribution_root import gradient, root_of
from ngplugin.curvature.likelihoods.likelihood import (
    FisherKind,
    Prediction,
    check_passes,
    random_signs,
    turns,
)
from ngplugin.curvature.likelihoods.loss_call import ScoredCall, fixed, last, widened
from ngplugin.curvature.process_wide import ProcessWide

_DRAWS = 64  # for information that is not to be had from the KL
_SAMPLES = 16  # for each term's KL where it has no closed form


@dataclass(frozen=True)
class LogProbCall(ScoredCall):
    """One observed `log_prob`; each element of its value is a term.

    Attributes:
        name: `log_prob` of the distribution's class.
        predictions: the distribution's tensors that require grad.
        target: the argument.
        distribution: whose method it was, as it was before the call.
        shape: of the value.
    """

    name: str
    predictions: tuple[Tensor, ...]
    target: Tensor
    distribution: Distribution
    shape: torch.Size = field(default_factory=torch.Size)

    def likelihood(self, predictions: tuple[Tensor, ...] | None = None) -> Scored:
        """The distribution with these tensors in it."""
        tensors = self.predictions if predictions is None else predictions
        return Scored(self._with([*map(fixed, tensors)]), self.shape)

    def weights(self, gradient: Tensor) -> Tensor:
        """|d(objective)/d(log p)|."""
        return widened(gradient).abs().reshape(-1)

    def scores(
        self, kind: FisherKind, weights: Tensor, draws: int, generator: torch.Generator
    ) -> Iterator[tuple[list[Tensor], float]]:
        """Σ_i √w_i s_i in the distribution's tensors.

        What `distribution_root` cannot work out exactly, which are distributions of infinitely many
        outcomes without a registered KL (a mixture, Student's t), an exact Fisher has from 32 draws
        for each term.
        """
        if kind in ("sampled", "empirical"):
            for _ in range(draws):
                factors, y = weights.sqrt(), self.target
                if kind == "empirical":
                    factors = factors * random_signs(factors, generator)
                else:
                    y = self.likelihood().sample(_seed(generator))
                nll = functools.partial(self._nll, y)
                yield gradient(self._wide(), nll, factors), 1 / draws
            return
        part, shape, root_w = self._parted(weights)
        tensors = self._wide()

        def at(others: Sequence[Tensor]) -> Distribution:
            return self._with(others, part)

        def draw(count: int) -> Tensor:
            # From a copy: what it caches on the way would hide the tensors from `at`.
            return Scored(at(tensors), shape).samples(count, _seed(generator))

        root = root_of(tensors, shape, at, draw)
        like = root_w.new_empty(1, 1).expand(len(root_w), root.columns)
        if kind == "propagated":
            for _ in range(draws):
                yield root(root_w[:, None] * random_signs(like, generator)), 1 / draws
            return
        apart = last(shape) if root.apart else 1
        check_passes(apart * root.columns, self.name)
        for vector in turns(like, apart, generator):
            yield root(root_w[:, None] * vector), 1 / (apart * root.columns)

    def _nll(self, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return -self._with(tensors).log_prob(y).reshape(-1)

    def _wide(self) -> list[Tensor]:
        return [widened(t.detach()) for t in self.predictions]

    def _parted(self, weights: Tensor) -> tuple[Distribution, torch.Size, Tensor]:
        """The same as a distribution with one term for each element of its batch: its part, √w.

        `Independent` ones are taken apart: the information of a sum is the sum. Terms that share
        one element of the batch have the same information, and their weights add up.
        """
        part, w = self.distribution, weights.reshape(self.shape)
        batch = part.batch_shape
        if _broadcasts(batch, self.shape) and _says_its_shape(self._with(self.predictions)):
            w = w.sum_to_size(batch)
        while isinstance(part, Independent) and w.shape == part.batch_shape:
            part = part.base_dist
            inner = part.batch_shape
            w = w.reshape(*w.shape, *[1] * (len(inner) - w.dim())).expand(inner)
        return part, w.shape, w.reshape(-1).sqrt()

    def information(self, weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        """-∂∂' Σ_i w_i KL(p_i ‖ p'_i) at p' = p, once by either side.

        Unlike the second derivative by one side this needs first derivatives of the distribution's
        tensors only, so it may not matter that they depend on each other, as normalized logits do
        (Eguchi 1983, Second Order Efficiency of Minimum Contrast Estimators, doi 10.1214/aos/
        1176346246). Where the KL is estimated from samples, so is this.
        """
        base = self.distribution
        while isinstance(base, Independent):
            base = base.base_dist
        if isinstance(base, Laplace):  # whose KL, made of an absolute value, hides its curvature
            return self._sampled_information(weights, tangents)
        ours, others = (
            [widened(t.detach()).requires_grad_() for t in self.predictions] for _ in range(2)
        )
        with torch.enable_grad():
            p, q = (Scored(self._with(tensors), self.shape) for tensors in (ours, others))
            kl = (weights * p.kl(q)).sum()
            slopes = torch.autograd.grad(kl, ours, create_graph=True, allow_unused=True)
            along = sum(
                ((s * t).sum() for s, t in zip(slopes, tangents, strict=True) if s is not None),
                start=kl.new_zeros(()),
            )
        parts = torch.autograd.grad(along, others, allow_unused=True)
        return [
            torch.zeros_like(t) if part is None else -part
            for part, t in zip(parts, others, strict=True)
        ]

    def _sampled_information(self, weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Σ_i w_i E[s_i s_iᵀ] t, from samples that are the same in every call."""
        tensors = self._wide()
        total = [torch.zeros_like(t) for t in tensors]
        for seed in range(_DRAWS):
            y = self.likelihood().sample(seed)
            leaves = [t.detach().requires_grad_() for t in tensors]
            with torch.enable_grad():
                nll = self._nll(y, leaves)  # [terms]
                dual = torch.zeros_like(nll).requires_grad_()  # sᵀt is linear in it
                slopes = torch.autograd.grad(
                    nll, leaves, dual, create_graph=True, allow_unused=True, materialize_grads=True
                )
                along = sum(
                    ((s * t).sum() for s, t in zip(slopes, tangents, strict=True)),
                    start=nll.new_zeros(()),
                )
            (st,) = torch.autograd.grad(along, dual)
            parts = gradient(tensors, functools.partial(self._nll, y), weights * st)
            total = [a + part / _DRAWS for a, part in zip(total, parts, strict=True)]
        return total

    def detached(self) -> LogProbCall:
        """The same with detached tensors in the distribution."""
        tensors = tuple(t.detach() for t in self.predictions)
        return replace(self, predictions=tensors, distribution=self._with(tensors))

    def _with(self, tensors: Any, distribution: Distribution | None = None) -> Distribution:
        """This distribution, or a part of it, with other tensors in it."""
        replaced = {id(old): new for old, new in zip(self.predictions, tensors, strict=True)}
        copy: Distribution = rebuilt(distribution or self.distribution, replaced, {})
        return copy


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


class Scored(Prediction):
    """A distribution with the shape of its `log_prob`."""

    def __init__(self, distribution: Distribution, shape: torch.Size) -> None:
        self.distribution = distribution
        self.shape = shape

    def kl(self, other: Any) -> Tensor:
        """As registered with torch, or estimated from samples.

        E_p[q/p - 1 - log(q/p)] is the KL, each of its samples is positive, and they vary little
        where p and q are near (Schulman 2020, Approximating KL Divergence,
        http://joschu.net/blog/kl-approx.html).
        """
        assert isinstance(other, Scored)
        try:
            wanted = torch.is_grad_enabled()
            with torch.enable_grad():  # that of a Wishart is made of derivatives
                exact = kl_divergence(self.distribution, other.distribution)
            exact = exact if wanted else exact.detach()
        except NotImplementedError:
            pass
        else:
            if _broadcasts(exact.shape, self.shape):
                return exact.expand(self.shape).reshape(-1)
        total: Tensor | float = 0.0
        for i in range(_SAMPLES):
            y = self.sample(i)  # the same for every step that is tried
            log_ratio = other.distribution.log_prob(y) - self.distribution.log_prob(y)
            total = total + (log_ratio.expm1() - log_ratio)
        return torch.as_tensor(total).reshape(-1) / _SAMPLES

    def nll(self, target: Tensor) -> Tensor:
        """-log p(target), of which the smallest value is not known."""
        return -self.distribution.log_prob(target).reshape(-1)

    def divergence(self, target: Tensor, nll: Tensor | None = None) -> Tensor:
        """The `nll` of a discrete distribution, and ½ of a continuous one.

        No density comes near data without noise; ½ is what a Gaussian of estimated variance has.
        """
        nll = self.nll(target) if nll is None else nll
        return nll if _is_discrete(self.distribution) else torch.full_like(nll, 0.5)

    def sample(self, seed: int) -> Tensor:
        """One label for each term, of the shape that `log_prob` takes; leaves all generators be."""
        return self.samples(1, seed)[0]

    def samples(self, count: int, seed: int) -> Tensor:
        """So many, `[count, *shape, *event]`."""
        batch, event, k = (
            self.distribution.batch_shape,
            self.distribution.event_shape,
            len(self.shape),
        )
        device = next(tensors_in(self.distribution)).device
        more, lead = torch.Size(), torch.Size()
        if _broadcasts(batch, self.shape):
            # The argument may have more dimensions than the distribution, or longer ones.
            lead = self.shape[: k - len(batch)]
            pairs = zip(self.shape[k - len(batch) :], batch, strict=True)
            more = torch.Size(n // b if b else 1 for n, b in pairs)
        lead = torch.Size([count]) + lead
        accelerated = [] if device.type == "cpu" else [device]
        kind = "cuda" if device.type == "cpu" else device.type
        with torch.no_grad(), torch.random.fork_rng(accelerated, device_type=kind):
            torch.manual_seed(seed)
            if not _says_its_shape(self.distribution):
                return torch.stack([self.distribution.sample() for _ in range(count)])
            y = self.distribution.sample(lead + more if max(more, default=1) > 1 else lead)
        if all(n == 1 for n in more):
            return y
        # y is [*lead, *more, *batch, *event]
        b, at = len(batch), len(lead)
        order = [at + i + j for i in range(b) for j in (0, b)]  # each repetition with its dimension
        y = y.permute(*range(at), *order, *range(at + 2 * b, y.dim()))
        return y.reshape(count, *self.shape, *event)


def read_log_prob(distribution: Distribution, value: Tensor) -> LogProbCall | None:
    """What scoring `value` says about a prediction, None if nothing depends on a model.

    A distribution that cannot be sampled says nothing either, and one whose support depends on the
    model has no Fisher information (a `Uniform` of predicted bounds); a warning names that one.
    """
    kind = type(distribution)
    if kind.sample is Distribution.sample and kind.rsample is Distribution.rsample:
        return None
    tensors = {id(t): t for t in tensors_in(distribution) if t.requires_grad}
    if not tensors:
        return None
    name = f"log_prob of {kind.__name__}"
    if _has_moving_support(distribution):
        warnings.warn(
            f"ngplugin: the {name} says nothing about the Fisher information, which does not exist "
            "where the support of a distribution depends on what the model predicts. Fix the "
            "bounds, or score a distribution on the whole line.",
            stacklevel=2,
        )
        return None
    # A copy, since what the user's object works out and caches later would hide the parameters.
    now: Distribution = rebuilt(distribution, {}, {})
    return LogProbCall(name, tuple(tensors.values()), value.detach(), now)


_Around: TypeAlias = Callable[[Callable[[], Tensor], Distribution, Tensor], Tensor]
_WATCHING: list[tuple[int, _Around]] = []  # what calls of which thread go through, outermost last


@contextmanager
def watching_log_prob(around: _Around) -> Iterator[None]:
    """A context in which every `log_prob(value)` of this thread goes through `around`.

    Args:
        around: gets the call, the distribution and the value; returns the result.
    """
    watcher = threading.get_ident(), around
    with _WATCHED.made():
        _WATCHING.append(watcher)
        try:
            yield
        finally:
            _WATCHING.remove(watcher)


@contextmanager
def _watched() -> Iterator[None]:
    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def log_prob(self: Distribution, *args: Any, **kwargs: Any) -> Tensor:
            compute = functools.partial(original, self, *args, **kwargs)
            values = [*args, *kwargs.values()]
            if len(values) == 1 and isinstance(values[0], Tensor):
                for thread, around in tuple(_WATCHING):
                    if thread == threading.get_ident():
                        compute = functools.partial(around, compute, self, values[0])
            return compute()

        return log_prob

    own: list[tuple[Any, Any]] = [
        (c, vars(c)["log_prob"]) for c in _classes(Distribution) if "log_prob" in vars(c)
    ]
    try:
        for c, original in own:
            c.log_prob = watched(original)
        yield
    finally:
        for c, original in own:
            c.log_prob = original


_WATCHED = ProcessWide(_watched)


def _classes(root: type) -> set[type]:
    return {root}.union(*map(_classes, root.__subclasses__()))


def _is_discrete(distribution: Distribution) -> bool:
    try:
        return bool(getattr(distribution.support, "is_discrete", False))
    except NotImplementedError:  # it has not said where it lives
        return False


def _says_its_shape(distribution: Distribution) -> bool:
    """Whether samples have the shape that is promised; a user's own class may have kept it back."""
    if type(distribution).__module__.startswith("torch."):
        return True
    promised = distribution.batch_shape + distribution.event_shape
    with torch.no_grad(), torch.random.fork_rng([]):
        return distribution.sample().shape == promised


def _has_moving_support(distribution: Distribution) -> bool:
    """Whether the support of a distribution, or of one that it is made of, requires grad."""
    parts = [part for part in trees(distribution) if isinstance(part, Distribution)]
    for part in parts:
        try:
            support = part.support
        except NotImplementedError:
            continue
        if any(t.requires_grad for t in tensors_in(support)):
            return True
    return False


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether `shape` expands to `to`."""
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))
