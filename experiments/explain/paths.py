"""Gradient descent and natural gradient for the same Gaussian, written down in three ways.

Every step has the same length where it counts: the package bounds its KL divergence, and is asked
for more than the bound lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Normal

from experiments.explain import plane
from experiments.explain.drawing import BLUE, GREEN, ORANGE, Picture, panels
from ngplugin import NaturalGradientOptimizer

START = (3.6, 0.5)
RADIUS = 0.003  # nats; a step uses two thirds
_MOST_STEPS = 500


@dataclass(frozen=True)
class Writing:
    """A number, beside the mean, that says how wide a Gaussian is."""

    name: str
    deviation: Callable[[Tensor], Tensor]
    of_deviation: Callable[[float], float]


WRITINGS = (
    Writing("logarithm of the deviation", torch.exp, np.log),
    Writing("variance", torch.sqrt, np.square),
    Writing("precision", torch.rsqrt, lambda deviation: deviation**-2),
)


@dataclass(frozen=True)
class Paths:
    """Mean and deviation before each step, `[steps, 2]`, one array for each of `WRITINGS`."""

    gradient: Sequence[np.ndarray]
    natural: Sequence[np.ndarray]


def measure() -> Paths:
    """From `START`, until a step does not lower the loss."""
    # Of mean and width the Fisher information has no entries but those of its diagonal.
    gradient, natural = (
        [path(writing, structure) for writing in WRITINGS] for structure in ("identity", "diagonal")
    )
    return Paths(gradient, natural)


def path(writing: Writing, structure: str) -> np.ndarray:
    """One of them."""
    data = plane.sepals()
    mean, width = (
        nn.Parameter(torch.tensor(value, dtype=torch.float64))
        for value in (START[0], writing.of_deviation(START[1]))
    )
    optimizer = NaturalGradientOptimizer(
        [mean, width], lr=1e6, momentum=0.0, structure=structure, fisher="exact",
        kl_radius=RADIUS, measure_every=1, layer_balance="natural",
        damping=1e-9, decay=0.0, statistics_every=1, refresh_every=1,
    )  # fmt: skip
    places: list[tuple[float, float]] = []
    before = float("inf")
    while len(places) < _MOST_STEPS:
        with optimizer.observe():
            loss = -Normal(mean, writing.deviation(width)).log_prob(data).mean()
        if not loss < before:
            break
        before = loss.item()
        places.append((mean.item(), writing.deviation(width).item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.array(places)


def apart(paths: Sequence[np.ndarray]) -> float:
    """How far a place of any path is from the first path, at most; in deviations of the data."""
    first = paths[0]
    gaps = [np.linalg.norm(p[:, None] - first[None], axis=-1).min(1).max() for p in paths[1:]]
    return float(max(gaps)) / float(plane.sepals().std())


def draw(paths: Paths) -> Figure:
    """A panel for each way of descending."""
    figure, axes = panels(2, 3.7)
    for axis, kind, title in (
        (axes[0], paths.gradient, "gradient descent"),
        (axes[1], paths.natural, "natural gradient"),
    ):
        plane.show(axis, plane.sepals())
        for i, (writing, places) in enumerate(zip(WRITINGS, kind, strict=True)):
            axis.plot(
                *places.T, color=(BLUE, ORANGE, GREEN)[i], linewidth=5 - 1.7 * i,
                label=writing.name,
            )  # fmt: skip
        axis.plot(*START, "o", color="black", markersize=5)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("standard deviation, cm", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8,
        frameon=False, title="the second parameter, beside the mean", title_fontsize=8,
    )  # fmt: skip
    return figure


def caption(paths: Paths) -> str:
    """How far apart the paths are."""
    return (
        "*The same Gaussian, described by its mean and one of three numbers; from the dot, with "
        f"steps of {2 / 3 * RADIUS:.3g} nats by the package, until the loss falls no more. "
        "Gradient descent takes a path for each description, up to "
        f"{apart(paths.gradient):.2f} standard deviations of the data apart, and in one of them "
        "stops short. With natural gradient they differ by "
        f"{apart(paths.natural):.2f}, which steps of a finite length leave.*"
    )


PICTURE = Picture("paths", measure, draw, caption)
