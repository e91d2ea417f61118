"""A picture kept in the weights of a network that knows the colour of every place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.tasks.networks import ACTIVATIONS, dense
from experiments.tasks.photograph import Photograph
from experiments.tasks.splits import Batch
from experiments.tasks.task import Task
from ngplugin.options import check_choice


class FourierFeatures(nn.Module):
    """Places [batch, inputs] -> [batch, 2 frequencies], cosines and sines of random waves.

    Without them a network is slow to learn what is sharp (Tancik et al. 2020, arXiv:2006.10739).

    Args:
        inputs: coordinates of a place.
        frequencies: how many waves; they are drawn once and not trained.
        scale: standard deviation of their frequencies, in waves per unit of a coordinate.
    """

    waves: Tensor

    def __init__(self, inputs: int, frequencies: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("waves", scale * torch.randn(inputs, frequencies))

    def forward(self, places: Tensor) -> Tensor:
        """The same places, by their phases."""
        phase = 2 * math.pi * places @ self.waves  # [batch, frequencies]
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class Sine(nn.Module):
    """The sine of `frequency` times its input."""

    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        """Between -1 and 1."""
        return torch.sin(self.frequency * x)


def coordinate_network(
    inputs: int,
    outputs: int,
    features: int = 256,
    hidden: Sequence[int] = (128, 128, 128),
    activation: str = "relu",
    scale: float = 5.0,
    frequency: float = 30.0,
) -> nn.Sequential:
    """Places [batch, inputs] -> [batch, outputs].

    Args:
        inputs: coordinates of a place.
        outputs: numbers to return for it.
        features: by which a place is described before the hidden layers; an even number.
        hidden: units of each hidden layer.
        activation: "relu", "tanh" or "silu" after random Fourier features; or "sine", where the
            features are trained too (SIREN, Sitzmann et al. 2020, arXiv:2006.09661).
        scale: of the Fourier features' frequencies, in waves per unit of a coordinate.
        frequency: of the sines, in radians per unit of their input.

    Raises:
        ValueError: a size, scale or activation that cannot be.
    """
    if features < 2 or features % 2 or scale <= 0 or frequency <= 0:
        raise ValueError(
            f"features={features}, scale={scale}, frequency={frequency}: expected a positive even "
            "number and two numbers above 0"
        )
    if activation == "sine":
        return _siren([inputs, features, *hidden, outputs], frequency)
    check_choice("activation", activation, [*ACTIVATIONS, "sine"])
    layers = dense(features, outputs, hidden, activation)
    return nn.Sequential(FourierFeatures(inputs, features // 2, scale), *layers)


def _siren(sizes: Sequence[int], frequency: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(sizes)):
        layer = nn.Linear(before, after)
        # Every layer's input to the sine has about the same distribution, see §3.2 there.
        bound = 1 / before if i == 0 else math.sqrt(6 / before) / frequency
        nn.init.uniform_(layer.weight, -bound, bound)
        layers += [layer, Sine(frequency)]
    return nn.Sequential(*layers[:-1])


class ImplicitImage(Task):
    """Minimises the mean squared error of colours; measures `loss` and `psnr` (dB).

    The peak signal-to-noise ratio is -10 log10 of the mean squared error, for colours up to 1. It
    is no mean over batches: what is measured has to come in one.
    """

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error."""
        where, colours = batch
        return F.mse_loss(self(where), colours)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """The error as it is and in decibels."""
        loss = self.loss(batch)
        return {"loss": loss, "psnr": -10 * loss.log10()}


class SavePicture(L.Callback):
    """Draws what the tested network has learned beside the original, at the end of the test.

    Args:
        path: of the PNG file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @torch.no_grad()
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not isinstance(data, Photograph):
            return
        where, colours = data.splits["test"][:]  # type: ignore[index]
        learned = pl_module(where.to(pl_module.device, pl_module.dtype)).cpu().to(colours)
        error = F.mse_loss(learned, colours)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draw(
            self.path,
            data.picture(colours),
            data.picture(learned),
            f"network, {-10 * error.log10():.1f} dB",
        )


def draw(path: Path, original: Tensor, learned: Tensor, title: str) -> None:
    """The photograph, the network's picture and ten times their difference, side by side.

    Args:
        path: of the PNG file.
        original: [height, width, 3] in [0, 1].
        learned: the same.
        title: of the network's picture.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, nothing global

    pictures = {
        "photograph": original,
        title: learned,
        "10 × difference": (10 * (original - learned).abs()).clamp(0, 1),
    }
    height, width = original.shape[:2]
    figure = Figure(figsize=(15, 5 * height / width + 0.35), layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        axes.imshow(picture.numpy(), interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
    figure.savefig(path, dpi=120)
