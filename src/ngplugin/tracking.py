"""What a step did, under the names of its metrics, to any Lightning logger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ngplugin.report import StepReport

PREFIX = "natgrad/"

# Not metrics: the step is the loggers' own axis, its time the business of profilers, and spectra
# are no numbers.
_LEFT_OUT = {"step", "seconds", "spectra"}


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
    values = ((field.name, getattr(report, field.name)) for field in dataclasses.fields(report))
    return {
        prefix(optimizer) + name: float(value)
        for name, value in values
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
