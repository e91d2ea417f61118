"""Faults in one of two processes: both decide the same, and go on.

All scenarios are run by one pair of processes, since starting them takes seconds; what one process
does not survive is in `test_ending_ranks`.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ngplugin import NaturalGradient, NaturalGradientOptimizer, OptionError
from ngplugin.curvature.observation import ScoredLoss
from ngplugin.curvature.ranks import mean_over_ranks
from tests.oracle import double, flat, randn
from tests.small_fits import POINTS, Points, quiet
from tests.test_faults import learnt, same

F = torch.nn.functional
supports, refuses = pytest.mark.supports, pytest.mark.refuses
STEPS, EXAMPLES = 16, 24
X = randn(EXAMPLES, 6, seed=1)
CLASSES, VALUES = X[:, :3].argmax(1), X[:, :3].sin()
#: Steps of all kinds after the fifth. The Fisher without a draw, of which each process has another.
OPTIONS = {"fisher": "exact", "statistics_every": 3, "refresh_every": 64, "overhead": 1e9}
INVERTED_AT = 8  # and at 0, 1, 2, 4, 16


def network() -> nn.Module:
    return double(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


Loss = Callable[[nn.Module, slice], Tensor]  # of the model and the examples


def classes(model: nn.Module, share: slice) -> Tensor:
    return F.cross_entropy(model(X[share]), CLASSES[share])


def values(model: nn.Module, share: slice) -> Tensor:
    return F.mse_loss(model(X[share]), VALUES[share])


def classes_sum(model: nn.Module, share: slice) -> Tensor:
    return F.cross_entropy(model(X[share]), CLASSES[share], reduction="sum") / 12


def values_sum(model: nn.Module, share: slice) -> Tensor:
    return F.mse_loss(model(X[share]), VALUES[share], reduction="sum") / 36


def cubes(model: nn.Module, share: slice) -> Tensor:
    """No loss that is known by name."""
    return (model(X[share]) - VALUES[share]).abs().pow(3).sum() / 12


@dataclasses.dataclass
class Fault:
    """What happens in the second process, and when.

    Attributes:
        where: `"inputs"`, `"loss"`, `"statistic"` or `"kl"` is nan; `"labels"` are all masked.
        when: `"first"`, or the first step after the fifth that is `"observed"`, `"unobserved"`, or
            `"measured"`, which is not observed otherwise, or one at which blocks are `"inverted"`.
        times: of measurements of one step.
    """

    where: str
    when: str
    loss: Loss = classes
    times: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def due(self, step: int, optimizer: NaturalGradientOptimizer) -> bool:
        needs = optimizer._engine._needs()
        kinds = {
            "observed": needs.statistics,
            "unobserved": not (needs.statistics or needs.record),
            "measured": needs.record and not needs.statistics,
        }
        if self.when in ("first", "inverted"):
            return step == (0 if self.when == "first" else INVERTED_AT)
        return kinds[self.when] and step > 5 and step != INVERTED_AT

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Some measurements of the KL give nan in this process."""
        measure, left = ScoredLoss.kl, self.times

        def kl(loss: ScoredLoss, predictions: Any) -> Tensor:
            nonlocal left
            left -= 1
            return measure(loss, predictions) * (math.nan if left >= 0 else 1)

        ScoredLoss.kl = kl  # type: ignore[method-assign]
        try:
            yield
        finally:
            ScoredLoss.kl = measure  # type: ignore[method-assign]


ALWAYS = ["first", "observed", "unobserved", "measured"]
REFUSED = {
    **{f"nan inputs, {w}": Fault("inputs", w) for w in ALWAYS},
    **{f"nan loss, {w}": Fault("loss", w) for w in ("first", "measured")},
    "nan loss, a running noise variance": Fault(
        "loss", "observed", values, options={"noise_variance": "running"}
    ),
    "nan loss, eigen": Fault("loss", "observed", options={"structure": "eigen"}),
}
STATISTIC = {
    "nan statistic, first": Fault("statistic", "first"),
    "nan statistic, observed": Fault("statistic", "observed"),
    "nan statistic, eigen": Fault("statistic", "observed", options={"structure": "eigen"}),
    "nan statistic, diagonal": Fault("statistic", "observed", options={"structure": "diagonal"}),
}
INVERTED = "nan inputs while blocks are inverted"
KL = {
    "nan kl once": Fault("kl", "measured"),
    "nan kl each time": Fault("kl", "measured", times=9),
    "nan kl before it was ever measured": Fault("kl", "first"),
}
FAULTS = {**REFUSED, INVERTED: Fault("inputs", "inverted"), **STATISTIC, **KL}


def noted(model: nn.Module, optimizer: NaturalGradientOptimizer, bad: bool) -> dict[str, Any]:
    report = dataclasses.asdict(optimizer.report) if optimizer.report else {}
    numbers = {k: v for k, v in report.items() if k not in ("seconds", "overhead", "spectra")}
    return {
        "bad": bad,
        "weights": flat([*model.parameters()]).clone(),
        "learnt": learnt(optimizer),
        "report": numbers,
    }


def with_fault(fault: Fault, rank: int) -> list[dict[str, Any]]:
    """What was noted before the first step, and after each."""
    model = DistributedDataParallel(network())
    optimizer = NaturalGradientOptimizer(model.parameters(), **OPTIONS, **fault.options)
    share, notes = slice(rank, None, 2), [noted(model, optimizer, False)]
    for step in range(STEPS):
        bad = fault.due(step, optimizer) and not any(note["bad"] for note in notes)
        here = bad and rank == 1
        with optimizer.observe():
            if here and fault.where == "inputs":
                loss = F.cross_entropy(model(X[share] * math.nan), CLASSES[share])
            else:
                loss = fault.loss(model, share)
                loss = loss * math.nan if here and fault.where == "loss" else loss
        optimizer.zero_grad()
        loss.backward()
        if here and fault.where == "statistic":
            block = optimizer._engine.fisher.block(model.module[0].weight)
            next(iter(block._added.values())).view(-1)[0] = math.nan
        with fault.measuring() if here and fault.where == "kl" else nullcontext():
            optimizer.step()
        notes.append(noted(model, optimizer, bad))
    return notes


EMPTY = {
    "classes, sum": classes_sum,
    "classes, mean": classes,
    "values, sum": values_sum,
    "values, mean": values,
    "no known loss": cubes,
}
EMPTY_AT = (0, 3, 7, 8, 9)


def with_empty_batches(loss: Loss, rank: int | None) -> list[dict[str, Any]]:
    """The second process has none of the examples at some steps; `None` for one process alone."""
    model: nn.Module = network()
    model = model if rank is None else DistributedDataParallel(model)
    optimizer = NaturalGradientOptimizer(model.parameters(), **OPTIONS)
    notes = []
    for step in range(STEPS):
        shares = [slice(0, None, 2), slice(1, 1 if step in EMPTY_AT else None, 2)]
        with optimizer.observe():
            if rank is None:
                value = sum(loss(model, share) for share in shares if share.stop is None) / 2
            else:
                value = loss(model, shares[rank])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        notes.append(noted(model, optimizer, step in EMPTY_AT))
    return notes


def without_a_loss(first: Callable[[Tensor], Tensor], rank: int) -> list[dict[str, Any]]:
    """One process has no loss at first, and gradients are averaged by hand.

    Args:
        first: makes of the first loss of the other process what it is.
        rank: of this process.
    """
    model, notes = network(), []
    # So that the process with a loss records none of its forward passes, nor may the other.
    optimizer = NaturalGradientOptimizer(model.parameters(), **OPTIONS, measure_every=None)
    for step in range(STEPS):
        none = rank == 1 and step < 12
        with optimizer.observe():
            share = slice(rank, None, 2)
            loss = torch.zeros((), requires_grad=True) if none else classes(model, share)
            loss = first(loss) if step == 0 else loss
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= 2
        optimizer.step()
        notes.append(noted(model, optimizer, step == 0))
    return notes


def joined(rank: int, **how: Any) -> tuple[str, list[dict[str, Any]]]:
    """The second process has fewer batches; what was raised, and what was noted before."""
    model = DistributedDataParallel(network())
    optimizer, notes = NaturalGradientOptimizer(model.parameters(), **OPTIONS), []
    try:
        with Join([model], **how):
            for _ in range(STEPS - 7 * rank):
                with optimizer.observe():
                    loss = classes(model, slice(rank, None, 2))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                notes.append(noted(model, optimizer, False))
    except (OptionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", notes
    return "", notes


OVERFLOWS_AT = (0, 1, 6, 7, 8)


def in_half_precision(rank: int) -> list[dict[str, Any]]:
    """The second process's gradients overflow at some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = DistributedDataParallel(model)
    optimizer = NaturalGradientOptimizer(model.parameters(), statistics_every=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    share, notes = slice(rank, None, 2), [{**noted(model, optimizer, False), "scale": 2.0**10}]
    for step in range(STEPS):
        bad = step in OVERFLOWS_AT
        with optimizer.observe(scaler), torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(X[share].float()), CLASSES[share])
            loss = loss * 1e6 if bad and rank == 1 else loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        notes.append({**noted(model, optimizer, bad), "scale": scaler.get_scale()})
    return notes


def one_of_a_pair(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patience = datetime.timedelta(seconds=60)  # a process alone with its fault ends
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=patience)
    found: dict[str, Any] = {name: with_fault(fault, rank) for name, fault in FAULTS.items()}
    found |= {name: with_empty_batches(loss, rank) for name, loss in EMPTY.items()}
    found["none"] = without_a_loss(lambda loss: loss, rank)
    found["none, beside one of nothing"] = without_a_loss(lambda loss: 0.0 * loss, rank)
    found["overflows"] = in_half_precision(rank)
    found["joined, all end"] = joined(rank, throw_on_early_termination=True)
    found["joined"] = joined(rank)
    found["mean"] = mean_over_ranks(torch.tensor([3e38, 2.0 * rank]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = str(tmp_path_factory.mktemp("failing"))
    quiet(NaturalGradient(show_coverage=False), max_steps=2).fit(Points(), DataLoader(POINTS, 16))
    mp.start_processes(one_of_a_pair, (folder,), nprocs=2, start_method="fork")  # imports nothing
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


def both(ranks: Found, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each noted, after every step the same but for averages that are each one's own."""
    one, other = (found[name] for found in ranks)
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine["weights"], theirs["weights"])
        assert repr(mine["report"]) == repr(theirs["report"])  # some numbers are nan
        for key in ("momentum", "bound", "nat_worth", "weight", "solver"):
            assert same(mine["learnt"][key], theirs["learnt"][key]), key
    return one, other


def loss_of(note: dict[str, Any], loss: Loss = classes, model: nn.Module | None = None) -> float:
    model = network() if model is None else model
    with torch.no_grad():
        nn.utils.vector_to_parameters(note["weights"], model.parameters())
        return float(loss(model, slice(None)))


def around(notes: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was noted before and after the step with the fault; those after it are sound."""
    at = next(i for i, note in enumerate(notes) if note["bad"])
    assert len(notes) - at > 5
    for note in notes[at + 1 :]:
        assert (note["report"]["skipped"], note["report"]["dropped_statistics"]) == (0, 0)
    return notes[at - 1], notes[at]


@supports("Faults", "nan in one process: all refuse the step, no average learns, training goes on")
@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_is_no_number_in_one_process_is_refused_by_all(ranks: Found, name: str) -> None:
    for notes in both(ranks, name):
        before, after = around(notes)
        assert torch.equal(after["weights"], before["weights"])
        assert same(after["learnt"], before["learnt"])
        assert (after["report"]["skipped"], after["report"]["step_scale"]) == (1, 0.0)
        loss = FAULTS[name].loss
        assert loss_of(notes[-1], loss) < 0.5 * loss_of(notes[0], loss)


def test_what_is_averaged_over_processes_at_a_refused_step_is_what_they_had_learnt(
    ranks: Found,
) -> None:
    pair = [around(notes) for notes in both(ranks, INVERTED)]
    before, after = zip(*pair, strict=True)
    one, other = (note["learnt"]["fisher"] for note in before)
    for mine in (note["learnt"]["fisher"] for note in after):
        for block, averages in mine.items():
            for name, average in averages.items():
                sums = one[block][name]["sum"], other[block][name]["sum"]
                assert torch.equal(average["sum"], (sums[0] + sums[1]) / 2)
                assert average["weight"] == one[block][name]["weight"]
    for then, now in pair:
        assert torch.equal(now["weights"], then["weights"])
        assert same(now["learnt"]["momentum"], then["learnt"]["momentum"])
        assert now["report"]["skipped"] == 1


@supports("Faults", "one statistic that is nan in one process is dropped by all")
@pytest.mark.parametrize("name", STATISTIC)
def test_a_statistic_that_is_no_number_in_one_process_is_dropped_by_all(
    ranks: Found, name: str
) -> None:
    for notes in both(ranks, name):
        before, after = around(notes)
        assert (after["report"]["skipped"], after["report"]["dropped_statistics"]) == (0, 1)
        assert same(after["learnt"]["fisher"].get(0), before["learnt"]["fisher"].get(0))
        assert not torch.equal(after["weights"], before["weights"])
        others = set(after["learnt"]["fisher"]) - {0}
        assert others
        for first in others:  # the parameters of every other block
            then = before["learnt"]["fisher"].get(first)
            assert not same(after["learnt"]["fisher"][first], then)
        assert loss_of(notes[-1]) < 0.5 * loss_of(notes[0])


def test_a_measured_kl_that_is_no_number_in_one_process_shortens_the_step_of_all(
    ranks: Found,
) -> None:
    for notes in both(ranks, "nan kl once"):
        before, after = around(notes)
        assert after["report"]["shrinks"] == 1
        assert 0 < after["report"]["kl"] <= after["report"]["kl_radius"]
        assert not torch.equal(after["weights"], before["weights"])
        assert loss_of(notes[-1]) < 0.5 * loss_of(notes[0])


def test_a_kl_that_stays_no_number_in_one_process_has_all_take_the_step_back(ranks: Found) -> None:
    for notes in both(ranks, "nan kl each time"):
        before, after = around(notes)
        assert (after["report"]["rejected"], after["report"]["step_scale"]) == (1, 0.0)
        assert torch.equal(after["weights"], before["weights"])
        assert same(after["learnt"]["momentum"], before["learnt"]["momentum"])
        assert loss_of(notes[-1]) < 0.5 * loss_of(notes[0])


def test_a_first_kl_that_is_no_number_in_one_process_is_measured_by_none(ranks: Found) -> None:
    for notes in both(ranks, "nan kl before it was ever measured"):
        around(notes)
        assert {note["report"]["kl"] for note in notes[1:]} == {None}
        assert loss_of(notes[-1]) < loss_of(notes[0])


def test_a_mean_of_numbers_is_a_number_where_their_sum_is_none(ranks: Found) -> None:
    for found in ranks:
        assert torch.equal(found["mean"], torch.tensor([3e38, 1.0]))


@supports("Faults", "an empty batch in one process counts for nothing")
@pytest.mark.parametrize("name", [name for name in EMPTY if "known" not in name])
def test_with_an_empty_batch_in_one_process_steps_are_those_of_the_others(
    ranks: Found, name: str
) -> None:
    """Its mean is nan, but has no gradient."""
    found, _ = both(ranks, name)
    for mine, alone in zip(found, with_empty_batches(EMPTY[name], None), strict=True):
        report = mine["report"]
        assert (report["skipped"], report["dropped_statistics"]) == (0, 0)
        assert (report["kl"] is None) == (alone["report"]["kl"] is None)
        torch.testing.assert_close(mine["weights"], alone["weights"], rtol=1e-6, atol=1e-7)


def test_an_empty_batch_of_a_loss_without_a_name_is_one_of_no_curvature(ranks: Found) -> None:
    for notes in both(ranks, "no known loss"):
        assert all(note["report"]["skipped"] == 0 for note in notes)
        assert loss_of(notes[-1], cubes) < 0.5 * loss_of({"weights": start()}, cubes)


def start() -> Tensor:
    return flat([*network().parameters()])


@pytest.mark.parametrize("name", ["none", "none, beside one of nothing"])
def test_a_process_without_any_loss_at_first_stays_with_the_others(ranks: Found, name: str) -> None:
    for notes in both(ranks, name):
        first = int("nothing" in name)
        assert [note["report"]["skipped"] for note in notes] == [first] + [0] * (STEPS - 1)
        assert loss_of(notes[-1]) < 0.9 * loss_of({"weights": start()})


@supports("Precision", "an overflow in one of several processes skips the step of all")
def test_an_overflow_in_one_process_is_one_of_all(ranks: Found) -> None:
    one, other = both(ranks, "overflows")
    assert [note["scale"] for note in one] == [note["scale"] for note in other]
    for notes in (one, other):
        for before, after in itertools.pairwise(notes):
            assert after["bad"] == (after["scale"] < before["scale"])
            assert after["bad"] == same(after["learnt"], before["learnt"])
            assert after["bad"] == torch.equal(after["weights"], before["weights"])
        assert notes[-1]["report"]["step"] == STEPS - len(OVERFLOWS_AT) - 1
    ends = [{"weights": note["weights"].double()} for note in (one[0], one[-1])]
    assert loss_of(ends[1]) < 0.5 * loss_of(ends[0])


@refuses("Distributed", "torch's Join, unless all end with the first")
def test_processes_that_may_leave_one_by_one_are_refused(ranks: Found) -> None:
    for error, notes in (found["joined"] for found in ranks):
        assert error.startswith("OptionError: a natural-gradient step under")
        assert "throw_on_early_termination=True" in error
        assert not notes


@supports("Distributed", "torch's Join(throw_on_early_termination=True)")
def test_processes_that_all_end_with_the_first_train_until_then(ranks: Found) -> None:
    errors, notes = zip(*(found["joined, all end"] for found in ranks), strict=True)
    assert "at least one rank that exhausted inputs" in errors[0]
    assert "Rank 1 exhausted all inputs" in errors[1]
    one, other = ([note["weights"] for note in of] for of in notes)
    assert same(one, other)
    assert len(one) == STEPS - 7
