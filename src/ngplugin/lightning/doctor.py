"""Says what is here, and what natural gradient would make of a module, by one step of it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import platform
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
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


@dataclass
class DryRun:
    """What one step of a module showed.

    Attributes:
        refused: why no step could be made; None if one was.
        warnings: that were given.
        coverage: which block every parameter has.
        plain_seconds: of a step with the module's own optimizer.
        natural_seconds: of one with natural gradient, with statistics and inversions, as the first
            steps have them all; later ones are rarely like that.
        bytes: that the blocks keep.
        parameter_bytes: of the parameters.
    """

    refused: str | None = None
    warnings: list[str] = field(default_factory=list)
    coverage: Coverage | None = None
    plain_seconds: float = 0.0
    natural_seconds: float = 0.0
    bytes: int = 0
    parameter_bytes: int = 0


def environment() -> dict[str, str]:
    """What is installed, and what the machine has."""
    found = {"Python": platform.python_version(), "platform": platform.platform()}
    for package, purpose in PACKAGES.items():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed" + (f" (for {purpose})" if purpose else "")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    found["devices"] = ", ".join(devices)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = multiplies_bfloat16(device)
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
    """Train for a step, as `fast_dev_run` does, without and with natural gradient.

    The module's weights are put back. Nothing is logged and nothing written.

    Args:
        module: a LightningModule.
        data: a data loader or data module; None if the module has its own.
        options: of `NaturalGradient`.
    """
    for name in options or {}:
        check_choice("option", name, [*inspect.signature(NaturalGradient).parameters])
    found = DryRun(parameter_bytes=sum(p.numel() * p.element_size() for p in module.parameters()))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    callback = NaturalGradient(show_coverage=False, show_summary=False, **(options or {}))
    try:
        found.plain_seconds = _fit(module, data, [])[0]
        module.load_state_dict(before)
        found.natural_seconds, found.warnings = _fit(module, data, [callback])
        if not callback.summary()["steps"]:
            found.refused = (
                "training_step gave no gradient to any parameter of the optimizer, so no step was "
                "made. Usual cause: the loss was detached, or is not of this module."
            )
            return found
        found.coverage = callback.coverage()
        found.bytes = 4 * sum(row.numel for row in found.coverage.rows)
    except NgpluginError as error:
        found.refused = str(error)
    finally:
        module.load_state_dict(before)
    return found


def _fit(module: Any, data: Any, callbacks: Sequence[Any]) -> tuple[float, list[str]]:
    """Seconds of a step, and what was warned of."""
    # The trainer of the Lightning that the module is of.
    lightning = importlib.import_module(_namespace(module))
    clock = _Clock(lightning)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        trainer = lightning.Trainer(
            fast_dev_run=2, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*callbacks, clock.callback],
        )  # fmt: skip
        trainer.fit(module, data)
    told = [str(w.message) for w in caught if "ngplugin" in str(w.message)]
    return clock.seconds, list(dict.fromkeys(told))


def _namespace(module: Any) -> str:
    older = any(base.__module__.startswith("pytorch_lightning") for base in type(module).__mro__)
    return "pytorch_lightning" if older else "lightning.pytorch"


class _Clock:
    """Seconds of the last batch: the first one has what is only done once."""

    def __init__(self, lightning: Any) -> None:
        self.seconds = 0.0
        clock = self

        class Callback(lightning.Callback):  # type: ignore[misc]
            def on_train_batch_start(self, *_: Any) -> None:
                clock.started = time.perf_counter()

            def on_train_batch_end(self, *_: Any) -> None:
                clock.seconds = time.perf_counter() - clock.started

        self.started = 0.0
        self.callback = Callback()


def describe(found: DryRun) -> list[str]:
    """A dry run in words, a line each."""
    if found.refused is not None:
        return [f"Natural gradient refuses this: {found.refused}"]
    assert found.coverage is not None
    without = [row.parameter for row in found.coverage.rows if row.block == "none"]
    lines = [
        found.coverage.sources(),
        found.coverage.totals(),
        found.coverage.pace(),
        f"Curvature keeps {_megabytes(found.bytes)}, the parameters are "
        f"{_megabytes(found.parameter_bytes)}",
        f"A step took {1e3 * found.plain_seconds:.1f} ms with its own optimizer, "
        f"{1e3 * found.natural_seconds:.1f} ms with natural gradient; this one had statistics, "
        "inversions and a measurement of the KL, which later ones have rarely",
    ]
    if without:
        lines.append(f"Without a block, so that they do not move: {', '.join(without)}")
    return lines + [f"Warning: {text}" for text in found.warnings]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
