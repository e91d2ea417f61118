"""What is in the wheel, and what another Hydra project gets from it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip would; built from the sdist, as on an index."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in OTHER.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def python(folder: Path, site: Path, *arguments: str) -> str:
    """What another project's Python prints, with the wheel and without this repository."""
    # The installed package may be this checkout in editable form: the wheel's comes before it.
    start = "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); sys.path.insert(0, '.'); "
    start += f"sys.path[:] = [p for p in sys.path if p not in ({str(REPOSITORY)!r}, "
    start += f"{str(REPOSITORY / 'src')!r})]; sys.argv[0] = sys.argv.pop(1); "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, str(site), *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_the_wheel_holds_package_configs_and_plugin(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
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
    }
    assert "hydra_plugins/__init__.py" not in names  # it would hide everyone else's plugins
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if "dist-info" not in name} == {"ngplugin", "hydra_plugins"}
    (metadata,) = installed.glob("*.dist-info/METADATA")
    required = [
        line for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]  # fmt: skip
    assert [line.split()[1].split(">")[0] for line in required] == ["lightning", "torch"]


def test_another_project_finds_natgrad(installed: Path, project: Path) -> None:
    said = python(project, installed, "main.py", "optimizer=natgrad")
    # Light: the plugin runs in every Hydra application of the environment.
    assert said.split() == ["ngplugin.NaturalGradientOptimizer", "bar", "natural_gradient", "False"]
    said = python(project, installed, "main.py", "callbacks=[mine,natgrad]")
    assert said.split()[:3] == ["torch.optim.SGD", "bar", "natural_gradient"]


def test_another_projects_own_files_win(installed: Path, project: Path) -> None:
    assert python(project, installed, "main.py", "optimizer=adamw").split()[0] == "theirs.AdamW"
    assert python(project, installed, "main.py").split()[:2] == ["torch.optim.SGD", "bar"]


def test_the_configs_are_a_package_too(installed: Path, project: Path) -> None:
    arguments = ("hydra.searchpath=[pkg://ngplugin.conf]", "optimizer=natgrad")
    (project / "only").mkdir()  # its plugin is left out, else that would have found them
    (project / "only" / "ngplugin").symlink_to(installed / "ngplugin")
    said = python(project, project / "only", "main.py", *arguments)
    assert said.split()[0] == "ngplugin.NaturalGradientOptimizer"


def test_in_a_checkout_the_configs_are_a_package_too() -> None:
    from importlib.resources import files

    assert files("ngplugin.conf").joinpath("optimizer/natgrad.yaml").is_file()


def test_importing_the_package_imports_neither_hydra_nor_wandb(project: Path) -> None:
    code = "import sys, ngplugin; print([m for m in ('hydra', 'wandb') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
