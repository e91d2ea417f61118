"""The soak: a short one really runs, and what the long one came to is what its page says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.soak.__main__ import PAGE, RESULTS
from experiments.soak.faults import FAULTS, NONSENSE
from experiments.soak.page import held_out, page, standard_error
from experiments.soak.running import ENDINGS, OPTIMIZERS, Plan, run


def test_a_short_one_ends_through_faults_and_endings(tmp_path: Path) -> None:
    plan = Plan(steps=24, kinds=FAULTS, endings=2, rate=0.6, batches=4)
    found = run(tmp_path, plan)
    assert found["steps"] == 24
    assert 1 <= sum(found["ended"].values()) <= 2
    assert len(found["faults"]) > 4
    assert math.isfinite(found["train loss"])
    assert run(tmp_path, plan)["processes"] == found["processes"]


@pytest.fixture
def results() -> Any:
    return json.loads(RESULTS.read_text())


def test_the_page_is_of_the_results(results: Any) -> None:
    assert PAGE.read_text() == page(results)


@pytest.mark.supports("Faults", "20,000 steps with all of them: as good as without (docs/soak.md)")
def test_the_long_one_ended_as_well_as_the_clean_one(results: Any) -> None:
    clean, faulty = results["clean"], results["faulty"]
    assert clean["steps"] == faulty["steps"] == 20_000
    assert set(faulty["faults"]) == set(FAULTS)
    assert set(faulty["ended"]) == set(ENDINGS)
    assert held_out(faulty) > held_out(clean) - 2 * standard_error(clean, faulty)
    assert faulty["train accuracy"] > 0.999


def test_what_means_nothing_harms_no_more_than_with_other_optimizers(results: Any) -> None:
    runs = {name: results[f"nonsense, {name}"] for name in OPTIMIZERS}
    assert all(set(run["faults"]) == set(NONSENSE) for run in runs.values())
    ours = runs.pop("natgrad")
    for other in runs.values():
        assert held_out(ours) > held_out(other) - 2 * standard_error(ours, other)


def test_its_memory_did_not_grow(results: Any) -> None:
    memory = results["clean"]["memory"]
    assert len(memory) == 40
    settled = memory[3:]
    assert len({seen["tensors"] for seen in settled}) < 4
    assert max(seen["bytes"] for seen in settled) < 1.03 * settled[0]["bytes"]
