"""A Gaussian that is fitted to fifty lengths, in the plane of its mean and its deviation.

The lengths are those of the sepals of Iris setosa (Fisher 1936), in centimetres.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_iris
from torch import Tensor

MEANS, DEVIATIONS = (3.2, 5.8), (0.15, 1.15)


def sepals() -> Tensor:
    """`[50]`."""
    return torch.tensor(load_iris().data[:50, 0])


def loss(mean: Any, deviation: Any, data: Tensor) -> Any:
    """-log p of the data, a mean, but for a constant."""
    spread = data.var(unbiased=False).item() + (mean - data.mean().item()) ** 2
    return np.log(deviation) + spread / (2 * deviation**2)


def kl(place: tuple[float, float], mean: Any, deviation: Any) -> Any:
    """From the Gaussian of a place to others, in nats."""
    squares = place[1] ** 2 + (mean - place[0]) ** 2
    return np.log(deviation / place[1]) + squares / (2 * deviation**2) - 0.5


def fisher(place: tuple[float, float]) -> np.ndarray:
    """Of mean and deviation, `[2, 2]`; Amari 1998 has it for other coordinates."""
    return np.diag([1.0, 2.0]) / place[1] ** 2


def show(axis: Any, data: Tensor) -> None:
    """Contours of the loss, and where it is least."""
    means, deviations = np.meshgrid(np.linspace(*MEANS, 200), np.linspace(*DEVIATIONS, 150))
    values = loss(means, deviations, data)
    levels = values.min() + np.geomspace(0.03, 30, 13)
    axis.contour(means, deviations, values, levels=levels, colors="0.85", linewidths=1)
    axis.plot(data.mean(), data.std(unbiased=False), "+", color="black", markersize=10)
    axis.set(xlabel="mean, cm", xlim=MEANS, ylim=DEVIATIONS)
