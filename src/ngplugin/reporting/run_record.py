"""What a run has left in its folder: metrics, spectra, config and results."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngplugin.curvature.spectrum import BlockSpectrum
from ngplugin.errors import NgpluginError
from ngplugin.history import History
from ngplugin.report import StepReport
from ngplugin.reporting import wandb_file
from ngplugin.summary import Summary
from ngplugin.tracking import coverage, spectra
from ngplugin.tracking.metrics import PREFIX, metrics

#: What a step's report has where nothing was written.
_MISSING = {
    "kl": None, "kl_predicted": 0.0, "kl_radius": math.inf, "step_scale": 1.0, "damping": math.nan,
    "condition_number": None, "condition_number_undamped": None, "reduction_ratio": None,
    "grad_norm": math.nan, "natural_grad_norm": math.nan, "cosine": math.nan, "overhead": 0.0,
    "skipped": 0, "rejected": 0, "failed_factorizations": 0, "remedy": 0, "dropped_statistics": 0,
}  # fmt: skip
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
        coverage: which block every parameter had; names of columns first.
        config: as the run was started, as far as it was kept.
        results: what it came to, as far as it was kept.
    """

    folder: Path
    metrics: dict[str, Series] = field(default_factory=dict)
    spectra: list[tuple[int, Sequence[BlockSpectrum]]] = field(default_factory=list)
    coverage: list[list[str]] = field(default_factory=list)
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
        """As `Summary.numbers` gives them, from what was written, without the seconds of a step.

        What a logger does not get is not there: a measurement that was not made, an infinite
        radius.
        """
        steps: dict[int, dict[str, float]] = {}
        for name, series in self.metrics.items():
            if name.startswith(PREFIX):
                for step, value in zip(series.steps, series.values, strict=True):
                    steps.setdefault(step, {})[name.removeprefix(PREFIX)] = value
        summary = Summary()
        for step, values in sorted(steps.items()):
            known = {name: values.get(name, other) for name, other in _MISSING.items()}
            summary.add(StepReport(step=step, seconds=1.0, **known))  # type: ignore[arg-type]
        return {**summary.numbers(), "step_seconds": None}


def record_of(history: History) -> RunRecord:
    """A fit of this process, as if it had been read from a folder."""
    rows = ((report.step, metrics(report)) for report in history.reports)
    return RunRecord(Path(), _series(rows), list(history.spectra.kept))


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
        path = tables[0].parent / spectra.FILE
        if path.exists():
            found = list(spectra.read_spectra(path))
            first = min((optimizer for _, optimizer, _ in found), default=0)
            record.spectra = [(step, blocks) for step, of, blocks in found if of == first]
        path = tables[0].parent / coverage.FILE
        if path.exists():
            record.coverage = coverage.read_coverage(path)
    elif written:
        rows, config = wandb_file.read(written[0])
        record = RunRecord(folder, _series(_numbers_of(rows)), config=config)
        record.spectra = [(_step(row), blocks) for row in rows if (blocks := _blocks_of(row))]
        record.coverage = _coverage_of(rows, written[0].parent)
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


def _step(row: Mapping[str, Any]) -> int:
    """The trainer's; wandb's own counts every call of its log()."""
    return int(row.get("trainer/global_step", row.get("_step", 0)))


def _numbers_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
    for row in rows:
        yield (
            _step(row),
            {
                name: float(value)
                for name, value in row.items()
                if isinstance(value, (int, float))
                and name[:1] != "_"
                and name != "trainer/global_step"
            },
        )


def _blocks_of(row: Mapping[str, Any]) -> list[BlockSpectrum]:
    """Of the first optimizer, from what `spectra.log_spectra` has written to wandb."""
    found, beginning = [], f"{PREFIX}spectrum/"
    for name, value in row.items():
        if name.startswith(beginning) and isinstance(value, dict):
            block = name.removeprefix(beginning)
            condition = row.get(f"{PREFIX}condition/{block}", math.nan)
            found.append(spectra.from_histogram(block, value["bins"], value["values"], condition))
    return sorted(found, key=lambda each: each.name)


def _coverage_of(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[list[str]]:
    tables = [row[f"{PREFIX}coverage"] for row in rows if f"{PREFIX}coverage" in row]
    path = folder / "files" / tables[0].get("path", "") if tables else folder / "no such file"
    if not path.is_file():
        return []
    table = json.loads(path.read_text())
    return [table["columns"], *table["data"]]


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
