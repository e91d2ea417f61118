"""Whoever is not looking hears of failed steps, but not of each one."""

from __future__ import annotations

from typing import Any

import pytest

from ngplugin.tracking.alerts import Alerts
from tests.tracking.conftest import records
from tests.tracking.test_metrics import report


class _Run:
    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str]] = []

    def alert(self, title: str, text: str, level: str) -> None:
        self.sent.append((title, text, level))


class WandbLogger:
    """By its name."""

    def __init__(self) -> None:
        self.experiment = _Run()


class Subclassed(WandbLogger):
    """As people do."""


CLEAN: dict[str, Any] = {"rejected": 0, "failed_factorizations": 0}


@pytest.mark.parametrize("kind", ["rejected", "failed_factorizations"])
def test_one_alert_of_a_kind_in_ten_minutes_says_how_often(kind: str) -> None:
    now = [0.0]
    alerts, logger = Alerts(lambda: now[0]), Subclassed()
    for step, seconds in enumerate([0.0, 1.0, 599.0, 600.0, 601.0, 1200.0]):
        now[0] = seconds
        alerts.step([logger, object()], report(**{**CLEAN, kind: 1}, step=step))
        alerts.step([logger], report(**CLEAN))
    starts = [text.split(".")[0] for _, text, _ in logger.experiment.sent]
    assert starts == ["At step 0; 1 so far", "At step 3; 4 so far", "At step 5; 6 so far"]
    assert {level for *_, level in logger.experiment.sent} == {"WARN"}
    assert all("What to try: raise damping" in text for _, text, _ in logger.experiment.sent)


def test_kinds_do_not_wait_for_each_other() -> None:
    alerts, logger = Alerts(lambda: 0.0), WandbLogger()
    alerts.step([logger], report(rejected=1, failed_factorizations=0))
    alerts.step([logger], report(rejected=0, failed_factorizations=2))
    titles = [title for title, _, _ in logger.experiment.sent]
    assert titles == [
        "Natural gradient: a step was taken back",
        "Natural gradient: an inversion failed",
    ]
    assert all(len(title) < 64 for title in titles)  # wandb's limit


def test_wandb_takes_it_offline(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import WandbLogger as Real

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = Real(save_dir=tmp_path, offline=True, project="test")
    Alerts().step([logger], report(rejected=1, failed_factorizations=0))
    logger.experiment.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (alert,) = records(path, "alert")
    assert alert.title == "Natural gradient: a step was taken back"
