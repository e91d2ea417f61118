"""Searches and launchers: what a sweep proposes, which way is better, where its runs are."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from experiments import command_line
from experiments.command_line import CommandLineError, check
from experiments.study import direction_of
from tests.environment import REPOSITORY
from tests.small_sweeps import SEARCH, TINY, Compose, Program, composed, results
from train import _metric


def proposed(folder: Path) -> dict[str, list[str]]:
    found = sorted(folder.glob("*/.hydra/overrides.yaml"))
    return {
        path.parents[1].name: [o for o in OmegaConf.load(path) if o.startswith("optimizer.")]
        for path in found
    }


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
    assert direction_of(metric, asked) == direction


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
        direction_of(metric, asked)


@pytest.mark.parametrize("tracebacks", [False, True])
def test_the_sweepers_own_default_is_no_way_around_it(
    tracebacks: bool, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It minimizes; and what a callback of Hydra raises is but a warning."""
    monkeypatch.setattr(command_line, "_TRACEBACKS", tracebacks)
    arguments = ("hydra/sweeper=optuna", "optimizer.lr=interval(0.1,1)", *TINY)
    expected = "hydra.sweeper.direction=minimize: of metric=val/accuracy one wants"
    if tracebacks:
        with pytest.raises(CommandLineError, match=expected):
            program(*arguments)
    else:
        assert f"train.py: error: {expected}" in program(*arguments, status=2)
    assert not [*tmp_path.iterdir()]  # nothing was begun
    with monkeypatch.context() as patch:  # as an agent's own process would come to it
        patch.setattr("experiments.rehearsal.rehearse", lambda *_: None)
        printed = program(*arguments, status=2)
    assert f"train.py: error: {expected}" in printed
    assert "To go on" not in printed
    (folder,) = tmp_path.glob("multirun/*/*")  # is free for another
    program("optimizer.lr=0.5", "optimizer=sgd", *TINY, f"hydra.sweep.dir={folder}")
    assert set(results(folder)) == {"0-sgd-seed0"}


def test_every_experiment_can_be_searched(compose_config: Compose) -> None:
    for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml"):
        metric = compose_config(f"experiment={path.stem}").metric
        better = "maximize" if metric in ("val/accuracy", "val/psnr") else "minimize"
        assert direction_of(metric, None) == better, path.stem


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
