"""Loggers that ngplugin knows nothing of get the same metrics, at every step."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger, MLFlowLogger, mlflow
from torch.utils.data import DataLoader

from ngplugin import NaturalGradient
from tests.small_fits import POINTS, Points, quiet

STEPS = 6


class Plain(Logger):
    """As little as a logger has to be: neither `experiment` nor `save_dir`."""

    name, version = "plain", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def fit(logger: Logger) -> NaturalGradient:
    callback = NaturalGradient(show_coverage=False, show_summary=False, measure_every=1)
    quiet(callback, logger=logger, max_steps=STEPS).fit(Points(), DataLoader(POINTS, batch_size=16))
    return callback


def test_a_logger_that_only_takes_metrics() -> None:
    logger = Plain()
    callback = fit(logger)
    measured = {step: row["natgrad/kl"] for step, row in logger.rows if "natgrad/kl" in row}
    assert [*measured] == [*range(STEPS)]
    assert max(measured.values()) == pytest.approx(callback.summary()["kl_max"])


def test_mlflow_by_lightnings_own_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client is a stand-in; that of MLflow writes to a server or a folder."""
    sent: list[Any] = []
    run = SimpleNamespace(info=SimpleNamespace(experiment_id="0"))
    client = SimpleNamespace(
        get_run=lambda _: run,
        log_batch=lambda metrics=(), **_: sent.extend(metrics),
        set_terminated=lambda *_: None,
    )
    parts = {
        "mlflow": {"set_tracking_uri": lambda _: None},
        "mlflow.tracking": {"MlflowClient": lambda _: client},
        "mlflow.entities": {"Metric": SimpleNamespace, "Param": SimpleNamespace},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mlflow, "_MLFLOW_AVAILABLE", True)
    fit(MLFlowLogger(run_id="a run", tracking_uri="nowhere"))
    steps = [metric.step for metric in sent if metric.key == "natgrad/kl"]
    assert steps == [*range(STEPS)]
    assert {"natgrad/condition_number", "natgrad/kl_radius"} <= {metric.key for metric in sent}
