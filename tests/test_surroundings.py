"""Without a network, an account, a terminal or a library, runs go on, or say why not in a line."""

from __future__ import annotations

import errno
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import wandb
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import train
from experiments import loggers
from experiments.command_line import CommandLineError, errors_in_one_line
from experiments.summary import write_report
from experiments.sweep import show
from ngplugin.reporting.run_record import read_run
from tests.environment import REPOSITORY, Environment
from tests.test_train import SMALL, written_folder

Compose = Callable[..., DictConfig]
NO_HOME = "/proc/no-home"  # nothing can be made there, not even by root
KEY = 40 * "0"

# -- programs --------------------------------------------------------------------------------------


def without_network(*command: str) -> list[str]:
    """The command in a network of its own, with nobody in it, where this process may make one."""
    alone = ["unshare", "--net"]
    may = shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True)
    return [*alone, *command] if may and may.returncode == 0 else [*command]


def at_a_terminal(command: Sequence[str], folder: Path, **variables: str) -> tuple[int, str]:
    """Status and output of a command that could ask, and is never answered."""
    ours, theirs = pty.openpty()
    hidden = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT", "WANDB_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.Popen(
        command, cwd=folder, env={**environment, "COLUMNS": "100", **variables},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 65536):
            said += piece
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    return process.wait(timeout=120), said.decode()


def test_at_a_terminal_without_account_network_and_home(tmp_path: Path) -> None:
    program = [sys.executable, str(REPOSITORY / "train.py"), "optimizer=natgrad", "report=false"]
    status, said = at_a_terminal(
        without_network(*program, *SMALL), tmp_path, HOME=NO_HOME, WANDB_MODE="online"
    )
    assert status == 0, said
    assert "WANDB_MODE=online: the run stays offline, logger.wandb.offline=false sends it" in said
    assert "API key" not in said
    assert "ManageConnection" not in said  # wandb's own log
    (run,) = tmp_path.glob("outputs/*/*/wandb/offline-run-*/*.wandb")
    assert b"natgrad/kl" in run.read_bytes()


def script(*lines: str) -> str:
    """A program that finds ngplugin and train.py in this checkout."""
    found = f"import runpy, sys; sys.path[:0] = {[str(REPOSITORY / 'src'), str(REPOSITORY)]}"
    return "\n".join([found, *lines])


def test_without_wandb_and_matplotlib_a_run_says_so_and_leaves_its_metrics(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment", without=["wandb", "matplotlib"])
    arguments = ["train.py", "optimizer=natgrad", *SMALL]  # logger=wandb is the default
    program = f"sys.argv = {arguments}; runpy.run_path({str(REPOSITORY / 'train.py')!r}, "
    said = environment.run(tmp_path, "-c", script(program + "run_name='__main__')"), COLUMNS="200")
    told = [line for line in said.splitlines() if "not installed" in line]
    assert told == [
        "logger.wandb: wandb is not installed (pip install wandb); this run has metrics.csv only",
        "No report.html: matplotlib is not installed (pip install matplotlib)",
    ]
    assert "Traceback" not in said
    folder = written_folder(said)
    assert "natgrad/kl" in (folder / "csv/metrics.csv").read_text()

    report = f"from ngplugin.command_line import main; sys.exit(main(['report', {str(folder)!r}]))"
    said = environment.run(tmp_path, "-c", script(report), refused=True)
    hint = "No module named 'matplotlib'; pip install 'ngplugin[report]'"
    assert said == f"ngplugin report: {hint}\n"
    assert read_run(folder).natural  # for a page, where it is installed


BARE = """
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from ngplugin import NaturalGradient
callback = NaturalGradient()
L.Trainer(max_steps=8, accelerator="cpu", callbacks=[callback]).fit(BoringModel())
print(callback.summary()["steps"])
"""


def test_the_callback_needs_torch_and_lightning_only(tmp_path: Path) -> None:
    without = ["rich", "tensorboard", "hydra", "hydra_core", "omegaconf", "wandb", "matplotlib"]
    environment = Environment(tmp_path / "environment", without=without)
    said = environment.run(tmp_path, "-c", script(BARE), HOME=NO_HOME)
    assert said.splitlines()[-1] == "8"
    assert "natural gradient: what preconditions each parameter" in said  # without colours
    assert "natural gradient: 8 steps" in said


# -- wandb: asked of the function that decides -----------------------------------------------------


@pytest.fixture
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no account"))


@pytest.mark.usefixtures("_no_account")
@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("mode", [None, "", "online", "shared", "offline", "dryrun", "disabled"])
def test_a_run_is_sent_where_config_and_environment_let_it_be(
    mode: str | None, offline: bool, compose_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    asked: list[str] = []
    monkeypatch.setattr(loggers, "_sign_in", lambda key, _: asked.append(key))
    node = compose_config(
        "logger=wandb", f"logger.wandb.offline={str(offline).lower()}"
    ).logger.wandb
    made = loggers._prepare_wandb("logger.wandb", node)
    sent = not offline and mode in (None, "", "online", "shared")
    assert made == (mode != "disabled")
    assert asked == (["logger.wandb.offline=false"] if sent else [])
    assert not made or node.offline == (not sent)


@pytest.mark.usefixtures("_no_account")
def test_a_mode_that_wandb_does_not_know(
    compose_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "garbage")
    node = compose_config("logger=wandb").logger.wandb
    with pytest.raises(CommandLineError, match="WANDB_MODE=garbage: expected online, off"):
        loggers._prepare_wandb("logger.wandb", node)


def signed_in(address: str) -> Any:
    """wandb with a key, and a server at an address."""
    setup = SimpleNamespace(settings=SimpleNamespace(base_url=address))
    return SimpleNamespace(login=lambda **_: True, setup=lambda: setup, Error=wandb.Error)


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = "http://127.0.0.1:9"  # refuses at once; see below for one that is silent
    with pytest.raises(CommandLineError, match=f"a=b: {nobody} does not answer; offline=true"):
        loggers._sign_in("a=b", signed_in(nobody))
    waited: list[float] = []
    monkeypatch.setattr(requests, "head", lambda _, timeout: waited.append(timeout))
    loggers._sign_in("a=b", signed_in("http://silent"))
    assert waited == [10]

    def certificate(*_: Any, **__: Any) -> None:
        raise requests.exceptions.SSLError

    monkeypatch.setattr(requests, "head", certificate)
    loggers._sign_in("a=b", signed_in("https://answered"))  # for wandb to judge


def test_a_key_that_cannot_be_one_is_told_in_a_line() -> None:
    def refuse(**_: Any) -> bool:
        raise wandb.Error("API key must have 40+ characters, has 5.")

    with pytest.raises(
        CommandLineError, match=r"a=b: API key must have .* offline=true needs none"
    ):
        loggers._sign_in("a=b", SimpleNamespace(login=refuse, Error=wandb.Error))


def test_what_wandb_raises_later_is_a_line_too_and_its_mode_is_left_as_it_was(
    compose_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = compose_config("logger=wandb")

    def fail() -> None:
        with loggers.made_loggers(cfg):
            os.environ["WANDB_MODE"] = "dryrun"  # as Lightning does for an offline run
            raise wandb.Error("returned error 401")

    with pytest.raises(CommandLineError, match=r"^logger\.wandb: returned error 401$"):
        fail()
    assert "WANDB_MODE" not in os.environ


# -- pictures and folders --------------------------------------------------------------------------


def test_pages_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("ngplugin.reporting.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report("a run", tmp_path) is None
    show(tmp_path)
    line = "No report.html: matplotlib is not installed (pip install matplotlib)\n"
    assert capsys.readouterr().out == 2 * line


@pytest.mark.parametrize("where", ["hydra.run.dir", "hydra.sweep.dir"])
def test_a_folder_that_cannot_be_made(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m"] if "sweep" in where else []
    monkeypatch.setattr(sys, "argv", ["train.py", *sweep, f"{where}=/proc/no/folder", *SMALL])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: [Errno 2] No such file or directory: '/proc/no")


def test_a_full_disk_is_a_line_and_other_errors_of_the_system_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit), errors_in_one_line("train.py"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert capsys.readouterr().err == "train.py: error: [Errno 28] No space left on device\n"
    with pytest.raises(ConnectionResetError), errors_in_one_line("train.py"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
