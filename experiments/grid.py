"""The grid that never diverges: `python -m experiments.grid`.

Natural gradient with every combination of a learning rate, a KL radius and a damping, sensible or
not, for a few steps from the same start. Whatever the choice, no run may end with a loss above its
start, or with one that is no number: that is what the trust region is for.

The loss is that of some batches of the training set, in the mode of training, before and after.
Cells are written as they are done, and a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.tasks.splits import SplitData
from experiments.tasks.task import Task
from experiments.workload import in_precision, make
from ngplugin import NaturalGradientOptimizer

LRS = (0.01, 0.1, 1.0, 10.0)
RADII = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # nats per term
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)  # of each factor's mean eigenvalue
OVERRIDES = {
    "digits_mlp": ("experiment=digits_mlp",),
    "mnist5k_cnn": ("data=mnist5k", "model=cnn"),
    "autoencoder": ("experiment=autoencoder",),
    "implicit_image": ("experiment=implicit_image",),
    "char_transformer": ("experiment=char_transformer",),
}
STEPS = {
    "digits_mlp": 40,
    "mnist5k_cnn": 15,
    "autoencoder": 10,
    "implicit_image": 25,
    "char_transformer": 12,
}
JUDGED = 2  # batches of the training set


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        lr: learning rate.
        kl_radius: nats per term.
        damping: relative.
        steps: that were made.
        start: training loss before them.
        end: training loss after them.
        rejected: steps that were taken back.
        skipped: steps that were not numbers.
        shrinks: of steps whose measured KL was too large.
        kl_over_radius: the largest measured KL of a step over its own radius.
    """

    lr: float
    kl_radius: float
    damping: float
    steps: int
    start: float
    end: float
    rejected: int
    skipped: int
    shrinks: int
    kl_over_radius: float

    @property
    def failed(self) -> bool:
        """Whether the loss is no number, or above its start."""
        return not self.end <= self.start


def train(
    overrides: tuple[str, ...], steps: int, lr: float, kl_radius: float, damping: float
) -> Cell:
    """Train from the start, and judge."""
    data, module = make(overrides, seed=0)
    start = judged(module, data)
    optimizer = NaturalGradientOptimizer(
        module.parameters(), lr=lr, kl_radius=kl_radius, damping=damping
    )
    reports = []
    batches = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
    for batch in itertools.islice(batches, steps):
        with optimizer.observe():
            loss = module.loss(in_precision(batch, module))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reports.append(optimizer.report)
    measured = [r.kl / r.kl_radius for r in reports if r and r.kl is not None and r.kl_radius > 0]
    return Cell(
        lr,
        kl_radius,
        damping,
        steps,
        start,
        judged(module, data),
        sum(r.rejected for r in reports if r),
        sum(r.skipped for r in reports if r),
        sum(r.shrinks for r in reports if r),
        max(measured, default=0.0),
    )


@torch.no_grad()
def judged(module: Task, data: SplitData) -> float:
    """The training loss as a training step has it, of the same batches every time."""
    twin = copy.deepcopy(module).train()  # whose running statistics nobody will miss
    batches = [*itertools.islice(data.in_order("train"), JUDGED)]
    return sum(float(twin.loss(in_precision(batch, twin))) for batch in batches) / len(batches)


def fill(
    path: Path,
    overrides: tuple[str, ...],
    steps: int,
    grid: Sequence[tuple[float, float, float]],
) -> list[Cell]:
    """Train the cells that the file does not have yet, and add them to it one by one."""
    cells = [Cell(**cell) for cell in json.loads(path.read_text())] if path.exists() else []
    done = {(cell.lr, cell.kl_radius, cell.damping) for cell in cells}
    for lr, kl_radius, damping in grid:
        if (lr, kl_radius, damping) not in done:
            cells.append(train(overrides, steps, lr, kl_radius, damping))
            path.write_text(json.dumps([asdict(cell) for cell in cells], indent=0) + "\n")
    return [cell for cell in cells if (cell.lr, cell.kl_radius, cell.damping) in set(grid)]


def table(task: str, cells: Sequence[Cell]) -> Table:
    """End over start, a row for each learning rate and damping, a column for each radius."""
    radii = sorted({cell.kl_radius for cell in cells})
    steps = f"{cells[0].steps} steps from a loss of {cells[0].start:.3g}"
    result = Table(title=f"{task}: what is left of the loss, {steps}", title_justify="left")
    for name in ("lr", "damping", *(f"radius {radius:g}" for radius in radii)):
        result.add_column(name, justify="right")
    by_place = {(cell.lr, cell.damping, cell.kl_radius): cell for cell in cells}
    for lr, damping in sorted({(cell.lr, cell.damping) for cell in cells}):
        row = [by_place.get((lr, damping, radius)) for radius in radii]
        result.add_row(f"{lr:g}", f"{damping:g}", *(_shown(cell) for cell in row))
    return result


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    share = f"{cell.end / cell.start:.3g}"
    return f"[red]{share}[/red]" if cell.failed else share


def plot(path: Path, results: dict[str, list[Cell]]) -> None:
    """A heat map a task; runs that failed are crossed out."""
    import matplotlib

    matplotlib.use("agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(2.6 * len(results) + 1.4, 5.2), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, (task, cells) in zip(axes[0], results.items(), strict=True):
        rows = sorted({(cell.lr, cell.damping) for cell in cells})
        radii = sorted({cell.kl_radius for cell in cells})
        shares = torch.full((len(rows), len(radii)), math.nan)
        for cell in cells:
            row, column = rows.index((cell.lr, cell.damping)), radii.index(cell.kl_radius)
            share = min(max(cell.end / cell.start, 1e-3), 10.0) if cell.end == cell.end else 10.0
            shares[row, column] = math.log10(share)
            if cell.failed:
                axis.plot(column, row, "x", color="red")
        image = axis.imshow(shares, aspect="auto", cmap="cividis", vmin=-2, vmax=0)
        axis.set_title(task, fontsize=9)
        axis.set_xticks(range(len(radii)), [f"{radius:g}" for radius in radii], rotation=60)
        axis.set_yticks(range(len(rows)), [f"{lr:g}, {damping:g}" for lr, damping in rows])
        axis.tick_params(labelsize=7)
        axis.set_xlabel("kl_radius, nats per term", fontsize=8)
    axes[0, 0].set_ylabel("learning rate, damping", fontsize=8)
    bar = figure.colorbar(image, ax=axes[0].tolist(), ticks=[-2, -1, 0], extend="min")
    bar.set_ticklabels(["1 %", "10 %", "all"], fontsize=8)
    bar.set_label("of the training loss is left", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the grid; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--steps", type=int, help="of each run; else the task's own number")
    parser.add_argument("--lr", nargs="+", type=float, default=LRS)
    parser.add_argument("--kl-radius", nargs="+", type=float, default=RADII)
    parser.add_argument("--damping", nargs="+", type=float, default=DAMPINGS)
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier call did")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    console = Console()
    grid = [*itertools.product(options.lr, options.kl_radius, options.damping)]
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Cell]] = {}
    for task in options.task:
        path = options.folder / f"grid-{task}.json"
        if options.fresh:
            path.unlink(missing_ok=True)
        started = time.process_time()
        results[task] = fill(path, OVERRIDES[task], options.steps or STEPS[task], grid)
        console.print(table(task, results[task]))
        console.print(f"{time.process_time() - started:.0f} seconds of the processor")
    plot(options.folder / "grid.png", results)
    cells = [cell for of_task in results.values() for cell in of_task]
    failed = sum(cell.failed for cell in cells)
    worst = max(cell.kl_over_radius for cell in cells)
    console.print(f"The largest measured KL of a step was {worst:.2f} of its radius.")
    console.print(f"{failed} of {len(cells)} runs ended above their start")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
