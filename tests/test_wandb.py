"""What wandb is told of a run, and what its agents start."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.command_line import check
from experiments.study import direction_of
from tests.environment import REPOSITORY
from tests.small_sweeps import TINY, Compose, Program, composed


def test_wandb_is_told_what_a_run_is(program: Program, tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    from ngplugin.reporting import wandb_file

    options = [option for option in TINY if option != "logger=none"]
    program("optimizer=sgd", "optimizer.lr=0.125", *options, "hydra.sweep.dir=some/sweep")
    (path,) = tmp_path.rglob("*.wandb")
    _, config = wandb_file.read(path)
    assert config["optimizer"]["lr"] == 0.125
    assert config["data"]["seed"] == 0  # resolved
    assert config["run"]["output_dir"] == str(tmp_path / "some" / "sweep" / "0-sgd-seed0")
    assert "optimizer.lr=0.125" in config["run"]["overrides"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert (config["run"]["commit"] or "").removesuffix("-dirty") == commit

    for data in wandb_file.records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
    assert (run.run_group, run.display_name, run.job_type) == ("sweep", "0-sgd-seed0", "train")
    assert list(run.tags) == ["sgd", "digits", "mlp"]


def test_the_groups_and_names_of_wandb_can_be_chosen(compose_config: Compose) -> None:
    from experiments.loggers import _identity

    cfg = compose_config("logger=wandb", "logger.wandb.group=mine", "experiment=digits_mlp")
    node = OmegaConf.to_container(cfg.logger.wandb, resolve=True)
    assert _identity(node)["group"] == "mine"
    assert _identity(node)["tags"] == ["natgrad", "digits", "mlp", "digits_mlp"]
    assert _identity({})["group"] is None  # a single run belongs with no others
    assert _identity({"name": "first"})["name"] == "first"


def agents_command(parameters: dict[str, Any]) -> list[str]:
    """What an agent of wandb starts, by wandb's own code, but for the process."""
    from wandb.wandb_agent import Agent

    sweep = OmegaConf.load(REPOSITORY / "sweeps" / "natgrad_wandb.yaml")
    started: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "wandb.wandb_agent.AgentProcess", lambda command, **_: started.append(command)
        )
        patch.setattr("wandb.wandb_agent.config_util.save_config_file_from_dict", lambda *_: None)
        patch.setenv("WANDB_RUN_ID", "set by the agent")
        patch.setenv("WANDB_SWEEP_PARAM_PATH", "set by the agent")
        agent = Agent.__new__(Agent)
        agent._in_jupyter, agent._function, agent._forward_signals = False, None, False
        raw = OmegaConf.to_container(sweep, resolve=False)
        agent._sweep_command = list(raw["command"])
        agent._run_processes = _Ignoring()
        arguments = {key: {"value": value} for key, value in parameters.items()}
        agent._command_run({"run_id": "r", "program": sweep.program, "args": arguments})
    (command,) = started
    return command


class _Ignoring(dict[str, Any]):
    """Where the agent keeps the process that is none."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, type("Process", (), {"last_sigterm_time": None})())


def test_an_agent_of_wandb_starts_what_train_py_understands() -> None:
    sweep = OmegaConf.load(REPOSITORY / "sweeps" / "natgrad_wandb.yaml")
    parameters = OmegaConf.to_container(sweep.parameters)
    first = {k: p.get("min", p.get("values", [None])[0]) for k, p in parameters.items()}
    last = {k: p.get("max", p.get("values", [None])[-1]) for k, p in parameters.items()}
    for values in (first, last):
        environment, python, script, *arguments = agents_command(values)
        assert (environment, python, script) == ("/usr/bin/env", "python", "train.py")
        assert {f"{key}={value}" for key, value in values.items()} < set(arguments)
        check(arguments, REPOSITORY / "conf", "train")
        cfg = composed(*arguments)
        assert cfg.logger.wandb.offline is False
        assert cfg.metric == sweep.metric.name
        assert cfg.logger.wandb.project == sweep.project
        assert direction_of(cfg.metric, sweep.metric.goal) == sweep.metric.goal
        assert cfg.optimizer.layer_balance == values["optimizer.layer_balance"]
