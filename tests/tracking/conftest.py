"""One fit that wandb, TensorBoard and CSV loggers have written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn

from ngplugin import NaturalGradient
from ngplugin.reporting import wandb_file


class Classifier(L.LightningModule):
    """Three blocks, six steps an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        return nn.functional.cross_entropy(self.net(x), (x[:, 0] > 0).long())

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(48, 6, generator=generator))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Fit(NamedTuple):
    """What there is to look at."""

    callback: NaturalGradient
    csv: Path
    tensorboard: Any
    wandb: Path  # the file of the run
    metrics: dict[str, Any]


@pytest.fixture(scope="package")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("logged")
    callback = NaturalGradient(show_coverage=False, show_summary=False, spectrum_every=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            CSVLogger(folder, "csv"),
            TensorBoardLogger(folder, "board"),
            WandbLogger(save_dir=folder, offline=True, mode="offline", project="test"),
        ]
        trainer = L.Trainer(
            max_epochs=2, logger=loggers, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=100,
            callbacks=[callback],
        )  # fmt: skip
        trainer.fit(Classifier())
        loggers[2].experiment.finish()
    (written,) = folder.glob("wandb/offline-run-*/*.wandb")
    accumulator = EventAccumulator(str(loggers[1].log_dir), {"histograms": 0, "images": 0})
    accumulator.Reload()
    metrics = dict(trainer.callback_metrics)
    return Fit(callback, Path(loggers[0].log_dir), accumulator, written, metrics)


def records(path: Path, kind: str) -> list[Any]:
    """Those of one kind in wandb's file of a run that has ended; another process writes it."""
    from wandb.proto import wandb_internal_pb2

    patience = time.monotonic() + 60
    while True:
        found = []
        for data in wandb_file.records(path.read_bytes()):
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(data)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return [getattr(r, kind) for r in found if r.WhichOneof("record_type") == kind]
        assert time.monotonic() < patience
        time.sleep(0.1)


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of the same file."""
    records(path, "history")
    return wandb_file.read(path)[0]
