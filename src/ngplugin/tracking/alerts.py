"""Tells somebody who is not looking that a step failed; wandb sends it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ngplugin.diagnosis import RULES
from ngplugin.report import StepReport
from ngplugin.tracking.kinds import kind

_QUIET_SECONDS = 600.0  # between two of a kind
#: What is told of, by the name of its count: the title, and the rule that has the advice.
_TITLES = {
    "rejected": ("a step was taken back", "rejected"),
    "failed_factorizations": ("an inversion failed", "failed factorizations"),
}
_ADVICE = {rule.name: f"{rule.why} What to try: {rule.advice}." for rule in RULES}


class Alerts:
    """One alert of a kind in ten minutes at most, with how often it happened until then.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts = dict.fromkeys(_TITLES, 0)
        self._last: dict[str, float] = {}

    def step(self, loggers: Iterable[Any], report: StepReport) -> None:
        """Send what there is to tell of a step; of it loggers other than wandb have the counts."""
        for name, (title, rule) in _TITLES.items():
            count = getattr(report, name)
            if not count:
                continue
            self._counts[name] += count
            now = self._clock()
            if now - self._last.get(name, -_QUIET_SECONDS) < _QUIET_SECONDS:
                continue
            self._last[name] = now
            text = f"At step {report.step}; {self._counts[name]} so far. {_ADVICE[rule]}"
            for logger in loggers:
                if kind(logger) == "wandb":
                    logger.experiment.alert(f"Natural gradient: {title}", text, level="WARN")
