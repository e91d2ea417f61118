"""What is said and written at the end of a sweep: a leaderboard, and a page that compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.summary import no_page


class Leaderboard(Callback):
    """Reads what the runs of a sweep have left, whichever of them are there.

    A sweep that was interrupted has a leaderboard of what it did once it is asked for:
    `ngplugin report FOLDER`.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print it, and write the page."""
        show(Path(config.hydra.sweep.dir), config.get("metric"))


def show(folder: Path, metric: str | None = None) -> None:
    """Print the leaderboard of a sweep; write `report.html`, pictures and `leaderboard.json`.

    Args:
        folder: of the sweep.
        metric: that decides about the order.
    """
    from ngplugin.errors import NgpluginError

    try:
        from ngplugin.reporting.comparison import comparison_page, read_sweep, write_leaderboard
    except ModuleNotFoundError as missing:
        print(no_page(missing))
        return
    console, folder = Console(), folder.resolve()
    try:
        page = comparison_page(folder, metric)
    except NgpluginError as error:
        console.print(str(error), soft_wrap=True, highlight=False)
        return
    board = page.tables[0]
    table = Table(title=page.title, caption=board.caption, title_justify="left")
    for i, column in enumerate(board.head):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in board.rows:
        table.add_row(
            *(f"[bold]{cell}[/]" if getattr(cell, "best", False) else cell for cell in row)
        )
    console.print(table)
    write_leaderboard(folder / "leaderboard.json", read_sweep(folder), board.head[2:])
    console.print(f"Written to {page.write(folder)}", soft_wrap=True, highlight=False)
