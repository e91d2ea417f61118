"""One run of the soak: a fit in a process of its own, ended now and then, and started again."""

from __future__ import annotations

import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.swa_utils import update_bn

from experiments.soak.faults import Faults
from experiments.tasks.task import Task
from experiments.workload import make
from ngplugin import NaturalGradient

OVERRIDES = ("data=mnist5k", "model=cnn", "data.batch_size=32", "schedule=cosine")
WATCHED_EVERY = 500  # steps between looks at memory
EPOCHS_BETWEEN = 1  # checkpoints
PATIENCE = 120.0  # seconds without a step, after which a process counts as hanging
ENDINGS = ("kill -9", "SIGTERM", "Ctrl-C", "an exception in training_step")
#: At the rates of `conf/optimizer`; the callback steps in the place of the first.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "natgrad": partial(torch.optim.SGD, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
}
_SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}


@dataclass(frozen=True)
class Plan:
    """What a run is to be.

    Attributes:
        steps: of the optimizer.
        optimizer: of `OPTIMIZERS`.
        kinds: of faults to draw from; none for a clean run.
        rate: share of the steps with a fault.
        endings: of processes that are ended from outside, at random, evenly of each kind.
        batches: in an epoch; None for all.
        renewed: whether running averages of BatchNorm are taken anew before the run is judged.
        seed: of weights and batches.
    """

    steps: int
    optimizer: str = "natgrad"
    kinds: tuple[str, ...] = ()
    rate: float = 0.1
    endings: int = 0
    batches: int | None = None
    renewed: bool = False
    seed: int = 0


class Soaked(L.LightningModule):
    """A task as it is, but for what goes wrong."""

    def __init__(self, task: Task, optimizer: str, faults: Faults, stumble: Any) -> None:
        super().__init__()
        self.task, self._optimizer = task, optimizer
        self._faults, self._stumble = faults, stumble

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, of which either may be spoiled."""
        self._faults.begin()
        if self._stumble.value:
            raise RuntimeError("an exception in training_step")
        loss = self._faults.loss(self.task.loss(self._faults.batch(batch)))
        self.log("train/loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Gradients may be spoiled too."""
        self._faults.gradients(self)

    def configure_optimizers(self) -> Any:
        """Its rate falls to zero."""
        optimizer = OPTIMIZERS[self._optimizer](self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class FaultyLogger(CSVLogger):
    """Sometimes there is no room."""

    faults: Faults

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write, or fail as a full disk does."""
        if any(name.startswith("natgrad") for name in metrics):
            self.faults.log()
        super().log_metrics(metrics, step)


class Watch(L.Callback):
    """Tells how far the fit is, and what it holds."""

    def __init__(self, folder: Path, faults: Faults, reached: Any) -> None:
        self._folder, self._faults, self._reached = folder, faults, reached
        self._memory: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After each step."""
        self._reached.value = step = trainer.global_step
        if step % WATCHED_EVERY == 0:
            gc.collect()
            tensors = sum(isinstance(o, Tensor) for o in gc.get_objects())
            self._memory.append({"step": step, "tensors": tensors, "bytes": _resident()})
        self.write()  # now: at any time it may be killed

    def write(self) -> None:
        """Have the process that started this one know of it."""
        text = json.dumps({"counts": self._faults.counts, "memory": self._memory})
        path = self._folder / f"watched-{os.getpid()}.json"
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)


def fit(folder: Path, plan: Plan, reached: Any, stumble: Any) -> None:
    """Go on from the last checkpoint, if any, to the end; writes what came of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    os.dup2(os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    faults = Faults(os.getpid(), plan.kinds, plan.rate)
    data, task = make(OVERRIDES, plan.seed)
    module = Soaked(task, plan.optimizer, faults, stumble)
    natural = [NaturalGradient(show_coverage=False, show_summary=False)]
    saving = ModelCheckpoint(folder, save_last=True, save_top_k=1, every_n_epochs=EPOCHS_BETWEEN)
    watch = Watch(folder, faults, reached)
    logger = FaultyLogger(folder, name="log", version=str(os.getpid()))
    logger.faults = faults
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        max_steps=plan.steps, max_epochs=-1, accelerator="cpu", logger=logger,
        callbacks=[*(natural if plan.optimizer == "natgrad" else []), saving, watch],
        enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, limit_train_batches=plan.batches,
    )  # fmt: skip
    trainer.fit(module, data.train_dataloader(), ckpt_path=last if last.exists() else None)
    watch.write()
    if plan.renewed:
        update_bn([batch[0] for batch in data.train_dataloader()], task.network)
    judged = {
        f"{split} {name}": value
        for split in ("train", "val", "test")
        for name, value in judge(task, data.in_order(split)).items()
    }
    (folder / "judged.json").write_text(json.dumps({"steps": trainer.global_step, **judged}))


@torch.no_grad()
def judge(task: Task, batches: Any) -> dict[str, float]:
    """Loss and accuracy, in evaluation."""
    task.eval()
    total: Counter[str] = Counter()
    for batch in batches:
        size = task.size(batch)
        total["examples"] += size
        for name, value in {"loss": task.loss(batch), **task.measure(batch)}.items():
            total[name] += size * float(value)
    examples = total.pop("examples")
    return {name: value / examples for name, value in total.items()}


def run(folder: Path, plan: Plan) -> dict[str, Any]:
    """A run to its end, through as many processes as that takes; what came of it.

    Args:
        folder: of its own; a run that is in it goes on.
        plan: of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = multiprocessing.get_context("fork")
    chance = random.Random(plan.seed)
    ended: Counter[str] = Counter()
    kinds = itertools.cycle(ENDINGS)
    while not (folder / "judged.json").exists():
        reached, stumble = processes.Value("i", 0), processes.Value("i", 0)
        process = processes.Process(target=fit, args=(folder, plan, reached, stumble))
        process.start()
        last = math.inf
        if ended.total() < plan.endings:
            last = _next_end(folder, chance, plan.steps / plan.endings)
        _wait(process, reached, last)
        ours = process.is_alive()
        if ours:
            kind = next(kinds)
            ended[kind] += 1
            time.sleep(chance.uniform(0, 0.1))
            if kind in _SIGNALS and process.pid is not None:
                os.kill(process.pid, _SIGNALS[kind])
            else:
                stumble.value = 1
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"a process in {folder} does not end")
        if process.exitcode and not ours:
            raise RuntimeError(f"a process failed by itself: see {folder / 'said.txt'}")
    watched = [json.loads(path.read_text()) for path in sorted(folder.glob("watched-*.json"))]
    counts = sum((Counter(each["counts"]) for each in watched), Counter())
    return {
        **json.loads((folder / "judged.json").read_text()),
        "processes": len(watched),
        "ended": dict(ended),
        "faults": dict(sorted(counts.items())),
        "memory": max((each["memory"] for each in watched), key=len),
    }


def _next_end(folder: Path, chance: random.Random, apart: float) -> int:
    """The step at which the process is to be ended: beyond where it has to start."""
    last = folder / "last.ckpt"
    start = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    return int(start + chance.uniform(0.3, 1.7) * apart)


def _wait(process: Any, reached: Any, step: float) -> None:
    """Until it has come so far, or to its end."""
    seen, patience = -1, time.monotonic() + PATIENCE
    while process.is_alive() and (reached.value < step):
        if reached.value != seen:
            seen, patience = reached.value, time.monotonic() + PATIENCE
        if time.monotonic() > patience:
            process.kill()
            raise TimeoutError(f"no step after {seen} in {PATIENCE:g} s")
        time.sleep(0.02)


def _resident() -> int:
    """Bytes of the process in memory, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
