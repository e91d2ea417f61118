"""What a step did, under the names of its metrics, to any Lightning logger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ngplugin.report import StepReport
from ngplugin.tracking.kinds import kind

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


def declare(loggers: Iterable[Any], options: Mapping[str, Any], optimizer: int = 0) -> None:
    """Tell wandb how metrics are to be summed up, and with which options they came about.

    Of the KL and the condition number it is the largest that counts, not the last; other loggers
    have nothing to declare. `WandbLogger` itself has made its step the axis of all metrics.

    Args:
        loggers: a trainer's.
        options: of natural gradient, by name.
        optimizer: whose, of several.
    """
    for logger in loggers:
        if kind(logger) != "wandb":
            continue
        run = logger.experiment
        for name in ("kl", "kl_predicted", "condition_number"):
            run.define_metric(
                prefix(optimizer) + name,
                step_metric="trainer/global_step",
                summary="max,last",
            )
        plain = {
            name: value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
            for name, value in options.items()
        }
        run.config.update({prefix(optimizer).rstrip("/"): plain}, allow_val_change=True)
