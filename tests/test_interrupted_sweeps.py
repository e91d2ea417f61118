"""A sweep that ended early keeps what it has, and goes on in its folder."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments import command_line, rehearsal, training
from experiments.command_line import CommandLineError
from experiments.finished import finished_results
from experiments.summary import write_results
from experiments.sweep import Leaderboard, leaderboard_of_what_there_is
from tests.environment import REPOSITORY
from tests.small_sweeps import SEARCH, TINY, Compose, Program, results


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
    assert "1 setting, 3 runs" in printed

    monkeypatch.setattr(command_line, "_TRACEBACKS", True)  # of which a callback makes a warning
    printed = program(*arguments, "model.hidden=[9]", status=2)
    assert "the sweep in it was begun with overrides optimizer=sgd" in printed
    assert "model.hidden=[9]" in printed
    overrides = (sweep / "0-sgd-seed0" / ".hydra" / "overrides.yaml").read_text()
    assert "[9]" not in overrides  # nothing was touched


def test_a_sweep_that_fails_shows_what_it_has_and_how_to_go_on(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: None)  # which would tell at once
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
