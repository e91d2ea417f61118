"""A config names what train.py needs, or is refused before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CommandLineError
from experiments.targets import check_targets
from experiments.training import train
from tests.environment import REPOSITORY

Compose = Callable[..., DictConfig]
EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "conf/experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("optimizer", ["natgrad", "muon", "adamw"])
def test_every_config_of_ours_is_allowed(
    experiment: str, optimizer: str, compose_config: Compose
) -> None:
    more = ["debug=profiler", "callbacks=[default,natgrad,median_stopping]", "logger=tensorboard"]
    check_targets(compose_config(f"experiment={experiment}", f"optimizer={optimizer}", *more))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "subprocess.Popen",
        "experiments.tasks.photograph.torch.load",  # a module's own import
        "experiments.command_line.os.system",
        "ngplugin.lightning.doctor.made",  # imports what it is told to
        "lightning.pytorch.loggers.csv_logs.os.system",
        "lightning.pytorch.trainer.trainer.os.system",
        "torch.nn.parallel.comm.torch.load",
        "torch.optim.swa_utils.update_bn",  # a function
    ],
)
@pytest.mark.parametrize("place", ["optimizer", "callbacks.mine", "model.hidden.0"])
def test_anything_else_is_refused(
    target: str, place: str, tmp_path: Path, compose_config: Compose
) -> None:
    cfg = compose_config("data=digits", "model=mlp", "logger=none")
    node: Any = {"_target_": target, "f": "x"}
    if place == "model.hidden.0":
        cfg.model.hidden = [node]
    else:
        OmegaConf.update(cfg, place, node, merge=False, force_add=True)
    with pytest.raises(CommandLineError, match=rf"{place}\._target_={target}: a config may name"):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damping_objects_of_ngplugin_and_layers_of_torch_are_allowed(
    compose_config: Compose,
) -> None:
    cfg = compose_config("data=digits", "model=mlp")
    schedule = {"_target_": "ngplugin.ExponentialDamping", "start": 1.0, "end": 0.1, "steps": 10}
    cfg.optimizer.damping = schedule
    OmegaConf.update(cfg, "model", {"_target_": "torch.nn.Linear"}, merge=False)
    check_targets(cfg)
