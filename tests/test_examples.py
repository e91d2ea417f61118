"""Every example runs as its first line says, and learns."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 60


@pytest.fixture
def accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., float]:
    """Runs an example in this process, which has imported most already."""

    def run(*command: str) -> float:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*command])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / command[0]), run_name="__main__")
        return float(capsys.readouterr().out.splitlines()[-1].removeprefix("accuracy "))

    return run


@pytest.mark.supports("Loops", "Plain PyTorch: observe(), backward(), step()")
def test_plain_loop(accuracy: Callable[..., float]) -> None:
    assert accuracy("plain_loop.py") > 0.95


@pytest.mark.supports("Loops", "Lightning Fabric: setup(model, optimizer)")
def test_fabric_loop(accuracy: Callable[..., float]) -> None:
    assert accuracy("fabric_loop.py") > 0.95


@pytest.mark.supports("Loops", "Lightning Fabric: precision bf16-mixed")
def test_fabric_loop_in_bf16(accuracy: Callable[..., float]) -> None:
    assert accuracy("fabric_loop.py", "--precision", "bf16-mixed") > 0.95


@pytest.mark.supports("Entry points", "Trainer(callbacks=[NaturalGradient()])")
def test_lightning_module(tmp_path: Path) -> None:
    """In a process of its own, as everybody would."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "lightning_module.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].removeprefix("accuracy ")) > 0.95


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert f"python examples/{path.name}" in text.splitlines()[0]
    assert f"def test_{path.stem}(" in Path(__file__).read_text()
