"""A race against AdamW: `python -m experiments.compare --task digits_mlp`.

Every optimizer trains the same network from the same weights on the same batches, in a plain
loop on one thread. The learning rates of the others are the best of a grid on the first seed;
natural gradient has its defaults. The loss of the whole training set is taken at fixed steps, off
the clock, and the clock is the processor's time of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from experiments.muon import MuonWithAdamW
from experiments.tasks.digits import Digits
from experiments.tasks.images import ImageData
from experiments.tasks.mnist5k import MNIST5k
from experiments.tasks.networks import cnn, mlp
from experiments.tasks.schedules import constant, cosine
from ngplugin import NaturalGradientOptimizer

MakeOptimizer = Callable[[Iterable[nn.Parameter], float], Optimizer]

ADAMW_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # learning rates
SCHEDULES = {"constant": constant, "cosine": cosine}


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long."""

    data: type[ImageData]
    network: Callable[..., nn.Module]
    steps: int
    points: int = 60  # at which the loss is taken


TASKS = {
    "digits_mlp": Task(Digits, mlp, steps=600),
    "mnist5k_mlp": Task(MNIST5k, mlp, steps=600),
    "mnist5k_cnn": Task(MNIST5k, cnn, steps=300),
}

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr),
    "muon": lambda params, lr: MuonWithAdamW(params, lr),
    "natgrad": lambda params, lr: NaturalGradientOptimizer(params, lr),
}


@dataclass
class Curve:
    """The training loss of one run at some of its steps.

    Attributes:
        optimizer: its name.
        lr: its learning rate.
        seed: of the weights and the batches.
        steps: optimizer steps taken.
        seconds: of the processor, in training alone.
        losses: mean cross entropy of the whole training set, nats.
    """

    optimizer: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def reach(self, loss: float) -> tuple[int, float] | None:
        """Steps and seconds until the loss was at most this for the first time, or None."""
        for step, second, value in zip(self.steps, self.seconds, self.losses, strict=True):
            if value <= loss:
                return step, second
        return None


def run(task: Task, name: str, lr: float, seed: int, schedule: str) -> Curve:
    """Train once."""
    torch.manual_seed(seed)
    data = task.data(seed=seed)
    data.setup()
    network = task.network(shape=data.shape, classes=data.classes)
    optimizer = OPTIMIZERS[name](network.parameters(), lr)
    scheduler = SCHEDULES[schedule](optimizer, task.steps)
    # Others have nothing to observe.
    observe: Callable[[], AbstractContextManager[Any]] = getattr(
        optimizer, "observe", contextlib.nullcontext
    )
    curve = Curve(name, lr, seed)
    points = {round(i * task.steps / task.points) for i in range(task.points + 1)}
    loader, step, spent = data.train_dataloader(), 0, 0.0
    while step <= task.steps:
        for images, labels in loader:
            if step in points:
                curve.steps.append(step)
                curve.seconds.append(spent)
                curve.losses.append(training_loss(network, data))
            if step == task.steps or not math.isfinite(curve.losses[-1]):
                return curve
            started = time.process_time()
            with observe():
                loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            spent += time.process_time() - started
            step += 1
    return curve


@torch.no_grad()
def training_loss(network: nn.Module, data: ImageData) -> float:
    """Mean cross entropy of the training set, nats; BatchNorm as in evaluation."""
    network.eval()
    examples = data.splits["train"]
    parts = zip(examples.images.split(1000), examples.labels.split(1000), strict=True)
    total = sum(F.cross_entropy(network(x), y, reduction="sum").item() for x, y in parts)
    network.train()
    return total / len(examples)


def race(
    task: Task, names: Sequence[str], seeds: Sequence[int], schedule: str, grid: Sequence[float]
) -> list[Curve]:
    """Tune those that need it on the first seed, then run all on every seed, taking turns."""
    rates = {
        name: 1.0 if name == "natgrad" else tune(task, name, seeds[0], schedule, grid)
        for name in names
    }
    return [run(task, name, rates[name], seed, schedule) for seed in seeds for name in names]


def tune(task: Task, name: str, seed: int, schedule: str, grid: Sequence[float]) -> float:
    """The learning rate with the smallest loss in the end.

    While that is the grid's largest, three times as much is tried: an opponent is not to lose by
    the limits of a grid.
    """
    tried = [run(task, name, lr, seed, schedule) for lr in sorted(grid)]
    while min(tried, key=_final) is tried[-1]:
        tried.append(run(task, name, 3 * tried[-1].lr, seed, schedule))
    return min(tried, key=_final).lr


def _final(curve: Curve) -> float:
    return curve.losses[-1] if math.isfinite(curve.losses[-1]) else math.inf


def thresholds(curves: Sequence[Curve]) -> list[float]:
    """0.5, 0.1, 0.01, ... as far as AdamW gets on every seed, then the worst of its last ones."""
    last = max(_final(curve) for curve in curves if curve.optimizer == "adamw")
    return [loss for loss in (0.5, 0.1, 1e-2, 1e-3, 1e-4) if loss > last] + [last]


def table(title: str, curves: Sequence[Curve], losses: Sequence[float]) -> Table:
    """Median steps and seconds over the seeds, and how many seeds got there if not all did."""
    names = list(dict.fromkeys(curve.optimizer for curve in curves))
    result = Table(title=title, title_justify="left")
    result.add_column("training loss (nats)")
    for name in names:
        result.add_column(f"{name}: steps, seconds", justify="right")
    for loss in losses:
        cells = []
        for name in names:
            reached = [curve.reach(loss) for curve in curves if curve.optimizer == name]
            got = [r for r in reached if r is not None]
            cell = "never"
            if got:
                steps = statistics.median(r[0] for r in got)
                seconds = statistics.median(r[1] for r in got)
                cell = f"{steps:.0f}, {seconds:.2f}"
            cells.append(cell if len(got) in (0, len(reached)) else f"{cell} ({len(got)} seeds)")
        result.add_row(f"{loss:.2g}", *cells)
    return result


def plot(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Loss against steps and against seconds; a line a run."""
    import matplotlib

    matplotlib.use("agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    names = list(dict.fromkeys(curve.optimizer for curve in curves))
    for curve in curves:
        color = f"C{names.index(curve.optimizer)}"
        label = curve.optimizer if curve.seed == curves[0].seed else None
        for axis, x in zip(axes, (curve.steps, curve.seconds), strict=True):
            axis.plot(x, curve.losses, color=color, label=label, linewidth=1.2)
    for axis, name in zip(axes, ("steps", "seconds of one processor core"), strict=True):
        axis.set(xlabel=name, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss of the training set (nats)")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print the table, write `<name>.json` and `<name>.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits_mlp")
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw", "natgrad"],
        help="to race; adamw must be among them",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--schedule", choices=SCHEDULES, default="constant")
    parser.add_argument("--steps", type=int, help="of each run; else the task's own number")
    parser.add_argument(
        "--grid", nargs="+", type=float, default=ADAMW_GRID, help="learning rates to tune over"
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if "adamw" not in options.optimizers:
        parser.error("--optimizers: adamw is what the others are measured against; add it")

    torch.set_num_threads(1)
    task = TASKS[options.task]
    if options.steps:
        task = Task(task.data, task.network, options.steps)
    curves = race(task, options.optimizers, options.seeds, options.schedule, options.grid)

    name = f"{options.task}-{options.schedule}"
    title = f"{options.task}, {options.schedule} learning rate, {len(options.seeds)} seeds"
    losses = thresholds(curves)
    options.folder.mkdir(parents=True, exist_ok=True)
    record = {
        "task": options.task,
        "schedule": options.schedule,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "grid": list(options.grid),
        "thresholds": losses,
        "curves": [asdict(curve) for curve in curves],
    }
    (options.folder / f"{name}.json").write_text(json.dumps(record) + "\n")
    plot(options.folder / f"{name}.png", title, curves)
    console = Console()
    console.print(table(title, curves, losses))
    rates = {curve.optimizer: curve.lr for curve in curves}
    console.print("learning rates:", ", ".join(f"{k} {v:g}" for k, v in rates.items()))
    console.print(f"Written to {options.folder / name}.json and .png", soft_wrap=True)


if __name__ == "__main__":
    main()
