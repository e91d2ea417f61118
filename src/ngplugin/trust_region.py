"""How far a step may move the prediction: a bound on its KL divergence, in nats per term.

The bound acts on the step Δ as it will be applied, all parameters together. Its quadratic model

    KL(p_θ ‖ p_θ+Δ) ≈ q(Δ) = ½ ΔᵀFΔ / Σw

is what a block-diagonal F predicts. Layers, tokens and pixels move together where such an F takes
them for independent, so the prediction is off by orders of magnitude; but it is off steadily. The
ratio measured/predicted, from steps whose KL was measured, is what makes the prediction a bound
for the steps between (measuring the KL of a step is how TRPO enforces one, arXiv:1502.05477).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

_UNMEASURED = 300.0  # measured over predicted KL, where it cannot be measured
_CAUTION = 1.1  # power of the deviance; chosen by runs of the tasks in experiments/
_LARGE = 0.05  # nats per term: a radius beyond which no prediction is to be relied upon
_RISE = 0.01  # nats per term that a step of such a radius may raise its own loss by
_AIM = 2 / 3  # share of the radius that a step is meant to use


class StepBound(ABC):
    """Decides a step's length from what it does to the prediction."""

    @abstractmethod
    def see_loss(self, nll: float) -> None:
        """Learn how far the prediction is from the data: KL(data ‖ p_θ), nats per term."""

    @abstractmethod
    def radius(self, schedule: float) -> float:
        """The bound on the KL, nats per term, when the learning rate is `schedule` of its peak."""

    @abstractmethod
    def scale(self, predicted: float, schedule: float) -> float:
        """What to multiply a step by whose predicted KL is `predicted`; in [0, 1]."""

    @abstractmethod
    def shrink(self, measured: float, schedule: float, rise: float = 0.0) -> float | None:
        """What to multiply an applied step by that was too long; None if it was not.

        Args:
            measured: its KL, nats per term.
            schedule: the learning rate over its peak.
            rise: of the batch's own loss, nats per term.
        """

    @abstractmethod
    def room(self, measured: float, schedule: float) -> float:
        """What to multiply a step by whose KL is `measured` to use all that is allowed."""

    @abstractmethod
    def calibrate(
        self, step: int, predicted: float, measured: float, surprise: bool = False
    ) -> None:
        """Learn from one measurement of an applied step.

        Args:
            step: its number.
            predicted: its KL by ½ΔᵀFΔ/Σw.
            measured: its KL.
            surprise: it had to be shortened, or the loss did not fall as it should.
        """

    @abstractmethod
    def distrust(self) -> None:
        """Learn that the KL of no step can be measured."""

    @abstractmethod
    def measurement_due(self, step: int, busy: bool = False) -> bool:
        """Whether the KL of this step shall be measured.

        Args:
            step: its number.
            busy: it takes statistics, so that the next step were a better one.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, of a bound of any kind."""


class Measurements:
    """When the KL of a step is measured: on the first ones, then as often as it surprises.

    While measurements agree with what was expected, the number of steps between them doubles up to
    `every`; after a surprise the next step is measured too. A measured step has one forward pass
    more, a third to a half of a plain step, two evaluations of the loss, and F d. Of the tasks in
    `experiments/` a quarter to a third of the steps are measured, for 0.6 to 1.2 of SGD's step
    each. With `every=8` it was a little less, and took longer to recover from a bad start.

    Args:
        every: the most steps between two; None for no measurement at all.
        first: how many steps at the start are all measured; young averages overshoot.
    """

    def __init__(self, every: int | None, first: int) -> None:
        self._every = every
        self._first = first
        self._interval = 1  # steps to the next one
        self._next = 0  # the step at which it is due

    def due(self, step: int, always: bool, busy: bool) -> bool:
        """Whether this step's KL is to be measured; on every step if `always`, if on any.

        A busy step leaves it to the next, unless there was a surprise.
        """
        waits = busy and self._interval > 1
        due = always or step < self._first or step >= self._next + waits
        return self._every is not None and due

    def done(self, step: int, expected: bool) -> None:
        """Learn that one was made, and whether it was as expected."""
        self._interval = min(self._every or 1, 2 * self._interval) if expected else 1
        self._next = step + self._interval

    def state_dict(self) -> dict[str, int]:
        """When to measure next."""
        return {"interval": self._interval, "next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a saved state."""
        self._interval, self._next = int(state["interval"]), int(state["next"])


class NoTrustRegion(StepBound):
    """Every step is taken as it is; measured now and then, to be reported.

    Args:
        measure_every: steps between measurements of the KL; None for none.
    """

    def __init__(self, measure_every: int | None = None) -> None:
        self._measure_every = measure_every

    def see_loss(self, nll: float) -> None:
        """Nothing to learn."""

    def radius(self, schedule: float) -> float:
        """Infinite."""
        return math.inf

    def scale(self, predicted: float, schedule: float) -> float:
        """Always 1."""
        return 1.0

    def shrink(self, measured: float, schedule: float, rise: float = 0.0) -> float | None:
        """Never."""
        return None

    def room(self, measured: float, schedule: float) -> float:
        """No limit."""
        return math.inf

    def calibrate(
        self, step: int, predicted: float, measured: float, surprise: bool = False
    ) -> None:
        """Nothing to learn."""

    def distrust(self) -> None:
        """Nothing to learn."""

    def measurement_due(self, step: int, busy: bool = False) -> bool:
        """Every so many steps."""
        return self._measure_every is not None and step % self._measure_every == 0

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class TrustRegion(StepBound):
    """KL(p_θ ‖ p_θ+Δ) ≤ radius_t = kl_radius · min(1, D)^1.1 · (lr_t / lr_peak)².

    A step is meant to use two thirds of the radius, by its calibrated prediction, so that few have
    to be taken back: one whose measured KL exceeds the radius is shortened until it does not, or
    refused.

    D = 2 KL(data ‖ p_θ) is the deviance a term. The radius follows it, because a step that moves
    the prediction further than it is from the data cannot be right: a classifier that is nearly
    certain of every label would be thrown out of its minimum by a step of a size that was modest
    at the start. With the power 1, logits would go on moving at the same speed however small the
    loss, and what one batch's steps do to examples that are not in it would never average out: on
    small data sets the loss then stays at 1e-3 and jumps, or blows up; with 1.1 it falls on, with
    5/4 ten times more slowly. For squared error under its own estimated variance D is 1, and
    nothing of this applies. No radius is larger than ½D: the prediction is no further from the
    data than that.

    The radius follows the square of the learning-rate schedule because KL is quadratic in the
    step: an active bound cancels the learning rate, and would cancel its schedule with it.

    Args:
        kl_radius: nats per term, at the schedule's peak and a deviance of 1 or more.
        measure_every: the most steps between measurements of the KL, see `Measurements`; None for
            none, so that the bound is on the prediction alone.
        measure_first: how many steps at the start have theirs measured, each.
        agreement: the factor up to which measured and calibrated KL count as agreeing.
    """

    def __init__(
        self,
        kl_radius: float,
        measure_every: int | None = 6,
        measure_first: int = 10,
        agreement: float = 2.5,
    ) -> None:
        self._kl_radius = float(kl_radius)
        self._large = kl_radius > _LARGE
        self._measurements = Measurements(measure_every, measure_first)
        self._agreement = math.log(agreement)
        self._nll: float | None = None  # running, nats per term
        self._log_ratio: float | None = None  # of measured over predicted
        if measure_every is None:
            self.distrust()

    def see_loss(self, nll: float) -> None:
        """Average the loss over about two values, but never above twice the present one.

        The bound has to tighten as fast as the loss falls.
        """
        self._nll = nll if self._nll is None else min(2 * nll, 0.5 * (self._nll + nll))

    @property
    def ratio(self) -> float:
        """c, the running ratio of measured over predicted KL, at least 1.

        Below 1 it would let a step beyond ½ΔᵀFΔ/Σw = radius, on the word of other steps.
        """
        return 1.0 if self._log_ratio is None else max(1.0, math.exp(self._log_ratio))

    def radius(self, schedule: float) -> float:
        """min(kl_radius · min(1, 2 nll)^1.1, nll) · schedule²."""
        if self._nll is None:
            return float(self._kl_radius * schedule**2)
        cautious = self._kl_radius * min(1.0, 2 * self._nll) ** _CAUTION
        return float(min(cautious, self._nll) * schedule**2)

    def scale(self, predicted: float, schedule: float) -> float:
        """min(1, √(⅔ radius / (c q)))."""
        expected, aim = self.ratio * predicted, _AIM * self.radius(schedule)
        return 1.0 if expected <= aim else math.sqrt(aim / expected)

    def shrink(self, measured: float, schedule: float, rise: float = 0.0) -> float | None:
        """√(⅔ radius / measured), or a tenth where that is no number, if measured is too large.

        A half if it is not, but the batch's own loss rose by more than the radius, or by more than
        0.01 nats if `kl_radius` is above 0.05. Momentum may well raise a batch's loss, by less.
        """
        radius = self.radius(schedule)
        if measured <= radius:
            return 0.5 if rise > (min(radius, _RISE) if self._large else radius) else None
        return math.sqrt(_AIM * radius / measured) if math.isfinite(measured) else 0.1

    def room(self, measured: float, schedule: float) -> float:
        """√(⅔ radius / measured)."""
        return math.sqrt(_AIM * self.radius(schedule) / measured)

    def calibrate(
        self, step: int, predicted: float, measured: float, surprise: bool = False
    ) -> None:
        """Move log c half-way to log(measured/predicted), all the way if that is larger.

        Trusting too long a step costs more than taking one that is too short. A KL that is no
        number makes c a hundred times larger.
        """
        if not math.isfinite(measured):
            self._log_ratio = math.log(100 * self.ratio)
            self._measurements.done(step, expected=False)
            return
        if not (predicted > 0 and measured > 0 and math.isfinite(measured / predicted)):
            return
        observed = math.log(measured / predicted)
        known = self._log_ratio
        # Less than expected is no danger, and is made up for half-way.
        agrees = known is not None and observed - known < self._agreement
        self._measurements.done(step, agrees and not surprise)
        if known is None or observed > known:
            self._log_ratio = observed
        else:
            self._log_ratio = 0.5 * (known + observed)

    def distrust(self) -> None:
        """Count on what is usual: blocks do not see that layers and positions move together.

        On deep networks measured over predicted was 30 to 1,000; where it can never be known, one
        of the larger values is the safe one.
        """
        if self._log_ratio is None:
            self._log_ratio = math.log(_UNMEASURED)

    def measurement_due(self, step: int, busy: bool = False) -> bool:
        """On each of the first steps, then as often as the calibration needs it.

        On every step if `kl_radius` is above 0.05 nats.
        """
        return self._measurements.due(step, self._large, busy)

    def state_dict(self) -> dict[str, Any]:
        """The calibration, the running loss and when to measure next."""
        return {
            "nll": self._nll,
            "log_ratio": self._log_ratio,
            **self._measurements.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved calibration; without one, start anew."""
        if not state:
            return
        self._nll, self._log_ratio = state["nll"], state["log_ratio"]
        self._measurements.load_state_dict(state)
