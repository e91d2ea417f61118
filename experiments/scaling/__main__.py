"""The command line: `python -m experiments.scaling`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.scaling.calibration import MEASURED, stored
from experiments.scaling.devices import DEVICES, Device
from experiments.scaling.figure import plot
from experiments.scaling.measure import count, measure, this_machine
from experiments.scaling.models import MODELS
from experiments.scaling.page import Study, rewritten
from experiments.scaling.protocol import Protocol

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
FIGURE = MEASURED.parent / "scaling.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; with every assumption as it is, rewrite the page and the figure too."""
    options = _parser().parse_args(arguments)
    if options.measure:
        MEASURED.write_text(json.dumps(measure(), indent=1) + "\n")
    elif options.count:
        MEASURED.write_text(json.dumps({**stored(), "traffic": count()}, indent=1) + "\n")
    record = stored()
    devices = {**DEVICES, "here": this_machine(record)}
    device_changes, protocol_changes = _changes(options, Device), _changes(options, Protocol)
    study = Study(
        record,
        dataclasses.replace(devices[options.device], **device_changes),
        dataclasses.replace(Protocol(), **protocol_changes),
        {name: MODELS[name].with_examples(options.examples) for name in options.model},
    )
    console = Console(width=None if sys.stdout.isatty() else 180)  # a file has room
    for table in study.tables().values():
        console.print(table.for_terminal())
    if study == Study.usual(record):
        options.page.write_text(rewritten(options.page.read_text(), study.tables()))
        plot(options.figure, study)
        console.print(f"Written to {options.page} and {options.figure}", soft_wrap=True)
    else:
        console.print("Not the page's assumptions, so nothing was written.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments.scaling", description=main.__doc__)
    parser.add_argument("--measure", action="store_true", help="measure this machine anew, first")
    parser.add_argument("--count", action="store_true", help="only what the code moves and holds")
    parser.add_argument("--device", choices=(*DEVICES, "here"), default="a100")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--examples", type=int, help="of a rank; else each model's own number")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    for title, kind in (("the protocol", Protocol), ("the device", Device)):
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(kind):
            _add(group, field)
    return parser


def _add(group: Any, field: dataclasses.Field[Any]) -> None:
    """An option of a field's own name and type."""
    if field.name == "name":
        return
    help_text = " ".join(field.metadata.values()) or f"instead of {field.default}"
    name = f"--{field.name.replace('_', '-')}"
    kinds = {"bool": argparse.BooleanOptionalAction, "int": int, "float": float}
    kind = kinds[str(field.type)]
    if kind is argparse.BooleanOptionalAction:
        group.add_argument(name, action=kind, default=None, help=help_text)
    else:
        group.add_argument(name, type=kind, help=help_text)


def _changes(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What was given of a dataclass's fields."""
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(kind)}
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
