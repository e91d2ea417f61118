"""Says what is here, and what natural gradient would make of a module, by one step of it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ngplugin.curvature.products import multiplies_bfloat16
from ngplugin.errors import NgpluginError
from ngplugin.lightning.callback import NaturalGradient
from ngplugin.options import check_choice
from ngplugin.report import Coverage

#: Each with what it is for.
PACKAGES = {
    "ngplugin": "", "torch": "", "lightning": "", "pytorch-lightning": "the older name",
    "hydra-core": "optimizer=natgrad in Hydra projects", "wandb": "its logger",
    "tensorboard": "its logger", "rich": "tables in colour", "matplotlib": "ngplugin report",
}  # fmt: skip


class ModuleNotMadeError(NgpluginError, ValueError):
    """What was named cannot be imported, or made."""


#: Steps that are tried, if they take no longer than this. A cycle of statistics, inversions and
#: measurements is the last half of them: see `Options`.
_STEPS, _SECONDS = 40, 20.0
#: Said of every module: see `trainer_settings.SETTINGS`.
_REFUSED = (
    "Refused with any module: parameters in pieces (FSDP, DeepSpeed, tensor parallelism), and "
    "DDPStrategy(model_averaging_period=...)"
)


@dataclass
class DryRun:
    """What some steps of a module showed.

    Attributes:
        fails: how it fails to train with its own optimizer; None if it does not.
        refused: why natural gradient makes no step; None if it made some.
        warnings: that were given.
        coverage: which block every parameter has.
        troubles: what the numbers of the steps say is wrong.
        plain_seconds: of a step with the module's own optimizer.
        natural_seconds: of one with natural gradient.
        steps: of which this is the mean, in the long run; 0 if it is one of the first, which have
            statistics, inversions and a measurement all at once.
    """

    fails: str | None = None
    refused: str | None = None
    warnings: list[str] = field(default_factory=list)
    coverage: Coverage | None = None
    troubles: list[str] = field(default_factory=list)
    plain_seconds: float = 0.0
    natural_seconds: float = 0.0
    steps: int = 0


def environment() -> dict[str, str]:
    """What is installed, and what the machine has."""
    found = {"Python": platform.python_version(), "platform": platform.platform()}
    for package, purpose in PACKAGES.items():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed" + (f" (for {purpose})" if purpose else "")
    devices = {"cpu": "cpu"}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        size = torch.cuda.get_device_properties(i).total_memory / 1e9
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)} ({size:.0f} GB)"
    if torch.backends.mps.is_available():
        devices["mps"] = "mps"
    found["devices"] = ", ".join(devices.values())
    # On the one that a trainer takes.
    first = next((name for name in devices if name != "cpu"), "cpu")
    fast = multiplies_bfloat16(torch.device(first))
    found["products with inverses"] = (
        "bfloat16" if fast else "float32, bfloat16 not being fast here"
    )
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()}"
    return found


def made(name: str, arguments: Mapping[str, Any]) -> Any:
    """What `package.module:Class` makes of arguments, or `package.module:function`.

    Raises:
        ModuleNotMadeError: with what failed, and what was expected.
    """
    place, _, attribute = name.partition(":")
    if not attribute:
        raise ModuleNotMadeError(
            f"{name}: expected package.module:Class, as in my_project.model:LitModel"
        )
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        factory = getattr(importlib.import_module(place), attribute)
        return factory(**arguments)
    except (ImportError, AttributeError) as error:
        raise ModuleNotMadeError(f"{name}: {error}; is the package installed, or here?") from error
    except TypeError as error:
        raise ModuleNotMadeError(
            f"{name}: {error}; give its arguments as --set name=value, or name a function that "
            "makes it"
        ) from error


def dry_run(module: Any, data: Any = None, options: Mapping[str, Any] | None = None) -> DryRun:
    """Train for some steps without and with natural gradient, but for no more than seconds.

    The module's weights are put back. Nothing is logged and nothing written.

    Args:
        module: a LightningModule.
        data: a data loader or data module; None if the module has its own.
        options: of `NaturalGradient`.

    Raises:
        ModuleNotMadeError: it is no LightningModule.
        OptionError: an option does not exist, or has a value that cannot work.
    """
    if not hasattr(module, "training_step") or not hasattr(module, "parameters"):
        raise ModuleNotMadeError(f"{type(module).__name__} is no LightningModule")
    for name in options or {}:
        check_choice("option", name, [*inspect.signature(NaturalGradient).parameters])
    callback = NaturalGradient(show_coverage=False, show_summary=False, **(options or {}))
    found = DryRun()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    try:
        # The first step has what is only done once.
        found.plain_seconds = statistics.median(_fit(module, data, [], 4)[0][1:] or [0.0])
    except Exception as error:
        found.fails = _place(error)
        if data is None:
            found.fails += "; data that the module has not are given as --data package.module:name"
        return found
    finally:
        module.load_state_dict(before)
    # Natural gradient takes a few times as long, at first.
    steps = _STEPS if 5 * _STEPS * found.plain_seconds < _SECONDS else 2
    try:
        seconds, found.warnings = _fit(module, data, [callback], steps)
    except NgpluginError as error:
        found.refused = str(error)
        return found
    finally:
        module.load_state_dict(before)
    if not callback.summary()["steps"]:
        found.refused = (
            "training_step gave no gradient to any parameter of the optimizer, so no step was "
            "made. Usual cause: the loss was detached, or is not of this module."
        )
        return found
    found.steps = _STEPS // 2 if len(seconds) == _STEPS else 0
    found.natural_seconds = statistics.mean(seconds[-max(found.steps, 1) :])
    found.coverage = callback.coverage()
    found.troubles = [str(f) for f in callback.diagnosis() if f.weight == "trouble"]
    return found


def _place(error: Exception) -> str:
    """An error, and where it came from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def _fit(
    module: Any, data: Any, callbacks: Sequence[Any], steps: int
) -> tuple[list[float], list[str]]:
    """Seconds of each of some batches, and what was warned of."""
    # The trainer of the Lightning that the module is of.
    lightning = importlib.import_module(_namespace(module))
    clock = _Clock(lightning, steps)
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(io.StringIO()),
        _quiet(logging.getLogger(_namespace(module))),
    ):
        warnings.simplefilter("always")
        trainer = lightning.Trainer(
            devices=1, max_epochs=steps, limit_train_batches=steps, limit_val_batches=0,
            num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*callbacks, clock.callback],
        )  # fmt: skip
        trainer.fit(module, data)
    told = [str(w.message) for w in caught if "ngplugin" in str(w.message)]
    return clock.seconds, list(dict.fromkeys(told))


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Without lists of devices and advice, which come with every trainer."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _namespace(module: Any) -> str:
    older = any(base.__module__.startswith("pytorch_lightning") for base in type(module).__mro__)
    return "pytorch_lightning" if older else "lightning.pytorch"


class _Clock:
    """Seconds of each batch; ends the fit after some."""

    def __init__(self, lightning: Any, batches: int) -> None:
        self.seconds: list[float] = []
        clock = self

        class Callback(lightning.Callback):  # type: ignore[misc]
            def on_train_batch_start(self, *_: Any) -> None:
                clock.started = _now()

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                clock.seconds.append(_now() - clock.started)
                trainer.should_stop = len(clock.seconds) >= batches

        self.started = 0.0
        self.callback = Callback()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # else it is the time at which work was handed over
    return time.perf_counter()


def describe(found: DryRun) -> list[str]:
    """What a dry run showed beside the coverage, a line each."""
    if found.fails is not None:
        return [f"It does not train with its own optimizer either: {found.fails}"]
    if found.refused is not None:
        return [f"Natural gradient refuses this: {found.refused}"]
    assert found.coverage is not None
    without = [row.parameter for row in found.coverage.rows if row.block == "none"]
    which = f"on average over {found.steps} steps"
    if not found.steps:
        which = (
            "this one with statistics, inversions and a measurement of the KL, which later ones "
            "have rarely"
        )
    lines = [
        f"A step took {1e3 * found.plain_seconds:.1f} ms with its own optimizer, "
        f"{1e3 * found.natural_seconds:.1f} ms with natural gradient, {which}",
    ]
    if without:
        lines.append(f"Without a block, so that they do not move: {', '.join(without)}")
    lines += [f"Trouble: {text}" for text in found.troubles]
    lines += [f"Warning: {text}" for text in found.warnings]
    return [*lines, _REFUSED]
