"""LightningCLI: from the command line and from YAML, with its help."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from ngplugin import (
    ExponentialDamping,
    KlMatching,
    NaturalGradient,
    NaturalGradientOptimizer,
    OptionError,
)
from ngplugin.options import Options

QUIET = [
    f"--trainer.{setting}"
    for setting in (
        "accelerator=cpu",
        "logger=false",
        "enable_checkpointing=false",
        "enable_progress_bar=false",
        "enable_model_summary=false",
        "max_steps=4",
    )
]
CALLBACK = ["--trainer.callbacks+=ngplugin.NaturalGradient"]
OPTIMIZER = ["--optimizer=ngplugin.NaturalGradientOptimizer"]
SCHEDULE = {"start": 1.0, "end": 0.1, "steps": 3}


class Model(BoringModel):
    """Of a project that knows nothing of ngplugin."""


@pytest.fixture(autouse=True)
def _no_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])


def run(*arguments: str, subcommand: str = "fit") -> LightningCLI:
    return LightningCLI(
        Model, BoringDataModule, args=[subcommand, *QUIET, *arguments], save_config_callback=None
    )


def optimizer_of(cli: LightningCLI) -> Any:
    (optimizer,) = cli.trainer.strategy.optimizers
    assert isinstance(optimizer, NaturalGradientOptimizer)
    assert optimizer.report is not None
    assert optimizer.report.step == 3
    return optimizer


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert not end.value.code
    return capsys.readouterr().out


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return f"--config={path}"


@pytest.mark.supports("LightningCLI", "--trainer.callbacks+=ngplugin.NaturalGradient")
def test_the_callback_and_its_options() -> None:
    cli = run(*CALLBACK, "--trainer.callbacks.kl_radius=0.1", "--trainer.callbacks.structure=eigen")
    assert optimizer_of(cli).options == Options(kl_radius=0.1, structure="eigen")


@pytest.mark.supports(
    "LightningCLI", "--optimizer=ngplugin.NaturalGradientOptimizer, without the callback"
)
def test_the_optimizer_alone() -> None:
    cli = run(*OPTIMIZER, "--optimizer.lr=0.5", "--optimizer.kl_radius=null")
    optimizer = optimizer_of(cli)
    assert optimizer.options == Options(kl_radius=None)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert {row.block for row in optimizer.coverage().rows} == {"kronecker"}


@pytest.mark.supports("LightningCLI", "--lr_scheduler beside --optimizer")
def test_the_optimizer_with_a_scheduler_and_the_callback_that_logs_it() -> None:
    schedule = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
    cli = run(*OPTIMIZER, *schedule, *CALLBACK, "--trainer.limit_train_batches=2")
    assert optimizer_of(cli).param_groups[0]["lr"] == 0.25  # two epochs
    assert "natgrad/kl" in cli.trainer.callback_metrics


@pytest.mark.supports("LightningCLI", "YAML with class_path and init_args")
def test_yaml(tmp_path: Path) -> None:
    text = """
        trainer:
          callbacks:
            - class_path: ngplugin.NaturalGradient
              init_args:
                kl_radius: 0.1
                damping:
                  class_path: ngplugin.ExponentialDamping
                  init_args: {start: 1.0, end: 0.1, steps: 3}
    """
    options = optimizer_of(run(config_file(tmp_path, text))).options
    assert options == Options(kl_radius=0.1, damping=ExponentialDamping(**SCHEDULE))


@pytest.mark.supports("LightningCLI", "--trainer.callbacks.damping: a class with its arguments")
@pytest.mark.parametrize("form", ["", ".class_path"])
@pytest.mark.parametrize("where", [("--trainer.callbacks", CALLBACK), ("--optimizer", OPTIMIZER)])
def test_a_damping_class(where: tuple[str, list[str]], form: str) -> None:
    prefix, chosen = where
    arguments = [f"{prefix}.damping.{name}={value}" for name, value in SCHEDULE.items()]
    cli = run(*chosen, f"{prefix}.damping{form}=ngplugin.ExponentialDamping", *arguments)
    optimizer = optimizer_of(cli)
    assert optimizer.options.damping == ExponentialDamping(**SCHEDULE)
    assert optimizer.report.damping == pytest.approx(0.1)


@pytest.mark.parametrize(("text", "value"), [("0.3", 0.3), ("auto", "auto")])
def test_damping_as_a_number_or_a_word(text: str, value: Any) -> None:
    cli = run(*CALLBACK, f"--trainer.callbacks.damping={text}")
    assert optimizer_of(cli).options.damping == value


def test_an_adaptive_damping_adapts() -> None:
    chosen = "--trainer.callbacks.damping=ngplugin.KlMatching"
    optimizer = optimizer_of(run(*CALLBACK, chosen, "--trainer.callbacks.damping.start=0.2"))
    assert isinstance(optimizer.options.damping, KlMatching)
    assert optimizer.report.damping != pytest.approx(0.2)


@pytest.mark.supports("LightningCLI", "--print_config, read back with --config")
@pytest.mark.parametrize("where", [("--trainer.callbacks", CALLBACK), ("--optimizer", OPTIMIZER)])
def test_the_printed_config_can_be_read_back(
    where: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, chosen = where
    damping = [f"{prefix}.damping=ngplugin.ExponentialDamping"]
    damping += [f"{prefix}.damping.{name}={value}" for name, value in SCHEDULE.items()]
    arguments = [*chosen, f"{prefix}.noise_variance=running", *damping]
    printed = output_of(capsys, *arguments, "--print_config")
    file = config_file(tmp_path, printed)
    assert output_of(capsys, file, "--print_config") == printed
    expected = Options(noise_variance="running", damping=ExponentialDamping(**SCHEDULE))
    assert optimizer_of(run(file)).options == expected


@pytest.mark.supports("LightningCLI", "config.yaml of a run, saved and read back")
def test_the_saved_config_can_be_read_back(tmp_path: Path) -> None:
    arguments = ["fit", *QUIET, f"--trainer.default_root_dir={tmp_path}", *CALLBACK]
    LightningCLI(Model, BoringDataModule, args=arguments)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (callback,) = saved["trainer"]["callbacks"]
    assert callback["class_path"] == "ngplugin.NaturalGradient"
    assert optimizer_of(run(f"--config={tmp_path / 'config.yaml'}")).options == Options()


@pytest.mark.supports("LightningCLI", "--trainer.callbacks.help=ngplugin.NaturalGradient")
@pytest.mark.parametrize(
    ("prefix", "cls"),
    [("--trainer.callbacks", NaturalGradient), ("--optimizer", NaturalGradientOptimizer)],
)
def test_help_says_something_of_its_own_about_every_option(
    prefix: str, cls: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "9999")  # one line each
    shown = output_of(capsys, f"{prefix}.help=ngplugin.{cls.__name__}")
    _, _, described = shown.partition(f"Help for {prefix}.help")
    names = [name for name in cls.__init__.__annotations__ if name not in ("params", "return")]
    texts = re.findall(
        rf"{prefix}\.(\w+) \S+(?:, \S+ \S+)?\s+(\S.*) \(type: .*, default: .*\)", described
    )
    assert [name for name, _ in texts] == names
    assert len({text for _, text in texts}) == len(names)
    assert not [text for _, text in texts if len(text) < 15 or "see there" in text]


@pytest.mark.refuses("LightningCLI", "An option that does not exist, a value that cannot work")
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*CALLBACK, "--trainer.callbacks.structure=kroneker")
    assert "kronecker" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"kl_radius=-1.0: expected a number above 0"):
        run(*CALLBACK, "--trainer.callbacks.kl_radius=-1")


@pytest.mark.refuses("LightningCLI", "Options in both --optimizer and --trainer.callbacks")
def test_options_in_two_places_are_refused() -> None:
    with pytest.raises(OptionError, match="Give them in one place"):
        run(*OPTIMIZER, *CALLBACK, "--trainer.callbacks.kl_radius=0.1")
