"""What a run came to, as a table and as a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write numbers as JSON, with null for those that are not finite.

    The file is there when it is complete, and not before: a run that has one has ended.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in results.items()
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(finite, indent=2) + "\n")
    os.replace(partial, path)


def write_report(title: str, folder: Path) -> Path | None:
    """Write `report.html` and pictures of a run.

    None if it left no metrics to draw, or if matplotlib is not installed, which is said in a line.

    Args:
        title: of the page.
        folder: of the run.
    """
    try:
        from ngplugin.reporting.run_page import run_page
        from ngplugin.reporting.run_record import RunNotFoundError, read_run
    except ModuleNotFoundError as missing:
        print(no_page(missing))
        return None
    try:
        return run_page(read_run(folder), title).write(folder)
    except RunNotFoundError:  # logger=none
        return None


def no_page(missing: ModuleNotFoundError) -> str:
    """Why there are no pictures, and what to do."""
    package = str(missing.name).partition(".")[0]
    return f"No report.html: {package} is not installed (pip install {package})"


def show_results(
    title: str, results: Mapping[str, Any], folder: Path, page: Path | None = None
) -> None:
    """Print a short table, and where everything was written.

    Args:
        title: of the table.
        results: those of `training.train`; natural gradient's are there if it was used.
        folder: of the run.
        page: with its pictures.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for stage in ("test", "val", "train"):
        shown = (n for n in results if n.startswith(f"{stage}/") and n != "train/seconds")
        for name in sorted(shown):
            table.add_row(name, _number(results[name]))
    table.add_row("seconds of training", f"{results['seconds']:.1f}")
    table.add_row("steps", f"{results['steps']:,}")
    if results["steps"]:
        step = 1e3 * results["seconds"] / results["steps"]
        table.add_row("milliseconds a step, validation included", f"{step:.3g}")
    if "natgrad/kl_mean" in results:
        _add_natural_gradient(table, results)
    console = Console()
    console.print(table)
    # Never wrapped: a path is there to be copied.
    console.print(f"Written to {folder}", soft_wrap=True, highlight=False)
    if page is not None:
        console.print(f"Pictures: {page}", soft_wrap=True, highlight=False)


def _number(value: float) -> str:
    """Four places, or where these are zeros four digits."""
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3e}"


def _add_natural_gradient(table: Table, results: Mapping[str, Any]) -> None:
    def number(name: str, form: str) -> str:
        value = results.get(f"natgrad/{name}")
        return "–" if value is None else format(value, form)

    kl = f"{number('kl_mean', '.3g')}, {number('kl_max', '.3g')}, {number('kl_radius', '.3g')}"
    table.add_row("KL of a step: mean, largest, bound (nats)", kl)
    table.add_row("steps that the bound shortened", number("bound_active", ".0%"))
    table.add_row("condition number of the Fisher", number("condition_number", ".2g"))
    table.add_row("time that went into curvature", number("overhead", ".0%"))
