"""The command line: `python -m experiments.race tune | run | memory | table`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from experiments.race import memory, results, running
from experiments.race.contestants import Contestant
from experiments.race.courses import COURSES, Course
from experiments.race.field import FIELD
from experiments.race.figure import plot
from experiments.race.page import OURS, Study
from experiments.race.results import Record
from experiments.race.search import Setting
from experiments.scaling.page import rewritten

PAGE = Path(__file__).parents[2] / "docs" / "race.md"
TRIED_OUT = Path(__file__).parents[2] / "build" / "race"  # where --quick leaves what it did
QUICK_SECONDS = 0.4
SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one stage; each goes on where it stopped."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.folder is None:
        options.folder = TRIED_OUT if options.quick else results.FOLDER
    if options.stage == "table":
        return _table(options)
    for name in options.workload:
        course = COURSES[name]
        if options.quick:
            course = course.shortened(QUICK_SECONDS)
        if options.seconds is not None:
            course = replace(course, seconds=options.seconds)
        stages = {"tune": _tune, "run": _run, "memory": _memory}
        stages[options.stage](name, course, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.race", description=__doc__)
    parser.add_argument("stage", choices=("tune", "run", "memory", "table"))
    parser.add_argument("--workload", nargs="+", choices=COURSES, default=[*COURSES])
    parser.add_argument("--contestant", nargs="+", choices=FIELD, default=[*FIELD])
    parser.add_argument("--seeds", nargs="+", type=int, help=f"instead of {SEEDS}")
    parser.add_argument("--seconds", type=float, help="of each run, instead of the course's own")
    parser.add_argument("--quick", action="store_true", help="all of it in minutes, to try it out")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier call did")
    parser.add_argument("--folder", type=Path, help="of what is measured")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser


def _racing(name: str, options: argparse.Namespace) -> dict[str, Contestant]:
    """Who can race on a course; says who is not installed."""
    able = {c: FIELD[c] for c in options.contestant if name not in FIELD[c].unable}
    for missing in [c for c in able if not running.installed(able[c])]:
        print(f"{name}: {missing} is not installed; see experiments/race/requirements.txt")
        del able[missing]
    return able


def _tune(name: str, course: Course, options: argparse.Namespace) -> None:
    for contestant, entry in _racing(name, options).items():
        done = results.tuned_of(name, options.folder)
        if name not in entry.axes or (contestant in done and not options.fresh):
            continue
        started = time.monotonic()
        few = {"first": 1, "more": 0} if options.quick else {}
        trials = running.tune(entry, course, name, **few)
        results.store_tuned(name, contestant, trials, options.folder)
        setting, loss = min(trials, key=lambda trial: trial[1])
        took = time.monotonic() - started
        print(f"{name}: {contestant} {setting}, loss {loss:.4g}, {took:.0f} s", flush=True)


def _entries(name: str, options: argparse.Namespace) -> dict[str, tuple[Contestant, Setting]]:
    tuned = results.tuned_of(name, options.folder)
    entries = {}
    for contestant, entry in _racing(name, options).items():
        if name in entry.axes and contestant not in tuned:
            sys.exit(f"{name}: {contestant} has no setting; run the stage tune first")
        entries[contestant] = entry, tuned.get(contestant, {}).get("setting", {})
    return entries


def _run(name: str, course: Course, options: argparse.Namespace) -> None:
    record = results.record_of(name, options.folder)
    if record is None or options.fresh:
        record = Record(name, course.seconds)
    entries = _entries(name, options)
    running.warm_up(course, entries)
    for seed in options.seeds or (SEEDS[:1] if options.quick else SEEDS):
        started = time.monotonic()
        if seed not in [curve.seed for curve in record.curves.get(OURS, ())]:
            for contestant, curve in running.race(course, entries, seed).items():
                record.curves.setdefault(contestant, []).append(curve)
        if course.long and seed not in [curve.seed for curve in record.long]:
            longer = replace(course, seconds=course.long)
            record.long.append(running.Runner(FIELD[OURS], longer, {}, seed).run())
        results.store(record, options.folder)
        print(f"{name}: seed {seed}, {time.monotonic() - started:.0f} s", flush=True)


def _memory(name: str, course: Course, options: argparse.Namespace) -> None:
    record = results.record_of(name, options.folder)
    if record is None:
        sys.exit(f"{name}: nothing was raced yet; run the stage run first")
    for contestant, (entry, setting) in _entries(name, options).items():
        if contestant not in record.bytes or options.fresh:
            steps = 2 if options.quick else memory.STEPS
            record.bytes[contestant] = memory.peak(entry, course, setting, steps)
            results.store(record, options.folder)
        print(f"{name}: {contestant} {record.bytes[contestant] / 2**20:.1f} MiB", flush=True)


def study(folder: Path) -> Study:
    """What is stored."""
    records = {name: results.record_of(name, folder) for name in COURSES}
    tuned = {name: results.tuned_of(name, folder) for name in COURSES}
    return Study({n: r for n, r in records.items() if r}, {n: t for n, t in tuned.items() if t})


def _table(options: argparse.Namespace) -> int:
    """Print the tables; write the page and the figure, unless it was only tried out."""
    found = study(options.folder)
    console = Console(width=None if sys.stdout.isatty() else 220)  # a file has room
    for table in found.tables().values():
        console.print(table.for_terminal())
    if found.records:
        plot(options.folder / "race.png", found.records)
    if options.folder == results.FOLDER or options.page != PAGE:
        options.page.write_text(rewritten(options.page.read_text(), found.tables()))
        console.print(f"Written to {options.page}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
