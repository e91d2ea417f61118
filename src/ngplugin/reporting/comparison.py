"""Several runs beside each other: those of a sweep, grouped by what was changed, over seeds."""

from __future__ import annotations

import contextlib
import json
import math
import re
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

STOPPED = "stopped/step"  # in the results of a run that was ended early, for being worse
_MOST_CURVES = 8  # settings in a picture; more lines hide each other
_MORE_IS_BETTER = ("accuracy", "psnr", "r2", "auroc", "f1", "precision", "recall", "bleu")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds.

    Attributes:
        label: what they have that others have not, short enough for a legend.
        runs: they.
        setting: the same in full; the label if it is not given.
    """

    label: str
    runs: Sequence[RunRecord]
    setting: str = ""

    @property
    def stopped(self) -> bool:
        """Whether a run was ended early; where it got to does not compare with an end."""
        return any(STOPPED in run.results for run in self.runs)

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

    Where runs write a `results.json` when they end, those without one are left out too: they are
    under way, were interrupted, or failed.

    They are called after Hydra's overrides that are not the same in all, or else after their
    folders.

    Raises:
        RunNotFoundError: there are no two runs.
    """
    found: dict[Path, list[str]] = {}
    runs: dict[Path, RunRecord] = {}
    for each in sorted((path for path in folder.iterdir() if path.is_dir()), key=_in_order):
        try:
            runs[each] = read_run(each)
        except RunNotFoundError:
            continue
    if any(run.results for run in runs.values()):
        runs = {each: run for each, run in runs.items() if run.results}
    for each in runs:
        path = each / ".hydra" / "overrides.yaml"
        found[each] = yaml.safe_load(path.read_text()) if path.exists() else [each.name]
    if len(runs) < 2:
        raise RunNotFoundError(
            f"{folder}: expected the folder of a sweep, with a folder for each run in it, but "
            f"found {len(runs)} with anything to read. For a single run name its own folder."
        )
    common = set.intersection(*(set(overrides) for overrides in found.values()))
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for each, overrides in found.items():
        own = [o for o in overrides if o not in common and not o.lstrip("+").startswith("seed=")]
        groups.setdefault(tuple(own), []).append(runs[each])
    labels = _labels(list(groups))
    return [
        Group(label, members, ", ".join(own) or label)
        for label, (own, members) in zip(labels, groups.items(), strict=True)
    ]


def _in_order(path: Path) -> tuple[int, str]:
    """Folders as Hydra numbers them: 2-... before 10-..."""
    number = re.match(r"\d{1,9}(?=-)", path.name)
    return (int(number.group()) if number else 0, path.name)


def _labels(settings: Sequence[tuple[str, ...]]) -> list[str]:
    """Keys by their last word, long numbers by three digits, where that tells settings apart."""
    words: dict[str, set[str]] = {}
    for override in (o for own in settings for o in own):
        key = override.partition("=")[0]
        words.setdefault(key.rpartition(".")[2], set()).add(key)

    def short(override: str) -> str:
        key, equals, value = override.partition("=")
        word = key.rpartition(".")[2]
        name = word if len(words[word]) == 1 else key
        with contextlib.suppress(ValueError):
            value = f"{float(value):.3g}" if len(value) > 6 else value
        return f"{name}{equals}{value}"

    labels = [", ".join(map(short, own)) or "as it is" for own in settings]
    full = [", ".join(own) for own in settings]
    return [b if labels.count(a) > 1 else a for a, b in zip(labels, full, strict=True)]


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
    return Page(f"{len(groups)} settings, {count} runs", str(folder), (), tables, pictures)


def leaderboard(
    groups: Sequence[Group], metric: str, higher: bool | None = None
) -> list[tuple[Group, float, float]]:
    """Groups with mean and spread of a metric, the best first; those without it are left out.

    Groups with runs that were stopped come after all others.

    Args:
        groups: of runs.
        metric: that decides.
        higher: whether more of it is better; None for what its name says.
    """
    found = [(g, statistics.fmean(v), _spread(v)) for g in groups if (v := g.values(metric))]
    reverse = higher_is_better(metric) if higher is None else higher
    found.sort(key=lambda entry: entry[1], reverse=reverse)
    return sorted(found, key=lambda entry: entry[0].stopped)


def write_leaderboard(path: Path, groups: Sequence[Group], metrics: Iterable[str]) -> None:
    """Mean, spread and values of every metric of every group, as JSON."""
    content: list[Mapping[str, Any]] = [
        {
            "setting": group.setting or group.label,
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
                text += f" ± {_spread(values):.2g}"
            if 0 < len(values) < len(group.runs):  # others were not finite
                text += f" ({len(values)} of {len(group.runs)})"
            cells.append(Best(text) if best.get(name) is group else text)
        rows.append(cells)
    caption = "Mean ± standard deviation over the runs; the best of each column is bold."
    if metric:
        caption += f" Ordered by {metric}."
    return Table("Leaderboard", rows, ["setting", "runs", *metrics], caption)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


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
