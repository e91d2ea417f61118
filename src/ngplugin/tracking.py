"""What a step did, under the names of its metrics, to any Lightning logger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ngplugin.report import StepReport

PREFIX = "natgrad/"

# Not metrics: the step is the loggers' own axis, and its time the business of profilers.
_LEFT_OUT = {"step", "seconds"}


class MetricsLogger(Protocol):
    """The part of a Lightning logger that is used."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write numbers under their names, for one step."""


def prefix(optimizer: int) -> str:
    """What the names of an optimizer's metrics begin with: `natgrad/`, then `natgrad-1/` ..."""
    return PREFIX if optimizer == 0 else f"natgrad-{optimizer}/"


def metrics(report: StepReport, optimizer: int = 0) -> dict[str, float]:
    """Name to value of everything in a report that has a value: `natgrad/kl` and so on.

    What was not measured at this step, and what is not finite (a radius without a bound), is left
    out, since loggers draw both wrongly.
    """
    values = dataclasses.asdict(report)
    return {
        prefix(optimizer) + name: float(value)
        for name, value in values.items()
        if name not in _LEFT_OUT and value is not None and math.isfinite(value)
    }


def log_step(
    loggers: Iterable[MetricsLogger], report: StepReport, step: int, optimizer: int = 0
) -> None:
    """Write every metric of one step to every logger.

    Args:
        loggers: a trainer's.
        report: of the step.
        step: on the loggers' axis.
        optimizer: whose step, of several.
    """
    values = metrics(report, optimizer)
    for logger in loggers:
        logger.log_metrics(values, step=step)


def declare(loggers: Iterable[Any], optimizer: int = 0) -> None:
    """Tell loggers that keep a summary of each metric to keep the largest KL, not the last.

    Only wandb does; other loggers have nothing to declare.
    """
    for logger in loggers:
        define = getattr(getattr(logger, "experiment", None), "define_metric", None)
        if callable(define):
            define(prefix(optimizer) + "kl", step_metric="trainer/global_step", summary="max")


class Summary:
    """The steps of a fit in a few numbers."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._curvature_seconds = 0.0
        self._bound_active = 0
        self._kl_count = 0
        self._kl_sum = 0.0
        self._kl_max = 0.0
        self._skipped = 0
        self._rejected = 0
        self._failed = 0
        self._last: StepReport | None = None

    def add(self, report: StepReport) -> None:
        """Take in one step."""
        self._last = report
        self._steps += 1
        self._seconds += report.seconds
        self._curvature_seconds += report.overhead * report.seconds
        self._bound_active += report.step_scale < 1
        self._skipped += report.skipped
        self._rejected += report.rejected
        self._failed += report.failed_factorizations
        if report.kl is not None:
            self._kl_count += 1
            self._kl_sum += report.kl
            self._kl_max = max(self._kl_max, report.kl)

    def numbers(self) -> dict[str, float | None]:
        """The summary; what was never measured is None.

        `kl_mean` and `kl_max` are over the measured steps, nats per term; `kl_radius` and
        `condition_number` those of the last step; `bound_active` the share of steps that the
        bound shortened; `overhead` the share of the time that went into curvature; the rest are
        counts.
        """
        last = self._last
        steps = max(self._steps, 1)
        return {
            "steps": self._steps,
            "kl_mean": self._kl_sum / self._kl_count if self._kl_count else None,
            "kl_max": self._kl_max if self._kl_count else None,
            "kl_radius": None if last is None else last.kl_radius,
            "condition_number": None if last is None else last.condition_number,
            "bound_active": self._bound_active / steps,
            "overhead": self._curvature_seconds / max(self._seconds, 1e-9),
            "skipped": self._skipped,
            "rejected": self._rejected,
            "failed_factorizations": self._failed,
        }
