"""Sweeps: searches, launchers, going on after an interruption, and what wandb is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from experiments import command_line, training
from experiments.command_line import CommandLineError, check
from experiments.finished import finished_results
from experiments.median_stopping import MedianStopping
from experiments.study import _direction
from experiments.summary import write_results
from experiments.sweep import Leaderboard, leaderboard_of_what_there_is
from experiments.training import train
from train import _metric, main

REPOSITORY = Path(__file__).parents[1]
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


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Program:
    """`train.py -m` in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    # For other processes, which start in that folder.
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}")

    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
        capfd.readouterr()
        try:
            main()
            ended = 0
        except SystemExit as end:
            ended = int(end.code or 0)
        printed = capfd.readouterr()
        assert ended == status, printed.err
        return printed.out + printed.err

    return run


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Of every run of a sweep, by the name of its folder."""
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/results.json")}


def proposed(folder: Path) -> dict[str, list[str]]:
    found = sorted(folder.glob("*/.hydra/overrides.yaml"))
    return {
        path.parents[1].name: [o for o in OmegaConf.load(path) if o.startswith("optimizer.")]
        for path in found
    }


# -- searches ------------------------------------------------------------------------------------


def test_a_search_finds_the_best_and_goes_on_in_its_folder(
    program: Program, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    sweep = tmp_path / "search"
    arguments = [*SEARCH, "hydra.sweep.dir=search"]
    printed = program(*arguments, "hydra.sweeper.n_trials=2")
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]
    losses = {name: values["val/loss"] for name, values in results(sweep).items()}
    found = OmegaConf.load(sweep / "optimization_results.yaml")
    assert found.best_value == min(losses.values()) < max(losses.values())
    board = json.loads((sweep / "leaderboard.json").read_text())
    assert "2 settings, 2 runs" in printed
    assert f"optimizer.kl_radius={found.best_params['optimizer.kl_radius']}" in str(board)
    assert "kl_radius=0.0626, damping=0.269" in printed
    before = proposed(sweep)
    written = {path: path.stat().st_mtime_ns for path in sweep.glob("*/results.json")}

    # In memory only, and yet: a sampler with a seed, told the same, proposes the same again.
    printed = program(*arguments, "hydra.sweeper.n_trials=3")
    assert printed.count("Finished before, not run again") == 2
    assert {path: path.stat().st_mtime_ns for path in written} == written
    after = proposed(sweep)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"2-natgrad-seed0"}
    assert len(results(sweep)) == 3


def test_a_study_in_a_storage_counts_the_runs_it_has(program: Program, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    arguments = [*SEARCH, "hydra.sweep.dir=search", "hydra.sweeper.storage=sqlite:///study.db"]
    program(*arguments, "hydra.sweeper.n_trials=2")
    study = optuna.load_study(study_name="natgrad", storage="sqlite:///study.db")
    assert study.direction.name == "MINIMIZE"
    study.ask()  # one that was interrupted

    printed = program(*arguments, "hydra.sweeper.n_trials=3")
    assert "natgrad has 2 finished trials, 1 are left to run" in printed
    runs = results(tmp_path / "search")
    assert set(runs) == {"0-natgrad-seed0", "1-natgrad-seed0", "3+0-natgrad-seed0"}
    assert "3 settings, 3 runs" in printed
    trials = optuna.load_study(study_name="natgrad", storage="sqlite:///study.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "RUNNING", "COMPLETE"]
    radii = {trial.params.get("optimizer.kl_radius") for trial in trials if trial.params}
    assert len(radii) == 3  # a sampler with the same seed would have begun with the first again
    values = [trial.value for trial in trials if trial.value is not None]
    assert values == [values["val/loss"] for _, values in sorted(runs.items())]

    other = [a for a in arguments if "sweep.dir" not in a]
    printed = program(*other, "model.hidden=[9]", status=2)
    assert "study of that name was begun with another overrides" in printed
    printed = program(*other, "hydra.sweeper.storage=sqlite:///no/where.db", status=2)
    assert "hydra.sweeper.storage=sqlite:///no/where.db: " in printed


@pytest.mark.parametrize(
    ("metric", "asked", "direction"),
    [
        ("val/accuracy", None, "maximize"),
        ("val/psnr", "maximize", "maximize"),
        ("val/loss", None, "minimize"),
        ("val/error", None, "minimize"),
        ("val/bits", "minimize", "minimize"),
        ("val/score", "maximize", "maximize"),
    ],
)
def test_the_direction_is_that_of_the_metric(metric: str, asked: Any, direction: str) -> None:
    assert _direction(metric, asked) == direction


@pytest.mark.parametrize(
    ("metric", "asked", "expected"),
    [
        ("val/accuracy", "minimize", "of metric=val/accuracy one wants to maximize"),
        ("val/loss", "maximize", "of metric=val/loss one wants to minimize"),
        ("val/score", None, "its name does not say which way is better"),
        ("val/loss", "down", "expected minimize or maximize"),
    ],
)
def test_a_wrong_direction_is_refused(metric: str, asked: Any, expected: str) -> None:
    with pytest.raises(CommandLineError, match=re.escape(expected)):
        _direction(metric, asked)


@pytest.mark.parametrize("tracebacks", [False, True])
def test_the_sweepers_own_default_is_no_way_around_it(
    tracebacks: bool, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It minimizes; and what a callback of Hydra raises is but a warning."""
    monkeypatch.setattr(command_line, "_TRACEBACKS", tracebacks)
    printed = program("hydra/sweeper=optuna", "optimizer.lr=interval(0.1,1)", *TINY, status=2)
    expected = "train.py: error: hydra.sweeper.direction=minimize: of metric=val/accuracy one wants"
    assert expected in printed
    assert "To go on" not in printed  # nothing was begun, and the folder is free for another
    arguments = ("optimizer.lr=0.5", "optimizer=sgd", *TINY)
    (folder,) = tmp_path.glob("multirun/*/*")
    program(*arguments, f"hydra.sweep.dir={folder}")
    assert set(results(folder)) == {"0-sgd-seed0"}


def test_every_experiment_can_be_searched(compose_config: Compose) -> None:
    for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml"):
        metric = compose_config(f"experiment={path.stem}").metric
        better = "maximize" if metric in ("val/accuracy", "val/psnr") else "minimize"
        assert _direction(metric, None) == better, path.stem


@pytest.mark.parametrize("name", ["natgrad_optuna", "natgrad_grid"])
def test_searches_change_what_there_is(name: str, compose_config: Compose) -> None:
    params = composed(f"hparams_search={name}").hydra.sweeper.params
    arguments = ["-m", *(f"{key}={value}" for key, value in params.items())]
    check(arguments, REPOSITORY / "conf", "train")
    assert set(params) >= {"optimizer.kl_radius", "optimizer.damping"}


def test_the_grid_is_for_those_without_optuna(program: Program, tmp_path: Path) -> None:
    small = ("hparams_search=natgrad_grid", "optimizer.kl_radius=0.1", "hydra.sweep.dir=grid")
    printed = program(*small, *TINY)
    assert "no leaderboard" in printed  # logger=none
    assert len(results(tmp_path / "grid")) == 3


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    Plugins.instance()  # which registers what is installed
    plugins = ConfigStore.instance().repo["hydra"]
    for group, name, package in (
        ("sweeper", "optuna", "pip install optuna; pip install --no-deps hydra-optuna-sweeper"),
        ("launcher", "submitit_slurm", "pip install hydra-submitit-launcher"),
    ):
        with monkeypatch.context() as patch:
            patch.delitem(plugins[group], f"{name}.yaml")
            searched = "hparams_search=natgrad_optuna"
            asked = searched if group == "sweeper" else "hydra/launcher=natgrad_slurm"
            printed = program(asked, status=2)
            assert (
                f"train.py: error: hydra/{group}/{name}: not installed; try: {package}" in printed
            )
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        printed = program("hparams_search=natgrad_optuna", status=2)
        assert "hydra/sweeper/optuna: not installed" in printed


def test_what_is_not_finite_is_no_number_to_a_sweeper() -> None:
    """Optuna's ends in a traceback when it is given nan, and counts None as a failed run."""
    assert _metric("val/loss", {"val/loss": float("nan")}) is None
    assert _metric("val/loss", {"val/loss": None}) is None  # as results.json has it
    assert _metric("val/loss", {"val/loss": 1}) == 1.0
    with pytest.raises(CommandLineError, match="expected one of steps"):
        _metric("data/name", {"data/name": "digits", "steps": 3})


# -- launchers -----------------------------------------------------------------------------------


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_runs_in_other_processes(launcher: str, program: Program, tmp_path: Path) -> None:
    settings = {
        "joblib": ("hydra.launcher.n_jobs=2", "optimizer=adamw,sgd"),
        "submitit_local": ("optimizer=adamw",),
    }[launcher]
    arguments = ("hydra.sweep.dir=sweep", "logger=csv", *settings)
    printed = program(f"hydra/launcher={launcher}", *TINY, *arguments)
    runs = results(tmp_path / "sweep")
    assert set(runs) == {"0-adamw-seed0", "1-sgd-seed0"} - (
        {"1-sgd-seed0"} if launcher == "submitit_local" else set()
    )
    assert all(values["steps"] == 3 for values in runs.values())
    if launcher == "joblib":
        assert "2 settings, 2 runs" in printed


def test_the_slurm_script_asks_for_what_the_config_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")  # there, and never called
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    submitit = pytest.importorskip("submitit")
    made: list[Any] = []

    def map_array(self: Any, *_: Any) -> list[Any]:
        made.append(self._executor._make_submission_file_text("python", "uid"))
        return []

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", map_array)
    cfg = composed("hydra/launcher=natgrad_slurm", "hydra.launcher.partition=short")
    cfg.hydra.sweep.dir = str(tmp_path / "sweep")
    cfg.hydra.launcher.submitit_folder = str(tmp_path / "logs")
    launcher = Plugins.instance()._instantiate(cfg.hydra.launcher)
    launcher.config = cfg
    launcher.launch([["seed=0"]], initial_job_idx=0)
    (script,) = made
    for line in ("partition=short", "cpus-per-task=2", "mem=8GB", "time=60", "nodes=1"):
        assert f"#SBATCH --{line}\n" in script


# -- sweeps that ended early ---------------------------------------------------------------------


def test_a_killed_sweep_goes_on(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "killed"
    arguments = ["optimizer=sgd", "seed=0,1,2", *TINY, "logger=csv", "hydra.sweep.dir=killed"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), "-m", *arguments],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (sweep / "1-sgd-seed1" / "config.yaml").exists():
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = results(sweep)
    assert "0-sgd-seed0" in kept
    assert "2-sgd-seed2" not in kept
    (sweep / "1-sgd-seed1" / "results.json").unlink(missing_ok=True)  # if it was that fast
    (sweep / "1-sgd-seed1" / "left.ckpt").touch()

    printed = program(*arguments)
    assert printed.count("Finished before, not run again") == 1
    assert f"Finished before, not run again: {sweep / '0-sgd-seed0'}" in printed
    assert len(results(sweep)) == 3
    assert results(sweep)["0-sgd-seed0"] == kept["0-sgd-seed0"]
    assert not (sweep / "1-sgd-seed1" / "left.ckpt").exists()
    assert (sweep / "1-sgd-seed1" / "interrupted-1" / "left.ckpt").exists()
    assert "1 settings, 3 runs" in printed

    monkeypatch.setattr(command_line, "_TRACEBACKS", True)  # of which a callback makes a warning
    printed = program(*arguments, "model.hidden=[9]", status=2)
    assert "the sweep in it was begun with overrides optimizer=sgd" in printed
    assert "model.hidden=[9]" in printed
    overrides = (sweep / "0-sgd-seed0" / ".hydra" / "overrides.yaml").read_text()
    assert "[9]" not in overrides  # nothing was touched


def test_a_sweep_that_fails_shows_what_it_has_and_how_to_go_on(program: Program) -> None:
    arguments = ["optimizer=sgd", "optimizer.lr=0.1,0.2,-1", *TINY, "logger=csv"]
    printed = program(*arguments, status=2)
    assert "2 settings, 2 runs" in printed
    assert "train.py: error: optimizer: Invalid learning rate: -1" in printed
    (command,) = [x for x in printed.splitlines() if x.startswith("To go on: ")]
    start = "To go on: python train.py -m optimizer=sgd optimizer.lr=0.1,0.2,-1 trainer=quick "
    assert command.startswith(start)
    again = command.rpartition(" ")[2]
    assert re.fullmatch(r"hydra\.sweep\.dir=multirun/[\d-]+/[\d-]+", again)
    assert program(*arguments, again, status=2).count("Finished before") == 2


@pytest.mark.parametrize("search", [False, True])
def test_a_run_that_fails_does_not_keep_the_others_from_being_run(
    search: bool, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, calls = training._fit_and_test, []

    def failing(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError("all of it")
        return fit(*arguments)

    monkeypatch.setattr(training, "_fit_and_test", failing)
    if search:
        program(*SEARCH, "hydra.sweep.dir=sweep", "hydra.sweeper.n_trials=2")
        found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
        (run,) = results(tmp_path / "sweep").values()
        assert found.best_value == run["val/loss"]
    else:
        with pytest.raises(MemoryError, match="all of it"):
            program("optimizer=sgd", "seed=0,1,2", *TINY, "hydra.sweep.dir=sweep")
        assert set(results(tmp_path / "sweep")) == {"1-sgd-seed1", "2-sgd-seed2"}


def test_after_ctrl_c_the_way_on_is_said_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0-adamw-seed0" / ".hydra").mkdir(parents=True)
    sweep = {"sweep": {"dir": str(tmp_path)}, "sweeper": {}}
    monkeypatch.setattr(Leaderboard, "begun", OmegaConf.create({"hydra": sweep, "metric": "a"}))
    arguments = ["-m", "seed=0,1", "hydra.sweep.dir=old"]
    with pytest.raises(SystemExit) as ended, leaderboard_of_what_there_is(arguments):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    expected = f"To go on: python train.py -m seed=0,1 hydra.sweep.dir={tmp_path}\n"
    assert capsys.readouterr().out.endswith(expected)
    with pytest.raises(KeyboardInterrupt), leaderboard_of_what_there_is(arguments):
        raise KeyboardInterrupt  # no sweep, nothing to say


def test_a_finished_run_is_known_by_its_config(compose_config: Compose, tmp_path: Path) -> None:
    cfg = compose_config(*TINY, "optimizer.lr=0.1234567890123456")
    assert finished_results(cfg, tmp_path) is None
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    write_results(tmp_path / "results.json", {"steps": 3, "val/loss": float("nan")})
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "results.json"}
    assert finished_results(cfg, tmp_path) == {"steps": 3, "val/loss": None}
    cfg.metric = "test/loss"  # how it is judged is no part of it
    assert finished_results(cfg, tmp_path) is not None
    cfg.optimizer.lr = 0.2
    expected = "optimizer.lr=0.1234567890123456, not 0.2; choose another hydra.sweep.dir"
    with pytest.raises(CommandLineError, match=re.escape(expected)):
        finished_results(cfg, tmp_path)


def test_what_an_interrupted_run_left_is_set_aside_by_the_first_process(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose_config(*TINY)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".hydra").mkdir()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert finished_results(cfg, tmp_path) is None
    assert (tmp_path / "checkpoints").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert finished_results(cfg, tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {".hydra", "interrupted-1"}
    (tmp_path / "config.yaml").touch()
    assert finished_results(cfg, tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {
        ".hydra", "interrupted-1", "interrupted-2",
    }  # fmt: skip
    assert (tmp_path / "interrupted-1" / "checkpoints").exists()


def test_results_are_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path / "results.json", {"steps": 3})
    assert not (tmp_path / "results.json").exists()


# -- wandb ---------------------------------------------------------------------------------------


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
        assert _direction(cfg.metric, sweep.metric.goal) == sweep.metric.goal
        assert cfg.optimizer.layer_balance == values["optimizer.layer_balance"]


# -- stopping early ------------------------------------------------------------------------------

VALIDATED = [option for option in TINY if option not in ("callbacks=none", "logger=none")] + [
    "trainer.max_steps=-1",
    "trainer.max_epochs=4",
    "callbacks=median_stopping",
    "callbacks.median_stopping.least_runs=2",
    "callbacks.median_stopping.warmup=1",
    "logger=csv",
    "optimizer=adamw",
    "metric=val/loss",
]


def test_runs_worse_than_the_median_are_stopped(program: Program, tmp_path: Path) -> None:
    rates = "0.03,0.02,1e-6,0.05"
    program(*VALIDATED, f"optimizer.lr={rates}", "hydra.sweep.dir=rates")
    runs = results(tmp_path / "rates")
    assert [values["steps"] for _, values in sorted(runs.items())] == [12, 12, 6, 12]
    stopped = runs["2-adamw-seed0"]
    assert stopped["stopped/step"] == 6
    assert stopped["stopped/counts_as"] == stopped["val/loss"]  # worse than the others' ends
    assert _metric("val/loss", stopped) == stopped["val/loss"]
    better = stopped | {"stopped/counts_as": 9.0}
    assert _metric("val/loss", better) == 9.0
    (entry,) = [
        entry
        for entry in json.loads((tmp_path / "rates" / "leaderboard.json").read_text())
        if entry["setting"] == "optimizer.lr=1e-06"
    ]
    assert len(entry["runs"]) == 1


def test_a_stopped_run_counts_no_better_than_the_others_ended(tmp_path: Path) -> None:
    """Overfitted ones end worse than they were: one stopped before that is not the best."""
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        curve = "step,val/loss\n2,0.3\n5,0.9\n"
        (tmp_path / str(i) / "metrics.csv").write_text(curve)
        write_results(tmp_path / str(i) / "results.json", {"val/loss": 0.9})
    callback = MedianStopping("val/loss", str(tmp_path), warmup=0, least_runs=2)
    trainer = SimpleNamespace(
        callback_metrics={"val/loss": 0.25}, global_step=3, sanity_checking=False, should_stop=False
    )
    module: Any = None
    callback.on_fit_start(trainer, module)
    callback.on_validation_end(trainer, module)
    assert not trainer.should_stop
    trainer.callback_metrics["val/loss"] = 0.4  # but its best is 0.25
    callback.on_validation_end(trainer, module)
    assert not trainer.should_stop
    callback = MedianStopping("val/loss", str(tmp_path), warmup=0, least_runs=2)
    callback.on_fit_start(trainer, module)
    callback.on_validation_end(trainer, module)
    assert trainer.should_stop
    assert callback.facts == {"stopped/step": 3, "stopped/counts_as": 0.9}


def test_median_stopping_needs_what_is_validated(compose_config: Compose, tmp_path: Path) -> None:
    cfg = compose_config(*VALIDATED, "metric=test/loss")
    with pytest.raises(CommandLineError, match="expected a metric that is logged at validations"):
        train(cfg, tmp_path)
