"""`train.py` from the command line to the files it leaves."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CommandLineError
from experiments.tasks.classifier import Classifier
from experiments.tasks.digits import Digits
from experiments.training import train
from train import job, main

REPOSITORY = Path(__file__).parents[1]
# A second or so: the smallest task, 10 steps.
SMALL = (
    "trainer=quick",
    "data=digits",
    "model=mlp",
    "model.hidden=[16]",
    "trainer.accelerator=cpu",
)
Compose = Callable[..., DictConfig]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program itself, in a folder, with no account and no terminal."""
    hidden = ("WANDB_API_KEY", "HYDRA_FULL_ERROR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"NETRC": str(folder / "no account"), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments, *SMALL],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def written_folder(output: str) -> Path:
    (line,) = [line for line in output.splitlines() if line.startswith("Written to ")]
    return Path(line.removeprefix("Written to "))


def test_a_run_leaves_everything_in_its_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "optimizer=natgrad", "logger=wandb")
    assert done.returncode == 0, done.stderr
    for row in ("test/accuracy", "steps", "seconds", "KL of a step", "condition number", "curvatu"):
        assert row in done.stdout
    assert "natgrad/kl" in done.stdout  # in the progress bar
    folder = written_folder(done.stdout)
    assert tmp_path in folder.parents
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}

    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 10
    assert 0.2 < results["test/accuracy"] <= 1
    assert 0 < results["natgrad/kl_mean"] <= results["natgrad/kl_max"]
    assert 0 < results["natgrad/overhead"] < 1
    config = OmegaConf.load(folder / "config.yaml")
    assert config.data.seed == 0  # resolved
    rows = list(csv.DictReader((folder / "csv" / "metrics.csv").open()))
    assert len([row for row in rows if row["natgrad/kl"]]) >= 5
    (offline,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"natgrad/kl" in offline.read_bytes()
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert f"Pictures: {folder / 'report.html'}" in done.stdout
    page = (folder / "report.html").read_text()
    assert "KL of each step" in page
    assert "natgrad on digits with mlp" in page
    assert {path.stem for path in (folder / "pictures").iterdir()} >= {"loss", "kl", "spectra"}


def test_a_sweep_keeps_its_runs_apart(tmp_path: Path) -> None:
    quiet = ("logger=wandb", "report=false")
    done = run(tmp_path, "-m", "optimizer=adamw,natgrad", "seed=1,2", *quiet)
    assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.glob("multirun/*/*/[0-9]*"))
    assert [r.name for r in runs] == [
        "0-adamw-seed1", "1-adamw-seed2", "2-natgrad-seed1", "3-natgrad-seed2",
    ]  # fmt: skip
    for folder in runs:
        results = json.loads((folder / "results.json").read_text())
        assert ("natgrad/kl_mean" in results) == ("natgrad" in folder.name)
        assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    sweep = runs[0].parent
    assert "2 settings, 4 runs" in done.stdout
    assert "optimizer=natgrad" in done.stdout
    assert f"Written to {sweep / 'report.html'}" in done.stdout
    board = json.loads((sweep / "leaderboard.json").read_text())
    assert {entry["setting"] for entry in board} == {"optimizer=adamw", "optimizer=natgrad"}
    assert all(len(entry["metrics"]["test/accuracy"]["values"]) == 2 for entry in board)
    assert "train/loss against seconds" in (sweep / "report.html").read_text()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.kl_radius=-1", "optimizer: kl_radius=-1: expected a number above 0"),
        ("optimizer.fisher=full", "optimizer: fisher='full': expected one of 'sampled'"),
        ("trainer.accelerator=abacus", "Available names are: auto"),
        ("trainer.precision=7", "Precision 7 is invalid. Allowed precision values"),
        ("data.batch_size=0", "data: batch_size=0"),
        ("data.pixels=big", "data: pixels='big': expected one of 'standardized', 'unit'"),
        ("model.hidden=[0]", "model: hidden=[0]: expected positive whole numbers"),
        ("threads=0", "threads: set_num_threads expects a positive integer"),
        ("seed=-1", "seed: -1 is not in bounds"),
        ("callbacks.best.mode=best", "callbacks.best: `mode` can be "),
        ("callbacks.best.monitor=nothing", "could not find the monitored key"),
        ("data.batch_size=${nothing}", "data.batch_size: Interpolation key 'nothing' not found"),
        ("data.split_seed=???", "missing"),
    ],
)
def test_values_that_only_their_user_can_judge(
    override: str, expected: str, compose_config: Compose, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        train(compose_config(*SMALL, "logger=csv", "optimizer=natgrad", override), tmp_path)
    from experiments.command_line import one_line

    assert expected in one_line(caught.value).replace("Missing", "missing")


def test_a_bad_value_ends_the_program_with_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "optimizer=adamw", "optimizer.lr=-1", "logger=none")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["train.py: error: optimizer: Invalid learning rate: -1"]


def test_wandb_online_without_an_account_is_refused_and_does_not_ask(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no account"))
    cfg = compose_config(*SMALL, "optimizer=sgd", "logger=wandb", "logger.wandb.offline=false")
    with pytest.raises(CommandLineError, match=r"logger\.wandb\.offline=false: no account found"):
        train(cfg, tmp_path)


@pytest.mark.parametrize(("debug", "steps"), [("fdr", 1), ("limit", 3), ("profiler", 3)])
def test_debugging_trains_by_natural_gradient_all_the_same(
    debug: str, steps: int, compose_config: Compose, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    small = (*SMALL, "trainer.max_epochs=1", "logger=csv", "trainer.limit_train_batches=3")
    cfg = compose_config(*small, "optimizer=natgrad", f"debug={debug}", "trainer.max_steps=3")
    results = train(cfg, tmp_path)
    assert results["steps"] == results["natgrad/steps"] == steps
    assert "what preconditions each parameter" in capsys.readouterr().out
    assert (tmp_path / "fit-profile.txt").exists() == (debug == "profiler")


def test_an_unknown_metric_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["optimizer=adamw", "metric=accuracy", "logger=none", *SMALL]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    expected = "metric=accuracy: expected one of seconds, steps, test/accuracy, test/loss, train"
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_sweepers_are_given_the_metric(tmp_path: Path) -> None:
    """Hydra keeps what a job returned; nothing else of a sweeper is needed to see it."""
    overrides = ["optimizer=adamw", "metric=test/loss", "logger=none", *SMALL]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    cfg.hydra.runtime.output_dir = str(tmp_path)
    HydraConfig.instance().set_config(cfg)
    returned = job.__wrapped__(cfg)
    assert returned == json.loads((tmp_path / "results.json").read_text())["test/loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "natgrad"])
def test_the_same_seed_is_the_same_run_bit_for_bit(
    optimizer: str, compose_config: Compose, tmp_path: Path
) -> None:
    def weights(seed: int, folder: str) -> dict[str, torch.Tensor]:
        options = ("logger=none", f"optimizer={optimizer}", f"seed={seed}")
        cfg = compose_config(*SMALL, *options)
        cfg.callbacks.best.dirpath = str(tmp_path / folder)
        train(cfg, tmp_path / folder)
        return torch.load(tmp_path / folder / "last.ckpt", weights_only=True)["state_dict"]

    first, again, other = weights(5, "first"), weights(5, "again"), weights(6, "other")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_optimizer_with_every_schedule(
    optimizer: str, schedule: str, compose_config: Compose, tmp_path: Path
) -> None:
    options = ("logger=csv", f"optimizer={optimizer}", f"schedule={schedule}")
    assert train(compose_config(*SMALL, *options), tmp_path)["steps"] == 10


def test_natural_gradient_in_the_place_of_another_optimizer(
    compose_config: Compose, tmp_path: Path
) -> None:
    options = ("logger=csv", "optimizer=adamw", "schedule=cosine", "callbacks=[default,natgrad]")
    results = train(compose_config(*SMALL, *options), tmp_path)
    assert results["natgrad/steps"] == 10


def test_without_logger_and_callbacks(compose_config: Compose, tmp_path: Path) -> None:
    options = ("logger=none", "callbacks=none", "optimizer=sgd")
    assert "test/accuracy" in train(compose_config(*SMALL, *options), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "results.json"}


def test_online_wandb_is_told_apart_by_its_target(compose_config: Compose, tmp_path: Path) -> None:
    cfg = compose_config(*SMALL, "logger=wandb", "optimizer=sgd")
    cfg.logger.wandb._target_ = "lightning.pytorch.loggers.no.WandbLogger"
    with pytest.raises(CommandLineError, match=r"logger: .*loggers\.no\.WandbLogger"):
        train(cfg, tmp_path)


def test_a_network_that_does_not_fit_the_data_is_told_so(
    compose_config: Compose, tmp_path: Path
) -> None:
    cfg = compose_config("data=digits", "model=dense", "logger=none")
    message = "model: experiments.tasks.networks.dense needs inputs and outputs, but Digits has"
    with pytest.raises(CommandLineError, match=message):
        train(cfg, tmp_path)


# What each experiment is judged by.
JUDGED_BY = {
    "autoencoder": {"loss", "squared_error"},
    "char_transformer": {"loss", "bits"},
    "digits_mlp": {"loss", "accuracy"},
    "graph_network": {"loss", "rmse", "r2"},
    "implicit_image": {"loss", "psnr"},
    "poisson_pinn": {"error"},
    "tabular": {"loss", "rmse"},
}


def test_every_experiment_is_judged() -> None:
    names = {path.stem for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")}
    assert names - {"fashion_cnn"} == set(JUDGED_BY)  # its data are not in a package


@pytest.mark.parametrize("name", JUDGED_BY)
def test_every_experiment_runs(name: str, compose_config: Compose, tmp_path: Path) -> None:
    options = (f"experiment={name}", "trainer=quick", "trainer.max_steps=2", "logger=csv")
    cfg = compose_config(*options, "optimizer=adamw", "trainer.limit_train_batches=2")
    results = train(cfg, tmp_path)
    assert results["steps"] == 2
    for stage in ("val", "test"):
        assert {f"{stage}/{metric}" for metric in JUDGED_BY[name]} <= set(results)
    assert cfg.metric in results
    assert cfg.monitor in results
    (best,) = set((tmp_path / "checkpoints").iterdir()) - {tmp_path / "checkpoints" / "last.ckpt"}
    assert best.suffix == ".ckpt"
    if name == "char_transformer":
        assert results["data/characters"] > 400_000
        assert len(results["data/sha256"]) == 64
    if name == "implicit_image":
        assert (tmp_path / "picture.png").stat().st_size > 30_000


def test_the_classifier_works_without_a_scheduler() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    module = Classifier(network, lambda params: torch.optim.SGD(params, lr=0.5))
    data = Digits(batch_size=100)
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 7
    known = {"train/loss", "train/seconds", "val/loss", "val/accuracy"}
    assert set(trainer.callback_metrics) == known
