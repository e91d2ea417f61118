"""One run, from its config to its results."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ngplugin
from experiments.command_line import CommandLineError, made_from
from experiments.finished import CONFIG, RESULTS
from experiments.loggers import made_loggers, origin
from experiments.median_stopping import MedianStopping
from experiments.summary import write_results
from experiments.targets import check_targets
from experiments.tasks.splits import SplitData
from experiments.tasks.task import Task

Made = TypeVar("Made")
#: What Lightning takes without a look, and how much it has to be.
_LEAST = {
    "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0,
    "log_every_n_steps": 0, "num_sanity_val_steps": -1,
}  # fmt: skip
_NEEDED = ("data", "model", "task", "optimizer", "schedule", "trainer", "seed", "threads", "metric")


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Fit and test the network that a config describes.

    Args:
        cfg: composed from `conf/`.
        folder: of the run; `config.yaml`, as it was used, and `results.json` are written there.

    Returns:
        The last value of every metric, `seconds` and `steps` of training, and `natgrad/*`.

    Raises:
        CommandLineError: a value in the config cannot work.
    """
    data, module, callbacks = prepare(cfg)
    folder.mkdir(parents=True, exist_ok=True)  # not before all of it could be made
    OmegaConf.save(cfg, folder / CONFIG, resolve=True)
    with made_loggers(cfg) as loggers, misconfiguration_is_the_users():
        trainer = make_trainer(cfg, callbacks, loggers)
        results = _fit_and_test(trainer, module, data)
    results |= {f"data/{name}": value for name, value in data.facts.items()}
    for callback in callbacks:
        if isinstance(callback, MedianStopping):
            results |= callback.facts
        if isinstance(callback, ngplugin.NaturalGradient):
            results |= {f"natgrad/{name}": value for name, value in callback.summary().items()}
    write_results(folder / RESULTS, results)
    return results


def prepare(cfg: DictConfig) -> tuple[SplitData, Task, list[Callback]]:
    """Make what a config describes, in memory.

    Raises:
        CommandLineError: a value in the config cannot work.
    """
    check_complete(cfg)
    check_targets(cfg)
    _leave_terminal_to_progress_bar()
    with made_from("threads"):
        torch.set_num_threads(cfg.threads)
    with made_from("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)
    return *make_task(cfg), make_callbacks(cfg)


def make_task(cfg: DictConfig) -> tuple[SplitData, Task]:
    """Make the data and the module that learns from them, as a config describes them.

    Raises:
        CommandLineError: a value in the config cannot work.
    """
    with made_from("data"):
        data = _expect(SplitData, _make(cfg.data))
        data.setup()
    with made_from("model"):
        network = _expect(nn.Module, _make_network(cfg.model, data.dimensions, type(data).__name__))
    with made_from("optimizer"):
        optimizer = _make(cfg.optimizer)
    with made_from("schedule"):
        scheduler = _make(cfg.schedule)
    with made_from("task"):
        maker = _make(cfg.task)
        module = _expect(Task, maker(network=network, optimizer=optimizer, scheduler=scheduler))
    # Bad options are told now, not in the middle of fit.
    with made_from("optimizer"):
        tried = _expect(Optimizer, optimizer(module.parameters()))
    with made_from("schedule"):
        _expect(LRScheduler, scheduler(tried, 1.0))
    return data, module


def make_callbacks(cfg: DictConfig) -> list[Callback]:
    """Make the callbacks that a config describes.

    Raises:
        CommandLineError: a value in the config cannot work.
    """
    made = []
    for name, node in (cfg.get("callbacks") or {}).items():
        with made_from(f"callbacks.{name}"):
            if node:
                made.append(_expect(Callback, _make(node)))
    return made


def check_complete(cfg: DictConfig) -> None:
    """Refuse a config that lacks a part which every run needs.

    Raises:
        CommandLineError: with its name.
    """
    for name in _NEEDED:
        node = cfg.get(name)
        if node is None or (OmegaConf.is_dict(node) and "_target_" not in node):
            raise CommandLineError(
                f"{name}: it is missing, and there is no run without it; leave it as it is in "
                f"conf/train.yaml, or give another, {name}=..."
            )


def _expect(kind: type[Made], made: Any) -> Made:
    if not isinstance(made, kind):
        raise TypeError(f"expected a {kind.__name__}, not a {type(made).__name__}")
    return made


def _make(node: DictConfig, **more: Any) -> Any:
    # Plain lists and dicts: OmegaConf's own could end up in checkpoints, which then do not load.
    return instantiate(node, _convert_="all", **more)


def _make_network(
    node: DictConfig, dimensions: Mapping[str, Any], of: str = "these data"
) -> nn.Module:
    """A network is told those of the data's dimensions that it has arguments for.

    Raises:
        ValueError: it asks for one that these data do not have.
    """
    factory = _make(node, _partial_=True)
    arguments = inspect.signature(factory).parameters
    missing = [
        name
        for name, argument in arguments.items()
        if argument.default is argument.empty and name not in dimensions
    ]
    if missing:
        raise ValueError(
            f"{node._target_} needs {' and '.join(missing)}, but {of} has "
            f"{', '.join(dimensions)}; choose another model= or data=, or an experiment="
        )
    return factory(**{k: v for k, v in dimensions.items() if k in arguments})  # type: ignore[no-any-return]


def make_trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> L.Trainer:
    """Make the trainer that a config describes, and tell its loggers of the config.

    Raises:
        CommandLineError: a value in the config cannot work.
    """
    for name, least in _LEAST.items():
        value = cfg.trainer.get(name)
        if isinstance(value, (int, float)) and not value >= least:  # nan is neither
            raise CommandLineError(f"trainer.{name}={value}: expected at least {least}")
    with made_from("trainer"):
        maker = _make(cfg.trainer)
        trainer = _expect(
            L.Trainer,
            maker(
                callbacks=callbacks,
                logger=loggers or False,
                # What no callback does is not wanted.
                enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
                enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
            ),
        )
    config = {**OmegaConf.to_container(cfg, resolve=True), "run": origin()}  # type: ignore[dict-item]
    for logger in loggers:
        logger.log_hyperparams(config)
    return trainer


def _fit_and_test(trainer: L.Trainer, module: Task, data: L.LightningDataModule) -> dict[str, Any]:
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    results: dict[str, Any] = {"seconds": time.perf_counter() - started}
    results["steps"] = trainer.global_step
    results |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Without a checkpoint callback: the weights of the last step.
    best = getattr(trainer.checkpoint_callback, "best_model_path", None) or None
    (tested,) = trainer.test(module, datamodule=data, ckpt_path=best, verbose=False)
    return results | dict(tested)


@contextlib.contextmanager
def misconfiguration_is_the_users() -> Iterator[None]:
    """Tell in one line what Lightning or natural gradient refuses.

    Raises:
        CommandLineError: it refused.
    """
    try:
        yield
    except (MisconfigurationException, ngplugin.NgpluginError) as error:
        raise CommandLineError(str(error)) from error


def _leave_terminal_to_progress_bar() -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):  # it speaks as the last one imported
        logging.getLogger(name).setLevel(logging.WARNING)  # no advice, no device list
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tensors in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # Lightning's own affair
