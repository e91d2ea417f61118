"""Every command in the documentation is run, or a table says why not and what holds it instead."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import train
from experiments.command_line import check
from ngplugin import command_line

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
PROGRAMS = r"(\S*/)?python[\d.]*|ngplugin|make|pip|wandb|mkdocs|nox|pre-commit|optuna-dashboard"
COMMAND = re.compile(rf"(\w+=\S+ )*({PROGRAMS}) |--(trainer|optimizer)\.?\S*=")
OPTION = re.compile(r"(ngplugin|make) (report|doctor|clean)$")  # spoken of, not to be typed as it is

NOBODY = ""  # holds it
#: Why a command is not run here, and the test that holds what it does.
NOT_RUN = {
    "make train": ("installs everything", "test_train.py::test_a_run_leaves_everything"),
    "make test": ("runs this test", NOBODY),
    "make lint": ("before every change, by .ci/run", "test_workflow.py::test_ci_run"),
    "make check": ("runs this test", "test_workflow.py::test_ci_run"),
    "make matrix": ("downloads other versions, an hour", NOBODY),
    "make support": ("collects every test", "test_support.py::test_"),
    "make grid": ("half an hour", "test_grid.py::test_"),
    "make trials": ("downloads other projects", "test_other_tasks.py::test_"),
    "make race": ("hours", "test_race.py::test_a_race_in_stages"),
    "make race QUICK=1": ("minutes", "test_race.py::test_a_race_in_stages"),
    "make cost": ("an hour", "test_cost.py::test_the_script_writes"),
    "make cost QUICK=1": ("minutes", "test_cost.py::test_a_quick_run"),
    "python -m experiments.race tune --workload autoencoder": (
        "an hour", "test_race.py::test_a_race_in_stages"),
    "python -m experiments.race run --workload autoencoder": (
        "half an hour", "test_race.py::test_a_race_in_stages"),
    "python -m experiments.race memory --workload autoencoder": (
        "a minute", "test_race.py::test_a_race_in_stages"),
    "python -m experiments.race table": (
        "rewrites a page", "test_race.py::test_the_page_has_the_tables"),
    "python -m experiments.cost": ("rewrites a page", "test_cost.py::test_the_script_writes"),
    "python -m experiments.cost --measure linear_algebra": (
        "minutes", "test_cost.py::test_a_quick_run"),
    "python -m experiments.scaling": (
        "rewrites a page", "test_scaling.py::test_the_script_writes"),
    "python -m experiments.scaling --measure": (
        "minutes", "test_scaling.py::test_the_parts_of_a_step"),
    "python -m experiments.scaling --device h100 --model gpt2-small --examples 32 "
    "--refresh-every 100": ("ten seconds", "test_scaling.py::test_another_assumption"),
    "python -m experiments.scaling --link-between 12.5e9 --training-efficiency 0.35": (
        "ten seconds", "test_scaling.py::test_another_assumption"),
    ".venv/bin/python -m pytest tests/test_trust_region.py": ("is run with all others", NOBODY),
    "source .venv/bin/activate": ("is for a shell", NOBODY),
    "pre-commit install": ("changes the repository", "test_workflow.py::test_pre_commit"),
    "wandb sync outputs/.../wandb/offline-run-...": ("sends to a server", NOBODY),
    "pip install ngplugin": ("would download", "test_installed.py::test_smoke_callback"),
}  # fmt: skip

#: What stands for something of the reader's own.
PLACEHOLDERS = {
    "experiment=NAME": "experiment=digits_mlp",
    "FOLDER": "outputs/2026-01-31/12-00-00-natgrad",
    "--lr_scheduler=...": "--lr_scheduler=CosineAnnealingLR --lr_scheduler.T_max=4",
}
TINY = ("data=digits", "model=mlp", "model.hidden=[8]", "callbacks=none")
SHORT = ("trainer=quick", "trainer.max_steps=2", "trainer.limit_train_batches=2",
         "trainer.accelerator=cpu", "logger=csv", "report=false")  # fmt: skip
QUIET = ("accelerator=cpu", "logger=false", "enable_checkpointing=false", "max_steps=2",
         "enable_progress_bar=false", "enable_model_summary=false")  # fmt: skip

THEIR_SCRIPT = f"""
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
L.Trainer({", ".join(s.replace("true", "True").replace("false", "False").replace("=cpu", "='cpu'")
                     for s in QUIET)}).fit(BoringModel())
"""


def documented() -> dict[str, str]:
    """Every command, with the page that has it."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(shlex.join(shlex.split(line, comments=True)).split())
                found.setdefault(command.replace("'", ""), page.name)
        for inline in INLINE.findall(FENCED.sub("", text)):
            command = " ".join(inline.split())
            if COMMAND.match(command) and not OPTION.match(command):
                found.setdefault(command.replace("'", ""), page.name)
    return {command: page for command, page in found.items() if command}


COMMANDS = documented()


def test_every_command_has_a_way_to_be_run_and_the_table_has_no_other() -> None:
    assert len(COMMANDS) > 40
    unknown = [c for c in COMMANDS if c not in NOT_RUN and way(c) is None]
    assert not unknown, "neither run here nor in NOT_RUN, with a reason"
    assert set(NOT_RUN) <= set(COMMANDS), "no page has these"
    for command, (_, test) in NOT_RUN.items():
        if test is not NOBODY:
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / "tests" / file).read_text(), command


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of someone who has trained a little, and has a project of their own."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_project").mkdir()
    project = f"from {__package__}.projects.doctored import Classifier as LitModel\n"
    (folder / "my_project/model.py").write_text(project)
    (folder / "their_script.py").write_text(THEIR_SCRIPT)
    shutil.copytree(ROOT / "tests/projects/hydra_template", folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_ours(patch, "optimizer=natgrad", f"hydra.run.dir={PLACEHOLDERS['FOLDER']}", *TINY)
        sweep = "hydra.sweep.dir=multirun/2026-01-31/12-00-00"
        run_ours(patch, "-m", "optimizer=adamw,natgrad", sweep, *TINY)
    shutil.copytree(folder / PLACEHOLDERS["FOLDER"] / "csv", folder / "lightning_logs/version_3")
    yield folder
    sys.modules.pop("my_project.model", None)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NOT_RUN])
def test_a_documented_command(
    command: str, users_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = way(command)
    assert run is not None, f"{COMMANDS[command]}: neither run here nor in NOT_RUN"
    for placeholder, instead in PLACEHOLDERS.items():
        command = command.replace(placeholder, instead)
    monkeypatch.chdir(users_folder)
    run(monkeypatch, *shlex.split(command))


def way(command: str) -> Callable[..., None] | None:
    """What runs a command."""
    return next((run for beginning, run in WAYS.items() if command.startswith(beginning)), None)


# -- ways to run them, with their words ------------------------------------------------------------


def run_ours(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides, *SHORT])
    GlobalHydra.instance().clear()
    train.main()


def train_py(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A run of a few steps; of a sweep, which may be long, every choice is composed."""
    overrides = words[2:]
    if "-m" in overrides:
        check(overrides, ROOT / "conf", "train")
    elif any(word.startswith("-") for word in overrides):  # --help
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as end:
            train.main()
        assert not end.value.code
    else:
        run_ours(monkeypatch, *overrides)


def the_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`ngplugin`, as it is; with --output it leaves its page there."""
    assert command_line.main(words[1:]) == 0


def lightning_cli(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    arguments = ["fit", *(f"--trainer.{setting}" for setting in QUIET)]
    if options[0].startswith("--trainer.callbacks.damping"):  # an option of a callback
        arguments.append("--trainer.callbacks+=ngplugin.NaturalGradient")

    def run() -> LightningCLI:
        return LightningCLI(
            BoringModel, BoringDataModule, args=[*arguments, *options], save_config_callback=None
        )

    if ".help" in options[0]:
        with pytest.raises(SystemExit) as end:
            run()
        assert not end.value.code
    else:
        assert "NaturalGradient" in type(run().trainer.strategy.optimizers[0]).__name__


def unmodified(
    monkeypatch: pytest.MonkeyPatch, *words: str, capsys: pytest.CaptureFixture[str] | None = None
) -> None:
    """A script of theirs, with variables of the environment before it."""
    *variables, _, script = words
    for variable in variables:
        monkeypatch.setenv(*variable.split("=", 1))
    runpy.run_path(script, run_name="__main__")


def template(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """The template's own program, in this process."""
    monkeypatch.setattr(sys, "argv", [*words[1:], "trainer.accelerator=cpu"])
    monkeypatch.syspath_prepend(".")
    GlobalHydra.instance().clear()
    try:
        runpy.run_path(words[1], run_name="__main__")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
            del sys.modules[name]


def pip_extra(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """That the extra exists; what it has is downloaded."""
    (extra,) = re.findall(r"^ngplugin\[(\w+)\]$", words[2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


WAYS: dict[str, Callable[..., None]] = {
    "python train.py": train_py,
    "ngplugin ": the_command,
    "--": lightning_cli,
    "NGPLUGIN_AUTO=1 ": unmodified,
    "python src/train.py": template,
    "pip install ngplugin[": pip_extra,
}


# -- what is not run is at least well-formed -------------------------------------------------------


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_what_to_do(command: str) -> None:
    done = subprocess.run(
        [*command.split(), "--dry-run", "--no-print-directory"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for module in re.findall(r"-m ((?:experiments|tests)\S*)", done.stdout):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m experiments")])
def test_experiments_take_these_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, args: object = None, *_: object) -> None:
        parse(self, args)  # type: ignore[call-overload]
        raise Parsed

    _, _, module, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=False)
