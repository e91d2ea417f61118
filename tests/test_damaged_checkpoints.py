"""A checkpoint that was cut off, damaged or made with bad intent is refused, and costs nothing."""

from __future__ import annotations

import copy
import errno
import io
import multiprocessing
import os
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ngplugin import DamagedStateError, NaturalGradient, NaturalGradientOptimizer
from ngplugin.saved_state import tensors
from tests.oracle import flat
from tests.small_fits import POINTS, Points, X, Y, quiet

supports = pytest.mark.supports
refuses = pytest.mark.refuses

KINDS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "exact": {"structure": "exact"},
    "eigen": {"structure": "eigen"},
    "diagonal": {"structure": "diagonal", "noise_variance": "running"},
    "quadratic": {"structure": "kronecker", "step_size": "quadratic"},
}
Both = tuple[nn.Module, NaturalGradientOptimizer]


def made(wrapped: bool = False, **options: Any) -> Both:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    if wrapped:
        return model, NaturalGradientOptimizer.wrap(
            torch.optim.AdamW(model.parameters()), **options
        )
    return model, NaturalGradientOptimizer(model.named_parameters(), **options)


def losses(both: Both, steps: int) -> list[float]:
    model, optimizer = both
    found = []
    for _ in range(steps):
        with optimizer.observe():
            loss = F.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def fit(folder: Path, *more: L.Callback, epochs: int = 4, checkpoint: Any = None) -> Points:
    module = Points()
    saving = ModelCheckpoint(folder, save_last=True, save_top_k=1, every_n_epochs=1)
    natural = NaturalGradient(show_coverage=False, show_summary=False)
    trainer = quiet(natural, saving, *more, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, DataLoader(POINTS, 64), ckpt_path=checkpoint)
    return module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    fit(folder)
    return folder / "last.ckpt"


# -- natural gradient's own part -------------------------------------------------------------------


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: at(state, path[:-1]).pop(path[-1])


def other(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        at(state, path[:-1])[path[-1]] = value

    return change


def at(state: Any, path: Any) -> Any:
    for key in path:
        state = state[key]
    return state


def resized(state: dict[str, Any], name: str | None = None) -> None:
    """A matrix of the last inversion is a row and a column short."""
    matrices = state["fisher"][0]["refreshed"]
    name = name or next(iter(matrices))
    matrices[name] = matrices[name][..., :-1, :-1]


def not_a_number(state: dict[str, Any]) -> None:
    *_, (_, t) = [found for found in tensors(state["fisher"]) if found[1].is_floating_point()]
    t.view(-1)[0] = float("nan")


DAMAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no steps": without("steps"),
    "no momentum": without("momentum"),
    "no peak": without("peak_lr"),
    "no averages": lambda state: state["fisher"][-1].clear(),
    "a name of no block": other("unheard of", "fisher", 0, "kind"),
    "a parameter too many": other([99], "fisher", 0, "parameters"),
    "words for steps": other("many", "steps"),
    "a number for the blocks": other(1.0, "fisher"),
    "a list for a tensor": other([[1.0]], "generator"),
    "a generator cut short": lambda state: state.update(generator=state["generator"][:10]),
    "momentum of another shape": other([torch.zeros(3)] * 4, "momentum"),
    "too little momentum": lambda state: state["momentum"].pop(),
    "infinite momentum": other([None, None, None, torch.full((2,), float("inf"))], "momentum"),
    "nan in a block": not_a_number,
    "a matrix of another size": resized,
    "no weight": other((1.0,), "weight"),
    "words for rates": other(["fast"], "peak_lr"),
}


@refuses("Checkpoints", "a state whose natural-gradient part is damaged")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "wrapped"])
def test_a_damaged_state_is_refused_and_nothing_of_it_is_taken(damage: str, wrapped: bool) -> None:
    both, undisturbed, saved = (made(wrapped) for _ in range(3))
    losses(saved, 9)
    state = copy.deepcopy(saved[1].state_dict())
    state["param_groups"][0]["lr"] = 0.123
    DAMAGES[damage](state["natgrad"])
    for each in (both, undisturbed):
        losses(each, 4)
    with pytest.raises(DamagedStateError, match=r"cannot be used: .*del state_dict\['natgrad'\]"):
        both[1].load_state_dict(state)
    assert both[1].param_groups[0]["lr"] != 0.123
    assert losses(both, 8) == losses(undisturbed, 8)
    # What the message says to try.
    del state["natgrad"]
    both[1].load_state_dict(state)
    assert both[1].param_groups[0]["lr"] == 0.123
    losses(both, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_structure_refuses_damage(kind: str) -> None:
    both, undisturbed, saved = (made(**KINDS[kind]) for _ in range(3))
    losses(saved, 9)
    for each in (both, undisturbed):
        losses(each, 3)
    whole = saved[1].natural_state()
    matrices = whole["fisher"][0].get("refreshed", {})  # the exact block's are of one batch
    damages = [DAMAGES["nan in a block"], DAMAGES["no averages"]]
    for name, matrix in matrices.items():
        if matrix.numel() > 1:
            damages.append(lambda state, name=name: resized(state, name))
    assert len(damages) > 2 or kind == "exact"
    for damage in damages:
        state = copy.deepcopy(whole)
        damage(state)
        with pytest.raises(DamagedStateError):
            both[1].load_natural_state(state)
    assert losses(both, 4) == losses(undisturbed, 4)


def test_where_the_plain_part_is_damaged_the_natural_part_is_not_taken_either() -> None:
    both, undisturbed, saved = (made() for _ in range(3))
    losses(saved, 9)
    state = copy.deepcopy(saved[1].state_dict())
    del state["param_groups"]
    for each in (both, undisturbed):
        losses(each, 4)
    with pytest.raises(KeyError, match="param_groups"):  # torch's own word
        both[1].load_state_dict(state)
    assert losses(both, 5) == losses(undisturbed, 5)


# -- files -----------------------------------------------------------------------------------------


class Untouched(Points):
    """Whether anything was loaded into it."""

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("loaded")


@refuses("Checkpoints", "a file that was cut off anywhere")
def test_a_file_that_was_cut_off_is_refused_before_anything_is_changed(
    good: Path, tmp_path: Path
) -> None:
    content, chance = good.read_bytes(), random.Random(0)
    path = tmp_path / "cut.ckpt"
    lengths = [0, 1, len(content) - 1, *(chance.randrange(len(content)) for _ in range(5))]
    for length in lengths:
        path.write_bytes(content[:length])
        trainer = quiet(NaturalGradient(), max_epochs=6)
        with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
            trainer.fit(Untouched(), DataLoader(POINTS, 64), ckpt_path=path)
        assert torch.overrides._get_current_function_mode_stack() == []
    path.write_bytes(content)
    resumed = fit(tmp_path / "resumed", epochs=6, checkpoint=path)
    assert torch.equal(weights(resumed), weights(fit(tmp_path / "whole", epochs=6)))


def weights(module: nn.Module) -> Tensor:
    return flat([*module.parameters()])


def test_flipped_bytes_are_refused_or_leave_finite_numbers(good: Path) -> None:
    """Torch has no checksum of what tensors hold: not every flip can be seen."""
    content, chance = good.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        module = Points()
        optimizer = NaturalGradientOptimizer.wrap(torch.optim.SGD(module.parameters(), lr=0.1))
        before = optimizer.natural_state()
        try:
            state = torch.load(io.BytesIO(bytes(damaged)), weights_only=True)
            optimizer.load_state_dict(state["optimizer_states"][0])
        except Exception:
            refused += 1
            assert optimizer.natural_state() == before
        else:
            assert all(t.isfinite().all() for _, t in tensors(optimizer.natural_state()))
    assert refused > 0


def killed_in_the_middle_of_writing(folder: Path, epoch: int, share: float) -> None:
    """A fit that dies when a share of the bytes of an epoch's checkpoint is in its file."""
    torch.set_num_threads(1)
    from fsspec.implementations import local

    write = local.LocalFileOpener.write
    count = [0]

    def writing(self: Any, content: bytes) -> int:
        count[0] += 1
        if count[0] <= 2 * epoch:  # of each epoch the best one and the last one
            return int(write(self, content))
        write(self, content[: int(share * len(content))])
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    local.LocalFileOpener.write = writing
    fit(folder)


@supports("Checkpoints", "killed in the middle of writing one: the one before stays whole")
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(
    share: float, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=killed_in_the_middle_of_writing, args=(tmp_path, 2, share)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    saved = {path.name: torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")}
    assert saved["last.ckpt"]["epoch"] == 1
    assert all(each["optimizer_states"][0]["natgrad"]["steps"] == each["global_step"]
               for each in saved.values())  # fmt: skip
    resumed = fit(tmp_path, checkpoint=tmp_path / "last.ckpt")
    assert torch.equal(weights(resumed), weights(fit(tmp_path / "whole")))


@supports("Checkpoints", "no room left while one is written: the one before stays whole")
def test_a_full_disk_while_saving_ends_the_run_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations import local

    write, count = local.LocalFileOpener.write, [0]

    def writing(self: Any, content: bytes) -> int:
        count[0] += 1
        if count[0] > 4:
            write(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(write(self, content))

    monkeypatch.setattr(local.LocalFileOpener, "write", writing)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path)
    monkeypatch.undo()
    assert torch.overrides._get_current_function_mode_stack() == []
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert torch.equal(weights(fit(tmp_path, checkpoint=last)), weights(fit(tmp_path / "whole")))
