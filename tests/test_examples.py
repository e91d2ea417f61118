"""Every example runs as its first line says, and learns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 60


def accuracy(tmp_path: Path, *command: str) -> float:
    done = subprocess.run(
        [sys.executable, EXAMPLES / command[0], *command[1:]],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1].removeprefix("accuracy "))


@pytest.mark.supports("Loops", "Plain PyTorch: observe(), backward(), step()")
def test_plain_loop(tmp_path: Path) -> None:
    assert accuracy(tmp_path, "plain_loop.py") > 0.95


@pytest.mark.supports("Loops", "Lightning Fabric: setup(model, optimizer)")
def test_fabric_loop(tmp_path: Path) -> None:
    assert accuracy(tmp_path, "fabric_loop.py") > 0.95


@pytest.mark.supports("Loops", "Lightning Fabric: precision bf16-mixed")
def test_fabric_loop_in_bf16(tmp_path: Path) -> None:
    assert accuracy(tmp_path, "fabric_loop.py", "--precision", "bf16-mixed") > 0.95


@pytest.mark.supports("Entry points", "Trainer(callbacks=[NaturalGradient()])")
def test_lightning_module(tmp_path: Path) -> None:
    assert accuracy(tmp_path, "lightning_module.py") > 0.95


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert f"python examples/{path.name}" in text.splitlines()[0]
    assert f"def test_{path.stem}(" in Path(__file__).read_text()
