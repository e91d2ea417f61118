"""What a fit says on the terminal: which block every parameter got, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ngplugin.diagnosis import Finding
from ngplugin.report import Coverage

_MOST_ROWS = 40  # a larger model's table would push everything else off the screen
_MARKS = {"trouble": ("!", "bold red"), "notice": ("-", "yellow"), "good": ("+", "green")}


def show_coverage(coverage: Coverage, optimizer: int | None = None) -> None:
    """Print which block every parameter has, with rich where it is installed.

    Args:
        coverage: of one optimizer's parameters.
        optimizer: its number, where there are several.
    """
    whose = "" if optimizer is None else f", optimizer {optimizer}"
    title = f"natural gradient{whose}: what preconditions each parameter"
    hidden = len(coverage.rows) - _MOST_ROWS
    shown = Coverage(coverage.rows[:_MOST_ROWS])
    lines = (coverage.totals(), coverage.sources(), coverage.memory(), coverage.pace())
    caption = "\n".join(lines)
    if hidden > 0:
        caption = f"{hidden} more in NaturalGradient.coverage(). {caption}"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title}\n{shown}\n{caption}")
        return
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in coverage.columns:
        table.add_column(column, justify="right" if column == "numbers kept" else "left")
    for cells in shown.cells():
        table.add_row(*cells)
    Console().print(table)


def show_summary(
    numbers: Mapping[str, float | None], findings: Sequence[Finding], optimizer: int | None = None
) -> None:
    """Print a fit in two sentences, and what its numbers say.

    Args:
        numbers: see `Summary.numbers`.
        findings: of `diagnose`.
        optimizer: its number, where there are several.
    """
    whose = "" if optimizer is None else f", optimizer {optimizer}"
    lines = [f"natural gradient{whose}: {in_words(numbers)}"]
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        marked = (f"{_MARKS[f.weight][0]} {f}" for f in findings)
        print("\n".join([*lines, *marked]))
        return
    console = Console()
    console.print(lines[0], highlight=False)
    for finding in findings:
        mark, style = _MARKS[finding.weight]
        console.print(Text.assemble((f"{mark} ", style), str(finding)))


def in_words(numbers: Mapping[str, float | None]) -> str:
    """A fit in one line."""

    def known(name: str, form: str) -> str:
        value = numbers.get(name)
        return "unknown" if value is None else format(value, form)

    steps, seconds = numbers["steps"] or 0, numbers.get("step_seconds")
    step = "" if seconds is None else f"{1e3 * seconds:,.3g} ms a step, "
    return (
        f"{steps:,.0f} steps; KL of a step {known('kl_mean', '.3g')} on average, at most "
        f"{known('kl_max', '.3g')} nats; condition number {known('condition_number', '.1e')}; "
        f"{step}{known('overhead', '.0%')} of the time in curvature"
    )
