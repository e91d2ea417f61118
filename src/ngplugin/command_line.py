"""The command `ngplugin`: look at runs, and at whether this machine and a module will do."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngplugin.errors import NgpluginError, OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit status."""
    parser = argparse.ArgumentParser("ngplugin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one HTML page, and PNGs, of a run or a sweep")
    report.add_argument("folder", type=Path, help="of a run, or of a sweep with runs in it")
    report.add_argument("--output", type=Path, help="folder to write to, instead of the same")
    report.add_argument("--metric", help="that decides about the order of a sweep")
    doctor = commands.add_parser("doctor", help="what is here, and a step of your module")
    doctor.add_argument("--module", help="package.module:Class of a LightningModule, or a function")
    doctor.add_argument("--data", help="likewise, of a data loader or data module")
    doctor.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the module"
    )
    doctor.add_argument(
        "--options", nargs="+", default=[], metavar="NAME=VALUE", help="of natural gradient"
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "report":
            print(_report(options.folder, options.output, options.metric))
        else:
            return _doctor(options)
    except NgpluginError as error:
        print(f"ngplugin {options.command}: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"ngplugin {options.command}: {error}; pip install 'ngplugin[report]'", file=sys.stderr
        )
        return 1
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from ngplugin.lightning import doctor, terminal

    for name, value in doctor.environment().items():
        print(f"{name:22} {value}")
    if options.module is None:
        return 0
    module = doctor.made(options.module, _assigned(options.set))
    data = None if options.data is None else doctor.made(options.data, {})
    found = doctor.dry_run(module, data, _assigned(options.options))
    print()
    if found.coverage is not None:
        terminal.show_coverage(found.coverage)
    print("\n".join(doctor.describe(found)))
    return int(bool(found.fails or found.refused))


def _assigned(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` with values as in Python, or else as they are."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            raise OptionError(f"{pair}: expected name=value")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def _report(folder: Path, output: Path | None, metric: str | None) -> Path:
    from ngplugin.reporting.comparison import comparison_page
    from ngplugin.reporting.run_page import run_page
    from ngplugin.reporting.run_record import RunNotFoundError, read_run

    several = folder.is_dir() and sum((path / ".hydra").is_dir() for path in folder.iterdir()) > 1
    if several:
        return comparison_page(folder, metric).write(output or folder)
    try:
        record = read_run(folder)
    except RunNotFoundError:
        if not folder.is_dir():
            raise
        return comparison_page(folder, metric).write(output or folder)
    return run_page(record).write(output or folder)
