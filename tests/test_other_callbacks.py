"""Lightning's own callbacks that touch optimizers or weights, beside ours."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer, StepReport
from tests.oracle import flat
from tests.small_fits import quiet

supports = pytest.mark.supports
averages_weights = pytest.mark.skipif(
    not hasattr(callbacks, "WeightAveraging"), reason="this Lightning averages no weights"
)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))
        self.lr, self.batch_size = 1e-3, 16
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]

    def train_dataloader(self) -> DataLoader[Any]:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(512, 6, generator=g)
        y = (x[:, 0] * x[:, 1] > 0).long()
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)

    val_dataloader = train_dataloader


def fit(
    folder: Path,
    *others: L.Callback,
    module: Module | None = None,
    natural: NaturalGradient | None = None,
    checkpoint: str | None = None,
    **settings: Any,
) -> tuple[Module, NaturalGradient, L.Trainer]:
    module = module or Module()
    natural = natural or NaturalGradient(show_coverage=False)
    settings = {"default_root_dir": folder, "max_epochs": 4, **settings}
    trainer = quiet(natural, *others, **settings)
    trainer.fit(module, ckpt_path=checkpoint)
    return module, natural, trainer


def loss(module: Module) -> float:
    with torch.no_grad():
        return sum(float(module.eval().loss(b)) for b in module.train_dataloader())


@averages_weights
@supports("Callbacks", "WeightAveraging, EMAWeightAveraging")
@pytest.mark.parametrize(
    ("name", "options"), [("WeightAveraging", {}), ("EMAWeightAveraging", {"decay": 0.9})]
)
def test_averaged_weights_are_those_of_natural_steps(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    averaging = getattr(callbacks, name)(**options)
    module, natural, _ = fit(tmp_path, averaging)
    assert natural.summary()["steps"] == 4 * 32
    assert loss(module) < 0.5 * loss(Module())
    # With the averages swapped in for validation, our own view of the weights is theirs again.
    plain, _, _ = fit(tmp_path)
    assert not torch.equal(flat([*module.parameters()]), flat([*plain.parameters()]))


@averages_weights
@supports("Callbacks", "EMAWeightAveraging: resuming bit by bit")
def test_resuming_with_averaged_weights_is_bit_exact(tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: str | None = None) -> tuple[Tensor, str]:
        saver = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        module, _, _ = fit(
            tmp_path,
            callbacks.EMAWeightAveraging(decay=0.9),
            saver,
            max_epochs=epochs,
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        return flat([*module.parameters()]), saver.last_model_path

    whole, _ = run(4)
    _, half = run(2)
    resumed, _ = run(4, half)
    assert torch.equal(resumed, whole)


@supports("Callbacks", "StochasticWeightAveraging")
def test_stochastic_weight_averaging_swaps_the_schedule_and_averages(tmp_path: Path) -> None:
    swa = StochasticWeightAveraging(swa_lrs=5e-4, swa_epoch_start=2, annealing_epochs=1)
    module, natural, trainer = fit(tmp_path, swa, max_epochs=6)
    assert natural.summary()["steps"] == 6 * 32
    assert loss(module) < 0.5 * loss(Module())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-4)


@supports("Callbacks", "LearningRateFinder, with a warning that its size is not used")
def test_a_rate_finder_looks_with_the_plain_optimizer_and_leaves_no_trace(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    with pytest.warns(UserWarning, match="LearningRateFinder"):
        module, natural, _ = fit(tmp_path, finder)
    assert module.lr != 1e-3
    assert natural.summary()["steps"] >= 4 * 32 - 30  # Lightning 2.4 counts those of the search
    assert loss(module) < 0.5 * loss(Module())


@supports("Callbacks", "BatchSizeFinder")
def test_a_batch_size_finder_leaves_no_trace(tmp_path: Path) -> None:
    finder = BatchSizeFinder(mode="power", steps_per_trial=2, init_val=16, max_trials=2)
    module, natural, _ = fit(tmp_path, finder)
    assert module.batch_size in (32, 64)  # Lightning has counted trials in two ways
    assert natural.summary()["steps"] == 4 * 512 // module.batch_size
    assert loss(module) < loss(Module())


@supports("Callbacks", "EarlyStopping and ModelCheckpoint on natgrad/kl")
def test_the_kl_can_be_monitored(tmp_path: Path) -> None:
    stop = EarlyStopping("natgrad/kl", stopping_threshold=10.0, mode="min")
    best = ModelCheckpoint(tmp_path, monitor="natgrad/kl", filename="{epoch}")
    _, _, trainer = fit(tmp_path, stop, best, enable_checkpointing=True)
    assert trainer.current_epoch == 1  # any KL is below 10 nats
    assert best.best_model_score is not None


@supports("Callbacks", "Timer, ModelCheckpoint in the middle of an epoch")
def test_saving_in_the_middle_of_an_epoch_changes_nothing(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    saving, _, _ = fit(tmp_path, saver, Timer(), enable_checkpointing=True)
    plain, _, _ = fit(tmp_path)
    assert torch.equal(flat([*saving.parameters()]), flat([*plain.parameters()]))
    assert len(list(tmp_path.glob("*.ckpt"))) == 4 * 32 // 5


@supports("Trainer", "a second fit with the same callback, fit after a KeyboardInterrupt")
def test_a_second_fit_starts_anew_and_leaves_nothing_behind(tmp_path: Path) -> None:
    natural = NaturalGradient(show_coverage=False)
    logger = CSVLogger(tmp_path, name="logs")

    class Break(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, Break(), natural=natural)
    assert natural.summary()["steps"] == 7
    module, _, trainer = fit(tmp_path, natural=natural, logger=logger)
    assert natural.summary()["steps"] == module.calls == 4 * 32
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["natgrad/kl_predicted"]]
    assert len(rows) == 4 * 32
    assert trainer.optimizers[0].listeners == []
    alone, _, _ = fit(tmp_path)
    assert torch.equal(flat([*module.parameters()]), flat([*alone.parameters()]))


def test_a_fit_leaves_the_listeners_of_the_user_alone(tmp_path: Path) -> None:
    steps: list[int] = []

    class Own(Module):
        def configure_optimizers(self) -> Any:
            optimizer = NaturalGradientOptimizer(self.parameters())
            optimizer.listeners.append(self.note)
            return optimizer

        def note(self, report: StepReport) -> None:
            steps.append(report.step)

    module, _, trainer = fit(tmp_path, module=Own(), max_epochs=1)
    assert steps == list(range(32))
    assert trainer.optimizers[0].listeners == [module.note]
