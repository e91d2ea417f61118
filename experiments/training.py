"""One run, from its config to its results."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

import ngplugin
from experiments.command_line import CommandLineError, made_from
from experiments.summary import write_results
from experiments.tasks.splits import SplitData
from experiments.tasks.task import Task

#: What wandb's own variable WANDB_MODE may be, and whether a run may then be sent.
_MAY_SEND = {
    "online": True, "shared": True, "run": True,
    "offline": False, "dryrun": False, "disabled": False,
}  # fmt: skip


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
    _leave_terminal_to_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    with made_from("threads"):
        torch.set_num_threads(cfg.threads)
    with made_from("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)
    data, module = make_task(cfg)
    with made_from("callbacks"):
        callbacks = [_make(node) for node in (cfg.get("callbacks") or {}).values() if node]
    with _loggers(cfg) as loggers, _misconfiguration_is_the_users():
        trainer = _make_trainer(cfg, callbacks, loggers)
        results = _fit_and_test(trainer, module, data)
    results |= {f"data/{name}": value for name, value in data.facts.items()}
    for callback in callbacks:
        if isinstance(callback, ngplugin.NaturalGradient):
            results |= {f"natgrad/{name}": value for name, value in callback.summary().items()}
    write_results(folder / "results.json", results)
    return results


def make_task(cfg: DictConfig) -> tuple[SplitData, Task]:
    """Make the data and the module that learns from them, as a config describes them.

    Raises:
        CommandLineError: a value in the config cannot work.
    """
    with made_from("data"):
        data = _make(cfg.data)
        data.setup()
    with made_from("model"):
        network = _make_network(cfg.model, data.dimensions)
    with made_from("optimizer"):
        optimizer = _make(cfg.optimizer)
    with made_from("schedule"):
        scheduler = _make(cfg.schedule)
    with made_from("task"):
        module = _make(cfg.task)(network=network, optimizer=optimizer, scheduler=scheduler)
    with made_from("optimizer"):
        optimizer(module.parameters())  # a bad option is told now, not in the middle of fit
    return data, module


def _make(node: DictConfig, **more: Any) -> Any:
    # Plain lists and dicts: OmegaConf's own could end up in checkpoints, which then do not load.
    return instantiate(node, _convert_="all", **more)


def _make_network(node: DictConfig, dimensions: Mapping[str, Any]) -> nn.Module:
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
            f"{node._target_} needs {' and '.join(missing)}, but these data have "
            f"{', '.join(dimensions)}; choose another model= or data=, or an experiment="
        )
    return factory(**{k: v for k, v in dimensions.items() if k in arguments})  # type: ignore[no-any-return]


def _make_trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> L.Trainer:
    with made_from("trainer"):
        trainer = _make(cfg.trainer)(
            callbacks=callbacks,
            logger=loggers or False,
            # What no callback does is not wanted.
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
            enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        )
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    return trainer  # type: ignore[no-any-return]


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
def _loggers(cfg: DictConfig) -> Iterator[list[Logger]]:
    """The loggers; wandb's run is closed in the end, else the next job of a sweep goes on in it.

    Raises:
        CommandLineError: a logger cannot be made, or wandb cannot do what it is asked to.
    """
    nodes = dict((cfg.get("logger") or {}).items())
    mode = os.environ.get("WANDB_MODE")
    for name, node in [*nodes.items()]:
        if node["_target_"].endswith(".WandbLogger") and not _prepare_wandb(f"logger.{name}", node):
            del nodes[name]
    wandb = sys.modules.get("wandb")  # not imported: not used
    with made_from("logger"):
        loggers = [_make(node) for node in nodes.values()]
    failed = True
    try:
        yield loggers
        failed = False
    except Exception as error:
        if wandb is not None and isinstance(error, wandb.Error):
            raise CommandLineError(f"logger.wandb: {error}") from error
        raise
    finally:
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))
        if mode is None:  # Lightning sets it for a run that is offline
            os.environ.pop("WANDB_MODE", None)


def _prepare_wandb(key: str, node: DictConfig) -> bool:
    """See to it that wandb neither asks nor waits; False if there can or shall be no run of it.

    A run is sent only where both the config and `WANDB_MODE` let it be.

    Raises:
        CommandLineError: it is to be sent, and there is no account or no way to the server.
    """
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in _MAY_SEND:
        raise CommandLineError(f"WANDB_MODE={mode}: expected online, offline or disabled")
    if mode == "disabled":
        return False
    try:
        import wandb
    except ModuleNotFoundError:
        print(f"{key}: wandb is not installed (pip install wandb); this run has metrics.csv only")
        return False
    os.environ.setdefault("WANDB_SILENT", "true")  # no greetings
    if not os.access(Path.home(), os.W_OK):  # else its own log comes to the terminal
        os.environ.setdefault("WANDB_CACHE_DIR", str(node.get("save_dir", ".")))
    if not _MAY_SEND[mode]:
        node["offline"] = True
    elif not node.get("offline", False):
        _sign_in(f"{key}.offline=false", wandb)
    elif "WANDB_MODE" in os.environ:
        print(f"WANDB_MODE={mode}: the run stays offline, {key}.offline=false sends it")
    return True


def _sign_in(key: str, wandb: Any) -> None:
    """Sign in to wandb with the account that is there; it is never asked for.

    Raises:
        CommandLineError: there is none, or nobody answers. wandb itself would ask, or go on trying
            for minutes.
    """
    import requests  # which wandb needs too

    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:  # a key that cannot be one
        raise CommandLineError(f"{key}: {error}; offline=true needs none") from error
    if not found:
        raise CommandLineError(
            f"{key}: no account found, expected a key in WANDB_API_KEY or from "
            "'wandb login'; offline=true needs none"
        )
    address = wandb.setup().settings.base_url
    try:
        requests.head(address, timeout=10)  # seconds
    except requests.exceptions.SSLError:  # it has answered
        pass
    except requests.RequestException as error:
        raise CommandLineError(
            f"{key}: {address} does not answer; offline=true needs no network"
        ) from error


@contextlib.contextmanager
def _misconfiguration_is_the_users() -> Iterator[None]:
    try:
        yield
    except (MisconfigurationException, ngplugin.NgpluginError) as error:
        raise CommandLineError(str(error)) from error


def _leave_terminal_to_progress_bar() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advice, no device list
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tensors in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # Lightning's own affair
