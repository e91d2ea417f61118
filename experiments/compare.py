"""A race against AdamW: `python -m experiments.compare --task digits_mlp`.

Every optimizer trains the same network from the same weights on the same batches, in a plain
loop on one thread. The learning rates of the others are the best of a grid on the first seed;
natural gradient has its defaults. All have the same number of steps, or with `--seconds` the same
time. The loss of the training set, and what is measured on the validation examples, are taken at
fixed points, off the clock, and the clock is the processor's time of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from experiments.muon import MuonWithAdamW
from experiments.tasks.schedules import constant, cosine
from experiments.tasks.splits import SplitData
from experiments.tasks.task import Task
from experiments.training import make_task
from ngplugin import NaturalGradientOptimizer

MakeOptimizer = Callable[[Iterable[nn.Parameter], float], Optimizer]

CONF = Path(__file__).parents[1] / "conf"
ADAMW_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # learning rates
EVALUATED = 8  # batches of the training set that its loss is taken on, all but of the longest
SCHEDULES = {"constant": constant, "cosine": cosine}


@dataclass(frozen=True)
class Course:
    """What is trained, and for how long.

    Attributes:
        overrides: of `conf/train.yaml`, that choose data, network and task.
        steps: of a run.
        seconds: of a run, instead of `steps`.
        points: at which losses are taken.
        losses: whose reaching is timed, as far as AdamW gets.
    """

    overrides: tuple[str, ...]
    steps: int
    seconds: float | None = None
    points: int = 60
    losses: tuple[float, ...] = (0.5, 0.1, 1e-2, 1e-3, 1e-4)


COURSES = {
    "digits_mlp": Course(("experiment=digits_mlp",), steps=600),
    "mnist5k_mlp": Course(("data=mnist5k", "model=mlp"), steps=600),
    "mnist5k_cnn": Course(("data=mnist5k", "model=cnn"), steps=300),
    "autoencoder": Course(("experiment=autoencoder",), 400, losses=(200, 150, 125, 100, 80, 60)),
    "char_transformer": Course(
        ("experiment=char_transformer",), 600, points=20, losses=(3.0, 2.5, 2.25, 2.0, 1.75, 1.5)
    ),
    "implicit_image": Course(("experiment=implicit_image",), 600),
    "poisson_pinn": Course(
        ("experiment=poisson_pinn",), 2000, losses=(10, 1, 0.1, 1e-2, 1e-3, 1e-4)
    ),
    "graph_network": Course(("experiment=graph_network",), 600),
    "tabular": Course(("experiment=tabular",), 1000, losses=(0.5, 0, -0.5, -0.75, -1)),
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
        losses: what the task minimises, over the training set.
        measured: what the task measures on the validation examples, by name.
    """

    optimizer: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=dict)

    def reach(self, loss: float) -> tuple[int, float] | None:
        """Steps and seconds until the loss was at most this for the first time, or None."""
        for step, second, value in zip(self.steps, self.seconds, self.losses, strict=True):
            if value <= loss:
                return step, second
        return None


def run(course: Course, name: str, lr: float, seed: int, schedule: str) -> Curve:
    """Train once."""
    data, module = make(course, seed)
    optimizer = OPTIMIZERS[name](module.parameters(), lr)
    scheduler = SCHEDULES[schedule](optimizer, course.steps)
    # Others have nothing to observe.
    observe: Callable[[], AbstractContextManager[Any]] = getattr(
        optimizer, "observe", contextlib.nullcontext
    )
    curve = Curve(name, lr, seed)
    loader, step, spent, points = data.train_dataloader(), 0, 0.0, 0
    while True:
        for batch in loader:
            done = step / course.steps if course.seconds is None else spent / course.seconds
            if round(done * course.points, 9) >= points or done >= 1:
                points = math.floor(round(done * course.points, 9)) + 1
                take(curve, step, spent, module, data)
            if done >= 1 or not math.isfinite(curve.losses[-1]):
                return curve
            batch = in_precision(batch, module)
            started = time.process_time()
            with observe():
                loss = module.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            spent += time.process_time() - started
            step += 1


def make(course: Course, seed: int) -> tuple[SplitData, Task]:
    """The data and the module of a course, with the weights and batches of a seed."""
    config = config_of(course.overrides).copy()
    config.seed = seed
    torch.manual_seed(seed)
    data, module = make_task(config)
    if config.trainer.precision == "64-true":
        module.double()
    return data, module


@functools.cache
def config_of(overrides: tuple[str, ...]) -> DictConfig:
    """Composed as `train.py` would."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "optimizer=adamw"])


def in_precision(batch: Any, module: Task) -> Any:
    """A batch with its floating-point tensors in the module's precision, as Lightning does it."""
    dtype = next(module.parameters()).dtype
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in batch]
    return type(batch)(*tensors) if hasattr(batch, "_fields") else tuple(tensors)


@torch.no_grad()
def take(curve: Curve, step: int, spent: float, module: Task, data: SplitData) -> None:
    """Add a point to a curve; the network is as in evaluation meanwhile."""
    module.eval()
    curve.steps.append(step)
    curve.seconds.append(spent)
    curve.losses.append(average(data, "train", module, lambda b: {"loss": module.loss(b)})["loss"])
    for name, value in average(data, "val", module, module.measure).items():
        curve.measured.setdefault(name, []).append(value)
    module.train()


def average(
    data: SplitData, split: str, module: Task, measure: Callable[[Any], dict[str, torch.Tensor]]
) -> dict[str, float]:
    """What is measured on the first batches of a split, averaged by their size."""
    totals: dict[str, float] = {}
    count = 0
    for batch in itertools.islice(data.in_order(split), EVALUATED):
        size = module.size(batch)
        count += size
        for name, value in measure(in_precision(batch, module)).items():
            totals[name] = totals.get(name, 0.0) + size * value.item()
    return {name: total / count for name, total in totals.items()}


def race(
    course: Course, names: Sequence[str], seeds: Sequence[int], schedule: str, grid: Sequence[float]
) -> list[Curve]:
    """Tune those that need it on the first seed, then run all on every seed, taking turns."""
    rates = {
        name: 1.0 if name == "natgrad" else tune(course, name, seeds[0], schedule, grid)
        for name in names
    }
    return [run(course, name, rates[name], seed, schedule) for seed in seeds for name in names]


def tune(course: Course, name: str, seed: int, schedule: str, grid: Sequence[float]) -> float:
    """The learning rate with the smallest loss in the end.

    While that is the grid's largest, three times as much is tried: an opponent is not to lose by
    the limits of a grid.
    """
    tried = [run(course, name, lr, seed, schedule) for lr in sorted(grid)]
    while min(tried, key=_final) is tried[-1]:
        tried.append(run(course, name, 3 * tried[-1].lr, seed, schedule))
    return min(tried, key=_final).lr


def _final(curve: Curve) -> float:
    return curve.losses[-1] if math.isfinite(curve.losses[-1]) else math.inf


def thresholds(curves: Sequence[Curve], losses: Sequence[float]) -> list[float]:
    """Those losses that AdamW gets below on every seed, then the worst of its last ones."""
    last = max(_final(curve) for curve in curves if curve.optimizer == "adamw")
    return [loss for loss in losses if loss > last] + [last]


def table(title: str, curves: Sequence[Curve], losses: Sequence[float]) -> Table:
    """Median steps and seconds over the seeds, and how many seeds got there if not all did."""
    names = list(dict.fromkeys(curve.optimizer for curve in curves))
    result = Table(title=title, title_justify="left")
    result.add_column("training loss")
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
        result.add_row(f"{loss:.3g}", *cells)
    return result


def last_values(curves: Sequence[Curve]) -> Table:
    """Median over the seeds of where each optimizer is in the end."""
    result = Table(
        "in the end", "steps", "training loss", *(f"val/{n}" for n in curves[0].measured)
    )
    for name in dict.fromkeys(curve.optimizer for curve in curves):
        own = [curve for curve in curves if curve.optimizer == name]
        values = [[c.losses[-1] for c in own]]
        values += [[c.measured[n][-1] for c in own] for n in curves[0].measured]
        steps = f"{statistics.median(c.steps[-1] for c in own):.0f}"
        result.add_row(name, steps, *(f"{statistics.median(v):.4g}" for v in values))
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
        positive = all(loss > 0 for curve in curves for loss in curve.losses)
        axis.set(xlabel=name, yscale="log" if positive else "linear")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss of the training set")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print the table, write `<name>.json` and `<name>.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=COURSES, default="digits_mlp")
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw", "natgrad"],
        help="to race; adamw must be among them",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--schedule", choices=SCHEDULES, default="constant")
    parser.add_argument("--steps", type=int, help="of each run; else the task's own number")
    parser.add_argument("--seconds", type=float, help="of the processor for each run; not steps")
    parser.add_argument(
        "--grid", nargs="+", type=float, default=ADAMW_GRID, help="learning rates to tune over"
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if "adamw" not in options.optimizers:
        parser.error("--optimizers: adamw is what the others are measured against; add it")

    if options.seconds and options.schedule != "constant":
        parser.error("--seconds: a schedule has to know its steps; give --steps")

    torch.set_num_threads(1)
    course = COURSES[options.task]
    if options.steps or options.seconds:
        steps = options.steps or course.steps
        course = replace(course, steps=steps, seconds=options.seconds)
    curves = race(course, options.optimizers, options.seeds, options.schedule, options.grid)

    name = f"{options.task}-{options.schedule}"
    title = f"{options.task}, {options.schedule} learning rate, {len(options.seeds)} seeds"
    losses = thresholds(curves, course.losses)
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
    console.print(last_values(curves))
    rates = {curve.optimizer: curve.lr for curve in curves}
    console.print("learning rates:", ", ".join(f"{k} {v:g}" for k, v in rates.items()))
    console.print(f"Written to {options.folder / name}.json and .png", soft_wrap=True)


if __name__ == "__main__":
    main()
