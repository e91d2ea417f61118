"""What is equally far, in parameters and in nats, and where the loss falls most within."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from experiments.explain import plane
from experiments.explain.drawing import BLUE, ORANGE, RED, Picture, panels

NATS = 0.05
LENGTH = 0.16  # of a step in parameters
PLACES = ((3.7, 0.35), (3.7, 0.85), (4.6, 0.35), (4.6, 0.85), (5.5, 0.35), (5.5, 0.85))


@dataclass(frozen=True)
class Step:
    """Steepest descent from a place: within a distance in parameters, and within one in nats."""

    place: tuple[float, float]
    gradient: np.ndarray  # [2]
    natural: np.ndarray

    @property
    def kls(self) -> tuple[float, float]:
        """Of the two."""
        ends = (self.place + self.gradient, self.place + self.natural)
        first, second = (float(plane.kl(self.place, *end)) for end in ends)
        return first, second


def measure() -> list[Step]:
    """One step of each kind from each place."""
    data = plane.sepals()
    return [_step(place, data) for place in PLACES]


def _step(place: tuple[float, float], data: plane.Tensor) -> Step:
    h = 1e-6
    slope = np.array(
        [
            (plane.loss(*(place + d), data) - plane.loss(*(place - d), data)) / (2 * h)
            for d in h * np.eye(2)
        ]
    )
    F = plane.fisher(place)
    natural = -np.linalg.solve(F, slope)
    natural *= np.sqrt(2 * NATS / (natural @ F @ natural))
    return Step(place, -LENGTH * slope / np.linalg.norm(slope), natural)


def draw(steps: Sequence[Step]) -> Figure:
    """Balls and arrows in the plane, whose axes have the same scale."""
    figure, (axis,) = panels(1, 3.9)
    plane.show(axis, plane.sepals())
    axis.set_aspect("equal")
    axis.set_ylabel("standard deviation, cm", fontsize=9)
    angles = np.linspace(0, 2 * np.pi, 200)
    circle = np.array([np.cos(angles), np.sin(angles)])
    means, deviations = np.meshgrid(
        np.linspace(*plane.MEANS, 600), np.linspace(*plane.DEVIATIONS, 400)
    )
    labelled = False
    for step in steps:
        x, y = step.place
        balls = (
            (LENGTH * circle, "-", BLUE, f"{LENGTH} away in parameters"),
            (
                np.sqrt(2 * NATS) * np.linalg.inv(np.linalg.cholesky(plane.fisher(step.place))).T
                @ circle,
                "-", RED, f"{NATS} nats away, by the Fisher information",
            ),
        )  # fmt: skip
        for ball, style, colour, label in balls:
            axis.plot(
                x + ball[0], y + ball[1], style, color=colour, linewidth=1.2,
                label=None if labelled else label,
            )  # fmt: skip
        axis.contour(
            means, deviations, plane.kl(step.place, means, deviations), levels=[NATS],
            colors=ORANGE, linestyles="--", linewidths=1.2,
        )  # fmt: skip
        labelled = True
        for arrow, colour in ((step.gradient, BLUE), (step.natural, RED)):
            axis.annotate(
                "", (x + arrow[0], y + arrow[1]), (x, y),
                arrowprops={
                    "arrowstyle": "-|>", "color": colour, "linewidth": 1.6,
                    "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9,
                },
            )  # fmt: skip
    axis.plot([], [], "--", color=ORANGE, label=f"{NATS} nats away, exactly")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def caption(steps: Sequence[Step]) -> str:
    """What the circles cost in nats."""
    kls = [step.kls[0] for step in steps]
    return (
        "*A Gaussian, fitted to fifty lengths of sepals; grey: where the loss is equal; cross: "
        f"where it is least. The blue steps are all {LENGTH:g} long, and move the prediction by "
        f"{min(kls):.2g} to {max(kls):.2g} nats. The red ones are made to move it by {NATS:g}: "
        "short where the Gaussian is narrow, long where it is wide, and in another direction.*"
    )


PICTURE = Picture("balls", measure, draw, caption)
