"""The coverage table, to loggers that can show one, and to a file beside a CSV logger's."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ngplugin.report import Coverage
from ngplugin.tracking.kinds import kind
from ngplugin.tracking.metrics import prefix

FILE = "natgrad-coverage.csv"


def log_coverage(loggers: Iterable[Any], coverage: Coverage, step: int, optimizer: int = 0) -> None:
    """Write which block every parameter has.

    wandb gets a table, TensorBoard a text, and a file is written beside that of a `CSVLogger`.

    Args:
        loggers: a trainer's.
        coverage: of one optimizer's parameters.
        step: on the loggers' axis.
        optimizer: whose, of several.
    """
    name = f"{prefix(optimizer)}coverage"
    for logger in loggers:
        match kind(logger):
            case "wandb":
                import wandb

                cells = [list(row) for row in coverage.cells()]
                table = wandb.Table(columns=list(coverage.columns), data=cells)
                logger.experiment.log({name: table, "trainer/global_step": step})
            case "tensorboard":
                logger.experiment.add_text(name, _markdown(coverage), step)
            case "csv":
                path = Path(logger.log_dir) / FILE
                path.parent.mkdir(parents=True, exist_ok=True)
                _to_file(path, coverage, optimizer)


def read_coverage(path: Path, optimizer: int = 0) -> list[list[str]]:
    """The rows of one optimizer, the names of columns first."""
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return [head[1:], *(row[1:] for row in rows if row[0] == str(optimizer))]


def _to_file(path: Path, coverage: Coverage, optimizer: int) -> None:
    # A second optimizer's rows go below the first one's; a second fit writes anew.
    with path.open("a" if optimizer else "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not optimizer:
            writer.writerow(["optimizer", *coverage.columns])
        writer.writerows([optimizer, *row] for row in coverage.cells())


def _markdown(coverage: Coverage) -> str:
    rows = [coverage.columns, tuple("---" for _ in coverage.columns), *coverage.cells()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{coverage.totals()}\n\n{coverage.sources()}\n\n{coverage.pace()}"
