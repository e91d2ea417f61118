"""Every command in the documentation is run, or a table says why not and what holds it instead."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
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
SPOKEN_OF = re.compile(r"ngplugin (report|doctor)$")  # and not to be typed as it is

NOBODY = ""  # holds it
_CI = "test_ci_run_is_tests_that_passed_then_lint"
_RACE = "test_a_race_in_stages_that_go_on_where_they_stopped"
_PAGE = "test_the_script_writes_the_page_and_the_figure"
_COST = "test_a_quick_run_prints_and_writes_nothing"
_MUTANTS = "test_mutants_of_functions_and_of_constants_are_killed_by_the_tests_of_them"
_SCALING = "test_another_assumption_is_printed_and_leaves_the_page_alone"
#: Why a command is not run here, and the test that holds what it does.
NOT_RUN = {
    "make train": ("installs everything", "test_a_run_leaves_everything_in_its_folder"),
    "make test": ("runs this test", _CI),
    "make lint": ("is run beside this test", _CI),
    "make check": ("runs this test", _CI),
    "make matrix": ("downloads other versions, and takes long", NOBODY),
    "make support": ("collects all tests", "test_the_page_is_what_the_tests_markers_make_it"),
    "make grid": (
        "half an hour",
        "test_the_script_says_how_many_failed_and_goes_on_where_it_stopped",
    ),
    **dict.fromkeys(
        ("make mutants", "make mutants ONLY=trust_region", "make mutants ONLY=damping"),
        ("minutes to hours", _MUTANTS),
    ),
    "make trials": ("downloads other projects", NOBODY),
    "make race": ("hours", _RACE),
    "make race QUICK=1": ("minutes", _RACE),
    "python -m experiments.race tune --workload autoencoder": ("a stage of hours", _RACE),
    "python -m experiments.race run --workload autoencoder": ("a stage of hours", _RACE),
    "python -m experiments.race memory --workload autoencoder": ("a stage of hours", _RACE),
    "python -m experiments.race table": (
        "rewrites a page",
        "test_the_page_has_the_tables_of_what_is_stored",
    ),
    "make cost": ("most of an hour", _COST),
    "NGPLUGIN_FUZZ=2000 .venv/bin/python -m pytest tests/test_fuzz.py": (
        "a quarter of an hour",
        "test_it_trains_or_says_in_one_line_what_is_wrong",
    ),
    "make soak": ("most of an hour", "test_a_short_one_ends_through_faults_and_endings"),
    "make cost QUICK=1": ("minutes", _COST),
    "python -m experiments.cost": ("rewrites a page", _PAGE),
    "python -m experiments.cost --measure linear_algebra": ("minutes", _COST),
    "python -m experiments.scaling": ("rewrites a page", _PAGE),
    "python -m experiments.scaling --measure": (
        "minutes",
        "test_the_parts_of_a_step_are_told_apart",
    ),
    "python -m experiments.scaling --device h100 --model gpt2-small --examples 32 "
    "--refresh-every 100": ("ten seconds, as another one that is run", _SCALING),
    "python -m experiments.scaling --link-between 12.5e9 --training-efficiency 0.35": (
        "ten seconds, as another one that is run",
        _SCALING,
    ),
    "make docs": ("is built by a test", "test_every_page_is_there"),
    "python -m http.server --directory build/site": ("goes on for ever", NOBODY),
    "python -m experiments.explain": (
        "rewrites a page",
        "test_the_script_writes_pictures_and_captions",
    ),
    ".venv/bin/python -m jupyter nbconvert --to notebook --execute --inplace "
    "--ExecutePreprocessor.record_timing=False docs/notebook.ipynb": (
        "rewrites the notebook",
        "test_it_puts_out_what_it_was_committed_with",
    ),
    "wandb login": ("needs an account", NOBODY),
    "wandb sweep sweeps/natgrad_wandb.yaml": (
        "needs an account",
        "test_an_agent_of_wandb_starts_what_train_py_understands",
    ),
    "wandb agent ENTITY/ngplugin/SWEEP": (
        "needs an account",
        "test_an_agent_of_wandb_starts_what_train_py_understands",
    ),
    ".venv/bin/python -m pytest tests/test_trust_region.py": ("is run with all tests", NOBODY),
    "source .venv/bin/activate": ("is for a shell", NOBODY),
    "pre-commit install": (
        "changes the repository",
        "test_pre_commit_has_the_linter_of_the_requirements",
    ),
    "wandb sync outputs/.../wandb/offline-run-...": ("sends to a server", NOBODY),
    "ngplugin report FOLDER": ("is run with other folders", "test_a_documented_command"),
    "pip install ngplugin": ("downloads", "test_smoke_callback"),
}

RUN = "outputs/2026-01-31/12-00-00-natgrad"
#: What stands for something of the reader's own.
PLACEHOLDERS = {
    "experiment=NAME": "experiment=digits_mlp",
    "--lr_scheduler=...": "--lr_scheduler=CosineAnnealingLR --lr_scheduler.T_max=4",
}
TINY = ("data=digits", "model=mlp", "model.hidden=[8]", "callbacks=none")
SHORT = ("trainer=quick", "trainer.max_steps=2", "trainer.limit_train_batches=2",
         "trainer.accelerator=cpu", "logger=csv", "report=false")  # fmt: skip
QUIET = ("accelerator=cpu", "logger=false", "enable_checkpointing=false", "max_steps=2",
         "enable_progress_bar=false", "enable_model_summary=false")  # fmt: skip

THEIR_SCRIPT = """
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel

trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(BoringModel())
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
            if COMMAND.match(command) and not SPOKEN_OF.match(command):
                found.setdefault(command.replace("'", ""), page.name)
    return {command: page for command, page in found.items() if command}


COMMANDS = documented()


def test_every_command_has_a_way_to_be_run_and_the_table_has_no_other() -> None:
    assert len(COMMANDS) > 40
    unknown = [c for c in COMMANDS if c not in NOT_RUN and way(c) is None]
    assert not unknown, "neither run here nor in NOT_RUN, with a reason"
    assert set(NOT_RUN) <= set(COMMANDS), "no page has these"
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for command, (_, test) in NOT_RUN.items():
        assert test is NOBODY or f"\ndef {test}(" in tests, command


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
        run_ours(patch, "optimizer=natgrad", f"hydra.run.dir={RUN}", *TINY)
        sweep = "hydra.sweep.dir=multirun/2026-01-31/12-00-00"
        run_ours(patch, "-m", "optimizer=adamw,natgrad", sweep, *TINY)
    shutil.copytree(folder / RUN / "csv", folder / "lightning_logs/version_3")
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
    elif any(word.startswith("-") for word in overrides):  # --help, --cfg, --info
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        GlobalHydra.instance().clear()
        try:
            train.main()
        except SystemExit as end:  # after --help
            if end.code:
                raise
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


def unmodified(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A script of theirs, with variables of the environment before it."""
    *variables, _, script = words
    for variable in variables:
        monkeypatch.setenv(*variable.split("=", 1))
    names = runpy.run_path(script, run_name="__main__")
    assert type(names["trainer"].strategy.optimizers[0]).__name__ == "WrappedNaturalGradient"


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
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


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
    for module in re.findall(r"-m ((?:experiments|tests)[\w.]*)(?![\w.$])", done.stdout):
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
