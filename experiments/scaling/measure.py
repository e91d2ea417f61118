"""Measures on this machine what can be: rates of one core, collectives, steps of small models."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from experiments.scaling.assignment import longest_first
from experiments.scaling.blocks import Side, blocks
from experiments.scaling.calibration import Host
from experiments.scaling.counting import count_traffic
from experiments.scaling.devices import INVERSE_BY_LAPACK, Device
from experiments.scaling.models import perceptron, transformer
from experiments.scaling.protocol import CURVED_EVERY, FisherStructure, Protocol
from experiments.workload import in_precision, make
from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.blocks.factor import damped_factor
from ngplugin.curvature.blocks.low_rank_factor import low_rank_factor
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.products import multiplies_bfloat16, quick_float32

COUNTED: tuple[FisherStructure, ...] = ("kronecker", "eigen", "diagonal", "identity", "matrix-free")
_SIZES = (64, 128, 256, 512, 1024, 2048)  # of factors
_MESSAGES = (2**8, 2**12, 2**16, 2**20, 2**22, 2**24)  # bytes
_NOT_TIMED = 20  # the first steps, many of which are observed and refreshed

# So that all parts are met in few steps, and not only together: F d of steps that are not measured.
_OFTEN: dict[str, Any] = {
    "statistics_every": 3, "refresh_every": 6, "spectrum_every": 12, "measure_every": 8
}  # fmt: skip

#: Small models of `experiments/tasks` as the formulas see them.
SMALL = {
    "autoencoder": perceptron(
        "autoencoder", (784, 1000, 500, 250, 30, 250, 500, 1000, 784), examples=500
    ),
    "char_transformer": transformer(
        "char_transformer", 2, 128, 64, 103, examples=32, tied=False
    ),
}  # fmt: skip


def measure() -> dict[str, Any]:
    """Everything, in some minutes."""
    torch.set_num_threads(1)
    return {
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "traffic": count(),
        "host": {name: asdict(host(name)) for name in COUNTED},
        "rates": rates(),
        "factorizations": factorizations(),
        "all_reduce": two_ranks(_time_all_reduce),
        "steps": {name: time_steps(name) for name in SMALL},
        "refresh": {name: two_ranks(_time_refresh, name) for name in SMALL},
    }


def count() -> dict[str, Any]:
    """What the optimizer moves and holds, by structure; the same on every machine.

    A matrix-free step takes as many iterations as it needs, so what a refresh adds is not to be
    told by differences; it is what Kronecker blocks have.
    """
    torch.set_num_threads(1)
    found = {name: asdict(count_traffic(name)) for name in COUNTED}
    for name in ("refresh_average", "refresh_factor"):
        found["matrix-free"][name] = found["kronecker"][name]
    return found


def best(run: Callable[[], Any], seconds: float = 0.3) -> float:
    """Seconds of the processor, the shortest of some runs: others on the machine prolong them."""
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


# -- one core ------------------------------------------------------------------------------------


def rates() -> dict[str, float]:
    """FLOP/s and bytes a second, medians over sizes of small models.

    `half` is of products with inverses, in float32 where a processor has none of bfloat16.
    """
    lower = torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32
    single, half, gram = [], [], []
    for size in (128, 256, 512, 1024):
        X, Y = torch.randn(size, size), torch.randn(size, size)
        low = X.to(lower), Y.to(lower)
        rows = torch.randn(1024, size)
        single.append(2 * size**3 / best(lambda a=X, b=Y: a @ b))
        half.append(2 * size**3 / best(lambda a=low[0], b=low[1]: a @ b))
        with quick_float32():
            gram.append(2 * 1024 * size**2 / best(lambda r=rows: r.mT @ r))
    a, b = torch.randn(2, 2**21)
    return {
        "single": statistics.median(single),
        "half": statistics.median(half),
        "gram": statistics.median(gram),
        "bandwidth": 3 * 4 * 2**21 / best(lambda: torch.add(a, b)),
    }


def factorizations() -> dict[str, list[list[float]]]:
    """Seconds by size: Cholesky and inverse, eigenvectors, eigenvalues."""
    found: dict[str, list[list[float]]] = {"inverse": [], "eigh": [], "eigvalsh": []}
    for size in _SIZES:
        X = torch.randn(size, 2 * size)
        X = X @ X.mT / (2 * size) + 0.1 * torch.eye(size)
        runs: dict[str, Callable[[], Any]] = {
            "inverse": lambda X=X: torch.cholesky_inverse(torch.linalg.cholesky_ex(X).L),
            "eigh": lambda X=X: torch.linalg.eigh(X),
            "eigvalsh": lambda X=X: torch.linalg.eigvalsh(X),
        }
        for name, run in runs.items():
            found[name].append([size, best(run)])
    return found


def host(structure: FisherStructure) -> Host:
    """Seconds a block of layers so small that their arithmetic is nothing.

    A matrix-free step takes as many iterations as it needs, so what else it has is not to be told
    by differences; it is what Kronecker blocks have.
    """
    if structure == "matrix-free":
        return replace(host("kronecker"), update=_host("matrix-free").update)
    return _host(structure)


def _host(structure: FisherStructure) -> Host:
    few, many = (_host_steps(structure, layers) for layers in (4, 24))
    more = 2 * (24 - 4)  # a linear layer and a normalization each
    return Host(**{name: max(0.0, (many[name] - few[name]) / more) for name in asdict(Host())})


def _host_steps(structure: FisherStructure, layers: int) -> dict[str, float]:
    torch.manual_seed(0)
    parts = [p for _ in range(layers) for p in (nn.Linear(4, 4), nn.LayerNorm(4))]
    model, x, y = nn.Sequential(*parts), torch.randn(8, 4), torch.arange(8) % 4
    optimizer = NaturalGradientOptimizer(
        model.parameters(), structure=structure, lr=0.01, weight_decay=0.01, **_OFTEN
    )

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    return step_parts(optimizer, loss, 200)


def step_parts(
    optimizer: NaturalGradientOptimizer, loss: Callable[[], Tensor], steps: int
) -> dict[str, float]:
    """Seconds of a step's parts, from the steps that have them and those that have not.

    A plain step is forward, backward and update; the first two are timed by themselves. So are
    inversions, of which each step of a period has some, and condition numbers.
    """
    options, times = optimizer.options, dict[tuple[bool, ...], list[float]]()  # by what a step has
    spectra: list[float] = []
    periods: dict[int, float] = {}
    curved_step = -CURVED_EVERY
    with _timed("refresh") as refreshed, _timed("spectra") as conditioned:
        for step in range(steps):
            optimizer.zero_grad()
            started = time.process_time()
            with optimizer.observe():
                value = loss()
            value.backward()
            optimizer.step()
            seconds = time.process_time() - started
            refresh, spectrum = sum(refreshed), sum(conditioned)
            refreshed.clear()
            conditioned.clear()
            measured = optimizer.report is not None and optimizer.report.kl is not None
            curved = measured or step >= curved_step + CURVED_EVERY
            curved_step = step if curved else curved_step
            if step >= _NOT_TIMED:
                kind = step % options.statistics_every == 0, measured, curved
                times.setdefault(kind, []).append(seconds - refresh - spectrum)
                period = step // options.refresh_every
                periods[period] = periods.get(period, 0.0) + refresh
                spectra += [spectrum] if spectrum else []

    def passes() -> None:
        optimizer.zero_grad()
        loss().backward()

    columns = np.array([[1.0, *kind] for kind in times])
    shortest = np.array([min(values) for values in times.values()])
    parts, *_ = np.linalg.lstsq(columns / shortest[:, None], np.ones(len(shortest)), rcond=None)
    plain, *more = (float(x) for x in parts)
    return {
        "update": plain - best(passes),
        **dict(zip(("statistics", "measured", "curved"), more, strict=True)),
        "refresh": min([*periods.values()][1:-1]),  # of whole periods
        "spectrum": min(spectra),
    }


@contextlib.contextmanager
def _timed(name: str) -> Iterator[list[float]]:
    """Has the seconds of each call of a method of the Fisher matrix."""
    method, seconds = getattr(Fisher, name), list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = method(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return result

    with mock.patch.object(Fisher, name, timed):
        yield seconds


# -- small models --------------------------------------------------------------------------------


def time_steps(name: str, steps: int = 100) -> dict[str, float]:
    """Seconds of the parts of a step, natural gradient's and AdamW's, of a task's own model."""
    data, module = make((f"experiment={name}",), seed=0)
    loader = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
    batch = in_precision(next(loader), module)
    adamw = torch.optim.AdamW(module.parameters(), 1e-4, fused=True)

    def passes() -> None:
        adamw.zero_grad()
        module.loss(batch).backward()

    forward_and_backward = best(passes, 2.0)
    updated = best(adamw.step, 0.5)
    batches = (in_precision(b, module) for b in loader)
    optimizer = NaturalGradientOptimizer(module.parameters(), weight_decay=0.01, **_OFTEN)
    parts = step_parts(optimizer, lambda: module.loss(next(batches)), steps)
    names = {"measured": "KL", "spectrum": "condition numbers", "curved": "F d"}
    return {
        "forward and backward": forward_and_backward,
        "AdamW's update": updated,
        **{names.get(name, name): seconds for name, seconds in parts.items()},
    }


# -- two processes -------------------------------------------------------------------------------


def two_ranks(run: Callable[..., Any], *arguments: Any) -> Any:
    """What the first of two processes returns."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, run, arguments), nprocs=2)
        return json.loads((Path(folder) / "0.json").read_text())


def _rank(rank: int, folder: str, run: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = run(*arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def _together(run: Callable[[], Any], times: int = 40) -> float:
    """Seconds of an operation of both processes, the shortest of some."""
    seconds = []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _slower(run: Callable[[], Any]) -> float:
    """Seconds of the processor, of the process that has more to do."""
    seconds = torch.tensor(best(run))
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _time_all_reduce() -> list[list[float]]:
    """Seconds by bytes."""
    found = []
    for size in _MESSAGES:
        t = torch.zeros(size // 4)
        found.append([size, _together(lambda t=t: dist.all_reduce(t))])
    return found


def _time_refresh(name: str) -> dict[str, float]:
    """Seconds of a refresh by two ranks, as the protocol has it, on factors of a model's sizes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = [b for b in blocks(SMALL[name], "kronecker", Protocol()) for _ in range(b.count)]
    flat = torch.zeros(sum(b.averages for b in found))
    owner = longest_first([sum(s.groups * s.size**3 for s in b.dense) for b in found], ranks)
    mine = [side for b, o in zip(found, owner, strict=True) if o == rank for side in b.dense]
    inversions = [_inversion(side) for side in mine]
    sizes = [sum(b.sent for b, o in zip(found, owner, strict=True) if o == r) for r in range(ranks)]
    messages = [torch.zeros(size // 4) for size in sizes]

    def invert() -> None:
        for inversion in inversions:
            inversion()

    def send() -> None:
        for r, message in enumerate(messages):
            dist.broadcast(message, r)

    def reduce() -> None:
        dist.all_reduce(flat)
        flat.div_(ranks)

    return {
        "all-reduce of the averages": _together(reduce),
        "inversions, the slower rank": _slower(invert),
        "broadcast of what was inverted": _together(send),
    }


def _inversion(side: Side) -> Callable[[], Any]:
    """Of a factor as from twice as many rows as it is large, not its first."""
    X = torch.randn(side.groups, side.size, 2 * side.size)
    X = X @ X.mT / X.shape[-1]
    damping = torch.full((side.groups, 1, 1), 0.1)
    if not side.rank:
        return lambda: damped_factor(X, damping, "auto")
    start = torch.linalg.qr(torch.randn(side.groups, side.size, side.rank))[0]
    return lambda: low_rank_factor(X, damping, side.rank, start)


# -- this machine as a device --------------------------------------------------------------------


def this_machine(record: dict[str, Any]) -> Device:
    """A device whose every number was measured; two of it are linked."""
    r = record["rates"]
    inverse = _cubic(record["factorizations"]["inverse"])
    eigh = _cubic(record["factorizations"]["eigh"])
    eigvalsh = _cubic(record["factorizations"]["eigvalsh"])
    latency, link = _link(record["all_reduce"])
    device = Device(
        "one core here",
        memory=math.nan,
        training=r["single"],
        half=r["half"],
        single=r["single"],
        gram=r["gram"],
        bandwidth=r["bandwidth"],
        link_inside=link,
        link_between=link,
        per_node=2,
        latency_inside=latency,
        training_efficiency=1.0,
        product_efficiency=1.0,
        bandwidth_efficiency=1.0,
        link_efficiency=1.0,
        waits_for_host=True,
        inverse_flops=INVERSE_BY_LAPACK,
        inverse_half_size=inverse[1],
        eigen_half_size=eigh[1],
    )
    return replace(
        device,
        inverse_efficiency=1 / (inverse[0] * r["single"]),
        eigh_efficiency=9 / (eigh[0] * r["single"]),
        eigvalsh_efficiency=4 / 3 / (eigvalsh[0] * r["single"]),
    )


def _cubic(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """C and h of seconds = c d³ (1 + h/d), with the least relative errors; h at least 0."""
    d, seconds = np.array(points).T
    columns = np.stack([d**3, d**2], 1) / seconds[:, None]
    (c, ch), *_ = np.linalg.lstsq(columns, np.ones(len(d)), rcond=None)
    if c <= 0 or ch < 0:
        return float(np.exp(np.mean(np.log(seconds / d**3)))), 0.0
    return float(c), float(ch / c)


def _link(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Latency of a hop and bytes a second, from all-reduces by two: two hops, all bytes once."""
    size, seconds = np.array(points).T
    columns = np.stack([np.ones(len(size)), size], 1) / seconds[:, None]
    (fixed, each), *_ = np.linalg.lstsq(columns, np.ones(len(size)), rcond=None)
    return float(max(fixed, 0.0) / 2), float(1 / each)
