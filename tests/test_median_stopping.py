"""Runs of a sweep that do worse than half of the others end early."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.command_line import CommandLineError
from experiments.median_stopping import MedianStopping
from experiments.summary import write_results
from experiments.training import train
from tests.small_sweeps import TINY, Compose, Program, results
from train import _metric

VALIDATED = [option for option in TINY if option not in ("callbacks=none", "logger=none")] + [
    "trainer.max_steps=-1",
    "trainer.max_epochs=4",
    "callbacks=median_stopping",
    "callbacks.median_stopping.least_runs=2",
    "callbacks.median_stopping.warmup=1",
    "logger=csv",
    "optimizer=adamw",
    "metric=val/loss",
]


def test_runs_worse_than_the_median_are_stopped(program: Program, tmp_path: Path) -> None:
    rates = "0.03,0.02,1e-6,0.05"
    program(*VALIDATED, f"optimizer.lr={rates}", "hydra.sweep.dir=rates")
    runs = results(tmp_path / "rates")
    assert [values["steps"] for _, values in sorted(runs.items())] == [12, 12, 6, 12]
    stopped = runs["2-adamw-seed0"]
    assert stopped["stopped/step"] == 6
    assert stopped["stopped/counts_as"] == stopped["val/loss"]  # worse than the others' ends
    assert _metric("val/loss", stopped) == stopped["val/loss"]
    better = stopped | {"stopped/counts_as": 9.0}
    assert _metric("val/loss", better) == 9.0
    (entry,) = [
        entry
        for entry in json.loads((tmp_path / "rates" / "leaderboard.json").read_text())
        if entry["setting"] == "optimizer.lr=1e-06"
    ]
    assert len(entry["runs"]) == 1


def test_a_stopped_run_counts_no_better_than_the_others_ended(tmp_path: Path) -> None:
    """Overfitted ones end worse than they were: one stopped before that is not the best."""
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        curve = "step,val/loss\n2,0.3\n5,0.9\n"
        (tmp_path / str(i) / "metrics.csv").write_text(curve)
        write_results(tmp_path / str(i) / "results.json", {"val/loss": 0.9})
    callback = MedianStopping("val/loss", str(tmp_path), warmup=0, least_runs=2)
    trainer = SimpleNamespace(
        callback_metrics={"val/loss": 0.25}, global_step=3, sanity_checking=False, should_stop=False
    )
    module: Any = None
    callback.on_fit_start(trainer, module)
    callback.on_validation_end(trainer, module)
    assert not trainer.should_stop
    trainer.callback_metrics["val/loss"] = 0.4  # but its best is 0.25
    callback.on_validation_end(trainer, module)
    assert not trainer.should_stop
    callback = MedianStopping("val/loss", str(tmp_path), warmup=0, least_runs=2)
    callback.on_fit_start(trainer, module)
    callback.on_validation_end(trainer, module)
    assert trainer.should_stop
    assert callback.facts == {"stopped/step": 3, "stopped/counts_as": 0.9}


def test_median_stopping_needs_what_is_validated(compose_config: Compose, tmp_path: Path) -> None:
    cfg = compose_config(*VALIDATED, "metric=test/loss")
    with pytest.raises(CommandLineError, match="expected a metric that is logged at validations"):
        train(cfg, tmp_path)
