"""PyTorch Forecasting: `python -m experiments.trials.forecasting`."""

from __future__ import annotations

from typing import Any

import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import Callback
from pytorch_forecasting import GroupNormalizer, TimeSeriesDataSet
from pytorch_forecasting.data import NaNLabelEncoder
from pytorch_forecasting.data.examples import generate_ar_data
from pytorch_forecasting.metrics import MASE, NormalDistributionLoss, QuantileLoss
from pytorch_forecasting.models import DeepAR, NBeats, TemporalFusionTransformer
from torch.utils.data import DataLoader

from experiments.trials.trial import QUIET, Trial, main

LIBRARY = "pytorch-forecasting"
STEPS = 40


def series(**how: Any) -> TimeSeriesDataSet:
    """The project's own synthetic series: trends, seasons and noise."""
    data = generate_ar_data(seasonality=10.0, timesteps=200, n_series=50)
    data["series"] = data["series"].astype(str)
    data["static"] = "2"
    data["date"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(data.time_idx, "D")
    how = {"max_encoder_length": 40, "max_prediction_length": 10, **how}
    return TimeSeriesDataSet(
        data,
        time_idx="time_idx",
        target="value",
        categorical_encoders={"series": NaNLabelEncoder().fit(data.series)},
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["series"]),
        **how,
    )


def _train(module: L.LightningModule, data: TimeSeriesDataSet, callbacks: list[Callback]) -> None:
    """Clipped by norm, as the project's examples are."""
    loader: DataLoader = data.to_dataloader(train=True, batch_size=64, num_workers=0)
    trainer = L.Trainer(max_steps=STEPS, gradient_clip_val=0.1, callbacks=callbacks, **QUIET)
    trainer.fit(module, loader)


def tft(callbacks: list[Callback]) -> None:
    """Temporal fusion transformer; histories of different lengths, packed for its LSTM."""
    data = series(
        min_encoder_length=20,
        static_categoricals=["series"],
        time_varying_known_reals=["time_idx"],
        add_relative_time_idx=True,
        add_encoder_length=True,
    )
    module = TemporalFusionTransformer.from_dataset(
        data, learning_rate=0.01, hidden_size=16, dropout=0.1, loss=QuantileLoss(), log_interval=-1
    )
    _train(module, data, callbacks)


def deepar(callbacks: list[Callback]) -> None:
    """A recurrent network whose output is a normal distribution, scaled to each series."""
    data = series(static_categoricals=["static"], time_varying_known_reals=["time_idx"])
    module = DeepAR.from_dataset(
        data,
        learning_rate=0.01,
        hidden_size=32,
        dropout=0.1,
        loss=NormalDistributionLoss(),
        log_interval=-1,
    )
    _train(module, data, callbacks)


def nbeats(callbacks: list[Callback]) -> None:
    """Stacked perceptrons; the mean absolute scaled error, and part of it for the past."""
    data = series(min_encoder_length=40)
    module = NBeats.from_dataset(
        data,
        learning_rate=0.01,
        widths=[32, 128],
        backcast_loss_ratio=0.1,
        loss=MASE(),
        log_interval=-1,
    )
    _train(module, data, callbacks)


TRIALS = [
    Trial("forecasting_tft", LIBRARY, "series; quantile loss", tft),
    Trial("forecasting_deepar", LIBRARY, "series; normal distribution", deepar),
    Trial("forecasting_nbeats", LIBRARY, "series; absolute scaled error", nbeats),
]

if __name__ == "__main__":
    main(TRIALS)
