"""Alternatives timed side by side: one thread, the processor's time, taking turns, medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

_SHORTEST = 2e-3  # seconds of a sample; what is faster is repeated within it


def medians(
    runs: Mapping[str, Callable[[], Any]], seconds: float, least: int = 3
) -> dict[str, float]:
    """Seconds of one call of each, the median of several samples.

    All take turns, so that what else happens on the machine happens to all of them.

    Args:
        runs: by name.
        seconds: of the processor, for all together.
        least: samples of each, even if they take longer.
    """
    repeats = {name: _repeats(run) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    started = time.process_time()
    while time.process_time() - started < seconds or len(min(samples.values(), key=len)) < least:
        for name, run in runs.items():
            samples[name].append(_once(run, repeats[name]))
    return {name: statistics.median(found) for name, found in samples.items()}


def _repeats(run: Callable[[], Any]) -> int:
    """How many calls make a sample; the first one, which may prepare something, is not counted."""
    run()
    return max(1, math.ceil(_SHORTEST / max(_once(run, 1), 1e-7)))


def _once(run: Callable[[], Any], repeats: int) -> float:
    started = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - started) / repeats
