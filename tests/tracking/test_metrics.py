"""Reports become metrics under fixed names, in any logger."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger

from ngplugin import StepReport
from ngplugin.tracking import metrics as tracking


def report(**changes: Any) -> StepReport:
    values = {f.name: 0.5 for f in dataclasses.fields(StepReport) if f.name != "spectra"}
    return StepReport(**{**values, "step": 3, **changes})  # type: ignore[arg-type]


def test_metric_names_are_the_documented_ones() -> None:
    assert set(tracking.metrics(report())) == {
        "natgrad/kl",
        "natgrad/kl_predicted",
        "natgrad/kl_radius",
        "natgrad/step_scale",
        "natgrad/condition_number",
        "natgrad/condition_number_undamped",
        "natgrad/damping",
        "natgrad/reduction_ratio",
        "natgrad/grad_norm",
        "natgrad/natural_grad_norm",
        "natgrad/cosine",
        "natgrad/overhead",
        "natgrad/shrinks",
        "natgrad/skipped",
        "natgrad/rejected",
        "natgrad/failed_factorizations",
        "natgrad/remedy",
        "natgrad/dropped_statistics",
    }


def test_what_was_not_measured_or_is_infinite_is_left_out() -> None:
    names = tracking.metrics(report(kl=None, kl_radius=math.inf, cosine=math.nan))
    assert not {"natgrad/kl", "natgrad/kl_radius", "natgrad/cosine"} & set(names)
    assert names["natgrad/kl_predicted"] == 0.5


def test_wandb_offline_gets_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    tracking.declare([logger], {})
    for step in range(4):
        tracking.log_step([logger], report(kl=0.25 + step), step)
    assert logger.experiment.summary["natgrad/kl_radius"] == 0.5
    logger.experiment.finish()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    patience = time.monotonic() + 60  # wandb writes in a process of its own
    while (found := written.read_bytes().count(b"natgrad/condition_number_undamped")) < 4:
        assert time.monotonic() < patience, f"{found} of 4 steps were written"
        time.sleep(0.1)
