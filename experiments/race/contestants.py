"""Who races: each knows how it is tuned, how it is made, and how to make one step."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.muon import MuonWithAdamW
from experiments.race.courses import Course
from experiments.race.search import Axes, Setting
from experiments.tasks.splits import SplitData
from experiments.tasks.task import Task
from experiments.workload import in_precision
from ngplugin import NaturalGradientOptimizer


class Training(ABC):
    """One module in training with one optimizer.

    Args:
        course: what is trained.
        module: in its first state.
        data: that it is trained on; batches of them come with each step.
        setting: the contestant's options.
    """

    def __init__(self, course: Course, module: Task, data: SplitData, setting: Setting) -> None:
        self.course = course
        self.module = module
        self.data = data
        self.prepare(**setting)

    @abstractmethod
    def prepare(self, **setting: float) -> None:
        """Make the optimizer."""

    @abstractmethod
    def step(self, batch: Any, done: float) -> Tensor:
        """Make one step, `done` being the share of the time that is spent; return the loss."""

    @property
    def overhead(self) -> float | None:
        """Share of the time that went into curvature, in [0, 1], for those who know."""
        return None


class Plain(Training):
    """One optimizer of torch's kind: forward, backward, step.

    Attributes:
        make: the optimizer, from the parameters and the setting.
    """

    make: Callable[..., Optimizer]

    def prepare(self, **setting: float) -> None:
        """Make the optimizer."""
        self.optimizer = type(self).make(self.module.parameters(), **setting)

    def step(self, batch: Any, done: float) -> Tensor:
        """Forward, backward, step."""
        loss = self.module.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss


class SGD(Plain):
    """With momentum 0.9."""

    @staticmethod
    def make(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Make the optimizer."""
        return torch.optim.SGD(params, lr, momentum=0.9)


class Adam(Plain):
    """torch's."""

    make = torch.optim.Adam


class AdamW(Plain):
    """torch's, at a constant learning rate."""

    make = torch.optim.AdamW


class AdamWCosine(AdamW):
    """With a learning rate that falls to nothing on half a cosine wave."""

    def prepare(self, **setting: float) -> None:
        """Make the optimizer."""
        super().prepare(**setting)
        self.peak = setting["lr"]

    def step(self, batch: Any, done: float) -> Tensor:
        """A step at the learning rate of the time."""
        self.optimizer.param_groups[0]["lr"] = self.peak * 0.5 * (1 + math.cos(math.pi * done))
        return super().step(batch, done)


class Muon(Plain):
    """torch's for matrices, AdamW with the same learning rate for the rest."""

    make = MuonWithAdamW


class SOAP(Plain):
    """pytorch-optimizer's."""

    @staticmethod
    def make(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Make the optimizer."""
        from pytorch_optimizer import SOAP

        return SOAP(params, lr)  # type: ignore[no-any-return]


class Shampoo(Plain):
    """pytorch-optimizer's scalable one: steps as long as RMSProp's, roots every 10 steps."""

    @staticmethod
    def make(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Make the optimizer."""
        from pytorch_optimizer import ScalableShampoo
        from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

        return ScalableShampoo(  # type: ignore[no-any-return]
            params, lr, preconditioning_compute_steps=10, graft_type=LayerWiseGrafting.RMSPROP,
            moving_average_for_momentum=True,
        )  # fmt: skip


class LBFGS(Training):
    """torch's on the whole training set, with a line search for the strong Wolfe conditions."""

    def prepare(self, **setting: float) -> None:
        """Make the optimizer."""
        train: Any = self.data.splits["train"]
        self.batch = in_precision(train.__getitems__([*range(len(train))]), self.module)
        self.optimizer = torch.optim.LBFGS(
            self.module.parameters(), setting["lr"], max_iter=1,
            history_size=round(setting["history_size"]), line_search_fn="strong_wolfe",
            max_eval=25, tolerance_grad=0.0,
        )  # fmt: skip
        # A step begins where the last one's line search ended: that is not to be evaluated twice.
        self.recent: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def step(self, batch: Any, done: float) -> Tensor:
        """One iteration: a direction and a line search along it."""
        return self.optimizer.step(self.evaluate)  # type: ignore[no-any-return]

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The loss, and its gradient in the parameters' `grad`."""
        params = [*self.module.parameters()]
        place = nn.utils.parameters_to_vector(params)
        for known, loss, gradients in self.recent:
            if torch.equal(known, place):
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = gradient
                return loss
        with torch.enable_grad():
            loss = self.module.loss(self.batch)
            gradients = [*torch.autograd.grad(loss, params)]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        self.recent = [*self.recent[-2:], (place, loss.detach(), gradients)]
        return loss.detach()


class NaturalGradient(Plain):
    """ngplugin's."""

    curvature_seconds = 0.0
    seconds = 0.0

    @staticmethod
    def make(
        params: Iterable[nn.Parameter], memory: float | None = None, **setting: float
    ) -> Optimizer:
        """Make the optimizer; `memory` is how many steps momentum sums up, 1 / (1 - momentum)."""
        options: dict[str, Any] = dict(setting)
        if memory is not None:
            options["momentum"] = 1 - 1 / memory
        return NaturalGradientOptimizer(params, **options)

    def step(self, batch: Any, done: float) -> Tensor:
        """A step with its forward pass observed."""
        assert isinstance(self.optimizer, NaturalGradientOptimizer)
        started = time.perf_counter()
        with self.optimizer.observe():
            loss = self.module.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # The report's own seconds go back to the last step, before which others had their turn.
        self.seconds += time.perf_counter() - started
        report = self.optimizer.report
        if report is not None:
            self.curvature_seconds += report.overhead * report.seconds
        return loss

    @property
    def overhead(self) -> float | None:
        """Share of the time that went into curvature."""
        return min(1.0, self.curvature_seconds / self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Contestant:
    """One that races.

    Attributes:
        title: for the page.
        training: makes its steps.
        axes: what it is tuned over on each course; none of it, none at all.
        unable: courses that it cannot take, and why.
        package: from PyPI that it needs, as it is imported; None for this project's own.
        options: that are not tuned, for the page.
    """

    title: str
    training: type[Training]
    axes: Mapping[str, Axes] = field(default_factory=dict)
    unable: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None
    options: str = ""
