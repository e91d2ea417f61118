"""The same step with the model's own labels inside the Fisher information, and with the data's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_iris

from experiments.explain.drawing import BLUE, GREEN, RED, Picture, panels

STARTS = ((-0.3, 0.9), (1.1, -0.6), (0.9, 0.6), (-0.1, -1.4))  # slope, offset
STEP = 0.002  # nats of each
STEPS = 500
KINDS = {"gradient": BLUE, "natural gradient": GREEN, "empirical Fisher": RED}


@dataclass(frozen=True)
class Line:
    """The width of petals by their length, a line under a Gaussian of variance 1."""

    inputs: np.ndarray  # [150, 2]: length, 1
    targets: np.ndarray  # [150]

    @staticmethod
    def of_iris() -> Line:
        """All three species (Fisher 1936)."""
        data = load_iris().data
        return Line(np.stack([data[:, 2], np.ones(len(data))], 1), data[:, 3])

    def residuals(self, place: np.ndarray) -> np.ndarray:
        """`[150]`."""
        return self.inputs @ place - self.targets

    def loss(self, place: np.ndarray) -> float:
        """-log p of the data, a mean, but for a constant."""
        return float((self.residuals(place) ** 2).mean() / 2)

    def gradient(self, place: np.ndarray) -> np.ndarray:
        """Of the loss, at the data's labels."""
        return self.inputs.T @ self.residuals(place) / len(self.targets)

    def fisher(self) -> np.ndarray:
        """E ∇log p ∇log pᵀ at labels of the model, whose residuals have the variance 1."""
        return self.inputs.T @ self.inputs / len(self.targets)

    def empirical_fisher(self, place: np.ndarray) -> np.ndarray:
        """The same at the labels of the data."""
        scores = self.inputs * self.residuals(place)[:, None]
        return scores.T @ scores / len(self.targets)

    def direction(self, kind: str, place: np.ndarray) -> np.ndarray:
        """Downhill."""
        g = self.gradient(place)
        if kind == "natural gradient":
            return -np.linalg.solve(self.fisher(), g)
        if kind == "empirical Fisher":
            return -np.linalg.solve(self.empirical_fisher(place), g)
        return -g

    def best(self) -> np.ndarray:
        """Least squares."""
        return np.linalg.lstsq(self.inputs, self.targets, rcond=None)[0]


Found = Mapping[str, list[np.ndarray]]  # kind to paths, [steps, 2] each


def measure() -> Found:
    """Paths of equal steps in nats, each until it is as near to the end as its steps are long."""
    line = Line.of_iris()
    return {kind: [_path(line, kind, np.array(start)) for start in STARTS] for kind in KINDS}


def _path(line: Line, kind: str, place: np.ndarray) -> np.ndarray:
    F, end, places = line.fisher(), line.best(), [place]
    for _ in range(STEPS):
        d = line.direction(kind, place)
        place = place + d * np.sqrt(2 * STEP / (d @ F @ d))
        places.append(place)
        if (place - end) @ F @ (place - end) < 2 * STEP:
            break
    return np.array(places)


def draw(found: Found) -> Figure:
    """A panel a kind."""
    line = Line.of_iris()
    figure, axes = panels(len(found), 3.4)
    slopes, offsets = np.meshgrid(np.linspace(-0.6, 1.4, 120), np.linspace(-2.2, 1.3, 120))
    losses = [line.loss(np.array(p)) for p in zip(slopes.flat, offsets.flat, strict=True)]
    least = line.loss(line.best())
    for axis, (kind, paths) in zip(axes, found.items(), strict=True):
        axis.contour(
            slopes, offsets, np.reshape(losses, slopes.shape),
            levels=least + np.geomspace(0.01, 20, 12), colors="0.85", linewidths=1,
        )  # fmt: skip
        for path in paths:
            axis.plot(*path.T, color=KINDS[kind], linewidth=1.8)
            axis.plot(*path[0], "o", color="black", markersize=4)
        axis.plot(*line.best(), "+", color="black", markersize=10)
        axis.set_title(kind, fontsize=10)
        axis.set(xlabel="slope", xlim=(-0.6, 1.4), ylim=(-2.2, 1.3))
    axes[0].set_ylabel("offset", fontsize=9)
    return figure


def reach(remaining: float) -> list[float]:
    """Of whole steps with the empirical Fisher: their lengths over what remains, by KL.

    Args:
        remaining: of the way from each start to the end.
    """
    line = Line.of_iris()
    root, found = np.linalg.cholesky(line.fisher()), []
    for start in STARTS:
        way = remaining * (start - line.best())
        step = line.direction("empirical Fisher", line.best() + way)
        found.append(float(np.linalg.norm(step @ root) / np.linalg.norm(way @ root)))
    return found


def caption(found: Found) -> str:
    """How long the ways are."""
    steps = {kind: [len(path) - 1 for path in paths] for kind, paths in found.items()}
    counts = [f"{min(n)} to {max(n)} ({kind})" for kind, n in steps.items()]
    first, late = reach(1.0), reach(0.1)
    return (
        "*The width of 150 petals as a line of their length, from four places, in steps of "
        f"{STEP:g} nats each: {', '.join(counts)} until the end is a step away. Natural gradient "
        "goes straight, since for a line under a Gaussian the Fisher information is all the "
        "curvature that the loss has; its whole step leads to the end. With the data's labels "
        "the direction is another, and the length more so: at the dots a whole step is "
        f"{min(first):.2f} to {max(first):.2f} of what it should be, after nine tenths of the way "
        f"{min(late):.1f} to {max(late):.0f} times.*"
    )


PICTURE = Picture("labels", measure, draw, caption)
