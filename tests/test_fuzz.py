"""Whatever is typed after `train.py`: it trains, or is told what is wrong in one line.

`NGPLUGIN_FUZZ=2000` tries so many random command lines instead of a few.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import train
from experiments.rehearsal import _FirstBatch
from tests.environment import REPOSITORY

CONF = REPOSITORY / "conf"
EXAMPLES = int(os.environ.get("NGPLUGIN_FUZZ", "8"))
GROUPS = {
    str(folder.relative_to(CONF)): sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF.rglob("*"))
    if folder.is_dir() and [*folder.glob("*.yaml")]
}

# -- what is typed -------------------------------------------------------------------------------

# The smallest that there is of each, and what is chosen beside it.
SMALL = {
    "digits": ("data=digits", "model=mlp", "model.hidden=[4]"),
    "images": ("data=digits", "model=cnn", "model.channels=[2]"),
    "autoencoder": ("experiment=autoencoder", "data=digits", "model.hidden=[4]", "model.code=2"),
    "characters": (
        "experiment=char_transformer", "data.batch_size=2", "data.context=4", "model.width=4",
        "model.layers=1",
    ),
    "photograph": (
        "experiment=implicit_image", "data.height=4", "data.width=4", "data.batch_size=4",
        "model.features=4", "model.hidden=[4]",
    ),
    "equation": (
        "experiment=poisson_pinn", "data.interior=4", "data.boundary=4", "data.grid=3",
        "model.hidden=[4]",
    ),
    "graphs": ("experiment=graph_network", "model.width=4", "model.layers=1"),
    "diamonds": ("experiment=tabular", "model.hidden=[4]"),
}  # fmt: skip
BESIDE = (
    (), ("optimizer=adamw",), ("optimizer=muon",), ("optimizer=sgd", "schedule=cosine"),
    ("optimizer=adam", "callbacks=natgrad"), ("callbacks=default",), ("logger=tensorboard",),
    ("callbacks=[default,median_stopping]", "logger=csv"), ("debug=limit",), ("debug=profiler",),
)  # fmt: skip
QUICK = (
    "trainer=quick",
    "logger=none",
    "callbacks=none",
    "report=false",
    "trainer.accelerator=cpu",
)

NUMBERS = (
    "0", "1", "2", "3", "-1", "7", "0.5", "1.5", "1e-3", "0.9", "-0.5", "1e400", "-1e400",
    "nan", "inf", "-inf", "1e18", "1e-300", "1e300", "01", "1_0", "0x10", "1000000000000000000",
    "1000000000000000000000000000000", "-0.0",
)  # fmt: skip
WORDS = (
    "null", "true", "false", "abc", "auto", "exact", "kronecker", "eigen", "diagonal",
    "matrix-free", "identity", "line-search", "quadratic", "bounded", "balanced", "natural",
    "orthogonal", "equal", "sampled", "empirical", "ggn", "propagated", "expand", "reduce",
    "absolute", "relative", "full", "running", "relu", "sine", "min", "max", "unit", "cpu",
    "gpu", "64-true", "16-mixed",
)  # fmt: skip
ODD = (
    "", "''", '"a b"', "[1,2]", "[]", "[a,b]", "[null]", "[[1]]", "[0]", "{a:1}", "{}", "${seed}",
    "${nothing}", "${trainer}", "${metric}", "${oc.env:NOT_THERE}", "${now:%Y}", "${bogus:1}", "${",
    "???", "é", "日本", "🙂", "'", '"', "a b", "a=b", "[1,2", "{a:", "$", "\\", "x" * 3000, "a\nb",
    "1,2", "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "int(3.7)", "str(3)", "*", "&a",
    "!!python/object:os", "@", "#x", "%", "None",
    "{_target_:os.system}", "{_target_:ngplugin.ConstantDamping,value:0.1}",
    "{_target_:ngplugin.KlMatching}", "{_target_:ngplugin.LinearDamping,start:1,end:0,steps:0}",
    "{_target_:ngplugin.ExponentialDamping,start:1,stop:0}",
)  # fmt: skip
TARGETS = (
    "abc", "os.system", "lightning.Trainer", "torch.optim.SGD", "torch.optim.LBFGS",
    "torch.optim.SparseAdam", "torch.nn.Linear", "torch.nn.ReLU", "ngplugin.NaturalGradient",
    "ngplugin.OptionError", "experiments.tasks.networks.mlp", "experiments.tasks.task.Task",
    "experiments.tasks.networks.ACTIVATIONS", "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.Callback", "lightning.pytorch.loggers.CSVLogger",
)  # fmt: skip
STARTS_PROCESSES = ("trainer.devices", "trainer.num_nodes")
CALLBACK = "+callbacks.more={_target_:lightning.pytorch.callbacks."
ADDED = (
    "+trainer.fast_dev_run=true", "+trainer.limit_train_batches=0", "++trainer.limit_val_batches=0",
    "++trainer.limit_test_batches=0", "+trainer.max_time=abc", "+trainer.max_time={minutes:1}",
    "+trainer.overfit_batches=0.5", "+trainer.strategy=fsdp", "+trainer.strategy=abc",
    "+trainer.gradient_clip_algorithm=value", "+trainer.gradient_clip_algorithm=abc",
    "+trainer.logger=true", "+trainer.barebones=true", "+trainer.profiler=abc",
    "+trainer.detect_anomaly=true", "+trainer.plugins=abc", "+trainer.sync_batchnorm=true",
    "+trainer.val_check_interval=0.5", "+trainer.val_check_interval=abc", "+trainer.num_nodes=0",
    "+trainer.min_steps=3", "+trainer.benchmark=abc", "+trainer.inference_mode=abc",
    "+optimizer.maximize=true", "+optimizer.params=[1]", "+model.shape=[1,2,3]", "+task.network=1",
    "+schedule.steps=1", "+callbacks.more=1", "+callbacks.more=null", "+callbacks.more={}",
    f"{CALLBACK}LearningRateMonitor}}", f"{CALLBACK}Callback}}", f"{CALLBACK}ModelCheckpoint}}",
    f"{CALLBACK}EarlyStopping,monitor:val/los}}", f"{CALLBACK}EarlyStopping,monitor:val/loss}}",
    f"{CALLBACK}StochasticWeightAveraging,swa_lrs:0.1}}", f"{CALLBACK}EarlyStopping}}",
    "+callbacks.more={_target_:ngplugin.NaturalGradient,kl_raduis:1}", "+logger.more=1",
    "+logger.more={_target_:torch.optim.SGD,params:[]}", "+logger.more={a:1}", "+logger.more=null",
    "+natgrad=default", "+foo=1", "++a.b=1", "+optimizer@second=sgd", "optimizer@x=sgd", "+seed=1",
    "callbacks=[default,natgrad]", "foo", "=1", "~", "+", "++", "a", "optimizer.lr", "~foo",
    "~foo=1",
)  # fmt: skip
HYDRA = (
    "hydra.run.dir=outputs/x", "hydra.verbose=abc", "hydra.job.chdir=true", "hydra.mode=foo",
    "hydra.output_subdir=null", "hydra.foo=1", "hydra/launcher=nope", "hydra.run.dir=",
    "hydra.run.dir=null", "hydra.run.dir=${nothing}", "~hydra.run",
    "hydra.job_logging.root.level=a",
    "hydra.callbacks=null", "hydra.sweeper.params={seed:1}", "hydra.searchpath=3", "hydra=null",
    "hydra.searchpath=[file:///nope]", "hydra/job_logging=none", "hydra.job.num=abc",
)  # fmt: skip
FLAGS = (
    "--help", "-h", "--hydra-help", "--version", "--info", "--info=config", "--cfg", "--cfg=job",
    "--cfg=foo", "--resolve", "--bogus", "--mutlirun", "-x", "-m", "--run", "--", "-",
    "--package=optimizer", "--experimental-rerun=nope",
)  # fmt: skip


@cache
def keys(chosen: tuple[str, ...]) -> dict[str, str]:
    """Every key of a config, and its value as it would be typed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return dict(_flat(compose("train", list(chosen))))


def _flat(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name in node:
        value = OmegaConf.select(node, str(name), throw_on_resolution_failure=False)
        words = {None: "null", True: "true", False: "false"}
        yield f"{prefix}{name}", words.get(value, str(value)) if _is_word(value) else str(value)
        if isinstance(value, DictConfig):
            yield from _flat(value, f"{prefix}{name}.")


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def misspelled(word: str, random: Random) -> str:
    """With a letter lost, doubled, moved, or of the other case."""
    i = random.randrange(len(word))
    a, b = word[i : i + 1], word[i + 1 : i + 2]
    return word[:i] + random.choice(["", a + a + b, b + a, a.swapcase() + b]) + word[i + 2 :]


def override(values: dict[str, str], random: Random) -> str:
    """Of one key or group, right or wrong."""
    key, group = random.choice([*values]), random.choice([*GROUPS])
    option, right = random.choice(GROUPS[group]), values[key]
    near, own = misspelled(random.choice(WORDS), random), f"${{{key}}}"
    kinds = [*[[right]] * 3, *[NUMBERS] * 2, *[WORDS] * 2, ODD, [near], [own]]
    value = random.choice(TARGETS if key.endswith("_target_") else random.choice(kinds))
    if key in STARTS_PROCESSES and value in NUMBERS:
        value = "0"
    lines = [
        *[f"{key}={value}"] * 8,
        *[random.choice(ADDED)] * 2,
        random.choice(HYDRA),
        f"{misspelled(key, random)}={value}",
        random.choice(["+", "++", "~"]) + f"{key}={value}",
        random.choice([f"~{key}", f"~{group}", f"+{key}.x={value}"]),
        *[f"{group}={option}"] * 2,
        f"{group}={random.choice(['null', value, misspelled(option, random)])}",
        f"{misspelled(group, random)}={option}",
    ]
    return random.choice(lines)


def command_line(number: int) -> list[str]:
    """Something small that works, and one to four overrides after it."""
    random = Random(number)
    chosen = (*QUICK, *SMALL[random.choice([*SMALL])], *random.choice(BESIDE))
    wrong = [override(keys(chosen), random) for _ in range(random.choice([1, 1, 2, 3, 4]))]
    flags = [random.choice(FLAGS)] if random.random() < 0.03 else []
    return [*flags, *chosen, *wrong]


# -- what comes of it ----------------------------------------------------------------------------


@contextlib.contextmanager
def left_as_it_was(folder: str) -> Iterator[None]:
    """In that folder; what a process has but once is afterwards as it was before."""
    root, variables, before = logging.getLogger(), dict(os.environ), Path.cwd()
    handlers, level = [*root.handlers], root.level
    os.environ |= {"WANDB_MODE": "disabled", "COLUMNS": "100"}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ |= variables
        for handler in (h for h in [*root.handlers] if h not in handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def two_steps() -> Iterator[list[L.Trainer]]:
    """Whatever a config says, a fit is two batches, with a validation behind them."""
    fit, trainers = L.Trainer.fit, []

    def short(trainer: Any, *arguments: Any, **options: Any) -> None:
        if not any(isinstance(c, _FirstBatch) for c in trainer.callbacks):  # no rehearsal
            trainers.append(trainer)
            trainer.check_val_every_n_epoch, trainer.val_check_interval = 1, 1.0
            trainer.fit_loop.epoch_loop.max_steps = 2
            for stage in ("train", "val", "test"):
                setattr(trainer, f"limit_{stage}_batches", 1 + (stage == "train"))
        fit(trainer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", short)
        yield trainers


def outcome(arguments: Sequence[str]) -> str:
    """ "trained", "shown", or the line in which `train.py` refuses; in this process.

    Raises:
        AssertionError: with a traceback, in more lines than one, or something is left elsewhere.
    """
    said, printed = io.StringIO(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder, left_as_it_was(folder), two_steps() as trainers,
        pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(),
        contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        left = {path.name for path in Path(folder).iterdir()}
    named = any(re.search("(dir|path|filename)=", argument) for argument in arguments)
    assert left <= {"outputs", "multirun"} or named, left
    if status == 0:
        assert all(trainer.global_step > 0 for trainer in trainers)
        return "trained" if trainers else "shown"
    assert status == 2, said.getvalue()
    (line,) = said.getvalue().splitlines()
    assert line.startswith("train.py: error: ")
    assert not trainers, line
    assert not left or any("hydra" in argument for argument in arguments), line
    return line.removeprefix("train.py: error: ")


DIGITS = (*QUICK, *SMALL["digits"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # What Hydra and OmegaConf had tracebacks or many lines for.
        ("~logger=1", "Config group override deletion value must be a string"),
        ("hydra.job_logging.root.level=abc", "hydra: Unable to configure root logger"),
        ("+logger.more=null", "logger.more=None: expected a _target_, and its arguments"),
        # What was told when training had begun, or after it, or not at all.
        ("hydra.run.dir=", "hydra.run.dir: expected a folder, for all that a run writes"),
        ("~schedule", "schedule: it is missing, and there is no run without it"),
        ("task=implicit_image", "task=implicit_image of model=mlp on data=digits: the first batch"),
        ("task=autoencoding hydra/launcher=natgrad_slurm", "on data=digits: the first batch fails"),
        ("data=graph_atlas", "mlp needs shape and classes, but GraphAtlas has inputs, outputs"),
        ("data.batch_size=5000", "data: batch_size=5000: expected at most 1297, the training"),
        ("trainer.max_epochs=0", "trainer: there is nothing to train"),
        ("metric=val/acc", "did you mean val/accuracy?"),
        ("trainer.max_steps=2", "metric=val/accuracy: the run ends before it is validated"),
        ("callbacks=default monitor=val/los", "ModelCheckpoint monitors val/los: expected one of"),
        (f"{CALLBACK}LearningRateMonitor}}", "`LearningRateMonitor` callback with `Trainer` that"),
        ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches=0: expected at least 1"),
        ("optimizer.burn_in=10", "burn_in=10 with 10 steps in all"),
        ("callbacks=natgrad callbacks.natural_gradient.lr=2", "Give them in one place"),
        ("optimizer.structure=kroneker", "did you mean 'kronecker'?"),
        ("-m optimizer.lr=1,0.5,-1", "in the run with optimizer.lr=-1, before any was begun"),
    ],
)  # fmt: skip
def test_what_was_found_is_told_before_anything_is_written(arguments: str, expected: str) -> None:
    *flags, last = arguments.replace("-m ", "-m|").split("|")
    line = outcome([*flags, *DIGITS, *last.split()])
    assert expected in line


def fails(arguments: list[str]) -> AssertionError | None:
    try:
        outcome(arguments)
    except AssertionError as error:
        return error
    return None


def shrunk(arguments: list[str]) -> list[str]:
    """What is left of arguments that fail when those are taken away that have no part in it."""
    for argument in arguments:
        fewer = [a for a in arguments if a is not argument]
        if fails(fewer):
            arguments = fewer
    return arguments


@pytest.mark.parametrize("number", range(EXAMPLES))
def test_it_trains_or_says_in_one_line_what_is_wrong(number: int) -> None:
    arguments = command_line(number)
    if error := fails(arguments):
        raise AssertionError(f"{shrunk(arguments)}: {error}") from error
