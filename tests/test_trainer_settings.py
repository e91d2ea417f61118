"""Trainer settings that cannot be followed are refused where the fit starts, with the way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy

from ngplugin import NaturalGradient, OptionError, UnsupportedTrainerError
from ngplugin.lightning.trainer_settings import SETTINGS, check

refuses = pytest.mark.refuses


def fit(tmp_path: Path, model: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> None:
    L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=2,
        callbacks=[NaturalGradient(show_coverage=False), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    ).fit(model)


class WithoutOptimizer(BoringModel):
    def configure_optimizers(self) -> None:
        return None


@refuses("Optimizers", "no optimizer from configure_optimizers()")
def test_a_module_without_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainerError, match=r"no optimizer.*torch.optim.SGD"):
        fit(tmp_path, WithoutOptimizer())


@pytest.mark.supports("Gradients", "clipping by value, with a warning")
def test_clipping_by_value_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="gradient_clip_algorithm='value'.*clip by norm"):
        fit(tmp_path, BoringModel(), gradient_clip_val=1.0, gradient_clip_algorithm="value")


@pytest.mark.supports("Callbacks", "LearningRateFinder, with a warning that its size is not used")
def test_a_rate_finder_is_warned_of(tmp_path: Path) -> None:
    class Model(BoringModel):
        lr = 0.1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    with pytest.warns(UserWarning, match=r"LearningRateFinder.*NaturalGradient\(lr="):
        fit(tmp_path, Model(), LearningRateFinder(num_training_steps=4, early_stop_threshold=None))


def stand_in(strategy: str = "SingleDeviceStrategy", **attributes: Any) -> Any:
    """What the table looks at, for settings that this machine cannot have."""
    optimizers = [torch.optim.SGD([torch.zeros(1)], lr=0.1)]
    return SimpleNamespace(
        strategy=type(strategy, (), {"optimizers": optimizers, **attributes})(),
        gradient_clip_val=None,
        gradient_clip_algorithm=None,
    )


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("FSDPStrategy", marks=refuses("Distributed", "FSDPStrategy (FSDP1)")),
        pytest.param("XLAFSDPStrategy", marks=refuses("Distributed", "XLAFSDPStrategy")),
        pytest.param("DeepSpeedStrategy", marks=refuses("Distributed", "DeepSpeedStrategy")),
    ],
)
def test_strategies_that_take_parameters_or_steps_away_are_refused(strategy: str) -> None:
    with pytest.raises(UnsupportedTrainerError, match=f"strategy {strategy}.*strategy='ddp'"):
        check(stand_in(strategy), {})


@refuses("Distributed", "DDPStrategy(model_averaging_period=...), copies that drift apart")
def test_copies_that_drift_apart_are_refused() -> None:
    trainer = stand_in()
    trainer.strategy = DDPStrategy(model_averaging_period=4)
    trainer.strategy.optimizers = [torch.optim.SGD([torch.zeros(1)], lr=0.1)]
    with pytest.raises(UnsupportedTrainerError, match=r"model_averaging_period=4.*leave"):
        check(trainer, {})


def test_an_ordinary_trainer_passes() -> None:
    check(stand_in(), {"weight": torch.zeros(1)})


def test_an_optimizer_that_is_not_there_cannot_be_chosen(tmp_path: Path) -> None:
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[NaturalGradient(optimizers=[0, 2])],
    )
    with pytest.raises(OptionError, match=r"no optimizer 2; .* returned 1, numbered from 0"):
        trainer.fit(BoringModel())


def test_every_message_says_what_to_do() -> None:
    assert all(setting.why and setting.instead for setting in SETTINGS)
