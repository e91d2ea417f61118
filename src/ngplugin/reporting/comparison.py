"""Several runs beside each other: those of a sweep, grouped by what was changed, over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from ngplugin.reporting.page import Best, Page, Shown, Table
from ngplugin.reporting.run_record import RunNotFoundError, RunRecord, read_run

_SEED = "seed"
_MORE_IS_BETTER = ("accuracy", "psnr", "r2", "auroc", "f1", "precision", "recall", "bleu")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
        label: what they have that others have not.
        runs: they.
    """

    label: str
    runs: Sequence[RunRecord]

    def values(self, metric: str) -> list[float]:
        """A metric's last value of each run that has it."""
        found = (final(run, metric) for run in self.runs)
        return [value for value in found if value is not None]


def final(run: RunRecord, metric: str) -> float | None:
    """What `results.json` says, or else the last value that was logged; None for neither."""
    value = run.results.get(metric)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    series = run.metrics.get(metric)
    return series.values[-1] if series is not None and series.values else None


def higher_is_better(metric: str) -> bool:
    """By its name."""
    return any(word in metric.lower() for word in _MORE_IS_BETTER)


def read_sweep(folder: Path) -> list[Group]:
    """The runs in the folders of a sweep; those that left nothing to read are left out.

    They are called after Hydra's overrides that are not the same in all, or else after their
    folders.

    Raises:
        RunNotFoundError: there are no two runs.
    """
    found: dict[Path, list[str]] = {}
    runs: dict[Path, RunRecord] = {}
    for each in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            runs[each] = read_run(each)
        except RunNotFoundError:
            continue
        path = each / ".hydra" / "overrides.yaml"
        found[each] = yaml.safe_load(path.read_text()) if path.exists() else [each.name]
    if len(runs) < 2:
        raise RunNotFoundError(
            f"{folder}: expected the folder of a sweep, with a folder for each run in it, but "
            f"found {len(runs)} with anything to read. For a single run name its own folder."
        )
    common = set.intersection(*(set(overrides) for overrides in found.values()))
    groups: dict[str, list[RunRecord]] = {}
    for each, overrides in found.items():
        own = [o for o in overrides if o not in common and not o.lstrip("+").startswith("seed=")]
        groups.setdefault(", ".join(own) or "as it is", []).append(runs[each])
    return [Group(label, members) for label, members in groups.items()]


def comparison_page(folder: Path, metric: str | None = None) -> Page:
    """Curves of all groups, and a table of where they ended.

    Args:
        folder: of the sweep.
        metric: that decides about the order; None for the validation loss, or a training loss.

    Raises:
        RunNotFoundError: there are no two runs to compare.
    """
    groups = read_sweep(folder)
    metrics = _shared_metrics(groups)
    metric = metric or next(
        (m for m in ("val/loss", "test/loss", "train/loss") if m in metrics), None
    )
    tables = [_leaderboard(groups, metrics, metric)]
    curves = [n for n in ("train/loss", "val/loss", "val/accuracy") if _plotted(groups, n)]
    if metric is not None and metric not in curves and _plotted(groups, metric):
        curves.append(metric)
    pictures = []
    for name in curves:
        for by_time in (False, True):
            figure = _curves(groups, name, by_time)
            if figure is not None:
                axis = "seconds" if by_time else "steps"
                file = f"{name.replace('/', '-')}-{axis}"
                caption = "A line for each run; the thick one is the median of its group."
                pictures.append(Shown(file, f"{name} against {axis}", caption, figure))
    count = sum(len(group.runs) for group in groups)
    return Page(f"{len(groups)} settings, {count} runs", str(folder), (), tables, pictures)


def leaderboard(groups: Sequence[Group], metric: str) -> list[tuple[Group, float, float]]:
    """Groups with mean and spread of a metric, the best first; those without it are left out."""
    found = [(g, statistics.fmean(v), _spread(v)) for g in groups if (v := g.values(metric))]
    return sorted(found, key=lambda entry: entry[1], reverse=higher_is_better(metric))


def write_leaderboard(path: Path, groups: Sequence[Group], metrics: Iterable[str]) -> None:
    """Mean, spread and values of every metric of every group, as JSON."""
    content: list[Mapping[str, Any]] = [
        {
            "setting": group.label,
            "runs": [str(run.folder) for run in group.runs],
            "metrics": {
                metric: {"mean": statistics.fmean(v), "spread": _spread(v), "values": v}
                for metric in metrics
                if (v := group.values(metric))
            },
        }
        for group in groups
    ]
    path.write_text(json.dumps(content, indent=2) + "\n")


def _shared_metrics(groups: Sequence[Group]) -> list[str]:
    """What every run has."""
    sets = [
        {*run.metrics, *(n for n, v in run.results.items() if isinstance(v, (int, float)))}
        for group in groups
        for run in group.runs
    ]
    shared = set.intersection(*sets)
    return sorted(name for name in shared if not name.startswith(("natgrad", "data/", "lr-")))


def _leaderboard(groups: Sequence[Group], metrics: Sequence[str], metric: str | None) -> Table:
    order = [entry[0] for entry in leaderboard(groups, metric)] if metric else list(groups)
    best = {
        name: ranked[0][0]
        for name in metrics
        if name != "steps" and (ranked := leaderboard(groups, name))
    }
    rows = []
    for group in order:
        cells: list[str] = [group.label, str(len(group.runs))]
        for name in metrics:
            values = group.values(name)
            text = f"{statistics.fmean(values):.4g}"
            if len(values) > 1:
                text += f" ± {_spread(values):.2g}"
            cells.append(Best(text) if best.get(name) is group else text)
        rows.append(cells)
    caption = "Mean ± standard deviation over the runs; the best of each column is bold."
    if metric:
        caption += f" Ordered by {metric}."
    return Table("Leaderboard", rows, ["setting", "runs", *metrics], caption)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _plotted(groups: Sequence[Group], name: str) -> bool:
    return all(name in run.metrics for group in groups for run in group.runs)


def _curves(groups: Sequence[Group], name: str, by_time: bool) -> Figure | None:
    figure = Figure((7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    positive, values = True, []
    for group, color in zip(groups, _cycled(len(groups)), strict=True):
        lines = []
        for run in group.runs:
            series = run.metrics[name]
            x: Sequence[float] | None = run.seconds(series) if by_time else series.steps
            if x is None:
                return None
            lines.append((np.array(x, float), np.array(series.values)))
            positive = positive and min(series.values) > 0
            values += [min(series.values), max(series.values)]
            axes.plot(*lines[-1], color=color, alpha=0.3, linewidth=0.8)
        axes.plot(*_median(lines), color=color, linewidth=1.8, label=group.label)
    if positive and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="seconds of training" if by_time else "step", ylabel=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    return figure


def _median(lines: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Over the runs, where all of them are."""
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.linspace(start, end, 200)
    return grid, np.median([np.interp(grid, x, y) for x, y in lines], axis=0)


def _cycled(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]
