"""How the time of a step grows with width and depth, natural gradient's and that of SGD."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.cost.pieces import PIECES, Stopwatch
from experiments.tasks.language_model import Transformer
from experiments.tasks.networks import dense
from ngplugin import NaturalGradientOptimizer

INPUTS, OUTPUTS = 64, 10  # of the perceptrons: few, so that width is what grows
TOKENS, SYMBOLS = 64, 100  # of the transformers, which have two layers

#: Steps before any that counts: the first have statistics and measurements each, refreshes at 0, 1,
#: 2, 4, 8 and 16, and the condition numbers of the first refresh.
FIRST = 20


@dataclass(frozen=True)
class Case:
    """A network and its batch.

    Attributes:
        kind: `"width"` and `"depth"`: perceptrons; `"transformer"`.
        width: of hidden layers.
        depth: how many of them.
        batch: examples.
        first: steps that are not counted.
        counted: steps that are.
    """

    kind: str
    width: int
    depth: int
    batch: int
    first: int = FIRST
    counted: int = 20

    def network(self) -> nn.Module:
        """With torch's own weights; deep ones, in which all vanishes with these, have He's."""
        if self.kind == "transformer":
            return nn.Sequential(
                Transformer(SYMBOLS, TOKENS, self.width, heads=4, layers=self.depth),
                nn.Flatten(0, 1),
            )
        network = dense(INPUTS, OUTPUTS, [self.width] * self.depth, "relu")
        for layer in network:
            if self.kind == "depth" and isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        return network

    def examples(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A new batch, whose labels can be learned."""
        if self.kind == "transformer":
            x = torch.randint(SYMBOLS, (self.batch, TOKENS), generator=generator)
            return x, ((3 * x + 1) % SYMBOLS).flatten()
        x = torch.randn(self.batch, INPUTS, generator=generator)
        return x, x[:, :OUTPUTS].argmax(1)


CASES = (
    *(Case("width", w, 3, b, counted=60) for w in (256, 512) for b in (128, 512)),
    *(Case("width", w, 3, b) for w in (1024, 2048, 4096) for b in (128, 512)),
    *(Case("depth", 256, d, 128, counted=60) for d in (2, 4, 8)),
    *(Case("depth", 256, d, 128) for d in (16, 32)),
    *(Case("transformer", w, 2, 32) for w in (64, 128, 256, 512)),
)
QUICK = (
    *(Case("width", w, 3, 128) for w in (128, 256)),
    *(Case("depth", 128, d, 128) for d in (2, 4)),
    *(Case("transformer", w, 2, 8) for w in (32, 64)),
)


@dataclass
class Run:
    """Seconds of the steps that count.

    Attributes:
        case: what was trained.
        parameters: how many numbers.
        statistics_every: steps, as the optimizer has settled it.
        refresh_every: the same of inversions.
        spectrum_every: the same of condition numbers.
        natural: of natural-gradient steps.
        sgd: of steps of SGD with momentum, which took turns with them.
        pieces: of each natural-gradient step, by piece.
        spectrum: condition numbers, once.
    """

    case: Case
    parameters: int
    statistics_every: int
    refresh_every: int
    spectrum_every: int
    natural: list[float] = field(default_factory=list)
    sgd: list[float] = field(default_factory=list)
    pieces: dict[str, list[float]] = field(default_factory=dict)
    spectrum: float = 0.0

    @staticmethod
    def of(record: dict[str, Any]) -> Run:
        """As it was stored."""
        return Run(**{**record, "case": Case(**record["case"])})

    def piece(self, name: str) -> float:
        """Seconds a step, on average; of what is rare, over all the steps that it is for."""
        if name == "condition numbers":
            return self.spectrum / self.spectrum_every
        found = self.pieces[name]
        if name == "statistics":
            seen = [seconds for seconds in found if seconds > 0]
            return statistics.mean(seen) / self.statistics_every if seen else 0.0
        return sum(found) / max(len(found), self.refresh_every if name == "refresh" else 0)

    @property
    def rest(self) -> float:
        """What no piece has and SGD's step has not either: momentum, length, Python."""
        known = sum(sum(found) for found in self.pieces.values()) / len(self.natural)
        return statistics.mean(self.natural) - known - self.sgd_step

    @property
    def step(self) -> float:
        """Seconds of a natural-gradient step, everything that is rare shared out."""
        return self.sgd_step + self.rest + sum(map(self.piece, PIECES))

    @property
    def sgd_step(self) -> float:
        """Seconds of SGD's, on average."""
        return statistics.mean(self.sgd)

    @property
    def ratio(self) -> float:
        """Of the two."""
        return self.step / self.sgd_step

    @property
    def floor(self) -> float:
        """SGD's step and one product with the inverses, over SGD's: what no step is below."""
        return 1 + statistics.median(self.pieces["preconditioning"]) / self.sgd_step

    @property
    def median_ratio(self) -> float:
        """Of the medians, which leave out what is rare."""
        return statistics.median(self.natural) / statistics.median(self.sgd)


def measure(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """All of them, one after another."""
    return [asdict(run(case)) for case in cases]


def run(case: Case) -> Run:
    """Train two copies of a network, a step of each in turn."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    natural, plain = case.network(), case.network()
    plain.load_state_dict(natural.state_dict())
    optimizer = NaturalGradientOptimizer(natural.parameters())
    sgd = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9)
    options = optimizer.options
    parameters = sum(p.numel() for p in natural.parameters())
    found = Run(case, parameters, 1, 1, options.spectrum_every)
    with Stopwatch().running() as stopwatch:
        for step in range(case.first + case.counted):
            x, y = case.examples(generator)

            def observed(x: Tensor = x, y: Tensor = y) -> None:
                optimizer.zero_grad()
                with optimizer.observe():
                    loss = F.cross_entropy(natural(x), y)
                loss.backward()
                optimizer.step()

            def usual(x: Tensor = x, y: Tensor = y) -> None:
                sgd.zero_grad()
                F.cross_entropy(plain(x), y).backward()
                sgd.step()

            seconds, sgd_seconds = _seconds(observed), _seconds(usual)
            pieces = stopwatch.taken()
            found.spectrum = max(found.spectrum, pieces["condition numbers"])
            if step >= case.first:
                found.natural.append(seconds)
                found.sgd.append(sgd_seconds)
                for name, value in pieces.items():
                    found.pieces.setdefault(name, []).append(value)
    found.statistics_every, found.refresh_every = dataclasses.astuple(optimizer.pace)
    return found


def _seconds(act: Callable[[], None]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started
