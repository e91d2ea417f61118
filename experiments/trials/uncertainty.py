"""Torch-Uncertainty: `python -m experiments.trials.uncertainty`."""

# ruff: noqa: E402 -- the operators below have to be there before the other imports.

from __future__ import annotations

import torch

# The wheel of torchvision on PyPI was built for CUDA: beside a torch without it, its import fails
# for want of these operators, which nothing here calls.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import lightning as L
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_uncertainty.losses import DistributionNLLLoss, ELBOLoss
from torch_uncertainty.models.mlp import bayesian_mlp, mlp, packed_mlp
from torch_uncertainty.routines import ClassificationRoutine, RegressionRoutine
from torch_uncertainty.transforms import RepeatTarget

from experiments.trials.trial import QUIET, Trial, main

LIBRARY = "torch-uncertainty"


def _fit(module: L.LightningModule, data: TensorDataset, epochs: int, callbacks: list) -> None:
    loader = DataLoader(data, batch_size=64, shuffle=True)
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(module, loader)


def digits() -> TensorDataset:
    """Handwritten digits, 8 by 8 pixels."""
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))


def classification(callbacks: list[Callback]) -> None:
    """The optimizer exists before the routine does."""
    model = mlp(64, 10, [128, 128], dropout_rate=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    routine = ClassificationRoutine(model, 10, nn.CrossEntropyLoss(), optim_recipe=optimizer)
    _fit(routine, digits(), 4, callbacks)


def packed(callbacks: list[Callback]) -> None:
    """Four networks in one, by convolutions with groups; every label four times."""
    model = packed_mlp(64, 10, [128], num_estimators=4)
    routine = ClassificationRoutine(
        model,
        10,
        nn.CrossEntropyLoss(),
        is_ensemble=True,
        format_batch_fn=RepeatTarget(4),
        optim_recipe=torch.optim.Adam(model.parameters(), lr=1e-3),
    )
    _fit(routine, digits(), 4, callbacks)


def bayesian(callbacks: list[Callback]) -> None:
    """Weights are drawn anew in each call of a layer; three calls a step."""
    model = bayesian_mlp(64, 10, [64])
    routine = ClassificationRoutine(
        model,
        10,
        ELBOLoss(None, nn.CrossEntropyLoss(), kl_weight=1e-4, num_samples=3),
        is_ensemble=True,
        optim_recipe=torch.optim.Adam(model.parameters(), lr=1e-3),
    )
    _fit(routine, digits(), 4, callbacks)


def regression(callbacks: list[Callback]) -> None:
    """The network's output is a normal distribution; AdamW's recipe has a schedule."""
    x, y = load_diabetes(return_X_y=True)
    data = TensorDataset(
        torch.tensor(x * 20, dtype=torch.float32),
        torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32),
    )
    model = mlp(10, 1, [64], dist_family="normal")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    routine = RegressionRoutine(
        model,
        1,
        DistributionNLLLoss(),
        dist_family="normal",
        optim_recipe={"optimizer": optimizer, "lr_scheduler": scheduler},
    )
    _fit(routine, data, 20, callbacks)


TRIALS = [
    Trial("uncertainty_classification", LIBRARY, "digits; cross entropy", classification),
    Trial("uncertainty_packed", LIBRARY, "digits; cross entropy of an ensemble", packed),
    Trial("uncertainty_bayesian", LIBRARY, "digits; evidence lower bound", bayesian),
    Trial("uncertainty_regression", LIBRARY, "diabetes; normal distribution", regression),
]

if __name__ == "__main__":
    main(TRIALS)
