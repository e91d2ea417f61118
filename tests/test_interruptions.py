"""A fit that is ended at any moment, by any means, leaves nothing behind, and can go on."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ngplugin import NaturalGradient
from ngplugin.curvature.fisher import Fisher
from tests.oracle import flat
from tests.small_fits import POINTS, Points, quiet

KILLS, EPOCHS = 20, 80


# -- killed ----------------------------------------------------------------------------------------


class Progress(L.Callback):
    """Tells another process how far it is."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.value = trainer.global_step


def fit(folder: Path, *more: L.Callback) -> Tensor:
    """From the last checkpoint of the folder, if any, to the end; the weights."""
    module = Points()
    # An epoch of one batch: Lightning does not go on in the middle of a data loader.
    saving = ModelCheckpoint(folder, save_last=True, every_n_epochs=2, save_top_k=1)
    natural = NaturalGradient(show_coverage=False, show_summary=False, measure_every=3)
    trainer = quiet(natural, saving, *more, max_epochs=EPOCHS, enable_checkpointing=True)
    last = folder / "last.ckpt"
    trainer.fit(module, DataLoader(POINTS, 64), ckpt_path=last if last.exists() else None)
    return flat([*module.parameters()])


def fit_in_another_process(folder: Path, steps: Any) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is said when it is killed
    fit(folder, Progress(steps))


@pytest.mark.supports("Checkpoints", "killed (kill -9) at any moment")
def test_after_twenty_kills_the_weights_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")  # which need import nothing
    chance, interrupted = random.Random(0), tmp_path / "interrupted"
    reached = []
    for _ in range(KILLS):
        steps = processes.Value("i", 0)
        process = processes.Process(target=fit_in_another_process, args=(interrupted, steps))
        process.start()
        goal = (reached[-1] if reached else 0) + chance.randint(1, 4)
        patience = time.monotonic() + 60
        while steps.value < min(goal, EPOCHS - 1) and process.is_alive():
            assert time.monotonic() < patience
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))  # into the step, or into a checkpoint
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        saved = [torch.load(p, weights_only=True) for p in interrupted.glob("*.ckpt")]
        reached.append(max((each["global_step"] for each in saved), default=0))
    assert reached[-1] < EPOCHS
    assert len(set(reached)) > 5
    assert torch.equal(fit(interrupted), fit(tmp_path / "whole"))


# -- by a signal -----------------------------------------------------------------------------------


class Signalled(L.Callback):
    """Sends the process a signal in the middle of a step."""

    def __init__(self, number: int, step: int = 5) -> None:
        self.number, self.step = number, step

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def fit_until_signalled(folder: Path, number: int, told: Any, own_handler: bool) -> None:
    """In a process of its own: what was left behind is told, and a second fit goes on."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    received: list[int] = []

    def handler(received_number: int, _: Any) -> None:
        received.append(received_number)

    # What this process has been given may be to ignore it, as jobs in the background do.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if own_handler:
        signal.signal(number, handler)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    saving = ModelCheckpoint(folder, filename="signalled", save_on_exception=True)
    natural = NaturalGradient(show_coverage=False, show_summary=False, measure_every=3)
    trainer = quiet(
        natural, Signalled(number), saving, max_epochs=EPOCHS, enable_checkpointing=True
    )
    ended = "by itself"
    try:
        trainer.fit(Points(), DataLoader(POINTS, 64))
    except SystemExit as end:
        ended = type(end).__name__
    handlers = {each: signal.getsignal(each) for each in before}
    told.put(
        {
            "ended": ended,
            "received": received,
            "steps": trainer.global_step,
            "modes": len(torch.overrides._get_current_function_mode_stack()),
            "patched": hasattr(torch.distributions.Normal.log_prob, "__wrapped__"),
            "listeners": len(trainer.optimizers[0].listeners),
            "handlers": {n for n in before if handlers[n] != before[n]},
        }
    )


def signalled(folder: Path, number: int, own_handler: bool) -> dict[str, Any]:
    processes = multiprocessing.get_context("fork")
    told = processes.SimpleQueue()
    arguments = folder, number, told, own_handler
    process = processes.Process(target=fit_until_signalled, args=arguments)
    process.start()
    found = told.get()
    process.join()
    assert process.exitcode == 0
    return dict(found)


saves_on_exceptions = pytest.mark.skipif(
    "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters,
    reason="this Lightning saves nothing on an exception",
)


@saves_on_exceptions
@pytest.mark.supports("Faults", "SIGTERM: the step is finished, saved and gone on from bit by bit")
@pytest.mark.parametrize("own_handler", [False, True])
def test_sigterm_ends_the_run_after_its_step_and_it_goes_on(
    own_handler: bool, tmp_path: Path
) -> None:
    found = signalled(tmp_path, signal.SIGTERM, own_handler)
    assert found == {
        "ended": "SIGTERMException",
        "received": [signal.SIGTERM] if own_handler else [],  # theirs is called too
        "steps": 6,
        "modes": 0, "patched": False, "listeners": 0, "handlers": set(),
    }  # fmt: skip
    (checkpoint,) = tmp_path.glob("*.ckpt")
    module = Points()
    natural = NaturalGradient(show_coverage=False, show_summary=False, measure_every=3)
    quiet(natural, max_epochs=20).fit(module, DataLoader(POINTS, 64), ckpt_path=checkpoint)
    whole = Points()
    natural = NaturalGradient(show_coverage=False, show_summary=False, measure_every=3)
    quiet(natural, max_epochs=20).fit(whole, DataLoader(POINTS, 64))
    assert torch.equal(flat([*module.parameters()]), flat([*whole.parameters()]))


@saves_on_exceptions
@pytest.mark.supports("Faults", "Ctrl-C with a handler of the user's own")
@pytest.mark.parametrize("own_handler", [False, True])
def test_ctrl_c_ends_the_run_unless_the_user_has_a_handler(
    own_handler: bool, tmp_path: Path
) -> None:
    found = signalled(tmp_path, signal.SIGINT, own_handler)
    if own_handler:  # a fit takes no notice of it
        assert (found["ended"], found["received"]) == ("by itself", [signal.SIGINT])
    else:
        assert (found["ended"], found["steps"]) == ("SystemExit", 5)
    assert (found["modes"], found["patched"], found["listeners"]) == (0, False, 0)
    # Lightning puts back the handlers of before.
    assert found["handlers"] == set()


# -- by an exception -------------------------------------------------------------------------------


class Stumbling(Points):
    """Fails in the fourth step, somewhere."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error, self.step = where, error, 0

    def stumble(self, where: str) -> None:
        if self.where == where and self.step == 4 and self.error is not None:
            error, self.error = self.error, None  # type: ignore[assignment]
            raise error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.step += 1
        self.stumble("before the loss")
        loss = super().training_step(batch, batch_idx)
        self.stumble("after the loss")
        if self.where == "in the backward pass":
            loss.register_hook(lambda _: self.stumble("in the backward pass"))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.stumble("before the step")


PLACES = [
    "before the loss", "after the loss", "in the backward pass", "before the step",
    "in our own refresh",
]  # fmt: skip


@pytest.mark.supports("Faults", "an exception, Ctrl-C or a signal anywhere in a step")
@pytest.mark.parametrize("error", [ValueError("theirs"), KeyboardInterrupt()], ids=["error", "^C"])
@pytest.mark.parametrize("where", PLACES)
def test_after_an_exception_nothing_is_left_and_a_second_fit_works(
    where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Stumbling(where, error)
    refresh = Fisher.refresh

    def refreshing(self: Fisher, *arguments: Any) -> int:
        module.stumble("in our own refresh")
        return refresh(self, *arguments)

    monkeypatch.setattr(Fisher, "refresh", refreshing)
    patched = {name: vars(of).get(name) for of, name in _watched()}
    callback = NaturalGradient(show_coverage=False, show_summary=False, refresh_every=1)
    trainer = quiet(callback, max_steps=8)
    loader = DataLoader(POINTS, batch_size=16)
    expected = ValueError if isinstance(error, ValueError) else (SystemExit, KeyboardInterrupt)
    with pytest.raises(expected) as seen:
        trainer.fit(module, loader)
    if isinstance(error, ValueError):
        assert seen.value is error
    assert module.error is None
    assert torch.overrides._get_current_function_mode_stack() == []
    assert {name: vars(of).get(name) for of, name in _watched()} == patched
    assert not any(p._backward_hooks for p in module.parameters())
    module.losses.clear()
    quiet(callback, max_steps=12).fit(module, loader)
    assert callback.summary()["steps"] == 12
    assert module.losses[-1] < module.losses[0]


def _watched() -> list[tuple[type, str]]:
    """What observing replaces for a while."""
    distributions = torch.distributions
    return [(distributions.Normal, "log_prob"), (distributions.Categorical, "log_prob")]
