"""Bytes of training with natural gradient: what stays between steps, what comes and goes.

Counted are the tensors that torch operations make, each storage once, while it is alive; not what a
LAPACK or BLAS routine has for itself while it runs.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from experiments.cost.workloads import Workload
from experiments.scaling.blocks import blocks
from experiments.scaling.counting import Counter
from experiments.scaling.models import Model
from experiments.scaling.protocol import Protocol
from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.products import multiplies_bfloat16

STEPS = 22  # in which every piece of a step is met, also all of them together
MORE = 6  # steps, the most until one is not measured; an exact block measures all
MAKERS = 3  # of the peak, that are named


@dataclass(frozen=True)
class Need:
    """Bytes that one optimizer's training has beside the network's own.

    Attributes:
        gradients: of all parameters.
        kept: what the optimizer has between steps.
        pass_peak: the most that forward and backward add to that, gradients included.
        step_peak: the most that one `step()` adds to what is there when it begins.
        left: what forward and backward had left for that `step()`, gradients excluded.
        made_by: the functions of the package that made most of that peak, with the bytes of each.
    """

    gradients: int
    kept: int
    pass_peak: int
    step_peak: int
    left: int
    made_by: dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Of one workload.

    Attributes:
        workload: its name.
        parameters: bytes of them.
        factors: bytes of the factors A and G, once; of an exact block, of its rows.
        predicted: what natural gradient keeps by the formulas, momentum included.
        natural: what was counted of it.
        sgd: what was counted of SGD with momentum.
    """

    workload: str
    parameters: int
    factors: int
    predicted: int
    natural: Need
    sgd: Need

    @staticmethod
    def of(record: dict[str, Any]) -> Memory:
        """As it was stored."""
        needs = {name: Need(**record[name]) for name in ("natural", "sgd")}
        return Memory(**{**record, **needs})

    def persistent(self, kept: int) -> float:
        """Parameters, gradients and all but `kept` of what stays, over the parameters."""
        need = self.natural
        return (self.parameters + need.gradients + need.kept - kept) / self.parameters

    def peak(self, kept: int) -> float:
        """The same with what `step()` adds at its peak."""
        return self.persistent(kept) + self.natural.step_peak / self.parameters

    @property
    def curvature(self) -> int:
        """What stays beside a momentum as large as the parameters."""
        return self.natural.kept - self.parameters


def measure(workloads: Sequence[Workload]) -> list[dict[str, Any]]:
    """All of them."""
    return [asdict(memory(workload)) for workload in workloads]


def memory(workload: Workload) -> Memory:
    """Train for some steps with each optimizer, and count."""
    natural = _needed(workload, lambda p: NaturalGradientOptimizer(p))
    sgd = _needed(workload, lambda p: SGD(p, 1e-3, momentum=0.9))
    module, _ = workload.made()
    size = next(module.parameters()).element_size()
    parameters = sum(p.numel() for p in module.parameters())
    shapes = workload.shapes(module)
    return Memory(
        workload.name,
        size * parameters,
        exact_rows(workload.rows, parameters) if workload.rows else size * factors(shapes),
        kept(shapes, workload.rows),
        natural,
        sgd,
    )


# -- by the formulas -----------------------------------------------------------------------------


def kept(model: Model, rows: int = 0) -> int:
    """Bytes that the optimizer has between steps, momentum and curvature.

    Args:
        model: the shapes.
        rows: of an exact block; 0 for Kronecker blocks, in float32.
    """
    if rows:
        return exact(rows, model.parameters)
    found = blocks(model, "kronecker", Protocol())
    half = multiplies_bfloat16(torch.device("cpu"))
    curvature = sum(b.count * (b.bytes if half else 4 * b.numel) for b in found)
    # Where a parameter enters no known map, what they all were before an unmeasured step.
    copies = 2 if model.norms or model.loose else 1
    return 4 * copies * model.parameters + curvature


def factors(model: Model) -> int:
    """Numbers of all dense factors."""
    return sum(b.count * b.factors for b in blocks(model, "kronecker", Protocol()))


def exact(rows: int, parameters: int) -> int:
    """Bytes of an exact block with fewer rows than parameters, in float64.

    The rows and their part of the gradient, the kernel and its Cholesky factor, and the last step.
    """
    return exact_rows(rows, parameters) + 8 * (rows + 2 * rows**2 + parameters)


def exact_rows(rows: int, parameters: int) -> int:
    """Bytes of the rows alone."""
    return 8 * rows * parameters


# -- counted -------------------------------------------------------------------------------------


class _Makers(Counter):
    """Knows who made what is alive, too.

    Attributes:
        made: bytes alive, by the function that made them.
        at_peak: the same at the peak since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}

    def follow(self, t: Tensor) -> None:
        """Also by its maker."""
        storage, before = t.untyped_storage(), self.peak
        if storage not in self._known:
            maker, size = _function(), storage.nbytes()
            self.made[maker] = self.made.get(maker, 0) + size
            weakref.finalize(storage, self._unmake, maker, size)
        super().follow(t)
        if self.peak > before:
            self.at_peak = dict(self.made)

    def _unmake(self, maker: str, size: int) -> None:
        self.made[maker] -= size


def _function() -> str:
    """The innermost function of the package that is running."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("ngplugin"):
            return f"{module.removeprefix('ngplugin.')}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _needed(workload: Workload, make: Callable[[Any], Optimizer]) -> Need:
    module, batches = workload.made()
    counter = _Makers()
    with counter:
        module = copy.deepcopy(module)  # so that its tensors are among those that are known
    network = counter.alive
    optimizer = make(module.parameters())
    gradients = pass_peak = step_peak = left = 0
    made_by: dict[str, int] = {}
    for step, batch in zip(range(STEPS + MORE), batches, strict=False):
        if step >= STEPS and not _measured(optimizer):
            break
        with counter:
            optimizer.zero_grad()
            before = counter.peak = counter.alive
            _backward(module, optimizer, batch)
            passed = counter.peak - before
            gradients = _gradients(module)
            begun, there = counter.alive, dict(counter.made)
            counter.peak, counter.at_peak = begun, there
            optimizer.step()
        if step == 0:  # makes what is then kept
            continue
        pass_peak = max(pass_peak, passed)
        if counter.peak - begun >= step_peak:
            step_peak, left = counter.peak - begun, begun - before - gradients
            added = {name: size - there.get(name, 0) for name, size in counter.at_peak.items()}
            made_by = dict(sorted(added.items(), key=lambda item: -item[1])[:MAKERS])
    optimizer.zero_grad()
    gc.collect()
    return Need(gradients, counter.alive - network, pass_peak, step_peak, left, made_by)


def _measured(optimizer: Optimizer) -> bool:
    """Whether the last step was; then nothing is kept to take it back with."""
    natural = isinstance(optimizer, NaturalGradientOptimizer)
    return natural and optimizer.report is not None and optimizer.report.kl is not None


def _backward(module: Any, optimizer: Optimizer, batch: Any) -> None:
    if isinstance(optimizer, NaturalGradientOptimizer):
        with optimizer.observe():
            loss = module.loss(batch)
    else:
        loss = module.loss(batch)
    loss.backward()


def _gradients(module: nn.Module) -> int:
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return sum(g.numel() * g.element_size() for g in found)
