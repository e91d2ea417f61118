"""Nothing grows from step to step, and no graph outlives its step."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from tests.oracle import generator
from tests.small_fits import POINTS, Points, quiet

supports = pytest.mark.supports

X = torch.randn(256, 6, generator=generator(1))
Y = (X[:, 0] * X[:, 1] > 0).long()
KINDS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "exact": {"structure": "exact"},
    "kronecker": {"structure": "kronecker"},
    "eigen": {"structure": "eigen"},
    "diagonal": {"structure": "diagonal"},
    "identity": {"structure": "identity"},
    "matrix-free": {"structure": "matrix-free", "cg_iterations": 2},
    "quadratic": {"structure": "kronecker", "step_size": "quadratic"},
    "line search": {"structure": "kronecker", "step_size": "line-search"},
}


STEPS = 20  # between two looks


class Run:
    """A small network, which leaves word of what it computes."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = NaturalGradientOptimizer(self.model.parameters(), **options)
        self.made: list[weakref.ref[Tensor]] = []

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.model[:2](x)
        prediction = self.model[2](hidden)
        loss = F.cross_entropy(prediction, y)
        self.made += map(weakref.ref, (x, y, hidden, prediction, loss))
        return loss

    def step(self, rows: int = 16, observed: bool = True, factor: float = 1.0) -> None:
        watched = self.optimizer.observe() if observed else contextlib.nullcontext()
        with watched:
            loss = self.objective(X[:rows] * factor, Y[:rows].clone())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def alive(self) -> int:
        return sum(each() is not None for each in self.made)


@pytest.fixture(scope="module", autouse=True)
def _nothing_from_before() -> Iterator[None]:
    """Neither counted nor looked through, which takes longer than what is tested."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What dies then dies at once, and not when Python comes to look for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def census() -> tuple[int, int, int]:
    """Objects of torch and of the package, tensors among them, and bytes of these."""
    gc.collect()
    # Of others, such as caches, there are more or fewer by what ran before in this process.
    objects = [
        each
        for each in gc.get_objects()
        if str(type(each).__module__).partition(".")[0] in ("torch", "ngplugin")
        and not isinstance(each, weakref.ref)  # of a step that waits for its next one
    ]
    # Fake ones, of a compiler that ran before, have no storage.
    tensors = [each for each in objects if type(each) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(objects), len(tensors), sum(storages.values())


def assert_no_more(before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
    """A step leaves a number or two until the next, another step a few less."""
    objects, tensors, bytes_ = (b - a for a, b in zip(before, after, strict=True))
    assert tensors < STEPS / 4
    assert bytes_ < 4 * STEPS
    assert objects < STEPS


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


# -- between steps ---------------------------------------------------------------------------------


@supports("Memory", "the same after any number of steps, whatever the structure")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_leave_nothing_behind(kind: str) -> None:
    run = Run(**KINDS[kind], spectrum_every=10)
    for _ in range(21):
        run.step()
    run.made.clear()
    before = census()
    for _ in range(STEPS):
        run.step()
    run.made.clear()
    assert_no_more(before, census())


def test_memory_that_python_does_not_know_of_does_not_grow() -> None:
    run = Run(structure="kronecker", measure_every=1, statistics_every=1, overhead=1e9)
    for _ in range(30):
        run.step(256)
    before = resident()
    for _ in range(80):
        run.step(256)
    assert resident() - before < 80 * 2048  # the graph of a step keeps 7 KB


@supports("Memory", "no graph outlives its step, unobserved, skipped and accumulated ones included")
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_outlives_its_step(kind: str) -> None:
    run = Run(**KINDS[kind])
    for i in range(16):
        run.step(observed=i % 5 != 4, factor=math.nan if i == 7 else 1.0)
        assert run.alive() == 0, i


@pytest.mark.usefixtures("_no_collector")
def test_a_micro_batch_keeps_no_graph_for_the_next_one() -> None:
    run = Run(structure="kronecker", measure_every=1)
    for _ in range(8):
        with run.optimizer.observe():
            loss = run.objective(X[:16].clone(), Y[:16].clone()) / 8
        loss.backward()
    hidden, prediction, losses = run.made[2::5], run.made[3::5], run.made[4::5]
    del loss
    for each in (hidden, prediction, losses):
        assert sum(ref() is not None for ref in each) <= 2  # of the last and of the one before
    run.optimizer.step()
    assert run.optimizer.report.kl is not None  # of all eight
    assert run.alive() == 0


# -- where no step follows -------------------------------------------------------------------------


class Fault(Exception):
    pass


def forward(run: Run, where: str) -> None:
    with run.optimizer.observe():
        loss = run.objective(X[:16].clone(), Y[:16].clone())
        if where == "in the forward pass":
            raise Fault
    if where == "in the backward pass":
        loss.register_hook(fail)
    if where != "never":
        loss.backward()
    raise Fault


def fail(_: Tensor) -> None:
    raise Fault


@supports("Memory", "batches without a backward pass, or without a step")
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize(
    "where", ["never", "in the forward pass", "in the backward pass", "before the step"]
)
def test_batches_that_end_early_do_not_pile_up(where: str, zeroed: bool) -> None:
    run = Run(measure_every=1)
    run.step()
    for _ in range(6):
        with contextlib.suppress(Fault):
            forward(run, where)
        if zeroed:
            run.optimizer.zero_grad()
    # Where gradients are summed up, inputs and targets are kept of each, to measure the KL of all.
    summed = where in ("in the backward pass", "before the step") and not zeroed
    assert run.alive() <= (6 * 2 if summed else 2 * 2) + 3
    run.step()
    assert run.alive() == 0


@supports("Memory", "a training_step that returns None, batch after batch")
@pytest.mark.usefixtures("_no_collector")
def test_batches_that_a_module_skips_do_not_pile_up() -> None:
    class Skipping(Points):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            hidden = self.net[0](x)
            made.append(weakref.ref(hidden))
            loss = F.cross_entropy(self.net[2](self.net[1](hidden)), y)
            alive.append(sum(each() is not None for each in made))
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx % 20 == 19 else None

    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    data = TensorDataset(X[:160], Y[:160])
    quiet(NaturalGradient(show_coverage=False, show_summary=False), max_epochs=2).fit(
        Skipping(), DataLoader(data, batch_size=4)
    )
    assert len(made) == 80
    assert max(alive) <= 2


# -- with Lightning --------------------------------------------------------------------------------


class Counting(L.Callback):
    def __init__(self, *steps: int) -> None:
        self.steps, self.found = steps, []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.found.append(census())


class Unnoted(Points):
    def note(self, loss: Tensor) -> None:
        """Keep nothing of it."""


@supports("Memory", "the same after any number of steps of a fit")
@pytest.mark.parametrize("kind", ["automatic", "eigen"])
def test_a_fit_keeps_reports_and_nothing_else(kind: str) -> None:
    counting = Counting(30, 30 + STEPS)
    natural = NaturalGradient(
        show_coverage=False, show_summary=False, spectrum_every=10, **KINDS[kind]
    )
    quiet(natural, counting, max_steps=31 + STEPS).fit(Unnoted(), DataLoader(POINTS, batch_size=16))
    (objects, *tensors), after = counting.found
    # A report a step and some spectra, of which a history has so many at most; see `History`.
    assert_no_more((objects + 3 * STEPS, *tensors), after)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_go_with_the_optimizer(kind: str) -> None:
    run = Run(**KINDS[kind])
    for _ in range(3):
        run.step()
    kept = [*map(weakref.ref, held_by(run.optimizer))]
    assert len(kept) > 4
    del run
    gc.collect()
    assert not any(each() is not None for each in kept)


def test_factors_go_with_the_fit() -> None:
    def fit(keep: Callable[[NaturalGradient], Any]) -> Any:
        natural = NaturalGradient(show_coverage=False, show_summary=False)
        quiet(natural, max_steps=6).fit(Points(), DataLoader(POINTS, batch_size=16))
        kept.extend(map(weakref.ref, held_by(natural._ng_optimizers[0])))
        return keep(natural)

    kept: list[weakref.ref[Tensor]] = []
    summary = fit(lambda natural: (natural.summary(), natural.diagnosis(), natural.coverage()))
    gc.collect()
    assert summary[0]["steps"] == 6
    assert not any(each() is not None for each in kept)


def held_by(optimizer: NaturalGradientOptimizer) -> list[Tensor]:
    """All tensors of its state, weights included."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for each in value.values():
                collect(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                collect(each)

    collect(optimizer.natural_state())
    collect(optimizer.param_groups)
    return found
