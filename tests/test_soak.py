"""The soak: a short one really runs, and what the long one came to is what its page says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.soak.__main__ import PAGE, RESULTS
from experiments.soak.faults import _KINDS
from experiments.soak.page import page
from experiments.soak.running import ENDINGS, run


def test_a_short_one_ends_through_faults_and_endings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.soak.running.EPOCHS_BETWEEN", 1)
    found = run(tmp_path, seed=0, steps=24, faulty=True, endings=2, rate=0.6, batches=4)
    assert found["steps"] == 24
    assert 1 <= sum(found["ended"].values()) <= 2
    assert len(found["faults"]) > 4
    assert math.isfinite(found["train loss"])
    assert found["test accuracy"] > 0.2
    assert run(tmp_path, seed=0, steps=24, faulty=True)["processes"] == (found["processes"])


@pytest.fixture
def results() -> Any:
    return json.loads(RESULTS.read_text())


def test_the_page_is_of_the_results(results: Any) -> None:
    assert PAGE.read_text() == page(results)


@pytest.mark.supports("Faults", "20,000 steps with all of them: as good as without (docs/soak.md)")
def test_the_long_one_ended_as_well_as_the_clean_one(results: Any) -> None:
    clean, faulty = results["clean"], results["faulty"]
    assert clean["steps"] == faulty["steps"] == 20_000
    assert set(faulty["faults"]) == set(_KINDS)
    assert set(faulty["ended"]) == set(ENDINGS)
    right = [round(500 * (r["val accuracy"] + r["test accuracy"])) for r in (clean, faulty)]
    spread = math.sqrt(sum(n * (1000 - n) / 1000 for n in right))
    assert abs(right[0] - right[1]) < 2 * spread
    assert faulty["train accuracy"] > 0.999


def test_its_memory_did_not_grow(results: Any) -> None:
    memory = results["clean"]["memory"]
    assert len(memory) == 40
    settled = memory[3:]
    assert len({seen["tensors"] for seen in settled}) < 4
    assert max(seen["bytes"] for seen in settled) < 1.03 * settled[0]["bytes"]
