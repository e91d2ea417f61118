"""Damping λ: a constant, a schedule, or any function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

from ngplugin.errors import OptionError

#: λ at an optimizer step, counted from 0.
DampingSchedule = Callable[[int], float]
Damping = Union[float, DampingSchedule]


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


def as_schedule(damping: Damping) -> DampingSchedule:
    """A number becomes `ConstantDamping`; anything callable is a schedule already.

    Raises:
        OptionError: it is neither, or a negative or infinite number.
    """
    if callable(damping):
        return damping
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
