"""Trainer settings that cannot be followed are refused where the fit starts, with the way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.plugins.precision import MixedPrecision

from ngplugin import NaturalGradient, UnsupportedTrainerError
from ngplugin.lightning.trainer_settings import SETTINGS, check


def fit(tmp_path: Path, model: L.LightningModule, **settings: Any) -> None:
    L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=2,
        callbacks=[NaturalGradient(show_coverage=False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    ).fit(model)


class WithoutOptimizer(BoringModel):
    def configure_optimizers(self) -> None:
        return None


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainerError, match=r"automatic_optimization=False.*wrap"):
        fit(tmp_path, ManualOptimBoringModel())


def test_a_module_without_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainerError, match=r"no optimizer.*torch.optim.SGD"):
        fit(tmp_path, WithoutOptimizer())


def test_a_gradient_scaler_is_refused(tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(UnsupportedTrainerError, match=r"16-mixed.*bf16-mixed"):
        fit(tmp_path, BoringModel(), plugins=[plugin])


def test_clipping_by_value_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="gradient_clip_algorithm='value'.*clip by norm"):
        fit(tmp_path, BoringModel(), gradient_clip_val=1.0, gradient_clip_algorithm="value")


def stand_in(strategy: str = "SingleDeviceStrategy", processes: int = 1) -> Any:
    """What the table looks at, for settings that this machine cannot have."""
    optimizers = [torch.optim.SGD([torch.zeros(1)], lr=0.1)]
    return SimpleNamespace(
        strategy=type(strategy, (), {"optimizers": optimizers})(),
        world_size=processes,
        precision="32-true",
        precision_plugin=SimpleNamespace(),
        gradient_clip_val=None,
        gradient_clip_algorithm=None,
    )


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_are_refused(strategy: str) -> None:
    with pytest.raises(UnsupportedTrainerError, match=f"strategy {strategy}.*one device"):
        check(stand_in(strategy), BoringModel())


def test_several_processes_are_refused() -> None:
    with pytest.raises(UnsupportedTrainerError, match=r"2 processes.*devices=1"):
        check(stand_in(processes=2), BoringModel())


def test_an_ordinary_trainer_passes() -> None:
    check(stand_in(), BoringModel())


def test_every_message_says_what_to_do() -> None:
    assert all(setting.why and setting.instead for setting in SETTINGS)
