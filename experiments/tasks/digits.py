"""Handwritten digits, 1,797 of 8 x 8 pixels, inside scikit-learn."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from experiments.tasks.images import ImageData


class Digits(ImageData):
    """Ten digits in 8 x 8 pixels; runs in seconds."""

    shape = (1, 8, 8)
    largest = 16

    def load(self) -> tuple[Tensor, Tensor]:
        """Pixels 0 to 16."""
        digits = load_digits()
        return torch.as_tensor(digits.images), torch.as_tensor(digits.target)
