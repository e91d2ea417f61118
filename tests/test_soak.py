"""The soak: a short one really runs."""

from __future__ import annotations

import math
from pathlib import Path

from experiments.soak.faults import FAULTS
from experiments.soak.running import Plan, run


def test_a_short_one_ends_through_faults_and_endings(tmp_path: Path) -> None:
    plan = Plan(steps=24, kinds=FAULTS, endings=2, rate=0.6, batches=4)
    found = run(tmp_path, plan)
    assert found["steps"] == 24
    assert 1 <= sum(found["ended"].values()) <= 2
    assert len(found["faults"]) > 4
    assert math.isfinite(found["train loss"])
    assert run(tmp_path, plan)["processes"] == found["processes"]
