"""One of two processes is gone, or stalls: the other ends, within the time it was given.

Each has a pair of processes to itself; these run at the same time, since they wait most of it.
"""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import os
import re
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ngplugin import NaturalGradient
from ngplugin.curvature.blocks import KroneckerBlock
from ngplugin.natural_step import NaturalGradientStep
from tests.small_fits import POINTS, Points, quiet

F = torch.nn.functional
supports = pytest.mark.supports
TIMEOUT = 8.0
LEAST_STEPS = 3  # before it ends


class Exchange(torch.autograd.Function):
    """Sends a message on its way back, as layers that are spread over processes do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Ending.reach("a backward pass")
        whole = gradient.clone()
        dist.all_reduce(whole)
        return gradient


class Exchanging(Points):
    def loss(self, batch: Any) -> Tensor:
        hidden = Exchange.apply(self.net[0](batch[0]))
        return F.cross_entropy(self.net[2](hidden.tanh()), batch[1])


class Ending(L.Callback):
    """Has the process end, or hold still, at a place in one of its steps."""

    place = how = ""
    step = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        Ending.step = trainer.global_step

    @staticmethod
    def reach(place: str) -> None:
        if place != Ending.place or Ending.step < LEAST_STEPS:
            return
        if Ending.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif Ending.how == "exits":
            os._exit(3)
        time.sleep(600)

    @staticmethod
    def before(owner: type, name: str, place: str) -> None:
        """Have a method reach a place first."""
        method = getattr(owner, name)

        def reached(*arguments: Any) -> Any:
            Ending.reach(place)
            return method(*arguments)

        setattr(owner, name, reached)


BEFORE, REFRESH, BACKWARD = "the step's first message", "an inversion", "a backward pass"
ENDS = [
    ("killed", BEFORE), ("killed", REFRESH), ("exits", BACKWARD), ("stalls", BEFORE),
    ("stalls", REFRESH), ("has fewer batches", ""),
]  # fmt: skip


def one_of_a_fit(rank: int, folder: Path, port: int, how: str, place: str) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    if rank == 1:
        Ending.how, Ending.place = how, place
        Ending.before(NaturalGradientStep, "_weigh", BEFORE)
        Ending.before(KroneckerBlock, "invert", REFRESH)
    fewer = rank == 1 and how == "has fewer batches"
    trainer = quiet(
        NaturalGradient(show_coverage=False, show_summary=False),
        Ending(),
        max_epochs=1 if fewer else 2,
        devices=2,
        strategy=DDPStrategy(timeout=datetime.timedelta(seconds=TIMEOUT)),
        use_distributed_sampler=False,
    )
    module = Exchanging() if place == BACKWARD else Points()
    loader = DataLoader(Subset(POINTS, range(rank, 64, 2)), batch_size=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, loader)
            outcome = "done"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            lines = [outcome, *(str(warning.message) for warning in said)]
            (folder / str(rank)).write_text("\n".join(lines))


@dataclasses.dataclass
class Ended:
    """What became of a pair.

    Attributes:
        codes: with which each process ended; None for one that did not.
        said: by the first of them, its error and its warnings.
    """

    codes: list[int | None]
    said: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Ended]]:
    quiet(NaturalGradient(show_coverage=False), max_steps=2).fit(Points(), DataLoader(POINTS, 16))
    forks = multiprocessing.get_context("fork")
    pairs: dict[tuple[str, str], tuple[Path, list[Any]]] = {}
    for how, place in ENDS:
        folder = tmp_path_factory.mktemp("ending")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (folder, port, how, place)
        pair = [forks.Process(target=one_of_a_fit, args=(r, *arguments)) for r in range(2)]
        for process in pair:
            process.start()
        pairs[how, place] = folder, pair
    patience = time.monotonic() + TIMEOUT + 60  # and all have to begin
    found = {}
    for name, (folder, (first, second)) in pairs.items():
        first.join(max(0.0, patience - time.monotonic()))
        if name[0] != "stalls":
            second.join(max(0.0, patience - time.monotonic()))
        codes = [first.exitcode, second.exitcode]
        said = folder / "0"
        found[name] = Ended(codes, said.read_text() if said.exists() else "")
    yield found
    for _, pair in pairs.values():
        for process in pair:
            process.kill()
            process.join()


GONE = re.compile(r"RuntimeError: .*(closed by peer|reset by peer|Broken pipe)")


@supports("Faults", "a process that is killed: the others end with the strategy's error")
@pytest.mark.parametrize(("how", "place"), ENDS[:3])
def test_where_one_process_is_gone_the_other_ends_and_says_so(
    ended: dict[tuple[str, str], Ended], how: str, place: str
) -> None:
    pair = ended[how, place]
    assert pair.codes == [1, -signal.SIGKILL if how == "killed" else 3]
    assert GONE.match(pair.said)
    assert "torch.autograd.grad" not in pair.said  # a lost message is no missing derivative


@supports("Faults", "a process that stalls: the others end when DDPStrategy(timeout=...) is over")
@pytest.mark.parametrize("place", [BEFORE, REFRESH])
def test_where_one_process_stalls_the_other_ends_when_the_time_is_over(
    ended: dict[tuple[str, str], Ended], place: str
) -> None:
    pair = ended["stalls", place]
    assert pair.codes == [1, None]
    assert f"Timed out waiting {TIMEOUT * 1000:.0f}ms" in pair.said


def test_a_process_with_fewer_batches_ends_and_then_the_other_without_waiting(
    ended: dict[tuple[str, str], Ended],
) -> None:
    """As of any optimizer: Lightning gives each process as many batches, unless told not to."""
    pair = ended["has fewer batches", ""]
    assert pair.codes == [1, 0]
    assert GONE.match(pair.said)
