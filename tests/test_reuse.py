"""Copies, second fits, fits inside fits, threads and workers: nobody gets in another's way."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.data import DataLoader, Dataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer, OptionError
from ngplugin.curvature.observe import active
from tests.oracle import flat
from tests.small_fits import POINTS, Points, X, Y, quiet

supports = pytest.mark.supports
refuses = pytest.mark.refuses


def silent(**options: Any) -> NaturalGradient:
    return NaturalGradient(show_coverage=False, show_summary=False, **options)


def batches() -> DataLoader[Any]:
    return DataLoader(POINTS, batch_size=16)


def weights(module: nn.Module) -> Tensor:
    return flat([*module.parameters()])


def assert_nothing_is_left() -> None:
    assert active() == []
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not hasattr(Distribution.log_prob, "__wrapped__")
    assert not hasattr(Categorical.log_prob, "__wrapped__")
    assert "apply" not in vars(CheckpointFunction)


# -- copies ----------------------------------------------------------------------------------------

Both = tuple[nn.Module, NaturalGradientOptimizer]
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}
KINDS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "kronecker": {"structure": "kronecker"},
    "eigen": {"structure": "eigen"},
    "diagonal": {"structure": "diagonal"},
    "matrix-free": {"structure": "matrix-free"},
    "quadratic": {"structure": "kronecker", "step_size": "quadratic"},
    "line search": {"structure": "kronecker", "step_size": "line-search"},
}


def made(wrapped: bool = False, **options: Any) -> Both:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    if wrapped:
        inner = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        return model, NaturalGradientOptimizer.wrap(inner, **options)
    return model, NaturalGradientOptimizer(model.parameters(), **options)


def forth(both: Both) -> Tensor:
    model, optimizer = both
    with optimizer.observe():
        loss = F.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    return loss


def losses(both: Both, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(forth(both).item())
        both[1].step()
    return found


@supports("Reuse", "copy.deepcopy and pickle of module and optimizer, at any time")
@pytest.mark.parametrize(
    ("kind", "steps", "wrapped", "copied"),
    [(kind, 3, *way) for kind in KINDS for way in ((False, "deepcopy"), (True, "pickle"))]
    + [("automatic", steps, True, "deepcopy") for steps in (0, 1, 20)]
    + [("automatic", 0, False, "pickle")],
)
def test_a_copy_goes_on_by_itself_as_the_original_does(
    kind: str, steps: int, wrapped: bool, copied: str
) -> None:
    both = made(wrapped, **KINDS[kind])
    losses(both, steps)
    optimizer = both[1]
    optimizer.parameter_names[id(next(both[0].parameters()))] = "first"
    optimizer.listeners.append(lambda report: None)
    other = COPIES[copied](both)
    assert type(other[1]) is type(optimizer)
    assert other[1].options == optimizer.options
    assert other[1].listeners == []
    assert other[1].coverage().rows[0].parameter == "first"
    before = weights(other[0])
    expected = losses(both, 5)
    assert torch.equal(weights(other[0]), before)
    assert losses(other, 5) == expected
    assert torch.equal(weights(other[0]), weights(both[0]))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_in_the_middle_of_a_step_is_no_part_of_it(copied: str) -> None:
    both, undisturbed = made(), made()
    for each in (both, undisturbed):
        losses(each, 2)
    with both[1].observe():
        loss = F.cross_entropy(both[0](X), Y)
        first = COPIES[copied](both)  # its copy is watched, as any call is
    both[1].zero_grad()
    loss.backward()
    second = COPIES[copied](both)
    both[1].step()
    losses(undisturbed, 1)
    expected = losses(undisturbed, 4)
    assert losses(both, 4) == expected
    # Gradients are not copied, so the copies have their step before them; scores of the second
    # are others, since those of the backward pass had been drawn.
    assert losses(first, 5)[1:] == expected
    assert losses(second, 5)[1:] == pytest.approx(expected, rel=0.1)


def test_a_plain_state_dict_loads_into_a_copy_and_schedulers_follow_it() -> None:
    model, optimizer = copy.deepcopy(made(wrapped=True))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), lr=3e-3).state_dict())
    losses((model, optimizer), 1)
    schedule.step()
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.5e-3)


HOOKS = [
    "training_step", "on_train_batch_start", "on_after_backward", "on_before_optimizer_step",
    "on_train_epoch_end",
]  # fmt: skip


class Hooked(Points):
    """Does something in one of its hooks."""

    def __init__(self, hook: str, act: Callable[[], None]) -> None:
        super().__init__()
        self.hook, self.act = hook, act
        if hook != "training_step":
            setattr(self, hook, lambda *_: act())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.hook == "training_step":
            self.act()
        return loss


def fitted(module: Points, **options: Any) -> Tensor:
    """Its weights after two epochs of four steps."""
    quiet(silent(**options), max_epochs=2).fit(module, batches())
    return weights(module)


@functools.cache
def alone(kind: type[Points] = Points, **options: Any) -> Tensor:
    """The same of a module that nothing happens to."""
    return fitted(kind(), **options)


@supports("Reuse", "copy.deepcopy of module, optimizers, callback and trainer in any hook of a fit")
@pytest.mark.parametrize("hook", HOOKS)
def test_what_is_copied_in_the_middle_of_a_fit_changes_nothing(hook: str) -> None:
    copies: list[Any] = []

    def act() -> None:
        fit = module.trainer
        if fit.global_step not in (2, 4):
            return
        own = module.__dict__.pop("act"), module.__dict__.pop(hook, None)  # a closure over the test
        try:
            optimizers = [each.optimizer for each in [module.optimizers()]]
            copies.append(copy.deepcopy((module.net, optimizers, fit.callbacks)))
            pickle.loads(pickle.dumps((module.net, optimizers, fit.callbacks)))
        finally:
            module.act = own[0]
            if own[1] is not None:
                setattr(module, hook, own[1])

    module = Hooked(hook, act)
    assert torch.equal(fitted(module), alone())
    net, (optimizer,), callbacks = copies[-1]
    (natural,) = [each for each in callbacks if isinstance(each, NaturalGradient)]
    assert natural._ng_optimizers == [optimizer]
    assert len(losses((net, optimizer), 3)) == 3
    other = Points()
    quiet(natural, max_epochs=2).fit(other, batches())
    assert torch.equal(weights(other), weights(module))


@supports(
    "Reuse", "copy.deepcopy and pickle of a trainer after a fit, with callback and optimizers"
)
@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_trainer_has_what_the_original_has(copied: str) -> None:
    natural = silent()
    trainer = quiet(natural, max_epochs=2)
    trainer.fit(Points(), batches())
    other = COPIES[copied](trainer)
    (callback,) = [each for each in other.callbacks if isinstance(each, NaturalGradient)]
    assert callback.summary() == natural.summary()
    assert callback.coverage() == natural.coverage()
    (optimizer,) = other.optimizers
    assert optimizer is callback._ng_optimizers[0]
    assert optimizer is not trainer.optimizers[0]
    assert optimizer.natural_state()["steps"] == 8


# -- several fits ----------------------------------------------------------------------------------


@supports("Reuse", "two fits of one trainer, also after an exception")
def test_a_trainer_that_stumbled_fits_again() -> None:
    class Once(Exception):
        pass

    def stumble() -> None:
        if module.global_step == 5 and not stumbled:
            stumbled.append(True)
            raise Once

    stumbled: list[bool] = []
    module = Hooked("on_before_backward", stumble)
    natural = silent()
    trainer = quiet(natural, max_epochs=2)
    with pytest.raises(Once):
        trainer.fit(module, batches())
    assert_nothing_is_left()
    other = Points()
    other.load_state_dict(module.state_dict())
    trainer.fit(module, batches())
    assert natural.summary()["steps"] == len(module.losses) - 6 > 0
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, batches())
    assert trainer.current_epoch == 5
    assert_nothing_is_left()


@supports("Reuse", "one callback, one trainer after the other, another module each")
def test_a_callback_serves_one_trainer_after_another() -> None:
    class Wider(Points):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))

    natural, modules = silent(), [Points(), Wider(), Points()]
    for module in modules:
        quiet(natural, max_epochs=2).fit(module, batches())
    assert torch.equal(weights(modules[0]), alone())
    assert torch.equal(weights(modules[1]), alone(Wider))
    assert torch.equal(weights(modules[2]), alone())


def test_two_models_trained_in_turns_are_trained_as_each_alone() -> None:
    options = {"structure": "kronecker"}
    one, two = made(), made(wrapped=True, **options)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(8):
        with two[1].observe():  # entered before, and left in the middle of the other's
            loss = F.cross_entropy(two[0](X), Y)
            taken[0].extend(losses(one, 1))
        two[1].zero_grad()
        loss.backward()
        two[1].step()
        taken[1].append(loss.item())
    assert taken == (losses(made(), 8), losses(made(wrapped=True, **options), 8))
    assert_nothing_is_left()


@supports("Reuse", "two callbacks in one trainer that share out its optimizers")
@refuses("Reuse", "two callbacks in one trainer for the same optimizer")
def test_two_callbacks_for_one_optimizer_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"more than one stateful callback .*NaturalGradient"):
        quiet(silent(), silent(kl_radius=0.1))  # Lightning's own words
    trainer = quiet(silent(optimizers=[0]), silent(), max_epochs=1)
    with pytest.raises(OptionError, match=r"two NaturalGradient callbacks for optimizer 0\. One"):
        trainer.fit(Points(), batches())
    assert_nothing_is_left()

    class Two(Points):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    both = [silent(optimizers=[0]), silent(optimizers=[1], kl_radius=0.01)]
    shared, together = Two(), Two()
    quiet(*both, max_epochs=2).fit(shared, batches())
    assert [each.summary()["steps"] for each in both] == [8, 8]
    quiet(silent(), max_epochs=2).fit(together, batches())
    assert not torch.equal(weights(shared), weights(together))  # the second has its own radius


# -- fits inside fits ------------------------------------------------------------------------------

STARTS = ["training_step", "on_train_batch_start", "on_after_backward", "on_train_epoch_end"]


@supports("Reuse", "a fit inside a hook of another fit")
@pytest.mark.parametrize("hook", STARTS)
def test_a_fit_inside_a_fit_disturbs_neither(hook: str) -> None:
    inner: list[Points] = []

    def fit_another() -> None:
        if not inner:
            inner.append(Points())
            fitted(inner[0], structure="kronecker")

    outer = Hooked(hook, fit_another)
    assert torch.equal(fitted(outer), alone())
    assert torch.equal(weights(inner[0]), alone(structure="kronecker"))
    assert_nothing_is_left()


@refuses("Reuse", "a fit inside another fit with the same callback")
@pytest.mark.parametrize("hook", STARTS)
def test_a_callback_in_two_fits_at_once_is_refused_and_the_first_goes_on(hook: str) -> None:
    def fit_another() -> None:
        if outer.trainer.global_step in (3, 4):
            with pytest.raises(OptionError, match="in the middle of a fit of another trainer"):
                quiet(natural, max_epochs=2).fit(Points(), batches())
            refused.append(True)

    refused: list[bool] = []
    natural, outer = silent(), Hooked(hook, fit_another)
    quiet(natural, max_epochs=2).fit(outer, batches())
    assert refused
    assert torch.equal(weights(outer), alone())
    assert natural.summary()["steps"] == 8
    assert_nothing_is_left()


# -- threads ---------------------------------------------------------------------------------------


class Scored(Points):
    def loss(self, batch: Any) -> Tensor:
        return -Categorical(logits=self.net(batch[0])).log_prob(batch[1]).mean()


@supports("Reuse", "fits in several threads")
@pytest.mark.parametrize("kind", [Points, Scored])
def test_fits_in_threads_are_those_of_one_after_another(kind: type[Points]) -> None:
    structures = ["kronecker", "exact"]

    def prepared() -> list[tuple[Points, NaturalGradient]]:
        # Modules draw their weights from the generator that all threads share.
        return [(kind(), silent(structure=s, measure_every=1)) for s in structures]

    def fit(module: Points, natural: NaturalGradient) -> None:
        torch.set_num_threads(1)
        quiet(natural, max_epochs=2).fit(module, batches())

    in_turn, together = prepared(), prepared()
    for each in in_turn:
        fit(*each)
    in_threads([lambda each=each: fit(*each) for each in together])
    for (one, natural), (other, same) in zip(in_turn, together, strict=True):
        assert torch.equal(weights(one), weights(other))
        assert natural.coverage().rows == same.coverage().rows
    assert_nothing_is_left()


def in_threads(acts: Sequence[Callable[[], None]]) -> None:
    """All at once, with as many changes of thread as there may be."""
    errors: list[BaseException] = []

    def guarded(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_regions_of_two_threads_that_overlap_leave_nothing_behind() -> None:
    """The first to enter is the first to leave, as no two regions of one thread do."""
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        both = made()
        with both[1].observe():
            assert entered.wait(60)
        left.set()

    def second() -> None:
        torch.set_num_threads(1)
        model, optimizer = made()
        with optimizer.observe():
            entered.set()
            assert left.wait(60)
            assert len(active()) == 1
            loss = -Categorical(logits=model(X)).log_prob(Y).mean()
        loss.backward()
        optimizer.step()
        assert optimizer.coverage().losses == ("log_prob of Categorical",)

    in_threads([first, second])
    assert_nothing_is_left()


# -- workers ---------------------------------------------------------------------------------------


class Holding(Dataset[Any]):
    """Has the module, the callback or the trainer with it, as data sets of some projects do."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(POINTS)

    def __getitem__(self, i: int) -> Any:
        return POINTS[i]


@supports("Reuse", "workers of a data loader, forked or spawned, that hold module and callback")
@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_may_hold_module_and_callback(start: str, workers: int) -> None:
    module, natural = Points(), silent()
    used = silent()
    quiet(used, max_epochs=1).fit(Points(), batches())
    loader = DataLoader(
        Holding((module, natural, used, used._ng_optimizers)),
        batch_size=16, num_workers=workers, multiprocessing_context=start, persistent_workers=True,
    )  # fmt: skip
    quiet(natural, max_epochs=2).fit(module, loader)
    assert torch.equal(weights(module), alone())
