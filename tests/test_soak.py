"""The soak: a short one really runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.soak.running import run


def test_a_short_one_ends_through_faults_and_endings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.soak.running.EPOCHS_BETWEEN", 1)
    found = run(tmp_path, seed=0, steps=24, faulty=True, endings=2, rate=0.6, batches=4)
    assert found["steps"] == 24
    assert 1 <= sum(found["ended"].values()) <= 2
    assert len(found["faults"]) > 4
    assert math.isfinite(found["train loss"])
    assert run(tmp_path, seed=0, steps=24, faulty=True)["processes"] == (found["processes"])
