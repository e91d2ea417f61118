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
        ("optimizer=adamm", "expected one of adam, adamw, muon, natgrad, sgd; did you mean adam?"),
        ("callbacks=[default,natgard]", "did you mean natgrad?"),
        ("optimzer=sgd", "did you mean optimizer?"),
        ("optimizer.kl_raduis=1", "did you mean optimizer.kl_radius?"),
        ("trainer.max_epocs=1", "did you mean trainer.max_epochs?"),
        ("+new.key=1", "nothing reads a key new; expected below one of callbacks, data"),
        ("++traner.max_steps=1", "nothing reads a key traner; "),
        ("++traner.max_steps=1", "did you mean trainer?"),
        ("data.batch_size=${metric}", "expected a whole number, such as 128, and not 'val/ac"),
        ("+metric.x=1", "metric is one value, such as val/accuracy, and has no keys below it"),
        ("metric={a:1}", "expected one value, such as val/accuracy"),
        ("seed=1 --mutlirun", "unrecognized arguments: --mutlirun; did you mean --multirun?"),
        ("seed=1 -m lr=1", "lr=1: expected beside the other KEY=VALUE, with -m and the like first"),
        ("-m --cfg job", "--multirun with --cfg: expected one of them"),
        ("--resolve", "--resolve: expected beside --cfg"),
        ("--experimental-rerun=nope", "--experimental-rerun=nope: expected a pickle"),
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
        "-m optimizer=glob(ad*)",
        "+rate=0.1 optimizer.lr=${rate}",
        "hydra.run.dir=somewhere hydra/launcher=basic",
        "-m hparams_search=natgrad_optuna hydra.sweeper.n_trials=3 hydra/launcher=joblib",
        "--config-name other anything=goes",
    ],
)
def test_accepted(arguments: str) -> None:
    check(arguments.split(), REPOSITORY / "conf", "train")


def runs(arguments: str) -> list[list[str]]:
    return check(arguments.split(), REPOSITORY / "conf", "train")


def test_the_runs_of_a_sweep_are_known_before_it_begins() -> None:
    assert runs("seed=1 optimizer=sgd") == [["seed=1", "optimizer=sgd"]]
    swept = runs("-m optimizer=sgd,adam seed=range(2) report=false")
    assert swept == [
        [f"optimizer={name}", f"seed={seed}", "report=false"]
        for name in ("sgd", "adam") for seed in (0, 1)
    ]  # fmt: skip
    grid = runs("-m hparams_search=natgrad_grid optimizer.kl_radius=0.3")
    assert [run[0] for run in grid] == ["optimizer.kl_radius=0.3"] * 3
    assert [run[1] for run in grid] == [f"optimizer.damping={x}" for x in (0.03, 0.1, 0.3)]
    assert runs("-m optimizer.lr=interval(0.1,1) seed=1,2") == [["seed=1"], ["seed=2"]]


def test_of_many_runs_each_value_is_in_one() -> None:
    many = runs("-m seed=range(20) optimizer.lr=1,2,3")
    assert len(many) == 22
    assert {word for run in many for word in run} == {
        *(f"seed={i}" for i in range(20)), *(f"optimizer.lr={i}" for i in (1, 2, 3)),
    }  # fmt: skip


def test_where_nothing_is_run_nothing_is_rehearsed() -> None:
    for arguments in ("--cfg job", "--help", "--info config", "--config-name other"):
        assert runs(arguments) == []


def test_the_program_ends_with_that_line_alone_and_status_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", REPOSITORY / "train.py", "optimizer=adamm"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    imported, said = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else said).append(line)
    choices = "adam, adamw, muon, natgrad, sgd"
    meant = "; did you mean adam?"
    assert said == [f"train.py: error: optimizer=adamm: expected one of {choices}{meant}"]
    assert done.returncode == 2
    # It takes seconds to import, which a misspelled word should not.
    assert not [line for line in imported if line.endswith((" torch", " lightning", " wandb"))]
    assert not list(tmp_path.iterdir())
