"""A run in pictures: each a function of its record that returns a figure, or None without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngplugin.curvature.spectrum import BINS, LOWEST, PER_DECADE
from ngplugin.errors import OptionError
from ngplugin.options import check_choice
from ngplugin.reporting.run_record import RunRecord, Series
from ngplugin.tracking.metrics import PREFIX

_WIDTH, _HEIGHT = 7.0, 3.4  # inches
_MOST_POINTS = 4000  # of a line; more than there are pixels
_MOST_BLOCKS = 48  # of a picture; the names of more cannot be read
#: Of measured, predicted, bound, other; told apart by those who see colours differently too.
_COLORS = ("#0072b2", "#e69f00", "#d55e00", "#009e73")


@dataclass(frozen=True)
class Picture:
    """One picture and what it shows.

    Attributes:
        name: of its file.
        title: above it.
        caption: how to read it.
        draw: makes it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[RunRecord], Figure | None]


def picture(run: RunRecord, name: str) -> Figure:
    """One of the pictures, by its name.

    Raises:
        OptionError: there is none of this name, or the run has nothing to draw in it.
    """
    check_choice("name", name, [each.name for each in PICTURES])
    figure = next(each for each in PICTURES if each.name == name).draw(run)
    if figure is None:
        raise OptionError(
            f"name={name!r}: this fit has nothing to draw there. Usual cause: it has made no step, "
            "or what the picture shows was switched off (measure_every=None, spectrum_every above "
            "the number of steps), or is of a loss, which only loggers know."
        )
    return figure


def loss(run: RunRecord) -> Figure | None:
    """Every logged loss against steps."""
    names = [name for name in run.metrics if name.rsplit("/", 1)[-1] in ("loss", "loss_step")]
    names += [name for name in run.metrics if name in ("train_loss", "val_loss")]
    if not names:
        return None
    figure, axes = _figure()
    for name in names:
        _line(axes, run.metrics[name], label=name)
    _logarithmic(axes, [run.metrics[name].values for name in names])
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def kl(run: RunRecord) -> Figure | None:
    """Measured KL, what was predicted, and the bound."""
    measured, predicted = _of(run, "kl"), _of(run, "kl_predicted")
    if not measured.values and not predicted.values:
        return None
    figure, axes = _figure()
    _line(axes, predicted, label="predicted by the blocks", color=_COLORS[1], linewidth=0.8)
    _line(axes, _of(run, "kl_radius"), label="radius", color=_COLORS[2])
    _points(axes, measured, label="measured", color=_COLORS[0])
    axes.set_yscale("log")
    axes.set_ylabel("KL of a step, nats per term")
    axes.legend()
    return figure


def kl_agreement(run: RunRecord) -> Figure | None:
    """Measured against predicted KL."""
    measured, predicted = _of(run, "kl"), _of(run, "kl_predicted")
    at = dict(zip(predicted.steps, predicted.values, strict=True))
    pairs = [
        (at[s], v, s)
        for s, v in zip(measured.steps, measured.values, strict=True)
        if at.get(s, 0) > 0 and v > 0
    ]
    if not pairs:
        return None
    x, y, steps = np.array(pairs).T
    figure, axes = _figure()
    dots = axes.scatter(x, y, c=steps, s=9, cmap="viridis")
    figure.colorbar(dots, label="step")
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="0.5", linewidth=0.8, label="equal")
    axes.set(xscale="log", yscale="log", xlabel="predicted KL", ylabel="measured KL")
    axes.legend()
    return figure


def condition(run: RunRecord) -> Figure | None:
    """Condition numbers of the whole matrix."""
    damped, undamped = _of(run, "condition_number"), _of(run, "condition_number_undamped")
    if not damped.values:
        return None
    figure, axes = _figure()
    _line(axes, damped, label="damped", color=_COLORS[0])
    _line(axes, undamped, label="undamped", color=_COLORS[1])
    axes.set_yscale("log")
    axes.set_ylabel("condition number")
    axes.legend()
    return figure


def block_conditions(run: RunRecord) -> Figure | None:
    """A heat map, block by step, of the condition numbers of the damped blocks."""
    if not run.spectra:
        return None
    names = list(dict.fromkeys(b.name for _, blocks in run.spectra for b in blocks))[:_MOST_BLOCKS]
    values = np.full((len(names), len(run.spectra)), np.nan)
    for column, (_, blocks) in enumerate(run.spectra):
        for block in blocks:
            if block.name in names and math.isfinite(block.condition):
                values[names.index(block.name), column] = math.log10(max(block.condition, 1.0))
    figure, axes = _figure(_rows_height(len(names)))
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="magma")
    figure.colorbar(image, label="log10 of the condition number, damped")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    _label_times(axes, [step for step, _ in run.spectra])
    return figure


def spectra(run: RunRecord) -> Figure | None:
    """How many eigenvalues there are of each size, over time, a panel for each block."""
    if not run.spectra:
        return None
    names = list(dict.fromkeys(b.name for _, blocks in run.spectra for b in blocks))[:12]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure((_WIDTH, 1.9 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, name in zip(panels.flat, names, strict=False):
        counts = np.zeros((BINS, len(run.spectra)))
        for column, (_, blocks) in enumerate(run.spectra):
            for block in blocks:
                if block.name == name:
                    counts[:, column] = block.counts[1:]
        share = counts / np.maximum(counts.sum(0, keepdims=True), 1)
        occupied = np.flatnonzero(share.sum(1))
        low, high = (occupied[0], occupied[-1] + 1) if len(occupied) else (0, 1)
        ends = (LOWEST + low / PER_DECADE, LOWEST + high / PER_DECADE)
        axes.imshow(
            np.sqrt(share[low:high]), origin="lower", aspect="auto", cmap="Blues",
            extent=(-0.5, len(run.spectra) - 0.5, *ends), interpolation="nearest",
        )  # fmt: skip
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        _label_times(axes, [step for step, _ in run.spectra])
    for axes in panels.flat[len(names) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("log10 eigenvalue", fontsize=8)
    return figure


def step_scale(run: RunRecord) -> Figure | None:
    """What the bound left of each step."""
    scale = _of(run, "step_scale")
    positive = Series(*_positive(scale))
    if not positive.values:
        return None
    figure, axes = _figure()
    _line(axes, positive, color=_COLORS[0])
    axes.set_yscale("log")
    axes.set_ylabel("step scale")
    return figure


def trust(run: RunRecord) -> Figure | None:
    """The reduction ratio, and the damping."""
    ratio, damping = _of(run, "reduction_ratio"), _of(run, "damping")
    if not ratio.values:
        return None
    figure, axes = _figure()
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    _points(axes, ratio, color=_COLORS[0])
    low, high = np.percentile(ratio.values, [2, 98])
    axes.set_ylim(min(low, 0) - 0.2, max(high, 1) + 0.2)
    axes.set_ylabel("reduction ratio", color=_COLORS[0])
    other = axes.twinx()
    _line(other, damping, color=_COLORS[3])
    if all(value > 0 for value in damping.values):
        other.set_yscale("log")
    other.set_ylabel("damping", color=_COLORS[3])
    return figure


def direction(run: RunRecord) -> Figure | None:
    """The cosine between gradient and natural gradient, and curvature's share of the time."""
    cosine, overhead = _of(run, "cosine"), _of(run, "overhead")
    if not cosine.values:
        return None
    figure, axes = _figure()
    _line(axes, cosine, label="cosine of gradient and natural gradient", color=_COLORS[0])
    _line(axes, overhead, label="curvature's share of the time", color=_COLORS[3], linewidth=0.8)
    axes.set_ylim(min(0.0, min(cosine.values)) - 0.02, 1.02)
    axes.legend()
    return figure


PICTURES = (
    Picture("loss", "Loss", "As it was logged; training losses are of single batches.", loss),
    Picture(
        "kl", "KL of each step",
        "Dots are measured: how far a step moved the model's own prediction on its batch. They "
        "stay below the radius. The line is what the blocks predict; on deep networks it is far "
        "too low, which the trust region makes up for.",
        kl,
    ),
    Picture(
        "kl-agreement", "Measured against predicted KL",
        "On the grey line the prediction is right. Above it the blocks do not see that layers move "
        "together.",
        kl_agreement,
    ),
    Picture(
        "condition", "Condition number of the Fisher information",
        "Largest over smallest eigenvalue of all blocks together, with damping and without.",
        condition,
    ),
    Picture(
        "block-conditions", "Condition number of each block",
        "Of the damped blocks, by the first parameter of each; brighter is worse.",
        block_conditions,
    ),
    Picture(
        "spectra", "Eigenvalues of each block",
        "Darker where there are more of them. Those that rounding cannot tell from zero are left "
        "out. At most twelve blocks are shown.",
        spectra,
    ),
    Picture(
        "step-scale", "What the bound left of each step",
        "1 is the whole step that the natural gradient proposes with lr; with the default lr of 1 "
        "it is usually far less, and the radius sets the pace.",
        step_scale,
    ),
    Picture(
        "trust", "Reduction ratio and damping",
        "How far the loss fell over how far the quadratic model said: 1 is a perfect model, below "
        "0 the loss of the batch rose.",
        trust,
    ),
    Picture(
        "direction", "Direction and cost",
        "Near a cosine of 1 curvature changes nothing but the length of a step.",
        direction,
    ),
)  # fmt: skip


def _of(run: RunRecord, name: str) -> Series:
    return run.metrics.get(PREFIX + name, Series())


def _figure(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    # Not by pyplot, which keeps figures, and opens windows where it can.
    figure = Figure((_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _rows_height(rows: int) -> float:
    return max(_HEIGHT, 0.22 * rows + 1.0)


def _thinned(series: Series) -> tuple[Sequence[int], Sequence[float]]:
    every = max(1, len(series.steps) // _MOST_POINTS)
    return series.steps[::every], series.values[::every]


def _line(axes: Axes, series: Series, **style: Any) -> None:
    alone = {"marker": "o", "markersize": 4} if len(series.values) == 1 else {}
    axes.plot(*_thinned(series), **{"linewidth": 1.2, **alone, **style})


def _points(axes: Axes, series: Series, **style: Any) -> None:
    axes.plot(*_thinned(series), linestyle="", marker=".", markersize=4, **style)


def _positive(series: Series) -> tuple[list[int], list[float]]:
    kept = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if v > 0]
    return [s for s, _ in kept], [v for _, v in kept]


def _logarithmic(axes: Axes, values: Sequence[Sequence[float]]) -> None:
    """Where all are positive and they span more than a decade."""
    together = [v for each in values for v in each]
    if together and min(together) > 0 and max(together) > 10 * min(together):
        axes.set_yscale("log")


def _label_times(axes: Axes, steps: Sequence[int]) -> None:
    places = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
    axes.set_xticks(places, [f"{steps[i]:,}" for i in places])
    axes.set_xlabel("step", fontsize=8)
