"""What a run has left in its folder: metrics, spectra, config and results."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngplugin.curvature.spectrum import BlockSpectrum
from ngplugin.errors import NgpluginError
from ngplugin.reporting import wandb_file
from ngplugin.spectrum_log import FILE, read_spectra
from ngplugin.tracking import PREFIX

SECONDS = "train/seconds"  # of training when a row was written, if the run says so


class RunNotFoundError(NgpluginError, FileNotFoundError):
    """A folder has nothing of a run in it."""


@dataclass
class Series:
    """One metric.

    Attributes:
        steps: at which it was written.
        values: as many; finite.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class RunRecord:
    """One run.

    Attributes:
        folder: where it was found.
        metrics: by name.
        spectra: step and blocks, of the first optimizer that has any.
        config: as the run was started, as far as it was kept.
        results: what it came to, as far as it was kept.
    """

    folder: Path
    metrics: dict[str, Series] = field(default_factory=dict)
    spectra: list[tuple[int, list[BlockSpectrum]]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def natural(self) -> bool:
        """Whether natural gradient had a part in it."""
        return any(name.startswith(PREFIX) for name in self.metrics)

    def seconds(self, series: Series) -> list[float] | None:
        """When each value was written, in seconds of training; None if the run does not say."""
        known = self.metrics.get(SECONDS)
        if known is None:
            return None
        found: list[float] = []
        at = 0
        for step in series.steps:  # both in order
            while at + 1 < len(known.steps) and known.steps[at] < step:
                at += 1
            found.append(known.values[at])
        return found

    def numbers(self) -> dict[str, float | None]:
        """As `Summary.numbers` gives them, from what was written."""
        kl, predicted = self._natural("kl"), self._natural("kl_predicted")
        radius = self._natural("kl_radius")
        at = dict(zip(predicted.steps, predicted.values, strict=True))
        bound = dict(zip(radius.steps, radius.values, strict=True))
        scale, overhead = self._natural("step_scale").values, self._natural("overhead").values
        measured = list(zip(kl.steps, kl.values, strict=True))
        counts = ("skipped", "rejected", "failed_factorizations", "dropped_statistics")
        steps = len(scale)
        return {
            "steps": steps,
            "kl_mean": statistics.fmean(kl.values) if kl.values else None,
            "kl_max": max(kl.values, default=None),
            "kl_used": _median([v / bound[s] for s, v in measured if bound.get(s)]),
            "kl_ratio": _median([v / at[s] for s, v in measured if at.get(s)]),
            "kl_radius": radius.values[-1] if radius.values else math.inf,
            "reduction_ratio": _median(self._natural("reduction_ratio").values),
            "cosine": _median(self._natural("cosine").values),
            "condition_number": self._last("condition_number"),
            "damping": self._last("damping"),
            "measured": len(measured) / steps if steps else None,
            "bound_active": sum(s < 1 for s in scale) / steps if steps else None,
            "overhead": statistics.fmean(overhead) if overhead else None,
            **{name: sum(self._natural(name).values) for name in counts},
        }

    def _natural(self, name: str) -> Series:
        return self.metrics.get(PREFIX + name, Series())

    def _last(self, name: str) -> float | None:
        values = self._natural(name).values
        return values[-1] if values else None


def read_run(folder: Path) -> RunRecord:
    """Read what a run has left.

    Metrics are those of the first `metrics.csv` below the folder, as Lightning's `CSVLogger` writes
    it; where there is none, of the first offline file of wandb.

    Args:
        folder: of the run.

    Raises:
        RunNotFoundError: there is nothing to read.
    """
    tables = sorted(folder.rglob("metrics.csv"), key=lambda path: (len(path.parts), path))
    written = sorted(folder.rglob("*.wandb"), key=lambda path: (len(path.parts), path))
    if tables:
        record = RunRecord(folder, _read_table(tables[0]))
        path = tables[0].parent / FILE
        if path.exists():
            found = list(read_spectra(path))
            first = min((optimizer for _, optimizer, _ in found), default=0)
            record.spectra = [(step, blocks) for step, of, blocks in found if of == first]
    elif written:
        metrics, config = wandb_file.read(written[0])
        record = RunRecord(folder, _series(metrics), config=config)
    else:
        raise RunNotFoundError(
            f"{folder}: expected the folder of a run, with a metrics.csv or an offline wandb file "
            "somewhere in it"
            + (", but there is none" if folder.is_dir() else ", but there is no such folder")
            + ". Usual cause: a run without a logger. Lightning's CSVLogger writes a metrics.csv; "
            "train.py does unless logger=none."
        )
    record.config = record.config or _read_config(folder)
    record.results = _read_json(folder / "results.json")
    return record


def _read_table(path: Path) -> dict[str, Series]:
    with path.open(newline="") as file:
        return _series(_rows(csv.DictReader(file)))


def _rows(reader: Iterator[Mapping[str, str | None]]) -> Iterator[tuple[int, dict[str, float]]]:
    for row in reader:
        try:
            step = int(float(row.get("step") or ""))
        except ValueError:
            continue  # the last line of a run that was killed
        yield step, {name: v for name, text in row.items() if (v := _number(text)) is not None}


def _series(rows: Iterator[tuple[int, dict[str, float]]]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for step, values in rows:
        for name, value in values.items():
            if name not in ("step", "epoch") and math.isfinite(value):
                series = found.setdefault(name, Series())
                series.steps.append(step)
                series.values.append(value)
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    import yaml  # Lightning needs it too

    found = yaml.safe_load(path.read_text())
    return found if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
