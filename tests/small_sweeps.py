"""The smallest sweeps of `train.py`, and what they left; `program` in conftest.py runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tests.environment import REPOSITORY

# Half a second: the smallest task, a few steps, nothing written that is not looked at.
TINY = (
    "trainer=quick",
    "trainer.limit_train_batches=3",
    "trainer.accelerator=cpu",
    "data=digits",
    "model=mlp",
    "model.hidden=[8]",
    "callbacks=none",
    "logger=none",
    "report=false",
)
SEARCH = ("hparams_search=natgrad_optuna", *TINY, "logger=csv", "metric=val/loss")
Compose = Callable[..., DictConfig]
Program = Callable[..., str]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Of every run of a sweep, by the name of its folder."""
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/results.json")}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True)
