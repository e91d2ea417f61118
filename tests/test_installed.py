"""ngplugin as users have it: installed in an environment of its own, used in another directory."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.environment import Environment

PROJECTS = Path(__file__).with_name("projects")
Installed = Callable[[str], Environment]

CALLBACK = """
import torch, ngplugin, lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel

callback = ngplugin.NaturalGradient()
L.Trainer(max_steps=8, accelerator="cpu", logger=False, callbacks=[callback]).fit(BoringModel())
print(callback.summary()["steps"], ngplugin.__file__)
"""


def last_line(text: str) -> str:
    return text.splitlines()[-1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project shaped like lightning-hydra-template."""
    return Path(shutil.copytree(PROJECTS / "hydra_template", tmp_path / "project"))


def train(environment: Environment, project: Path, *overrides: str) -> str:
    """What its `src/train.py` prints; the loss comes last."""
    return environment.run(project, "src/train.py", *overrides)


def loss(said: str) -> float:
    return float(last_line(said).removeprefix("val/loss "))


# -- the wheel that is built from the sdist --------------------------------------------------------


@pytest.mark.supports("Installation", "A wheel from the sdist: the callback")
def test_smoke_callback(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(CALLBACK)
    steps, where = last_line(installed("sdist").run(tmp_path, "main.py")).split()
    assert steps == "8"
    assert "site-packages" in where


@pytest.mark.supports("Installation", "A wheel from the sdist: LightningCLI")
@pytest.mark.supports("Namespaces", "LightningCLI of lightning and of pytorch_lightning")
def test_smoke_cli(installed: Installed, tmp_path: Path) -> None:
    """Of pytorch_lightning; that of lightning is in test_lightning_cli."""
    arguments = ["--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    arguments += ["--trainer.callbacks+=ngplugin.NaturalGradient"]
    arguments += ["--trainer.callbacks.kl_radius=0.1"]
    said = installed("sdist").run(
        tmp_path, PROJECTS / "cli.py", "pytorch_lightning", "fit", *arguments
    )
    assert last_line(said) == "WrappedNaturalGradient 0.1"


# -- lightning-hydra-template ----------------------------------------------------------------------


@pytest.mark.supports("Installation", "Editable, sdist: a Hydra override")
@pytest.mark.supports("Hydra", "lightning-hydra-template: python src/train.py +natgrad=default")
@pytest.mark.parametrize("kind", ["editable", "sdist"])  # pip makes a wheel of the second
def test_a_template_project_trains_by_one_override(
    installed: Installed, kind: str, project: Path
) -> None:
    overrides = ["logger=csv", "+natgrad=default", "callbacks.natural_gradient.kl_radius=0.2"]
    assert loss(train(installed(kind), project, *overrides)) < 0.4  # by its own Adam: 0.7
    (metrics,) = project.glob("logs/*/csv/version_0/metrics.csv")
    with metrics.open() as file:
        logged = next(csv.reader(file))
    assert {"val/loss", "natgrad/kl", "natgrad/kl_radius"} <= set(logged)


@pytest.mark.supports("Hydra", "lightning-hydra-template: debug=default, which nulls callbacks")
def test_a_template_project_keeps_the_callback_in_debug_mode(
    installed: Installed, project: Path
) -> None:
    overrides = ["debug=default", "experiment=example", "+natgrad=default"]
    said = train(installed("sdist"), project, *overrides)
    assert "what preconditions each parameter" in said


@pytest.mark.supports("Hydra", "lightning-hydra-template: model.optimizer._target_")
def test_a_template_project_takes_the_optimizer_alone(installed: Installed, project: Path) -> None:
    target = "model.optimizer._target_=ngplugin.NaturalGradientOptimizer"
    assert loss(train(installed("sdist"), project, target, "model.optimizer.lr=1.0")) < 0.4


# -- without an edit -------------------------------------------------------------------------------


def points(environment: Environment, folder: Path, name: str, **variables: str) -> dict[str, Any]:
    """What a script that knows nothing of ngplugin tells of its training."""
    said = environment.run(folder, PROJECTS / "points.py", name, **variables)
    told: dict[str, Any] = json.loads(last_line(said))
    told["said"] = said
    return told


@pytest.mark.supports("NGPLUGIN_AUTO=1", "An unmodified script with lightning")
def test_an_unmodified_script(installed: Installed, tmp_path: Path) -> None:
    options = "kl_radius=0.2,show_coverage=false"
    told = points(
        installed("sdist"), tmp_path, "lightning.pytorch",
        NGPLUGIN_AUTO="1", NGPLUGIN_OPTIONS=options,
    )  # fmt: skip
    assert "AutomaticNaturalGradient" in told["callbacks"]
    assert told["optimizer"] == "WrappedNaturalGradient"
    assert told["loss"] < 0.4
    assert "this fit is by natural gradient" in told["said"]


@pytest.mark.supports("NGPLUGIN_AUTO=1", "An unmodified script with pytorch_lightning")
@pytest.mark.supports("Namespaces", "pytorch_lightning alone, lightning not installed")
def test_where_only_pytorch_lightning_is_installed(
    distributions: dict[str, list[str | Path]], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "environment", without=["lightning"])
    environment.install(*distributions["wheel"])
    told = points(environment, tmp_path, "pytorch_lightning", NGPLUGIN_AUTO="1")
    assert told["lightning"] == ["pytorch_lightning"]
    assert told["optimizer"] == "WrappedNaturalGradient"
    assert told["loss"] < 0.4


@pytest.mark.supports("Namespaces", "The optimizer without any Lightning installed")
@pytest.mark.refuses("Namespaces", "The callback without any Lightning installed")
def test_where_no_lightning_is_installed(
    distributions: dict[str, list[str | Path]], tmp_path: Path
) -> None:
    environment = Environment(
        tmp_path / "environment", without=["lightning", "pytorch_lightning", "lightning_fabric"]
    )
    environment.install(*distributions["wheel"])
    said = environment.run(tmp_path, "-c", "from ngplugin import NaturalGradient", refused=True)
    assert "pip install lightning" in last_line(said)
    loop = "from ngplugin import NaturalGradientOptimizer as N; print(N.__name__)"
    assert last_line(environment.run(tmp_path, "-c", loop)) == "NaturalGradientOptimizer"
