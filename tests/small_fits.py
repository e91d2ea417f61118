"""A quiet trainer and a small module, for tests that differ in one setting each."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient
from tests.oracle import generator

X = torch.randn(64, 6, generator=generator(1))
Y = (X[:, 0] * X[:, 1] > 0).long()
POINTS = TensorDataset(X, Y)


class Points(L.LightningModule):
    """Two classes of points; notes every loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = self.build()
        self.losses: list[float] = []

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.note(loss)
        return loss

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    @torch.compiler.disable
    def note(self, loss: Tensor) -> None:
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A trainer that writes nothing, neither to files nor to the terminal."""
    silent = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{"accelerator": "cpu", **silent, "callbacks": [*callbacks], **settings})


def fit(
    module: Any, *more: L.Callback, data: Any = None, steps: int = 10, **settings: Any
) -> NaturalGradient:
    """Fit with natural gradient for some steps; returns the callback."""
    callback = NaturalGradient(show_coverage=False)
    if "max_epochs" not in settings:
        settings = {"max_steps": steps, **settings}
    loader = DataLoader(POINTS, batch_size=16) if data is None else data
    quiet(callback, *more, **settings).fit(module, loader)
    return callback


def blocks(callback: NaturalGradient) -> set[str]:
    """The kinds of block that the parameters have."""
    return {row.block for row in callback.coverage().rows}
