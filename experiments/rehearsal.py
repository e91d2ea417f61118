"""What is asked for is tried before it begins: each run is made in memory and trained on a batch.

Nothing is written, and what a config cannot have is told while nothing has been started.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from omegaconf import DictConfig, open_dict, read_write

import ngplugin
from experiments.command_line import CommandLineError, composed, nearest, one_line
from experiments.loggers import made_loggers
from experiments.study import direction_of
from experiments.training import make_trainer, misconfiguration_is_the_users, prepare
from ngplugin.summary import Summary

#: Launchers whose runs are on this machine; of another one, nothing here can tell.
_HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")
#: They train by themselves as a fit starts, or draw.
_LEFT_OUT = (BatchSizeFinder, LearningRateFinder, ProgressBar)


def rehearse(
    runs: Sequence[Sequence[str]], config_dir: Path, config_name: str, in_sweep: bool
) -> None:
    """Try each run.

    Args:
        runs: the overrides of each.
        config_dir: of the configs.
        config_name: of the primary one.
        in_sweep: whether they are of one, with -m.

    Raises:
        CommandLineError: one of them cannot work.
    """
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return  # the first process of this run has done it
    for number, overrides in enumerate(runs):
        try:
            with _config(number, overrides, in_sweep, config_dir, config_name) as cfg:
                _rehearse(cfg, in_sweep)
        except CommandLineError as error:
            if len(runs) == 1:
                raise
            own = [o for o in overrides if any(o not in run for run in runs)]
            raise CommandLineError(
                f"{error}; in the run with {shlex.join(own)}, before any was begun"
            ) from error


@contextlib.contextmanager
def _config(
    number: int, overrides: Sequence[str], in_sweep: bool, config_dir: Path, config_name: str
) -> Iterator[DictConfig]:
    """The config that a run will have, as far as Hydra's own part is known before it."""
    with initialize_config_dir(str(config_dir), version_base="1.3", job_name="train"):
        cfg = composed(config_name, overrides, return_hydra_config=True)
    instance = HydraConfig.instance()
    before = instance.cfg
    try:
        with open_dict(cfg.hydra.job):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        instance.set_config(cfg)  # of which the name of the folder is made
        sweep = cfg.hydra.sweep
        folder = f"{sweep.dir}/{sweep.subdir}" if in_sweep else cfg.hydra.run.dir
        if folder in ("", None):
            raise CommandLineError("hydra.run.dir: expected a folder, for all that a run writes")
        with read_write(cfg.hydra):
            cfg.hydra.runtime.output_dir = folder
        instance.set_config(cfg)
        yield cfg
    finally:
        instance.cfg = before


def _rehearse(cfg: DictConfig, in_sweep: bool) -> None:
    """Make everything that a run is made of, and let it train on its first batch."""
    here = not in_sweep or str(cfg.hydra.launcher.get("_target_")).endswith(_HERE)
    chosen, sweeper = cfg.hydra.runtime.choices, cfg.hydra.sweeper
    if str(sweeper.get("_target_")).endswith(".OptunaSweeper"):
        direction_of(cfg.metric, sweeper.get("direction"))
    with open_dict(cfg):
        del cfg["hydra"]
    if not here:
        return
    said = io.StringIO()  # what is said now will be said again
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        data, module, callbacks = prepare(cfg)
        with made_loggers(cfg) as loggers, misconfiguration_is_the_users():
            first = _FirstBatch()
            taking_part = [c for c in callbacks if not isinstance(c, _LEFT_OUT)]
            silent: list[Any] = [DummyLogger() for _ in loggers]
            trainer = make_trainer(cfg, [first, *taking_part], silent)
            if trainer.world_size > 1 or trainer.strategy.launcher is not None:
                return  # it would start other processes
            trainer.profiler = PassThroughProfiler()
            what = f"task={chosen.get('task')} of model={chosen.get('model')} on data="
            with _blamed_on(f"{what}{chosen.get('data')}"):
                trainer.fit(module, datamodule=data)
        if not first.seen:
            raise CommandLineError(
                "trainer: there is nothing to train; expected max_epochs, max_steps and "
                "limit_train_batches to leave one batch at least"
            )
        _check_burn_in(trainer, first.steps)
        _check_names(cfg, first, callbacks)


class _Rehearsed(Exception):
    """The first batch went through."""


class _FirstBatch(Callback):
    """Ends a fit after its first batch, with what it logs.

    Attributes:
        seen: whether there was one.
        logged: names of metrics, by the stage in which they are logged.
        validates: whether the fit comes to a validation, so far as steps and epochs tell.
        steps: of the whole fit.
    """

    def __init__(self) -> None:
        self.seen = False
        self.logged: dict[str, set[str]] = {}
        self.validates = False
        self.steps = 0.0

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure on what is held out, too, and end."""
        self.seen = True
        self.logged["fit"] = set(trainer.callback_metrics)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.eval()
        for stage, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
            batch = trainer.precision_plugin.convert_input(next(iter(loader)))
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with trainer.precision_plugin.forward_context():
                self.logged[stage] = {f"{stage}/{name}" for name in pl_module.measure(batch)}
        self.validates = _validates(trainer)
        self.steps = float(trainer.estimated_stepping_batches)
        if not trainer.limit_test_batches:
            self.logged["test"] = set()
        raise _Rehearsed


def _validates(trainer: L.Trainer) -> bool:
    every = trainer.check_val_every_n_epoch
    first = trainer.val_check_batch + ((every or 1) - 1) * trainer.num_training_batches
    last = trainer.num_training_batches * (
        trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
    )
    if trainer.max_steps != -1:
        last = min(last, trainer.max_steps * trainer.accumulate_grad_batches)
    return bool(trainer.limit_val_batches) and first <= last


@contextlib.contextmanager
def _blamed_on(what: str) -> Iterator[None]:
    """Whatever fails now is what will not do with one another.

    Raises:
        CommandLineError: it failed.
    """
    try:
        yield
    except _Rehearsed:
        pass
    except (CommandLineError, ngplugin.NgpluginError):
        raise
    except Exception as error:
        raise CommandLineError(
            f"{what}: the first batch fails with {type(error).__name__}: {one_line(error)}; choose "
            "others that fit together, or an experiment= (HYDRA_FULL_ERROR=1 shows where)"
        ) from error


def _check_burn_in(trainer: L.Trainer, steps: float) -> None:
    """Refuse a burn-in that outlasts the run.

    Raises:
        CommandLineError: no step would be made.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, ngplugin.NaturalGradientOptimizer):
            burn_in = optimizer.options.burn_in
            if burn_in >= steps:
                raise CommandLineError(
                    f"burn_in={burn_in} with {steps:g} steps in all by trainer.max_epochs and "
                    "trainer.max_steps: no step would be made; give a smaller one, or more steps"
                )


def _check_names(cfg: DictConfig, first: _FirstBatch, callbacks: Sequence[Callback]) -> None:
    """Refuse a metric that will not be logged.

    Raises:
        CommandLineError: with those that will.
    """
    natural = any(isinstance(c, ngplugin.NaturalGradient) for c in callbacks)
    of_steps = {"natgrad/kl", "natgrad/step_scale"} if natural else set()
    in_fit = first.logged["fit"] | first.logged["val"] | of_steps
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in in_fit:
            raise CommandLineError(
                f"{type(callback).__name__} monitors {monitor}: expected one of "
                f"{', '.join(sorted(in_fit))}{nearest(monitor, in_fit)}"
            )
    of_fit = {f"natgrad/{name}" for name in Summary().numbers()} if natural else set()
    known = in_fit | of_fit | first.logged["test"] | {"seconds", "steps"}
    if cfg.metric in first.logged["val"] and not first.validates:
        raise CommandLineError(
            f"metric={cfg.metric}: the run ends before it is validated; expected more "
            "trainer.max_steps or trainer.max_epochs, fewer trainer.limit_train_batches or "
            "trainer.check_val_every_n_epoch, or another metric"
        )
    if cfg.metric not in known:
        raise CommandLineError(
            f"metric={cfg.metric}: expected one of {', '.join(sorted(known))}"
            f"{nearest(cfg.metric, known)}"
        )
