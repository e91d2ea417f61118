"""A task as a plain loop has it: the data and the module that a config describes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.tasks.splits import SplitData
from experiments.tasks.task import Task
from experiments.training import make_task

CONF = Path(__file__).parents[1] / "conf"


def make(overrides: tuple[str, ...], seed: int) -> tuple[SplitData, Task]:
    """The data and the module, with the weights and batches of a seed.

    Args:
        overrides: of `conf/train.yaml`, that choose data, network and task.
        seed: of torch's global generator too.
    """
    config = config_of(overrides).copy()
    config.seed = seed
    torch.manual_seed(seed)
    data, module = make_task(config)
    if config.trainer.precision == "64-true":
        module.double()
    return data, module


@functools.cache
def config_of(overrides: tuple[str, ...]) -> DictConfig:
    """Composed as `train.py` would."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "optimizer=adamw"])


def in_precision(batch: Any, module: Task) -> Any:
    """A batch with its floating-point tensors in the module's precision, as Lightning does it."""
    dtype = next(module.parameters()).dtype
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in batch]
    return type(batch)(*tensors) if hasattr(batch, "_fields") else tuple(tensors)
