"""Runs a module that is shaped like another project's, without and with natural gradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning
import pytest
import torch

from ngplugin import Coverage, NaturalGradient
from tests.small_fits import quiet


def point(number: int, what: str) -> Any:
    """Marks a test of one of the demands that real projects make."""
    return pytest.mark.supports("Look-alikes", f"point {number}: {what}")


@dataclass
class Run:
    """What a fit showed.

    Attributes:
        losses: that `training_step` returned, one a batch.
        calls: of `training_step`.
        rates: the learning rates of all groups after each batch.
        schedules: how often each scheduler has stepped.
        warnings: their texts.
        coverage: which block each parameter has; None without natural gradient.
    """

    module: Any
    losses: list[float] = field(default_factory=list)
    calls: int = 0
    rates: list[list[float]] = field(default_factory=list)
    schedules: list[int] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)
    coverage: Coverage | None = None

    def blocks(self) -> dict[str, str]:
        """Name of a parameter to its kind of block."""
        assert self.coverage is not None
        return {row.parameter: row.block for row in self.coverage.rows}


class Probe(lightning.Callback):
    """Notes losses and learning rates as they pass by."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.run.losses.append(float(loss))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.run.rates.append([float(group["lr"]) for group in groups])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        configs = trainer.lr_scheduler_configs
        self.run.schedules = [config.scheduler.last_epoch for config in configs]


def one_run(
    make: Callable[[], Any],
    data: Any,
    natural: bool,
    more: Callable[[], list[Any]] = list,
    trainer: Callable[..., Any] = quiet,
    **settings: Any,
) -> Run:
    """Make a module and fit it.

    Args:
        make: makes the module.
        data: loaders, or a data module, or None if the module brings its own.
        natural: add the callback.
        more: makes the project's own callbacks.
        trainer: makes the trainer from callbacks and settings.
        settings: of the trainer.
    """
    torch.manual_seed(0)
    module = make()
    run = Run(module)
    step = module.training_step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        run.calls += 1
        return step(*args, **kwargs)

    module.training_step = counted
    ours = NaturalGradient(show_coverage=False) if natural else None
    callbacks = [*more(), Probe(run), *([ours] if ours else [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks, **{"max_epochs": 5, **settings}).fit(module, data)
    run.warnings = {str(w.message).partition("\n")[0] for w in caught}
    if ours is not None:
        run.coverage = ours.coverage()
    return run


def look_alike(
    make: Callable[[], Any],
    data: Any,
    fall: float = 0.8,
    same_rates: bool = True,
    **settings: Any,
) -> Run:
    """Fit without and with natural gradient, and hold what every project may expect.

    Args:
        make: makes the module.
        data: see `one_run`.
        fall: what is left of the loss at most, the mean of the last quarter over that of the
            first two batches.
        same_rates: learning rates depend on no loss, so that they are to be the same.
        settings: see `one_run`.

    Returns:
        The run with natural gradient.
    """
    without = one_run(make, data, natural=False, **settings)
    run = one_run(make, data, natural=True, **settings)
    assert run.calls == without.calls == len(run.losses)
    assert run.schedules == without.schedules
    if same_rates:
        assert run.rates == without.rates
    assert not run.warnings - without.warnings
    last = run.losses[-max(1, len(run.losses) // 4) :]
    assert all(abs(loss) < float("inf") for loss in run.losses)
    assert sum(last) / len(last) < fall * sum(run.losses[:2]) / 2
    assert "none" not in run.blocks().values(), run.blocks()
    return run
