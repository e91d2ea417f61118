"""The figure of `docs/cost.md`: growth, what a step consists of, linear algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.cost.page import Study
from experiments.cost.pieces import PIECES
from experiments.cost.power_law import PowerLaw

# Okabe & Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DRAWN = (
    "cholesky_ex", "cholesky_ex, cholesky_inverse", "eigh", "orthogonal iteration, Cholesky-QR",
    "Newton-Schulz, two turns", "G⁻¹ V A⁻¹", "XᵀX of 128 rows",
)  # fmt: skip


def plot(path: Path, study: Study) -> None:
    """Draw and save it."""
    import matplotlib

    matplotlib.use("agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    _growth(axes[0], study)
    _shares(axes[1], study)
    _algebra(axes[2], study)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _growth(axis: Any, study: Study) -> None:
    """Points as measured, lines as fitted."""
    colours = iter(_COLOURS[1:])
    for (kind, batch), runs in study.series().items():
        if kind != "width":
            continue
        sizes = [size for size, _ in runs]
        steps = {
            "natural gradient": [run.step for _, run in runs],
            "SGD": [run.sgd_step for _, run in runs],
        }
        for name, seconds in steps.items():
            law, colour = PowerLaw.fit(sizes, seconds), next(colours)
            label = f"{name}, batch {batch}: d^{law.exponent:.2f}"
            axis.plot(sizes, [1e3 * law(size) for size in sizes], color=colour, linewidth=1)
            axis.plot(sizes, [1e3 * s for s in seconds], "o", color=colour, label=label)
    axis.set(xscale="log", yscale="log", xlabel="width of 3 hidden layers", ylabel="ms a step")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_title("A step, and the power laws fitted", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _shares(axis: Any, study: Study) -> None:
    """Stacked, batch 128."""
    runs = study.series()["width", 128]
    bottoms = [0.0] * len(runs)
    for colour, part in zip(_COLOURS, ("SGD's step", *PIECES, "rest"), strict=True):
        heights = []
        for _, run in runs:
            seconds = {"SGD's step": run.sgd_step, "rest": run.rest}.get(part)
            heights.append(100 * (run.piece(part) if seconds is None else seconds) / run.step)
        axis.bar(range(len(runs)), heights, 0.7, bottoms, color=colour, label=part)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axis.set_xticks(range(len(runs)), [f"{size:,}" for size, _ in runs])
    axis.set(xlabel="width of 3 hidden layers", ylabel="% of a natural-gradient step")
    axis.set_title("What a step consists of, batch 128", fontsize=10)
    axis.set_ylim(0, 130)  # for the legend
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")


def _algebra(axis: Any, study: Study) -> None:
    """In products of float32."""
    for colour, name in zip(_COLOURS, _DRAWN, strict=True):
        units = study.units("float32", name)
        axis.plot([*units], [*units.values()], color=colour, marker="o", markersize=3, label=name)
    sizes = [*study.units("float32", _DRAWN[0])]
    axis.set(xscale="log", yscale="log", xlabel="d", ylabel="products of d x d matrices")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_title("Linear algebra, float32", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
