"""The KL divergence of every step of three networks: measured, predicted, and its bound."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from experiments.explain.drawing import BLUE, GREEN, ORANGE, PINK, RED, Picture, panels
from ngplugin import NaturalGradientOptimizer, StepReport

STEPS = 150
LEAST_RATE = 0.1  # of the schedule: below it KLs drown in float32's rounding
BATCH = 256
SHOWN = "autoencoder of 8 layers"  # step by step


@dataclass(frozen=True)
class Network:
    """Something to train on digits of 8×8 pixels."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _labels(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(network(images), labels)


def _pixels(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(network(images), images)


NETWORKS = {
    "one layer": Network(lambda: _perceptron(64, 10), _labels),
    "perceptron of 3 layers": Network(lambda: _perceptron(64, 64, 64, 10), _labels),
    SHOWN: Network(lambda: _perceptron(64, 48, 32, 16, 8, 16, 32, 48, 64), _pixels),
}


def measure(steps: int = STEPS) -> dict[str, list[StepReport]]:
    """A run of each, with the defaults but that every step is measured, and a cosine schedule."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    return {name: _run(network, images, labels, steps) for name, network in NETWORKS.items()}


def _run(network: Network, images: Tensor, labels: Tensor, steps: int) -> list[StepReport]:
    torch.manual_seed(0)
    model = network.make()
    optimizer = NaturalGradientOptimizer(model.parameters(), measure_every=1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, LEAST_RATE)
    reports: list[StepReport] = []
    optimizer.listeners.append(reports.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loss that has little left to fall
        for _ in range(steps):
            batch = torch.randint(len(images), (BATCH,))
            with optimizer.observe():
                loss = network.loss(model, images[batch], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reports


def ratios(reports: Sequence[StepReport]) -> list[float]:
    """Measured over predicted KL of every step that has both."""
    return [r.kl / r.kl_predicted for r in reports if r.kl is not None and r.kl_predicted > 0]


def draw(runs: Mapping[str, Sequence[StepReport]]) -> Figure:
    """One run step by step; of all the ratio of measured to predicted."""
    figure, (left, right) = panels(2, 3.6)
    shown = runs[SHOWN]
    steps = [r.step for r in shown]
    left.plot(steps, [r.kl_radius for r in shown], color=RED, label="radius")
    measured = [(r.step, r.kl) for r in shown if r.kl]
    left.plot(*zip(*measured, strict=True), ".", color=BLUE, markersize=4, label="measured")
    left.plot(
        steps, [r.kl_predicted for r in shown], color=ORANGE, linewidth=1,
        label="predicted by the blocks",
    )  # fmt: skip
    left.set(yscale="log", xlabel="step", ylabel="KL, nats a term")
    left.set_title(SHOWN, fontsize=10)
    for colour, (name, reports) in zip((GREEN, PINK, BLUE), runs.items(), strict=True):
        right.plot(ratios(reports), ".", color=colour, markersize=4, label=name)
    right.axhline(1.0, color="0.5", linewidth=0.8)
    right.set(yscale="log", xlabel="step", ylabel="measured KL over predicted")
    right.set_title("what the prediction misses", fontsize=10)
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
    return figure


def caption(runs: Mapping[str, Sequence[StepReport]]) -> str:
    """Whether the bound held, and how far the prediction was off."""
    reports = [r for each in runs.values() for r in each]
    kept = sum(r.kl is not None and r.kl <= r.kl_radius for r in reports)
    off = [
        f"{statistics.median(ratios(each)):.2g} ({name}, at most {max(ratios(each)):,.0f})"
        for name, each in runs.items()
    ]
    return (
        f"*Digits of 8×8 pixels, {STEPS} steps with the defaults, but that all are measured. Left: "
        "the radius follows the schedule and the loss; dots are measured. Right: measured over "
        f"predicted, at the median {', '.join(off)}. {kept} of {len(reports)} steps stayed within "
        "their radius.*"
    )


PICTURE = Picture("divergences", measure, draw, caption)
