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
_CAUTION = 1.25  # power of the deviance; chosen by runs of experiments/compare.py


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
    def shrink(self, measured: float, schedule: float) -> float | None:
        """What to multiply an applied step by whose measured KL is too large; None if it is not."""

    @abstractmethod
    def calibrate(self, step: int, predicted: float, measured: float) -> None:
        """Learn from one measurement of an applied step."""

    @abstractmethod
    def distrust(self) -> None:
        """Learn that the KL of no step can be measured."""

    @abstractmethod
    def measurement_due(self, step: int) -> bool:
        """Whether the KL of this step shall be measured."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, of a bound of any kind."""


class NoTrustRegion(StepBound):
    """Every step is taken as it is."""

    def see_loss(self, nll: float) -> None:
        """Nothing to learn."""

    def radius(self, schedule: float) -> float:
        """Infinite."""
        return math.inf

    def scale(self, predicted: float, schedule: float) -> float:
        """Always 1."""
        return 1.0

    def shrink(self, measured: float, schedule: float) -> float | None:
        """Never."""
        return None

    def calibrate(self, step: int, predicted: float, measured: float) -> None:
        """Nothing to learn."""

    def distrust(self) -> None:
        """Nothing to learn."""

    def measurement_due(self, step: int) -> bool:
        """Never."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class TrustRegion(StepBound):
    """KL(p_θ ‖ p_θ+Δ) ≤ radius_t = kl_radius · min(1, D)^{5/4} · (lr_t / lr_peak)².

    D = 2 KL(data ‖ p_θ) is the deviance a term. The radius follows it, because a step that moves
    the prediction further than it is from the data cannot be right: a classifier that is nearly
    certain of every label would be thrown out of its minimum by a step of a size that was modest
    at the start. With the power 1, logits would go on moving at the same speed however small the
    loss, and what one batch's steps do to examples that are not in it would never average out: on
    small data sets the loss then stays at 1e-3 and jumps, or blows up; with 5/4 it falls on. For
    squared error under its own estimated variance D is 1, and nothing of this applies.

    The radius follows the square of the learning-rate schedule because KL is quadratic in the
    step: an active bound cancels the learning rate, and would cancel its schedule with it.

    Measurements are adaptive: while they agree with the calibrated prediction within a factor of
    `agreement`, the number of steps between them doubles up to `measure_every`; after a surprise
    the next step is measured too.

    Args:
        kl_radius: nats per term, at the schedule's peak and a deviance of 1 or more.
        measure_every: the most steps between measurements of the KL.
        measure_first: how many steps at the start have theirs measured, each; young averages
            overshoot.
        tolerance: a measured KL up to `tolerance · radius` is let pass, since shrinking costs a
            forward pass.
        agreement: the factor up to which measured and calibrated KL count as agreeing.
    """

    def __init__(
        self,
        kl_radius: float,
        measure_every: int = 5,
        measure_first: int = 10,
        tolerance: float = 1.5,
        agreement: float = 2.5,
    ) -> None:
        self._kl_radius = float(kl_radius)
        self._measure_every = measure_every
        self._measure_first = measure_first
        self._tolerance = tolerance
        self._agreement = math.log(agreement)
        self._nll: float | None = None  # running, nats per term
        self._log_ratio: float | None = None  # of measured over predicted
        self._interval = 1  # steps to the next measurement
        self._next = 0  # the step at which it is due

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
        """kl_radius · min(1, 2 nll)^{5/4} · schedule²."""
        deviance = 1.0 if self._nll is None else min(1.0, 2 * self._nll)
        return float(self._kl_radius * deviance**_CAUTION * schedule**2)

    def scale(self, predicted: float, schedule: float) -> float:
        """min(1, √(radius / (c q)))."""
        expected, radius = self.ratio * predicted, self.radius(schedule)
        return 1.0 if expected <= radius else math.sqrt(radius / expected)

    def shrink(self, measured: float, schedule: float) -> float | None:
        """√(radius / measured), or a tenth where that is no number, if measured is too large."""
        radius = self.radius(schedule)
        if measured <= self._tolerance * radius:
            return None
        return math.sqrt(radius / measured) if math.isfinite(measured) else 0.1

    def calibrate(self, step: int, predicted: float, measured: float) -> None:
        """Move log c half-way to log(measured/predicted), all the way if that is larger.

        Trusting too long a step costs more than taking one that is too short. A KL that is no
        number makes c a hundred times larger.
        """
        if not math.isfinite(measured):
            self._log_ratio = math.log(100 * self.ratio)
            self._interval, self._next = 1, step + 1
            return
        if not (predicted > 0 and measured > 0 and math.isfinite(measured / predicted)):
            return
        observed = math.log(measured / predicted)
        known = self._log_ratio
        agrees = known is not None and abs(observed - known) < self._agreement
        self._interval = min(self._measure_every, 2 * self._interval) if agrees else 1
        self._next = step + self._interval
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

    def measurement_due(self, step: int) -> bool:
        """On each of the first steps, then as often as the calibration needs it."""
        return step < self._measure_first or step >= self._next

    def state_dict(self) -> dict[str, Any]:
        """The calibration, the running loss and when to measure next."""
        return {
            "nll": self._nll,
            "log_ratio": self._log_ratio,
            "interval": self._interval,
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved calibration; without one, start anew."""
        if not state:
            return
        self._nll, self._log_ratio = state["nll"], state["log_ratio"]
        self._interval, self._next = int(state["interval"]), int(state["next"])
