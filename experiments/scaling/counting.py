"""Counts what the real optimizer moves in memory outside matrix products, and what it holds.

Products, factorizations and what blocks keep follow from shapes. How often the rest of a step reads
and writes a parameter, a factor or a row is a property of the code, so it is counted there: every
torch operation of a few small networks' steps is intercepted, and what was counted is fitted by the
networks' sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.scaling.blocks import blocks
from experiments.scaling.models import Map, Model, Norm
from experiments.scaling.protocol import FisherStructure, Protocol
from ngplugin import NaturalGradientOptimizer

# Operations whose time is that of their FLOPs.
_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "linalg_cholesky_ex", "cholesky_inverse", "_linalg_eigh",
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


def count_steps(
    structure: FisherStructure, network: Network, cg_iterations: int = 1
) -> dict[str, Count]:
    """A step of each kind: plain, with statistics, with statistics and a refresh, measured.

    In mixed precision with bfloat16, as large models are trained. A matrix-free step is always
    measured.
    """
    torch.manual_seed(0)
    x, y = torch.randn(network.rows, network.inputs), torch.arange(network.rows) % network.outputs
    module = network.module()
    usual = structure == "matrix-free"
    wanted = {
        (False, False, usual): "plain",
        (True, False, usual): "statistics",
        (True, True, usual): "refresh",
        (False, False, True): "plain" if usual else "measured",
    }
    found: dict[str, Count] = {}
    with Counter() as counter:
        optimizer = NaturalGradientOptimizer(
            module.parameters(), structure=structure, weight_decay=0.01, lr=0.1,
            statistics_every=4, refresh_every=8, cg_iterations=cg_iterations,
        )  # fmt: skip
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
            kind = (step % 4 == 0, step % 8 == 0, report is not None and report.kl is not None)
            if step > 8 and kind in wanted and wanted[kind] not in found:  # as all later ones are
                found[wanted[kind]] = Count(
                    counter.moved,
                    counter.moved - passed,
                    pass_peak,
                    kept - before,
                    counter.peak - kept,
                )
            if found.keys() == {*wanted.values()}:
                return found
    raise RuntimeError(f"{structure}: only {', '.join(found)} steps among the first 100")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step of one structure moves, and holds for a while, by the sizes of things.

    A *factor* is a number in a dense factor, an *average* one in a running average, a *row* one in
    the rows of inputs and scores of a statistic, a *logit* one in the loss's predictions.

    Attributes:
        update_parameter: moved every step.
        update_factor: the same, where inverses and matrices are converted.
        statistics_row: moved for a statistic.
        statistics_average: the same.
        statistics_logit: the same.
        refresh_average: moved at a refresh.
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
    statistics_row: float = 0.0
    statistics_average: float = 0.0
    statistics_logit: float = 0.0
    refresh_average: float = 0.0
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
    counts = [count_steps(structure, network) for network in networks]
    sizes = [_sizes(structure, network) for network in networks]

    def fit(values: Sequence[float], *names: str) -> list[float]:
        columns = np.array([[size[name] for name in names] for size in sizes], dtype=float)
        scale = np.array(values, dtype=float)[:, None]  # so that each network counts the same
        solution, *_ = np.linalg.lstsq(columns / scale, np.ones(len(scale)), rcond=None)
        return [round(max(0.0, float(x)), 1) for x in solution]

    plain = [count["plain"] for count in counts]
    statistics = [count["statistics"] for count in counts]
    pairs = [*zip(statistics, plain, strict=True)]
    updating: list[float] = [p.updating for p in plain]
    explained = ["parameters", "factors"]
    if structure == "diagonal":
        explained.remove("factors")
    elif structure == "matrix-free":
        # Two numbers of iterations, few enough not to end early on networks as small as these.
        more = [count_steps(structure, network, 3)["plain"].updating for network in networks]
        growth = [(m - u) / 2 for m, u in zip(more, updating, strict=True)]
        updating = [
            u + (cg_iterations - 1) * each for u, each in zip(updating, growth, strict=True)
        ]
        explained = ["parameters", "rows"]
    update = dict(zip(explained, fit(updating, *explained), strict=True))
    refreshing = [c["refresh"].updating - c["statistics"].updating for c in counts]
    measured = [0.0, 0.0]
    if structure != "matrix-free":
        measuring = [c["measured"].moved - c["plain"].moved for c in counts]
        measured = fit(measuring, "parameters", "logits", "rows")[:2]
    return Traffic(
        update["parameters"],
        update.get("factors", 0.0),
        *fit([s.moved - p.moved for s, p in pairs], "rows", "averages", "logits"),
        *fit(refreshing, "averages"),
        *measured,
        *fit([s.pass_peak - p.pass_peak for s, p in pairs], "rows", "averages", "logits"),
        *fit([s.kept + s.step_peak for s in statistics], "parameters", "rows", "logits"),
    )


def _sizes(structure: FisherStructure, network: Network) -> dict[str, float]:
    model = network.model()
    found = blocks(model, structure, Protocol())
    return {
        "parameters": model.parameters,
        "factors": sum(b.count * b.factors for b in found),
        "averages": sum(b.count * b.averages for b in found),
        "rows": sum(m.count * network.rows * (m.inputs + m.outputs) for m in model.maps),
        "logits": network.rows * model.logits,
    }
