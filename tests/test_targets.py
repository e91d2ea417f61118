"""A config names what train.py needs, or is refused before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CommandLineError
from experiments.targets import check_targets
from experiments.training import prepare, train
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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "+optimizer.kl_raduis=1",
            "optimizer.kl_raduis: .* expected one of lr, .*; did you mean k",
        ),
        ("+trainer.max_epocs=1", "trainer.max_epocs: .*; did you mean max_epochs"),
        ("+data.batchsize=1", "data.batchsize: .*; did you mean batch_size"),
        ("+trainer.logger=true", "trainer.logger: train.py gives it"),
        ("+model.classes=3", "model.classes: train.py gives it"),
        ("optimizer.lr=null", "optimizer.lr=null: expected a value"),
        ("+optimizer.damping={_target_:ngplugin.KlMatching,begin:1}", r"optimizer\.damping\.begin"),
    ],
)
def test_arguments_that_a_class_does_not_have_are_refused(
    override: str, expected: str, compose_config: Compose
) -> None:
    with pytest.raises(CommandLineError, match=expected):
        check_targets(compose_config("data=digits", "model=mlp", override))


@pytest.mark.parametrize("override", ["optimizer.kl_radius=null", "trainer.max_epochs=null"])
def test_what_may_be_none_may_be_null(override: str, compose_config: Compose) -> None:
    check_targets(compose_config(override))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+callbacks.more={_target_:torch.nn.ReLU}", "callbacks.more: expected a Callback"),
        ("model._target_=experiments.tasks.splits.Examples", "model"),
        ("schedule._target_=experiments.tasks.networks.dense", "schedule"),
        ("data.pixels=units", "did you mean 'unit'"),
    ],
)
def test_what_is_made_is_of_its_kind(override: str, expected: str, compose_config: Compose) -> None:
    with pytest.raises(CommandLineError, match=expected):
        prepare(compose_config("data=digits", "model=mlp", "optimizer=sgd", override))
