"""The runs of a sweep, grouped by what was changed, and which of them came out best."""

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

import yaml

from ngplugin.reporting.run_record import RunNotFoundError, RunRecord, read_run

STOPPED = "stopped/step"  # in the results of a run that was ended early, for being worse
_MORE_IS_BETTER = ("accuracy", "psnr", "r2", "auroc", "f1", "precision", "recall", "bleu")


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
    found = [(g, statistics.fmean(v), spread(v)) for g in groups if (v := g.values(metric))]
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
                metric: {"mean": statistics.fmean(v), "spread": spread(v), "values": v}
                for metric in metrics
                if (v := group.values(metric))
            },
        }
        for group in groups
    ]
    path.write_text(json.dumps(content, indent=2) + "\n")


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
