"""Two pairs of Gaussians, equally far apart in their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.distributions import Normal, kl_divergence

from experiments.explain.drawing import BLUE, ORANGE, Picture, panels

WIDTHS = (0.5, 5.0)
SHIFT = 1.0


@dataclass(frozen=True)
class Pair:
    """N(0, width²) and the same, moved by `SHIFT`; their KL divergence in nats."""

    width: float
    kl: float


def measure() -> list[Pair]:
    """One pair a width."""
    return [
        Pair(width, float(kl_divergence(Normal(0.0, width), Normal(SHIFT, width))))
        for width in WIDTHS
    ]


def draw(pairs: list[Pair]) -> Figure:
    """A panel a pair, on the same axis."""
    figure, axes = panels(len(pairs), 2.6)
    x = np.linspace(-14, 15, 2000)
    for axis, pair in zip(axes, pairs, strict=True):
        for mean, colour, style in ((0.0, BLUE, "-"), (SHIFT, ORANGE, "--")):
            density = Normal(mean, pair.width).log_prob(torch.from_numpy(x)).exp().numpy()
            axis.plot(x, density, style, color=colour, linewidth=1.8, label=f"mean {mean:g}")
            axis.fill_between(x, density, color=colour, alpha=0.15)
        axis.set_title(f"standard deviation {pair.width:g}: KL {pair.kl:.2g} nats", fontsize=10)
        axis.set(xlabel="y", yticks=[], ylim=(0, None))
        axis.spines["left"].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("density", fontsize=9)
    return figure


def caption(pairs: list[Pair]) -> str:
    """How far apart they are, twice."""
    near, far = pairs
    return (
        f"*The mean moves by {SHIFT:g} in both. With a standard deviation of {near.width:g} the "
        f"two hardly overlap: {near.kl:.2g} nats. With {far.width:g} nobody would notice: "
        f"{far.kl:.2g} nats. The axis is the same, the heights are not.*"
    )


PICTURE = Picture("gaussians", measure, draw, caption)
