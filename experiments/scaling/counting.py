"""Counts what the real optimizer moves in memory outside matrix products, and what it holds.

Products, factorizations and what blocks keep follow from shapes. How often the rest of a step reads
and writes a parameter, a factor or a row is a property of the code, so it is counted there: every
torch operation of a few small networks' steps is intercepted, and what was counted is fitted by the
networks' sizes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.scaling.blocks import blocks
from experiments.scaling.models import Map, Model, Norm
from experiments.scaling.protocol import CURVED_EVERY, FisherStructure, Protocol
from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature import products
from ngplugin.curvature.pace import Pace, Work
from ngplugin.report import StepReport

# Operations whose time is that of their FLOPs.
_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "linalg_cholesky_ex", "cholesky_inverse", "_linalg_eigh",
    "linalg_qr", "linalg_inv_ex",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Adds up what torch operations read and write, and follows what is alive.

    Attributes:
        moved: bytes read and written so far, by everything but products and views.
        alive: bytes of the tensors that were made here and are still there.
        peak: the most of them since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.alive = 0
        self.peak = 0
        self._known: Any = weakref.WeakSet()  # of storages

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count it."""
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if any(not alias.is_write for alias in aliases):
            return result  # a view
        for t in outputs:
            self.follow(t)
        if func._schema.name.removeprefix("aten::") not in _PRODUCTS:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.moved += sum(map(_bytes, (*inputs, *outputs)))
        return result

    def follow(self, t: Tensor) -> None:
        """Count a tensor among those alive, until it is not."""
        storage = t.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.alive -= size


def _bytes(t: Tensor) -> int:
    """What is there to be read of a tensor, which may be expanded from less."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


@dataclass(frozen=True)
class Count:
    """Of one step, in bytes.

    Attributes:
        moved: read and written, in forward, backward and `step()` together.
        updating: of that, in `step()`.
        pass_peak: the most that forward and backward added to what was there before them.
        kept: what was left of it for `step()`.
        step_peak: the most that `step()` added to that.
    """

    moved: int
    updating: int
    pass_peak: int
    kept: int
    step_peak: int


@dataclass(frozen=True)
class Network:
    """What is counted on: linear layers of sides over 127, each with tanh and LayerNorm behind."""

    layers: int
    width: int
    inputs: int
    outputs: int
    rows: int

    def module(self) -> nn.Sequential:
        """The network."""
        parts: list[nn.Module] = []
        for layer in range(self.layers):
            before = self.width if layer else self.inputs
            parts += [nn.Linear(before, self.width), nn.Tanh(), nn.LayerNorm(self.width)]
        return nn.Sequential(*parts, nn.Linear(self.width, self.outputs))

    def model(self) -> Model:
        """Its shapes."""
        return Model(
            "counted",
            (
                Map("linear", self.inputs, self.width, bias=True),
                Map("linear", self.width, self.width, bias=True, count=self.layers - 1),
                Map("linear", self.width, self.outputs, bias=True),
            ),
            (Norm(self.width, True, self.layers),),
            logits=self.outputs,
            examples=self.rows,
        )


NETWORKS = (
    Network(2, 128, 160, 256, 64),
    Network(3, 192, 130, 130, 256),
    Network(4, 160, 256, 512, 128),
    Network(2, 256, 320, 128, 512),
    Network(2, 128, 512, 1024, 512),
    Network(5, 256, 128, 256, 128),
)


#: What steps have beside gradient, direction and move: statistics, a refresh, F d.
_KINDS = {
    (False, False, False): "plain",
    (False, False, True): "curved",
    (True, False, False): "statistics",
    (True, False, True): "statistics, curved",
    (True, True, False): "refresh",
}


def count_steps(
    structure: FisherStructure,
    network: Network,
    cg_iterations: int = 1,
    overhead: float = math.inf,
    last: str | None = None,
) -> dict[str, Count]:
    """A step of each kind: those of `_KINDS`, and measured, which has F d too.

    In mixed precision with bfloat16, as large models are trained, whatever this machine multiplies.
    A matrix-free step is always measured. With statistics there is a refresh of all blocks, and so
    F d, at each power of two.

    Args:
        structure: of F.
        network: what is trained.
        cg_iterations: of a matrix-free step.
        overhead: beyond which factors are kept by their leading eigenvectors.
        last: the kind after which to stop; None for all kinds.
    """
    options: dict[str, Any] = {
        "structure": structure, "cg_iterations": cg_iterations, "overhead": overhead,
        "weight_decay": 0.01, "lr": 0.1, "statistics_every": 4, "refresh_every": 1000,
    }  # fmt: skip
    found: dict[str, Count] = {}
    for step, count, _ in _steps(network, {**options, "measure_every": None}):
        powers = step & (step - 1) == 0
        kind = _KINDS.get((step % 4 == 0, powers, step % CURVED_EVERY == 0))
        if kind is not None:
            found.setdefault(kind, count)
        if kind is not None and kind == last:
            return found
        if found.keys() == {*_KINDS.values()}:
            break
    if structure == "matrix-free":
        return found
    for step, count, report in _steps(network, {**options, "measure_every": 1}):
        if step % 4 and report.kl is not None and not report.shrinks:
            return {**found, "measured": count}
    raise RuntimeError(f"{structure}: no measured step that was made as it was proposed")


def _steps(network: Network, options: dict[str, Any]) -> Iterator[tuple[int, Count, StepReport]]:
    """A hundred steps but for the first, which make what is then there."""
    torch.manual_seed(0)
    x, y = torch.randn(network.rows, network.inputs), torch.arange(network.rows) % network.outputs
    module = network.module()
    with (
        Counter() as counter,
        mock.patch.object(products, "multiplies_bfloat16", _yes),
        mock.patch.object(Pace, "within", _as_asked),  # whatever the budget
    ):
        # As without an end: no factor is too large for the share it may take.
        optimizer = NaturalGradientOptimizer(
            module.parameters(), **{**options, "overhead": min(options["overhead"], 1e9)}
        )
        for step in range(100):
            optimizer.zero_grad()
            before = counter.peak = counter.alive
            counter.moved = 0
            with optimizer.observe(), torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(module(x), y)
            loss.backward()
            del loss
            passed, pass_peak = counter.moved, counter.peak - before
            kept = counter.peak = counter.alive
            optimizer.step()
            report = optimizer.report
            if step > 8 and report is not None:
                moved, peak = counter.moved, counter.peak
                yield (
                    step,
                    Count(moved, moved - passed, pass_peak, kept - before, peak - kept),
                    report,
                )


def _yes(device: torch.device) -> bool:
    return True


def _as_asked(pace: Pace, work: Work, share: float) -> Pace:
    return pace


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step of one structure moves, and holds for a while, by the sizes of things.

    A *factor* is a number in a dense factor that a refresh keeps whole, *low rank* a parameter for
    each of its sides that is kept by eigenvectors, an *average* a number in a running average, a
    *row* one in the rows of inputs and scores of a statistic, a *logit* one in the loss's
    predictions.

    Attributes:
        update_parameter: moved every step.
        update_factor: the same.
        update_low_rank: the same.
        curved_parameter: moved for F d, and its part of the model of the step.
        curved_factor: the same, where matrices are converted.
        statistics_row: moved for a statistic.
        statistics_average: the same.
        statistics_logit: the same.
        refresh_average: moved at a refresh.
        refresh_factor: the same.
        measured_parameter: moved to measure the KL.
        measured_logit: the same.
        statistics_held_row: held while a statistic is taken, beyond forward and backward.
        statistics_held_average: the same.
        statistics_held_logit: the same.
        step_held_parameter: held at the peak of a `step()` with statistics.
        step_held_row: the same.
        step_held_logit: the same.
    """

    update_parameter: float = 0.0
    update_factor: float = 0.0
    update_low_rank: float = 0.0
    curved_parameter: float = 0.0
    curved_factor: float = 0.0
    statistics_row: float = 0.0
    statistics_average: float = 0.0
    statistics_logit: float = 0.0
    refresh_average: float = 0.0
    refresh_factor: float = 0.0
    measured_parameter: float = 0.0
    measured_logit: float = 0.0
    statistics_held_row: float = 0.0
    statistics_held_average: float = 0.0
    statistics_held_logit: float = 0.0
    step_held_parameter: float = 0.0
    step_held_row: float = 0.0
    step_held_logit: float = 0.0


#: A fused AdamW reads parameter, gradient and two moments, and writes all but the gradient.
ADAMW = Traffic(update_parameter=28.0)


def count_traffic(
    structure: FisherStructure, networks: Sequence[Network] = NETWORKS, cg_iterations: int = 10
) -> Traffic:
    """Fit what was counted on some networks by their sizes.

    What only rows explain of a measurement or of a matrix-free step is left out: it is the traffic
    of forward and backward passes, whose time is that of their FLOPs.
    """
    # With all factors whole; and where that is told apart, with those by eigenvectors that can be.
    overheads = (math.inf, 0.0) if structure in ("kronecker", "identity") else (math.inf,)
    cases = [(network, overhead) for overhead in overheads for network in networks]
    counts = [count_steps(structure, network, 1, overhead) for network, overhead in cases]
    sizes = [_sizes(structure, network, overhead) for network, overhead in cases]

    def fit(values: Sequence[float], *names: str) -> list[float]:
        """Zero for what nothing here has any of."""
        known = [name for name in names if any(size[name] for size in sizes)]
        columns = np.array([[size[name] for name in known] for size in sizes], dtype=float)
        scale = np.maximum(values, 1.0)[:, None]  # so that each network counts the same
        solution, *_ = np.linalg.lstsq(columns / scale, np.array(values) / scale[:, 0], rcond=None)
        found = dict(zip(known, solution.tolist(), strict=True))
        return [round(max(0.0, found.get(name, 0.0)), 1) for name in names]

    def more(kind: str, than: str, part: str) -> list[float]:
        return [getattr(c[kind], part) - getattr(c[than], part) for c in counts]

    updating: list[float] = [c["plain"].updating for c in counts]
    explained = ["parameters", "factors", "low_rank"]
    curved = fit(more("curved", "plain", "updating"), "parameters", "factors")
    if structure == "matrix-free":
        # Two numbers of iterations, few enough not to end early on networks as small as these.
        longer = [
            count_steps(structure, n, 3, overhead, "plain")["plain"].updating
            for n, overhead in cases
        ]
        updating = [
            u + (cg_iterations - 1) * (m - u) / 2 for m, u in zip(longer, updating, strict=True)
        ]
        explained = ["parameters", "rows"]
    update = dict(zip(explained, fit(updating, *explained), strict=True))
    measured = [0.0, 0.0]
    if structure != "matrix-free":
        measured = fit(more("measured", "curved", "moved"), "parameters", "logits", "rows")[:2]
    held = [max(k.kept + k.step_peak for k in c.values()) for c in counts]
    return Traffic(
        update["parameters"],
        update.get("factors", 0.0),
        update.get("low_rank", 0.0),
        *curved,
        *fit(more("statistics", "plain", "moved"), "rows", "averages", "logits"),
        *fit(more("refresh", "statistics, curved", "updating"), "averages", "factors"),
        *measured,
        *fit(more("statistics", "plain", "pass_peak"), "rows", "averages", "logits"),
        *fit(held, "parameters", "rows", "logits"),
    )


def _sizes(structure: FisherStructure, network: Network, overhead: float) -> dict[str, float]:
    model = network.model()
    found = blocks(model, structure, Protocol(overhead=overhead))
    return {
        "parameters": model.parameters,
        "factors": sum(b.count * b.whole for b in found),
        "low_rank": sum(b.count * b.low_rank for b in found),
        "averages": sum(b.count * b.averages for b in found),
        "rows": sum(m.count * network.rows * (m.inputs + m.outputs) for m in model.maps),
        "logits": network.rows * model.logits,
    }
