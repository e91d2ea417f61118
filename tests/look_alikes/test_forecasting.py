"""Shaped like forecasting libraries: losses that are metrics of their own, logs in a dict."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

from tests.look_alikes.look_alike import look_alike, point
from tests.oracle import generator

QUANTILES = (0.1, 0.5, 0.9)


class Series(Dataset[Any]):
    """Noisy sines; a history of 12 and a future of up to 6 values."""

    def __init__(self, ragged: bool, size: int = 96) -> None:
        g = generator(5)
        phase = 6.28 * torch.rand(size, 1, generator=g)
        self.values = torch.sin(torch.arange(18) / 2 + phase)
        self.values += 0.1 * torch.randn(size, 18, generator=g)
        self.lengths = torch.randint(2, 7, (size,), generator=g) if ragged else None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        length = 6 if self.lengths is None else int(self.lengths[i])
        return self.values[i, :12], self.values[i, 12 : 12 + length]


def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Any], Any]:
    """Targets of different lengths come as one packed sequence."""
    histories, futures = zip(*items, strict=True)
    lengths = torch.tensor([len(future) for future in futures])
    x = {"history": torch.stack(histories), "lengths": lengths}
    if len(lengths.unique()) > 1:
        return x, (pack_sequence([*futures], enforce_sorted=False), None)
    return x, (torch.stack(futures), None)


class MultiHorizonMetric(torchmetrics.Metric):
    """A loss that adds up what it has seen, as a metric of validation does.

    `forward` updates the sums over all batches and returns the loss of this one.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("lengths", torch.tensor(0), dist_reduce_fx="sum")

    outputs = 1

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """One value for each time, `[B, T]`."""
        raise NotImplementedError

    def update(self, predicted: Tensor, target: Any) -> None:
        if isinstance(target, PackedSequence):
            target, lengths = pad_packed_sequence(target, batch_first=True)
            predicted = predicted[:, : target.shape[1]]
        else:
            lengths = torch.full((len(target),), target.shape[1])
        losses = self.loss(predicted, target)
        inside = torch.arange(target.shape[1]) < lengths[:, None]
        self.losses = self.losses + losses.masked_fill(~inside, 0.0).sum()
        self.lengths = self.lengths + lengths.sum()

    def compute(self) -> Tensor:
        return self.losses / self.lengths


class Quantile(MultiHorizonMetric):
    outputs = len(QUANTILES)

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        each = []
        for i, q in enumerate(QUANTILES):
            error = target - predicted[..., i]
            each.append(torch.max((q - 1) * error, q * error).unsqueeze(-1))
        return 2 * torch.cat(each, dim=2).mean(-1)


class AbsoluteError(MultiHorizonMetric):
    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted[..., 0] - target).abs()


class NormalDistribution(MultiHorizonMetric):
    outputs = 2

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        mean, scale = predicted[..., 0], nn.functional.softplus(predicted[..., 1]) + 1e-3
        return -torch.distributions.Normal(mean, scale).log_prob(target)


class GatedResidual(nn.Module):
    """Two layers, a gate and a normalization, with a raw parameter on the way around."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.gate = nn.Linear(size, 2 * size)
        self.mask = nn.Parameter(torch.zeros(size))
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        skipped = x * torch.sigmoid(self.mask) * 2.0
        x = self.second(nn.functional.elu(self.first(x)))
        return self.norm(nn.functional.glu(self.gate(x), dim=-1) + skipped)


class Forecaster(L.LightningModule):
    """A recurrent encoder and decoder with learned times and attention to the history."""

    def __init__(self, loss: MultiHorizonMetric, optimizer: str = "adam", size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["loss"])
        self.loss = loss
        self.enter = nn.Linear(1, size)
        self.times = nn.Embedding(6, size)
        self.encoder = nn.LSTM(size, size, batch_first=True)
        self.decoder = nn.LSTM(size, size, batch_first=True)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.residual = GatedResidual(size)
        self.leave = nn.Linear(size, loss.outputs)
        self.logged: list[dict[str, Any]] = []

    def forward(self, x: dict[str, Any]) -> dict[str, Tensor]:
        history, state = self.encoder(self.enter(x["history"].unsqueeze(-1)))
        steps = int(x["lengths"].max())
        times = self.times(torch.arange(steps)).expand(len(history), -1, -1)
        decoded, _ = self.decoder(times, state)
        attended, _ = self.attention(decoded, history, history, need_weights=False)
        return {"prediction": self.leave(self.residual(decoded + attended))}

    def step(self, batch: Any) -> dict[str, Any]:
        x, (y, weight) = batch
        assert weight is None
        loss = self.loss(self(x)["prediction"], y)
        return {"loss": loss, "n_samples": x["lengths"].size(0)}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        log = self.step(batch)
        self.log("train_loss", log["loss"], on_epoch=True, prog_bar=True, batch_size=32)
        self.logged.append({k: v for k, v in log.items() if k != "loss"})
        return log

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        log = self.step(batch)
        self.log("val_loss", log["loss"], on_epoch=True, batch_size=32)
        return log

    def configure_optimizers(self) -> dict[str, Any]:
        classes = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        kind = classes[self.hparams.optimizer]
        try:
            optimizer = kind(self.parameters(), lr=1e-3, weight_decay=1e-8)
        except TypeError:  # for optimizers without weight decay
            optimizer = kind(self.parameters(), lr=1e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(
                    optimizer, factor=0.1, patience=2
                ),
                "monitor": "val_loss",
                "interval": "epoch",
                "frequency": 1,
                "strict": False,
            },
        }


def loader(ragged: bool) -> DataLoader[Any]:
    return DataLoader(Series(ragged), batch_size=32, collate_fn=collate)


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "packed"])
@pytest.mark.parametrize(
    ("loss", "fall"),
    [
        pytest.param(
            NormalDistribution,
            0.8,
            marks=point(2, "a distribution loss in a Metric, dict logs, PackedSequence targets"),
        ),
        pytest.param(Quantile, 0.9, marks=point(5, "quantile loss over (B, T, quantiles)")),
        pytest.param(AbsoluteError, 0.9, marks=point(5, "absolute error by hand")),
    ],
)
def test_a_forecaster_trains_by_a_metric(loss: Any, fall: float, ragged: bool) -> None:
    run = look_alike(
        lambda: Forecaster(loss()), loader(ragged), fall, same_rates=False, max_epochs=6
    )
    assert run.module.logged == [{"n_samples": 32}] * 18
    blocks = run.blocks()
    assert blocks["encoder.weight_hh_l0"] == "gradient-kronecker"
    assert blocks["residual.first.weight"] == blocks["attention.in_proj_weight"] == "kronecker"
    # The metric's sums are those of the user's own calls.
    assert int(run.module.loss.lengths) > 0


@point(9, "ReduceLROnPlateau on a validation loss, strict=False")
def test_a_plateau_lowers_the_rate_of_the_optimizer_that_steps() -> None:
    class Stuck(Forecaster):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(1.0), batch_size=32)

    def data() -> Any:
        class Both(L.LightningDataModule):
            def train_dataloader(self) -> Any:
                return loader(ragged=False)

            def val_dataloader(self) -> Any:
                return loader(ragged=True)

        return Both()

    run = look_alike(lambda: Stuck(NormalDistribution()), data(), max_epochs=5)
    assert [rates[0] for rates in run.rates[::3]] == pytest.approx([1e-3] * 4 + [1e-4])
