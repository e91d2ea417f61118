"""The steps of a fit in a few numbers."""

from __future__ import annotations

import math
import statistics
from array import array

from ngplugin.report import StepReport


class Summary:
    """Takes in one step after another, and says what they came to."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._curvature_seconds = 0.0
        self._bound_active = 0
        self._kl_sum = 0.0
        self._kl_max = 0.0
        self._counts = dict.fromkeys(
            ("skipped", "rejected", "failed_factorizations", "dropped_statistics"), 0
        )
        # Eight bytes a step each; of a million steps medians are still soon found.
        self._kl_used = array("d")
        self._kl_ratios = array("d")
        self._reduction_ratios = array("d")
        self._cosines = array("d")
        self._last: StepReport | None = None

    def add(self, report: StepReport) -> None:
        """Take in one step."""
        self._last = report
        self._steps += 1
        self._seconds += report.seconds
        self._curvature_seconds += report.overhead * report.seconds
        self._bound_active += report.step_scale < 1
        for name in self._counts:
            self._counts[name] += getattr(report, name)
        self._cosines.append(report.cosine)
        if report.reduction_ratio is not None:
            self._reduction_ratios.append(report.reduction_ratio)
        if report.kl is None:
            return
        self._kl_sum += report.kl
        self._kl_max = max(self._kl_max, report.kl)
        self._kl_used.append(report.kl / report.kl_radius if report.kl_radius > 0 else math.nan)
        if report.kl_predicted > 0:
            self._kl_ratios.append(report.kl / report.kl_predicted)

    def numbers(self) -> dict[str, float | None]:
        """The summary; what was never measured is None.

        `kl_mean`, `kl_max`: of the measured steps, nats per term. `kl_used`: what they used of the
        radius, `kl_ratio`: measured over predicted KL, `reduction_ratio`, `cosine`: medians.
        `measured`, `bound_active`: shares of the steps that were measured, and that the bound
        shortened. `step_seconds`: from the end of one step to that of the next, mean. `kl_radius`,
        `condition_number`, `damping`: those of the last step. `overhead`: the share of the time
        that went into curvature. The rest are counts.
        """
        last, steps = self._last, max(self._steps, 1)
        measured = len(self._kl_used)
        return {
            "steps": self._steps,
            "kl_mean": self._kl_sum / measured if measured else None,
            "kl_max": self._kl_max if measured else None,
            "kl_used": _median(self._kl_used),
            "kl_ratio": _median(self._kl_ratios),
            "kl_radius": None if last is None else last.kl_radius,
            "reduction_ratio": _median(self._reduction_ratios),
            "cosine": _median(self._cosines),
            "condition_number": None if last is None else last.condition_number,
            "damping": None if last is None else last.damping,
            "measured": measured / steps,
            "bound_active": self._bound_active / steps,
            "step_seconds": self._seconds / self._steps if self._steps else None,
            "overhead": self._curvature_seconds / max(self._seconds, 1e-9),
            **self._counts,
        }


def _median(values: array[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None
