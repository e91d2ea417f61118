"""Ends runs of a sweep early that do worse than half of those before them did.

The median stopping rule of Golovin et al. 2017, "Google Vizier", section 3.2.1, by the best value
so far. It reads what finished runs have left in the sweep's folder, so it works with any sweeper
and launcher; Optuna's own pruners do not, since Hydra's sweeper does not tell a run its trial.
"""

from __future__ import annotations

import bisect
import statistics
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ngplugin.reporting.leaderboard import STOPPED, final, higher_is_better
from ngplugin.reporting.run_record import RunNotFoundError, RunRecord, read_run


class MedianStopping(Callback):
    """Stops a run at a validation if its best value so far is worse than the others' median.

    Attributes:
        facts: of a run that was stopped, for its results: at which step, and what it counts as to
            a sweeper: the worse of its own value and the median of what the others came to.

    Args:
        metric: that is logged at validations, such as val/loss.
        folder: of the sweep.
        warmup: validations of a run before it is compared; what starts slowly may end well.
        least_runs: finished runs that there have to be; stopped ones do not count.
        higher: whether more of it is better; None for what its name says.
    """

    def __init__(
        self,
        metric: str,
        folder: str,
        warmup: int = 5,
        least_runs: int = 5,
        higher: bool | None = None,
    ) -> None:
        self.metric = metric
        self.folder = Path(folder)
        self.warmup = warmup
        self.least_runs = least_runs
        self.better = max if (higher_is_better(metric) if higher is None else higher) else min
        self.facts: dict[str, float] = {}
        self._others: list[RunRecord] = []
        self._best: float | None = None
        self._validations = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the finished runs."""
        for path in sorted(self.folder.glob("*/results.json")):
            try:
                run = read_run(path.parent)
            except RunNotFoundError:  # without a logger
                continue
            if STOPPED not in run.results and self.metric in run.metrics:
                self._others.append(run)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare with them at this step."""
        if trainer.sanity_checking:
            return
        if self.metric not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"callbacks.median_stopping.metric={self.metric}: expected a metric that is logged "
                f"at validations: {', '.join(sorted(trainer.callback_metrics))}"
            )
        value = float(trainer.callback_metrics[self.metric])
        self._best = value if self._best is None else self.better(self._best, value)
        self._validations += 1
        if self._validations <= self.warmup:
            return
        step = trainer.global_step
        others = [b for run in self._others if (b := self._best_until(run, step)) is not None]
        if len(others) < self.least_runs:
            return
        median = statistics.median(others)
        if self.better(self._best, median) != self._best:
            trainer.should_stop = True
            ends = [e for run in self._others if (e := final(run, self.metric)) is not None]
            worse = min if self.better is max else max
            counts_as = worse(value, statistics.median(ends))
            self.facts = {STOPPED: step, "stopped/counts_as": counts_as}

    def _best_until(self, run: RunRecord, step: int) -> float | None:
        series = run.metrics[self.metric]
        values = series.values[: bisect.bisect_right(series.steps, step)]
        return self.better(values) if values else None
