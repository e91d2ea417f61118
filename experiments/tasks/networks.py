"""Networks that are quick on one core."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ngplugin.options import check_choice

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}


def dense(
    inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), activation: str = "tanh"
) -> nn.Sequential:
    """Fully connected layers: [batch, inputs] -> [batch, outputs].

    Args:
        inputs: numbers that describe an example.
        outputs: numbers to return for it.
        hidden: units of each hidden layer.
        activation: after each hidden layer; "relu", "tanh" or "silu".

    Raises:
        ValueError: a layer without units, or an activation that does not exist.
    """
    _check_sizes("hidden", hidden)
    check_choice("activation", activation, list(ACTIVATIONS))
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def mlp(
    shape: tuple[int, int, int], classes: int, hidden: Sequence[int] = (256, 128)
) -> nn.Sequential:
    """A multilayer perceptron with ReLU: images [batch, *shape] -> logits [batch, classes].

    Args:
        shape: channels, height and width of an image.
        classes: how many logits to return.
        hidden: units of each hidden layer.

    Raises:
        ValueError: a layer without units.
    """
    channels, height, width = shape
    layers = dense(channels * height * width, classes, hidden, "relu")
    return nn.Sequential(nn.Flatten(), *layers)


def cnn(
    shape: tuple[int, int, int], classes: int, channels: Sequence[int] = (16, 32, 64)
) -> nn.Sequential:
    """3 x 3 convolutions, each with BatchNorm, ReLU and a halving of height and width.

    Images [batch, *shape] -> logits [batch, classes].

    Args:
        shape: channels, height and width of an image.
        classes: how many logits to return.
        channels: of each convolution; as many as the image can be halved.

    Raises:
        ValueError: a convolution without channels, or more of them than the image can be halved.
    """
    _check_sizes("channels", channels)
    before, height, width = shape
    if min(height, width) < 2 ** len(channels):
        raise ValueError(
            f"channels={list(channels)}: each convolution halves the image, and {height} x {width} "
            f"pixels can be halved {min(height, width).bit_length() - 1} times; give fewer"
        )
    layers: list[nn.Module] = []
    for after in channels:
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),  # BatchNorm has the bias
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        before, height, width = after, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * height * width, classes))


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{name}={list(sizes)}: expected positive whole numbers, one for a layer")
