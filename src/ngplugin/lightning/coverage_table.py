"""Shows which block every parameter got, on the terminal."""

from __future__ import annotations

from ngplugin.report import Coverage

_MOST_ROWS = 40  # a larger model's table would push everything else off the screen


def show(coverage: Coverage, optimizer: int | None = None) -> None:
    """Print the table, with rich where it is installed.

    Args:
        coverage: of one optimizer's parameters.
        optimizer: its number, where there are several.
    """
    whose = "" if optimizer is None else f", optimizer {optimizer}"
    title = f"natural gradient{whose}: what preconditions each parameter"
    hidden = len(coverage.rows) - _MOST_ROWS
    shown = Coverage(coverage.rows[:_MOST_ROWS])
    caption = f"{coverage.totals()}\n{coverage.sources()}\n{coverage.pace()}"
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
