"""A logger that fails in the middle of a fit changes no step of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.environment import REPOSITORY

#: What each fault is told of, and how; a word of it.
FAULTS = {
    "csv, no room": "File too large",
    "csv, no room for a while": "File too large",
    "tensorboard, no room": "File too large",
    "wandb, finished by somebody": "is finished",
    "wandb, no network": "Network is unreachable",
    "wandb, service killed": "Connection",
}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("failing")
    path = f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.projects.failing_loggers", str(folder)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": path, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr
    return {line["case"]: line for line in lines}


@pytest.mark.supports("Faults", "loggers: no room, no network, a run that ends, a dead service")
@pytest.mark.parametrize("case", [*FAULTS, "wandb, no room", "wandb, server gone"])
def test_the_fit_goes_on_with_the_same_steps(case: str, fits: dict[str, dict[str, Any]]) -> None:
    found = fits[case]
    assert found["steps"] == fits["none"]["steps"] == 24
    assert found["weights"] == fits["none"]["weights"]


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_told_of_once_for_what_it_hinders(
    case: str, fits: dict[str, dict[str, Any]]
) -> None:
    told = fits[case]["told"]
    kinds = [text.split(" could not be logged")[0] for text in told]
    assert "ngplugin: metrics" in kinds
    assert len(set(kinds)) == len(kinds)
    assert all(FAULTS[case] in text for text in told)
    assert all("training goes on" in text for text in told)


def test_where_the_server_of_wandb_is_gone_all_is_kept_to_be_sent_later(
    fits: dict[str, dict[str, Any]],
) -> None:
    found = fits["wandb, server gone"]
    assert found["sent"]  # it was there at first
    assert found["written"] == found["steps"]
    assert found["told"] == []  # wandb tells of it at the end


def test_what_is_raised_is_raised_by_lightning_when_it_closes_the_files(
    fits: dict[str, dict[str, Any]],
) -> None:
    """All steps are made by then; where there is room again nothing is lost."""
    raised = {case: found["raised"] for case, found in fits.items() if found["raised"]}
    assert set(raised) <= {"csv, no room", "tensorboard, no room"}
    assert fits["csv, no room for a while"]["raised"] is None
