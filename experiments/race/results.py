"""What was measured: curves, how they are kept, and what is read off them."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "pytorch-optimizer", "asdfghjkl", "singd", "nngeometry")
SETTLED = 50  # steps after which the longest one counts


@dataclass
class Curve:
    """One run.

    Attributes:
        seed: of the weights and the batches.
        setting: the contestant's options.
        steps: made before each point.
        seconds: of the processor that they took.
        losses: on the training set.
        metrics: on held-out examples; None at points where it was not taken.
        step_seconds: of a step: median, mean, and the longest after the first 50.
        overhead: share of the time that went into curvature; None for not known.
        failure: why it ended early.
    """

    seed: int
    setting: dict[str, float]
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    metrics: list[float | None] = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    overhead: float | None = None
    failure: str | None = None

    @property
    def final(self) -> float:
        """The last loss; inf if the run failed."""
        return math.inf if self.failure else self.losses[-1]

    @property
    def best(self) -> float:
        """The least loss on the way."""
        return min(self.losses)

    def best_metric(self, higher: bool) -> float:
        """The best metric on the way."""
        taken = [m for m in self.metrics if m is not None and math.isfinite(m)]
        return max(taken) if higher else min(taken)

    def reach(self, value: float, metric: bool = False) -> tuple[float, float]:
        """Steps and seconds until the loss, or metric, was at most this; inf for never."""
        values = self.metrics if metric else self.losses
        for step, second, found in zip(self.steps, self.seconds, values, strict=True):
            if found is not None and found <= value:
                return step, second
        return math.inf, math.inf

    def summarize(self, times: Sequence[float]) -> None:
        """Keep what is told of the seconds of its steps."""
        if not times:
            return
        self.step_seconds = {"median": statistics.median(times), "mean": statistics.mean(times)}
        if len(times) > SETTLED:
            self.step_seconds["longest"] = max(times[SETTLED:])


@dataclass
class Record:
    """All runs of one course.

    Attributes:
        course: its name.
        seconds: of each run.
        curves: of each contestant, a seed each.
        long: of natural gradient in more time.
        bytes: of tensors, at the most, for each contestant.
        versions: of what ran.
    """

    course: str
    seconds: float
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    long: list[Curve] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def target(self) -> float:
        """The least loss of tuned AdamW, the median over the seeds.

        Not the last one, which at a constant learning rate may be several times as large.
        """
        return self.best("adamw")

    def reached(self, name: str) -> tuple[float, float]:
        """Median steps and seconds until the target; inf for never."""
        found = [curve.reach(self.target) for curve in self.curves[name]]
        return statistics.median(f[0] for f in found), statistics.median(f[1] for f in found)

    def best(self, name: str) -> float:
        """Median over the seeds of the least loss."""
        return statistics.median(curve.best for curve in self.curves[name])

    def step_ratio(self, name: str, kind: str) -> float:
        """Seconds of a step over SGD's, medians over the seeds."""
        mine, sgd = (
            statistics.median(c.step_seconds[kind] for c in self.curves[n]) for n in (name, "sgd")
        )
        return mine / sgd


def record_of(course: str, folder: Path = FOLDER) -> Record | None:
    """What is stored of a course, or None."""
    path = folder / f"{course}.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    curves = {n: [Curve(**c) for c in cs] for n, cs in stored.pop("curves").items()}
    long = [Curve(**c) for c in stored.pop("long")]
    return Record(**stored, curves=curves, long=long)


def store(record: Record, folder: Path = FOLDER) -> None:
    """Write a course's runs."""
    record.versions = versions()
    _write(folder / f"{record.course}.json", asdict(record))


def tuned_of(course: str, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """For each contestant that was tuned: `setting`, and `trials` of [setting, loss]."""
    path = folder / f"tuned-{course}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def store_tuned(
    course: str, name: str, trials: Sequence[tuple[dict[str, float], float]], folder: Path = FOLDER
) -> None:
    """Add what was found for a contestant; read anew, so that nothing is lost."""
    found = tuned_of(course, folder)
    setting = min(trials, key=lambda trial: trial[1])[0]
    found[name] = {"setting": setting, "trials": [[s, _finite(loss)] for s, loss in trials]}
    _write(folder / f"tuned-{course}.json", found)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def versions() -> dict[str, str]:
    """Of Python and of the packages that race."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(value)) + "\n")


def _rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
