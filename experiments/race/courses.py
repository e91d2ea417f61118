"""What is raced on: six tasks, each with its time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.tasks.splits import SplitData
from experiments.tasks.task import Task
from experiments.workload import in_precision, make


@dataclass(frozen=True)
class Course:
    """What is trained, for how long, and how it is judged.

    Attributes:
        title: for the page.
        overrides: of `conf/train.yaml`, that choose data, network and task.
        seconds: of the processor, for each run.
        metric: what is judged on held-out examples, by the task's name for it.
        higher: whether more of it is better.
        prediction: the distribution that the network's outputs stand for; None if the loss is of
            something else than these.
        judged: batches of the training set that its loss is taken on, `SplitData.evaluation_size`
            each; fixed.
        points: at which it is taken, about.
        metric_every: points at one of which the held-out examples are judged too.
        long: seconds of a second run of natural gradient; None for none.
    """

    title: str
    overrides: tuple[str, ...]
    seconds: float
    metric: str
    higher: bool = False
    prediction: Literal["categorical", "bernoulli", "gaussian"] | None = None
    judged: int = 1
    points: int = 48
    metric_every: int = 4
    long: float | None = None

    def make(self, seed: int) -> tuple[SplitData, Task]:
        """The data and the module, with the weights and batches of a seed."""
        return make(self.overrides, seed)

    def shortened(self, seconds: float) -> Course:
        """The same in less time, to try it out."""
        long = None if self.long is None else 4 * seconds
        return replace(self, seconds=seconds, points=8, long=long)

    @torch.no_grad()
    def judge(self, module: Task, data: SplitData) -> float:
        """The training loss of the fixed batches, as in evaluation."""
        return self._average(module, data, "train", lambda b: module.loss(b))

    @torch.no_grad()
    def judge_held_out(self, module: Task, data: SplitData) -> float:
        """The metric on held-out examples."""
        return self._average(module, data, "val", lambda b: module.measure(b)[self.metric])

    def _average(
        self, module: Task, data: SplitData, split: str, value: Callable[[Any], Tensor]
    ) -> float:
        module.eval()
        total, count = 0.0, 0
        for batch in itertools.islice(data.in_order(split), self.judged):
            size = module.size(batch)
            total += size * value(in_precision(batch, module)).item()
            count += size
        module.train()
        return total / count


COURSES = {
    "digits_mlp": Course(
        "MLP 64-256-256-10 on digits, batches of 128",
        ("experiment=digits_mlp", "model.hidden=[256,256]", "data.batch_size=128"),
        seconds=3,
        metric="accuracy",
        higher=True,
        prediction="categorical",
        judged=2,
    ),
    "mnist5k_cnn": Course(
        "three convolutions with BatchNorm on 5,000 images of MNIST, batches of 128",
        ("data=mnist5k", "model=cnn", "data.batch_size=128"),
        seconds=15,
        metric="accuracy",
        higher=True,
        prediction="categorical",
        points=30,
    ),
    "autoencoder": Course(
        "autoencoder 784-1000-500-250-30 and back, tanh, on the same images, batches of 500",
        ("experiment=autoencoder",),
        seconds=30,
        metric="loss",
        prediction="bernoulli",
        judged=2,
    ),
    "char_transformer": Course(
        "transformer of 2 layers, width 128, on 64 characters of Python's help, batches of 32",
        ("experiment=char_transformer",),
        seconds=30,
        metric="loss",
        prediction="categorical",
        points=30,
    ),
    "implicit_image": Course(
        "a photograph of 107 x 160 pixels, Fourier features 256-128-128-128-3, batches of 4,096",
        ("experiment=implicit_image",),
        seconds=10,
        metric="psnr",
        higher=True,
        prediction="gaussian",
    ),
    "poisson_pinn": Course(
        "Poisson equation by a network 2-64-64-1, tanh, float64, all 900 + 120 points",
        ("experiment=poisson_pinn",),
        seconds=15,
        metric="error",
        metric_every=1,
        long=60,
    ),
}
