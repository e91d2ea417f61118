"""What is in the wheel, and what another Hydra project gets from each kind of installation."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.environment import Environment

Installed = Callable[[str], Environment]
KINDS = ["editable", "wheel", "sdist"]

# Another project: its own `optimizer` and `callbacks` groups, and no word of ngplugin.
OTHER = {
    "conf/config.yaml": "defaults:\n  - optimizer: mine\n  - callbacks: mine\n",
    "conf/optimizer/mine.yaml": "_target_: torch.optim.SGD\nlr: 0.5\n",
    "conf/optimizer/adamw.yaml": "_target_: theirs.AdamW\n",
    "conf/callbacks/mine.yaml": "bar:\n  _target_: lightning.pytorch.callbacks.TQDMProgressBar\n",
    "main.py": (
        "import hydra, sys\n"
        "from omegaconf import OmegaConf\n"
        "@hydra.main(version_base='1.3', config_path='conf', config_name='config')\n"
        "def main(cfg):\n"
        "    print(cfg.optimizer._target_, *sorted(cfg.callbacks), 'torch' in sys.modules)\n"
        "main()\n"
    ),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in OTHER.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_wheel_holds_package_configs_and_plugin(
    distributions: dict[str, list[str | Path]], tmp_path: Path
) -> None:
    (wheel,) = distributions["wheel"]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "ngplugin/__init__.py",
        "ngplugin/py.typed",
        "ngplugin/conf/__init__.py",
        "hydra_plugins/ngplugin_searchpath/__init__.py",
    } <= names
    # Those of train.py's own models and data would be of no use elsewhere.
    assert {n.removeprefix("ngplugin/conf/") for n in names if n.endswith(".yaml")} == {
        "optimizer/natgrad.yaml",
        "callbacks/natgrad.yaml",
        "callbacks/natural_gradient/report.yaml",
        "natgrad/default.yaml",
    }
    assert "hydra_plugins/__init__.py" not in names  # it would hide everyone else's plugins
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if "dist-info" not in name} == {"ngplugin", "hydra_plugins"}
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    required = [
        line for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]  # fmt: skip
    assert [line.split()[1].split(">")[0] for line in required] == ["lightning", "torch"]


@pytest.mark.supports("Hydra", "optimizer=natgrad in another project, found once installed")
@pytest.mark.parametrize("kind", KINDS)
def test_another_project_finds_natgrad(installed: Installed, kind: str, project: Path) -> None:
    said = installed(kind).run(project, "main.py", "optimizer=natgrad")
    # Light: the plugin runs in every Hydra application of the environment.
    assert said.split() == ["ngplugin.NaturalGradientOptimizer", "bar", "natural_gradient", "False"]


@pytest.mark.supports("Hydra", "callbacks=[mine,natgrad] in another project")
def test_another_project_has_the_callback_beside_its_own(
    installed: Installed, project: Path
) -> None:
    said = installed("wheel").run(project, "main.py", "callbacks=[mine,natgrad]")
    assert said.split()[:3] == ["torch.optim.SGD", "bar", "natural_gradient"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_projects_own_files_win(installed: Installed, kind: str, project: Path) -> None:
    run = installed(kind).run
    assert run(project, "main.py", "optimizer=adamw").split()[0] == "theirs.AdamW"
    assert run(project, "main.py").split()[:2] == ["torch.optim.SGD", "bar"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_are_a_package_too(installed: Installed, kind: str, project: Path) -> None:
    said = installed(kind).run(project, "main.py", "--info", "searchpath")
    assert "pkg://ngplugin.conf" in said
    look = "from importlib.resources import files as f; import ngplugin; print("
    look += "f('ngplugin.conf').joinpath('natgrad/default.yaml').is_file(), ngplugin.__file__)"
    found, where = installed(kind).run(project, "-c", look).split()
    assert found == "True"
    assert ("site-packages" in where) == (kind != "editable")


def test_importing_the_package_imports_neither_hydra_nor_wandb_nor_torch(project: Path) -> None:
    names = "('hydra', 'wandb', 'torch', 'lightning')"
    code = f"import sys, ngplugin; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
