"""The tables of `docs/race.md`, from what is stored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.race.courses import COURSES, Course
from experiments.race.field import FIELD
from experiments.race.results import Curve, Record
from experiments.scaling.table import Table

OURS = "natgrad"
SMALL_ERROR = 1e-6  # that the long run of the equation is timed to


@dataclass(frozen=True)
class Study:
    """What was measured, by course.

    Attributes:
        records: of the races; courses that are not in it have not been raced.
        tuned: settings and trials of each contestant.
    """

    records: Mapping[str, Record]
    tuned: Mapping[str, Mapping[str, Any]]

    def tables(self) -> dict[str, Table]:
        """All tables, by their places in the page."""
        courses = {name: self.course(name) for name in COURSES}
        return {"summary": self.summary(), "long": self.long(), **courses} | {
            "unable": unable(),
            "trials": self.trials(),
            "versions": self.versions(),
        }

    def summary(self) -> Table:
        """Natural gradient with its defaults beside the best of the others, a row a course."""
        result = Table(
            "natural gradient and the best of the others",
            ("workload", "AdamW's loss", "AdamW, s", "natural gradient, s", "over AdamW's time",
             "fastest other", "its time over AdamW's", "least loss: natural gradient",
             "least loss of others", "whose"),
            left=frozenset({0, 5, 9}),
        )  # fmt: skip
        for name, record in self.records.items():
            adamw, ours = record.reached("adamw")[1], record.reached(OURS)[1]
            fastest, seconds = fastest_other(record)
            whose, least = least_of_others(record)
            result.add(
                name, _number(record.target), _number(adamw), _number(ours), _ratio(ours / adamw),
                FIELD[fastest].title, _ratio(seconds / adamw), _number(record.best(OURS)),
                _number(least), FIELD[whose].title,
            )  # fmt: skip
        if self.records:
            records = [*self.records.values()]
            fast = sum(r.reached(OURS)[1] <= fastest_other(r)[1] for r in records)
            low = sum(r.best(OURS) <= least_of_others(r)[1] for r in records)
            result.add(
                "natural gradient not behind", "", "", "", "", f"on {fast} of {len(records)}", "",
                "", "", f"on {low} of {len(records)}",
            )  # fmt: skip
        return result

    def course(self, name: str) -> Table:
        """A row a contestant."""
        course = COURSES[name]
        result = Table(
            name,
            ("contestant", "setting", "s to AdamW's loss", "steps", "over AdamW's time",
             "least loss (range)", f"best {course.metric}", "steps made", "median step",
             "mean step", "curvature", "longest step", "memory"),
            left=frozenset({0, 1}),
        )  # fmt: skip
        record = self.records.get(name)
        for contestant in FIELD if record else ():
            if record and contestant in record.curves:
                result.add(*_row(record, course, contestant))
        return result

    def long(self) -> Table:
        """The equation in more time."""
        result = Table(
            "in more time",
            ("workload", "seconds", f"s to an error of {SMALL_ERROR:g}",
             f"s to a loss of {SMALL_ERROR:g}", "least error", "least loss"),
        )  # fmt: skip
        for name, record in self.records.items():
            if record.long:
                result.add(
                    name,
                    f"{COURSES[name].long:g}",
                    _middle(record.long, lambda c: c.reach(SMALL_ERROR, metric=True)[1]),
                    _middle(record.long, lambda c: c.reach(SMALL_ERROR)[1]),
                    _middle(record.long, lambda c: c.best_metric(higher=False)),
                    _middle(record.long, lambda c: c.best),
                )
        return result

    def trials(self) -> Table:
        """Every trial and its loss in the end."""
        result = Table("trials", ("workload", "contestant", "setting: loss in the end"))
        result.left = frozenset({0, 1, 2})
        for course, tuned in self.tuned.items():
            for name in FIELD:
                if name in tuned:
                    tried = (
                        f"{_setting(s)}: {'failed' if loss is None else _number(loss)}"
                        for s, loss in tuned[name]["trials"]
                    )
                    result.add(course, FIELD[name].title, "; ".join(tried))
        return result

    def versions(self) -> Table:
        """Of what ran."""
        found = {k: v for record in self.records.values() for k, v in record.versions.items()}
        result = Table("versions", ("package", "version"))
        for package, version in found.items():
            result.add(package, version)
        return result


def unable() -> Table:
    """Who does not race where, and why; and failures are told in the other tables."""
    result = Table("not racing", ("contestant", "workload", "why"), left=frozenset({0, 1, 2}))
    for contestant in FIELD.values():
        for course, why in contestant.unable.items():
            result.add(contestant.title, course, why)
    return result


def fastest_other(record: Record) -> tuple[str, float]:
    """Whose time to AdamW's loss is the least, natural gradient aside, and the time."""
    return min(((n, record.reached(n)[1]) for n in _others(record)), key=lambda pair: pair[1])


def least_of_others(record: Record) -> tuple[str, float]:
    """Whose loss is the least, natural gradient aside, and the loss."""
    return min(((n, record.best(n)) for n in _others(record)), key=lambda pair: pair[1])


def _others(record: Record) -> list[str]:
    return [name for name in record.curves if not name.startswith(OURS)]


def _row(record: Record, course: Course, name: str) -> tuple[str, ...]:
    curves = record.curves[name]
    steps, seconds = record.reached(name)
    times = [curve.reach(record.target)[1] for curve in curves]
    failed = next((curve.failure for curve in curves if curve.failure), None)
    least = [curve.best for curve in curves]
    metric = statistics.median(c.best_metric(course.higher) for c in curves)
    longest = [c.step_seconds["longest"] / c.step_seconds["median"]
               for c in curves if "longest" in c.step_seconds]  # fmt: skip
    overheads = [c.overhead for c in curves if c.overhead is not None]
    title = FIELD[name].title
    return (
        f"{title} (failed: {failed})" if failed else title,
        _setting(curves[0].setting) or FIELD[name].options,
        _spread(seconds, times),
        _number(steps),
        _ratio(seconds / record.reached("adamw")[1]),
        _spread(record.best(name), least),
        f"{metric:.4g}",
        f"{statistics.median(c.steps[-1] for c in curves):,.0f}",
        _ratio(_step_ratio(record, name, "median")),
        _ratio(_step_ratio(record, name, "mean")),
        f"{100 * statistics.mean(overheads):.0f} %" if overheads else "-",
        _ratio(statistics.median(longest)) if longest else "-",
        _ratio(record.bytes[name] / record.bytes["sgd"]) if name in record.bytes else "-",
    )


def _step_ratio(record: Record, name: str, kind: str) -> float:
    made = all(c.step_seconds for n in (name, "sgd") for c in record.curves[n])
    return record.step_ratio(name, kind) if made else math.nan


def _middle(curves: list[Curve], value: Callable[[Curve], float]) -> str:
    values = [value(curve) for curve in curves]
    return _spread(statistics.median(values), values)


def _spread(middle: float, values: list[float]) -> str:
    """A median and its range."""
    if not math.isfinite(middle):
        reached = sum(map(math.isfinite, values))
        return "never" if not reached else f"never ({reached} of {len(values)} seeds)"
    ends = [_number(v) for v in (min(values), max(values))]
    return f"{_number(middle)} ({ends[0]}–{ends[1]})"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "never"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _setting(setting: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())
