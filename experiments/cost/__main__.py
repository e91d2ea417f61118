"""The command line: `python -m experiments.cost`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.cost import growth, linear_algebra, memory
from experiments.cost.figure import plot
from experiments.cost.page import Study
from experiments.cost.workloads import WORKLOADS
from experiments.scaling.page import rewritten

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "cost.md"
FIGURE = RESULTS / "cost.png"

#: What can be measured; each takes whether it is to be quick.
PARTS: dict[str, Callable[[bool], Any]] = {
    "linear_algebra": linear_algebra.measure,
    "growth": lambda quick: growth.measure(growth.QUICK if quick else growth.CASES),
    "memory": lambda quick: memory.measure(WORKLOADS[:1] if quick else WORKLOADS),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of what was measured; rewrite the page and the figure, unless quick."""
    parser = argparse.ArgumentParser("python -m experiments.cost", description=main.__doc__)
    parser.add_argument("--measure", nargs="*", choices=PARTS, help="these anew first; all if none")
    parser.add_argument("--quick", action="store_true", help="measure little, and write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    names = [] if options.measure is None and not options.quick else options.measure or [*PARTS]
    records = {} if options.quick else stored(options.results)
    for name in names:
        records[name] = measured(name, options.quick)
        if not options.quick:
            text = json.dumps(records[name], ensure_ascii=False)
            (options.results / f"{name}.json").write_text(text + "\n")
    study = Study(records)
    console = Console(width=None if sys.stdout.isatty() else 200)  # a file has room
    for table in study.tables().values():
        console.print(table.for_terminal())
    if options.quick:
        console.print("Little was measured, so nothing was written.")
        return 0
    options.page.write_text(rewritten(options.page.read_text(), study.tables()))
    plot(options.figure, study)
    console.print(f"Written to {options.page} and {options.figure}", soft_wrap=True)
    return 0


def measured(name: str, quick: bool) -> dict[str, Any]:
    """What was found, and on what."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of losses that fall slowly, which is not the point
        found = PARTS[name](quick)
    machine = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return {"machine": machine, "found": found}


def stored(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What was measured before, by part."""
    paths = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    sys.exit(main())
