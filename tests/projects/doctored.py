"""Modules for `ngplugin doctor` to look at."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn


class Classifier(L.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
        self.unused = nn.Parameter(torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        return nn.functional.cross_entropy(self.net(x), (x[:, 0] > 0).long())

    def train_dataloader(self) -> Any:
        data = torch.utils.data.TensorDataset(torch.randn(40, 6))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sparse(Classifier):
    """With a loss that was not made of the model's parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.zeros((), requires_grad=True)


class Broken(Classifier):
    """Fails in every trainer."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("label")


class Detached(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx).detach()


class NotANumber(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * float("nan")


class WithoutData(Classifier):
    train_dataloader = None


def loader() -> Any:
    return Classifier().train_dataloader()


def wide() -> Classifier:
    return Classifier(width=64)
