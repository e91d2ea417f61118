"""A sweep from its beginning to its leaderboard; where it ended early, it can go on."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.command_line import CommandLineError, errors_in_one_line
from experiments.summary import no_page

_BEGUN_WITH = "multirun.yaml"  # as Hydra's own sweeper names it
#: What decides which run is which in a sweep's folder, besides the overrides.
_PROPOSAL = ("_target_", "params", "sampler", "direction", "n_jobs")


class Leaderboard(Callback):
    """Reads what the runs of a sweep have left, whichever of them are there.

    Attributes:
        begun: the config of the sweep that this process is in the middle of.
    """

    begun: DictConfig | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse to go on in the folder of another sweep; else note in it what this one is."""
        with errors_in_one_line("train.py", always=True):
            _begin(config)
        Leaderboard.begun = config

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print it, and write the page."""
        Leaderboard.begun = None
        _show(config)


@contextlib.contextmanager
def leaderboard_of_what_there_is(arguments: Sequence[str]) -> Iterator[None]:
    """If a sweep ends early, show how far it came, and the command that goes on from there.

    Args:
        arguments: of the program, without its name.
    """
    try:
        yield
    except BaseException as error:
        config, Leaderboard.begun = Leaderboard.begun, None
        if config is None or not _has_runs(Path(config.hydra.sweep.dir)):
            raise
        _show(config)
        same = [a for a in arguments if not a.startswith("hydra.sweep.dir=")]
        command = ["python", "train.py", *same, f"hydra.sweep.dir={config.hydra.sweep.dir}"]
        print(f"To go on: {shlex.join(command)}")
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None  # as a shell says it
        raise


def _begin(config: DictConfig) -> None:
    """Write down what a sweep is made of, in its folder.

    Raises:
        CommandLineError: the folder is that of a sweep of other runs.
    """
    folder = Path(config.hydra.sweep.dir)
    path = folder / _BEGUN_WITH
    if path.exists() and _has_runs(folder):
        before = _made_of(OmegaConf.load(path))
        now = _made_of(OmegaConf.create(OmegaConf.to_yaml(config)))  # as it would be read back
        different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if different:
            key = different[0]
            raise CommandLineError(
                f"hydra.sweep.dir={folder}: the sweep in it was begun with {key} "
                f"{_text(before.get(key))}, not {_text(now.get(key))}; give the same to go on "
                "with it, or another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, path)


def _has_runs(folder: Path) -> bool:
    return any(folder.glob("*/.hydra"))


def _made_of(config: Any) -> dict[str, Any]:
    sweeper = OmegaConf.to_container(config.hydra.sweeper)
    assert isinstance(sweeper, Mapping)
    proposal = {f"hydra.sweeper.{key}": sweeper.get(key) for key in _PROPOSAL}
    return {"overrides": list(config.hydra.overrides.task), **proposal}


def _text(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) else str(value)


def _show(config: DictConfig) -> None:
    direction = config.hydra.sweeper.get("direction")  # a sweeper that looks for the best has one
    higher = direction == "maximize" if isinstance(direction, str) else None
    show(Path(config.hydra.sweep.dir), config.get("metric"), higher)


def show(folder: Path, metric: str | None = None, higher: bool | None = None) -> None:
    """Print the leaderboard of a sweep; write `report.html`, pictures and `leaderboard.json`.

    Args:
        folder: of the sweep.
        metric: that decides about the order.
        higher: whether more of it is better; None for what its name says.
    """
    from ngplugin.errors import NgpluginError

    try:
        from ngplugin.reporting.comparison import comparison_page
        from ngplugin.reporting.leaderboard import read_sweep, write_leaderboard
    except ModuleNotFoundError as missing:
        print(no_page(missing))
        return
    console, folder = Console(), folder.resolve()
    try:
        page = comparison_page(folder, metric, higher)
    except NgpluginError:
        console.print(
            f"{folder}: no leaderboard, which takes two runs", soft_wrap=True, highlight=False
        )
        return
    board = page.tables[0]
    table = Table(title=page.title, caption=board.caption, title_justify="left")
    columns = _that_fit(board.rows, board.head, console.width)
    for i in columns:
        table.add_column(board.head[i], justify="left" if i == 0 else "right")
    for row in board.rows:
        cells = [row[i] for i in columns]
        table.add_row(*(f"[bold]{c}[/]" if getattr(c, "best", False) else c for c in cells))
    console.print(table)
    write_leaderboard(folder / "leaderboard.json", read_sweep(folder), board.head[2:])
    console.print(f"Written to {page.write(folder)}", soft_wrap=True, highlight=False)


def _that_fit(rows: Sequence[Sequence[str]], head: Sequence[str], width: int) -> list[int]:
    """Columns from the left, as many as a line of the terminal holds, but at least three.

    The page has all of them.
    """
    used, columns = 1, []
    for i, name in enumerate(head):
        used += 3 + max(len(name), *(len(row[i]) for row in rows))  # a line and two spaces
        if used <= width or i < 3:
            columns.append(i)
    return columns
