"""What one optimizer did in a fit: to loggers as it happens, and kept until the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ngplugin.curvature.spectrum import BlockSpectrum
from ngplugin.diagnosis import Finding, diagnose
from ngplugin.history import History
from ngplugin.report import Coverage, StepReport
from ngplugin.summary import Summary
from ngplugin.tracking.alerts import Alerts
from ngplugin.tracking.coverage import log_coverage
from ngplugin.tracking.metrics import declare, log_step
from ngplugin.tracking.pictures import log_end
from ngplugin.tracking.spectra import log_spectra


class FitLog:
    """Of one fit and optimizer.

    A logger that fails in the middle, for want of room or of a network, is told of in one warning;
    training goes on without what it did not write.

    Args:
        optimizer: its number, which its metrics' names have; of the first there is none.
        loggers: a trainer's.
        writes: whether this process also writes what is more than numbers: of several one does.
            Numbers are the loggers' own affair.

    Attributes:
        steps: of this fit so far; one that goes on from a checkpoint begins at 0.
        summary: of them.
        history: them, as many as can be drawn.
    """

    def __init__(
        self, optimizer: int = 0, loggers: Sequence[Any] = (), *, writes: bool = True
    ) -> None:
        self._optimizer = optimizer
        self._loggers = loggers
        self._showing = loggers if writes else ()
        self._alerts = Alerts()
        self._last = 0
        self._told: set[str] = set()  # of which failures
        self.steps = 0
        self.summary = Summary()
        self.history = History()

    def begin(self, options: Mapping[str, Any]) -> None:
        """Before the first step.

        Args:
            options: of natural gradient, by name.
        """
        declare(self._showing, options, self._optimizer)

    def step(self, report: StepReport, step: int) -> None:
        """After each.

        Args:
            report: of it.
            step: on the loggers' axis.
        """
        self._last = step
        self.steps += 1
        self.summary.add(report)
        self.history.add(report)
        for logger in self._loggers:
            self._write("metrics", log_step, [logger], report, step, self._optimizer)
        self._show("spectra", log_spectra, report.spectra, step)
        self._write("alerts", self._alerts.step, self._showing, report)

    def coverage(self, coverage: Coverage) -> None:
        """Once blocks are known."""
        self._show("the coverage table", log_coverage, coverage, self._last)

    def end(self, spectra: Callable[[], Sequence[BlockSpectrum]] | None) -> None:
        """After the last.

        Args:
            spectra: computes those of now, for the right edge of the pictures; None for pictures
                without.
        """
        if not self.steps:
            return
        kept = self.history.spectra.kept
        if spectra is not None and (not kept or kept[-1][0] < self.history.last):
            found = spectra()
            self.history.add_spectra(self.history.last, found)
            self._show("spectra", log_spectra, found, self._last)
        numbers, findings = self.summary.numbers(), self.diagnosis()
        self._show("pictures", log_end, self.history, numbers, findings, self._last)

    def diagnosis(self) -> list[Finding]:
        """What the numbers say."""
        return diagnose(self.summary.numbers())

    def _show(self, what: str, write: Callable[..., None], *values: Any) -> None:
        for logger in self._showing:
            self._write(what, write, [logger], *values, self._optimizer)

    def _write(self, what: str, write: Callable[..., None], *values: Any) -> None:
        try:
            write(*values)
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                cause: BaseException = error
                while cause.__cause__ is not None:  # a logger may say that it is the value's fault
                    cause = cause.__cause__
                warnings.warn(
                    f"ngplugin: {what} could not be logged ({type(cause).__name__}: {cause}); "
                    "training goes on, and this is said once.",
                    stacklevel=2,
                )
