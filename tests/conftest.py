"""What all tests share: one thread, configs composed as `train.py` would, what is distributed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from tests.environment import REPOSITORY, Environment


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _wandb_has_no_mode() -> Iterator[None]:
    """A logger of Lightning that is offline says so to the whole process."""
    os.environ.pop("WANDB_MODE", None)  # by a fixture of many tests
    yield
    os.environ.pop("WANDB_MODE", None)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | Path]]:
    """What pip is given: a checkout, a wheel built from it, and the sdist that pip builds from."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", folder,
         REPOSITORY],
        check=True, capture_output=True,
    )  # fmt: skip
    return {
        "editable": ["--editable", REPOSITORY],
        "wheel": [*folder.glob("*.whl")],
        "sdist": [*folder.glob("*.tar.gz")],
    }


@pytest.fixture(scope="session")
def installed(
    distributions: dict[str, list[str | Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Environment]:
    """An environment with ngplugin installed from one of the `distributions`."""

    @cache
    def environment(kind: str) -> Environment:
        return Environment(tmp_path_factory.mktemp(kind)).install(*distributions[kind])

    return environment


@pytest.fixture
def compose_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose `conf/train.yaml` with overrides; the run's folder is `tmp_path`."""

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            cfg = compose("train", list(overrides), return_hydra_config=True)
        cfg.hydra.runtime.output_dir = str(tmp_path)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    return composed


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`train.py -m` in this process, in an empty folder; returns what it printed."""
    from train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    # For other processes, which start in that folder.
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}")

    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *arguments])
        capfd.readouterr()
        try:
            main()
            ended = 0
        except SystemExit as end:
            ended = int(end.code or 0)
        printed = capfd.readouterr()
        assert ended == status, printed.err
        return printed.out + printed.err

    return run
