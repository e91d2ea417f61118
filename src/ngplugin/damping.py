"""Damping λ: a constant, a schedule, or any function of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union

from ngplugin.errors import OptionError

#: λ at an optimizer step, counted from 0.
DampingSchedule = Callable[[int], float]
Damping = Union[float, DampingSchedule, Literal["auto"]]

# What λ is multiplied by where the reduction ratio is above so much.
_FACTORS = ((0.75, 0.1), (0.5, 0.5), (0.25, 1.0), (0.0, 2.0))
_AUTO = 0.1  # of blocks that approximate; chosen by the runs in experiments/


@dataclass(frozen=True)
class ConstantDamping:
    """λ for ever."""

    value: float

    def __post_init__(self) -> None:
        _check(self.value, "damping")

    def __call__(self, step: int) -> float:
        """The damping at `step`."""
        return self.value


@dataclass(frozen=True)
class _Path:
    """From `start` to `end` over `steps` steps, then `end`."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.start, "start")
        _check(self.end, "end")
        if self.steps < 1:
            raise OptionError(f"steps={self.steps!r}: expected a number of steps of at least 1")

    def _progress(self, step: int) -> float:
        return min(step / self.steps, 1.0)


@dataclass(frozen=True)
class LinearDamping(_Path):
    """λ on a straight line from `start` to `end` over `steps` steps, then `end`."""

    def __call__(self, step: int) -> float:
        """The damping at `step`."""
        t = self._progress(step)
        return (1 - t) * self.start + t * self.end


@dataclass(frozen=True)
class ExponentialDamping(_Path):
    """λ by equal ratios from `start` to `end` over `steps` steps, then `end`; both above 0."""

    def __post_init__(self) -> None:
        """Refuse an end that no ratio reaches."""
        super().__post_init__()
        if self.start <= 0 or self.end <= 0:
            raise OptionError(
                f"start={self.start!r}, end={self.end!r}: exponential damping never reaches 0; "
                "give two positive numbers, or use LinearDamping"
            )

    def __call__(self, step: int) -> float:
        """The damping at `step`."""
        ratio: float = (self.end / self.start) ** self._progress(step)
        return self.start * ratio


@dataclass(frozen=True)
class CosineDamping(_Path):
    """λ on half a cosine wave from `start` to `end` over `steps` steps, then `end`."""

    def __call__(self, step: int) -> float:
        """The damping at `step`."""
        wave = 0.5 * (1 + math.cos(math.pi * self._progress(step)))
        return self.end + (self.start - self.end) * wave


class AdaptiveDamping(ABC):
    """λ that learns from what is measured of the steps made with it."""

    _value: float

    def __call__(self, step: int) -> float:
        """The damping now, whatever the step."""
        return self._value

    @abstractmethod
    def see(self, reduction_ratio: float | None, kl_ratio: float | None = None) -> None:
        """Take in what was measured of a step; None where it was not.

        Args:
            reduction_ratio: how far the loss fell over how far the quadratic model said.
            kl_ratio: the measured KL over the predicted ½ΔᵀFΔ/Σw, uncalibrated.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._value = float(state["value"])


class KlMatching(AdaptiveDamping):
    """λ that makes the predicted KL come true.

    After each measurement

        log λ ← log λ + clip(rate · log(measured / predicted), ±log 2)

    Too little damping makes steps long along directions in which F, an average over few rows and
    block by block, has less curvature than there is; those are where the prediction moves further
    than predicted. So the ratio falls as λ rises, and λ settles where it is 1.

    The part of the ratio that no damping mends, layers that move together, is the calibration's
    business; where it is large, as on transformers, λ goes to `most`.

    Args:
        start: λ of the first step.
        least: no less than this.
        most: no more than this.
        rate: power of the ratio, in (0, 1].

    Source: the rule is ours; that λ should follow how well the model does is Martens & Grosse 2015
    (arXiv:1503.05671) §6.5.
    """

    def __init__(
        self, start: float = 0.1, least: float = 1e-8, most: float = 10.0, rate: float = 0.5
    ) -> None:
        _check_range(start, least, most)
        if not 0 < rate <= 1:
            raise OptionError(f"rate={rate!r}: expected a number above 0 and at most 1")
        self._value, self._least, self._most = float(start), float(least), float(most)
        self._rate = float(rate)

    def see(self, reduction_ratio: float | None, kl_ratio: float | None = None) -> None:
        """Take in the ratio of the KLs; one that is no number counts as too large."""
        if kl_ratio is None or kl_ratio <= 0:
            return
        most = math.log(2)
        change = self._rate * math.log(kl_ratio) if math.isfinite(kl_ratio) else most
        self._value *= math.exp(min(max(change, -most), most))
        self._value = min(max(self._value, self._least), self._most)


class LevenbergMarquardt(AdaptiveDamping):
    """λ that follows how well the quadratic model predicts the loss.

    With the reduction ratio ρ = (how far the loss fell) / (how far the model said):

        ρ > ¾:       λ ← λ/10
        ½ < ρ ≤ ¾:   λ ← λ/2
        ¼ < ρ ≤ ½:   λ stays
        0 < ρ ≤ ¼:   λ ← 2λ
        ρ ≤ 0:       the step is taken back, and λ ← λ ν with ν = 2, 4, 8, ... until one succeeds

    so λ falls while the model is right, and rises the faster the longer it is wrong.

    Args:
        start: λ of the first step.
        least: no less than this.
        most: no more than this.

    Source: that the ratio steers λ in natural gradient too is Martens & Grosse 2015
    (arXiv:1503.05671) §6.5; ν is from Nielsen 1999, Damping Parameter in Marquardt's Method
    (IMM-REP-1999-05) §3. His own rule for ρ > 0 falls too slowly where ρ stays near 0.6, and any
    that halves at most where steps follow the valley and ρ stays near 1: there a tenth gives an
    error a hundred times smaller after 70 steps.
    """

    def __init__(self, start: float = 1e-3, least: float = 1e-15, most: float = 1e3) -> None:
        _check_range(start, least, most)
        self._value, self._least, self._most = float(start), float(least), float(most)
        self._growth = 2.0

    def see(self, reduction_ratio: float | None, kl_ratio: float | None = None) -> None:
        """Take in the reduction ratio of a step."""
        if reduction_ratio is None:
            return
        if reduction_ratio > 0:
            factor = next(f for least, f in _FACTORS if reduction_ratio > least)
            self._growth = 2.0
        else:
            factor, self._growth = self._growth, 2 * self._growth
        self._value = min(max(self._value * factor, self._least), self._most)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"value": self._value, "growth": self._growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self._value, self._growth = float(state["value"]), float(state["growth"])


def as_schedule(damping: Damping) -> DampingSchedule:
    """A number becomes `ConstantDamping`; anything callable is a schedule already.

    `"auto"` is that of the blocks that approximate: 0.1.

    Raises:
        OptionError: it is neither, or a negative or infinite number.
    """
    if callable(damping):
        return damping
    if damping == "auto":
        return ConstantDamping(_AUTO)
    if isinstance(damping, (int, float)) and not isinstance(damping, bool):
        return ConstantDamping(float(damping))
    raise OptionError(
        f"damping={damping!r}: expected a number of at least 0 or a function of the step, such as "
        "ngplugin.ExponentialDamping(start=1.0, end=0.1, steps=1000)"
    )


def damping_at(schedule: DampingSchedule, step: int) -> float:
    """The schedule's value, checked: a user's function may return anything.

    Raises:
        OptionError: the value is no number of at least 0.
    """
    value = float(schedule(step))
    _check(value, f"damping schedule at step {step}")
    return value


def _check(value: float, name: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise OptionError(f"{name}={value!r}: expected a finite number of at least 0")


def _check_range(start: float, least: float, most: float) -> None:
    for name, value in (("start", start), ("least", least), ("most", most)):
        _check(value, name)
    if not 0 < least <= start <= most:
        raise OptionError(
            f"start={start!r}, least={least!r}, most={most!r}: expected 0 < least <= start <= most"
        )
