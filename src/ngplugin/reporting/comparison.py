"""The page of a sweep: its runs beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ngplugin.reporting.leaderboard import Group, leaderboard, read_sweep, spread
from ngplugin.reporting.page import Best, Page, Shown, Table

_MOST_CURVES = 8  # settings in a picture; more lines hide each other
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def comparison_page(folder: Path, metric: str | None = None, higher: bool | None = None) -> Page:
    """Curves of the best groups, and a table of where all ended.

    Args:
        folder: of the sweep.
        metric: that decides about the order; None for the validation loss, or a training loss.
        higher: whether more of it is better; None for what its name says.

    Raises:
        RunNotFoundError: there are no two runs to compare.
    """
    groups = read_sweep(folder)
    metrics = _shared_metrics(groups)
    metric = metric or next(
        (m for m in ("val/loss", "test/loss", "train/loss") if m in metrics), None
    )
    if metric is not None:
        ranked = [group for group, _, _ in leaderboard(groups, metric, higher)]
        without = [group for group in groups if not group.values(metric)]
        groups = [*ranked, *without]
        if ranked:
            metrics = [metric, *(m for m in metrics if m != metric)]
    tables = [_leaderboard(groups, metrics, metric, higher)]
    shown = groups[:_MOST_CURVES]
    curves = [n for n in ("train/loss", "val/loss", "val/accuracy") if _plotted(shown, n)]
    if metric is not None and metric not in curves and _plotted(shown, metric):
        curves.append(metric)
    pictures = []
    for name in curves:
        for by_time in (False, True):
            figure = _curves(shown, name, by_time)
            if figure is not None:
                axis = "seconds" if by_time else "steps"
                file = f"{name.replace('/', '-')}-{axis}"
                caption = "A line for each run; the thick one is the median of its group."
                if len(shown) < len(groups):
                    caption += f" The first {len(shown)} of {len(groups)} settings."
                pictures.append(Shown(file, f"{name} against {axis}", caption, figure))
    count = sum(len(group.runs) for group in groups)
    settings = "setting" if len(groups) == 1 else "settings"
    return Page(f"{len(groups)} {settings}, {count} runs", str(folder), (), tables, pictures)


def _shared_metrics(groups: Sequence[Group]) -> list[str]:
    """What every run has; null is a number that was not finite."""
    numbers = (int, float, type(None))
    sets = [
        {*run.metrics, *(n for n, v in run.results.items() if isinstance(v, numbers))}
        for group in groups
        for run in group.runs
    ]
    shared = set.intersection(*sets)
    return sorted(name for name in shared if not name.startswith(("natgrad", "data/", "lr-")))


def _leaderboard(
    groups: Sequence[Group], metrics: Sequence[str], metric: str | None, higher: bool | None
) -> Table:
    best = {
        name: ranked[0][0]
        for name in metrics
        if name != "steps"
        and (ranked := leaderboard(groups, name, higher if name == metric else None))
    }
    rows = []
    for group in groups:
        label = f"{group.label} (stopped early)" if group.stopped else group.label
        cells: list[str] = [label, str(len(group.runs))]
        for name in metrics:
            values = group.values(name)
            text = f"{statistics.fmean(values):.4g}" if values else "–"
            if len(values) > 1:
                text += f" ± {spread(values):.2g}"
            if 0 < len(values) < len(group.runs):  # others were not finite
                text += f" ({len(values)} of {len(group.runs)})"
            cells.append(Best(text) if best.get(name) is group else text)
        rows.append(cells)
    caption = "Mean ± standard deviation over the runs; the best of each column is bold."
    if metric:
        caption += f" Ordered by {metric}."
    return Table("Leaderboard", rows, ["setting", "runs", *metrics], caption)


def _plotted(groups: Sequence[Group], name: str) -> bool:
    return any(name in run.metrics for group in groups for run in group.runs)


def _curves(groups: Sequence[Group], name: str, by_time: bool) -> Figure | None:
    figure = Figure((7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    positive, values = True, []
    for group, color in zip(groups, _cycled(len(groups)), strict=True):
        lines = []
        for run in group.runs:
            series = run.metrics.get(name)
            if series is None:  # never finite, or never logged
                continue
            x: Sequence[float] | None = run.seconds(series) if by_time else series.steps
            if x is None:
                return None
            lines.append((np.array(x, float), np.array(series.values)))
            positive = positive and min(series.values) > 0
            values += [min(series.values), max(series.values)]
            axes.plot(*lines[-1], color=color, alpha=0.3, linewidth=0.8)
        if lines:
            axes.plot(*_median(lines), color=color, linewidth=1.8, label=group.label)
    if positive and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="seconds of training" if by_time else "step", ylabel=name)
    axes.spines[["top", "right"]].set_visible(False)
    small = 6 if len(groups) > 4 else 8  # for long labels not to hide the curves
    axes.legend(fontsize=small)
    return figure


def _median(lines: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Over the runs, where all of them are."""
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.linspace(start, end, 200)
    return grid, np.median([np.interp(grid, x, y) for x, y in lines], axis=0)


def _cycled(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]
