"""What is wrong with a command line is told in one line, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.command_line import CommandLineError, check

REPOSITORY = Path(__file__).parents[1]


def message(*arguments: str) -> str:
    with pytest.raises(CommandLineError) as caught:
        check(arguments, REPOSITORY / "conf", "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("optimizer=adamm", "optimizer=adamm: expected one of adam, adamw, muon, natgrad, sgd"),
        (
            "data=cifar",
            "data=cifar: expected one of characters, diamonds, digits, f",
        ),
        ("model=null", "model=null: expected one of autoencoder, cnn, "),
        (
            "callbacks=[default,foo]",
            "callbacks=foo: expected one of default, median_stopping, natgrad, none",
        ),
        (
            "experiment=null",
            "experiment=null: expected one of autoencoder, char_transformer",
        ),
        (
            "experiment=foo",
            "experiment=foo: expected one of autoencoder, char_transformer",
        ),
        (
            "optimizer=adamw optimizer.learning_rate=1",
            "optimizer.learning_rate=1: no such key, expected one of optimizer.lr, "
            "optimizer.betas, optimizer.eps, optimizer.weight_decay",
        ),
        ("lr=1", "did you mean optimizer.lr?"),
        ("optimizer.lr=abc", "optimizer.lr=abc: expected a number, such as 1.0"),
        ("optimizer.lr=", "optimizer.lr=: expected a number"),
        ("optimizer.nesterov=1", "optimizer.nesterov=1: expected true or false, such as true"),
        ("trainer.max_epochs=1.5", "trainer.max_epochs=1.5: expected a whole number, such as 5"),
        ("model.channels=3", "model.channels=3: expected a list, such as [16, 32, 64]"),
        ("seed=null", "seed=null: expected a value, such as 0"),
        ("metric=[1]", "metric=[1]: expected one value, such as val/accuracy"),
        ("optimizer=adamw,sgd", "optimizer=adamw,sgd: several values are a sweep, which needs -m"),
        ("hparams_search=natgrad_grid", "natgrad_grid: a search is a sweep, which needs -m"),
        (
            "-m hparams_search=nonsense",
            "hparams_search=nonsense: expected one of natgrad_grid, natgrad_optuna",
        ),
        ("foo", "foo: expected KEY=VALUE"),
        ("optimizer.lr=[1,2", "not KEY=VALUE as Hydra reads it"),
        ("-m optimizer=adamw,adamm", "optimizer=adamm: expected one of"),
        ("-m optimizer.lr=1,b", "optimizer.lr=b: expected a number"),
        # A key of one optimizer that the other one lacks.
        ("-m optimizer=natgrad,adamw optimizer.kl_radius=0.1", "no such key, expected one of"),
    ],
)
def test_refused(arguments: str, expected: str) -> None:
    assert expected in message(*arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--info searchpath",
        "--cfg job optimizer=adamw",
        "experiment=digits_mlp model.hidden=[8]",
        "optimizer.kl_radius=null optimizer.damping=1",
        "optimizer.noise_variance=2.0",
        "optimizer.damping={_target_:ngplugin.ConstantDamping,value:0.1}",
        "callbacks=[default,natgrad] optimizer=adamw callbacks.natural_gradient.damping=0.2",
        "+trainer.limit_train_batches=3 ++trainer.devices=[0] ~callbacks.progress",
        "data.batch_size=${seed}",
        "-m optimizer=adamw,natgrad seed=range(3) optimizer.lr=0.1,1",
        "-m optimizer.lr=interval(0.1,1)",
        "hydra.run.dir=somewhere hydra/launcher=basic",
        "-m hparams_search=natgrad_optuna hydra.sweeper.n_trials=3 hydra/launcher=joblib",
        "--config-name other anything=goes",
    ],
)
def test_accepted(arguments: str) -> None:
    check(arguments.split(), REPOSITORY / "conf", "train")


def test_the_program_ends_with_that_line_alone_and_status_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", REPOSITORY / "train.py", "optimizer=adamm"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    imported, said = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else said).append(line)
    choices = "adam, adamw, muon, natgrad, sgd"
    assert said == [f"train.py: error: optimizer=adamm: expected one of {choices}"]
    assert done.returncode == 2
    # It takes seconds to import, which a misspelled word should not.
    assert not [line for line in imported if line.endswith((" torch", " lightning", " wandb"))]
    assert not list(tmp_path.iterdir())
