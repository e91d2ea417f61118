"""A fit in numbers, and what these say."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from ngplugin import NaturalGradient
from ngplugin.diagnosis import RULES, diagnose
from ngplugin.lightning import terminal
from ngplugin.summary import Summary
from tests.tracking.test_metrics import report

#: A fit of which there is nothing to say.
QUIET: dict[str, float | None] = {
    "steps": 1000, "kl_mean": 0.03, "kl_max": 0.05, "kl_used": 0.6, "kl_ratio": 3.0,
    "kl_radius": 0.05, "reduction_ratio": 0.5, "cosine": 0.3, "condition_number": 1e4,
    "damping": 0.1, "measured": 0.2, "bound_active": 0.5, "step_seconds": 0.01, "overhead": 0.4,
    "skipped": 0, "rejected": 0, "failed_factorizations": 0, "dropped_statistics": 0,
}  # fmt: skip

#: Of each rule: numbers of which it speaks, next to some of which it does not.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "skipped": ({"skipped": 1}, {"skipped": 0}),
    "rejected": ({"rejected": 11}, {"rejected": 10}),
    "failed factorizations": ({"failed_factorizations": 1}, {"failed_factorizations": 0}),
    "dropped statistics": ({"dropped_statistics": 11}, {"dropped_statistics": 10}),
    "shrinks to nothing": ({"kl_used": 0.04}, {"kl_used": 0.06}),
    "lr decides": ({"bound_active": 0.04}, {"bound_active": 0.06}),
    "the bound decides": ({"bound_active": 0.81}, {"bound_active": 0.79}),
    "never measured": ({"measured": 0.0}, {"measured": 0.1}),
    "poor model": ({"reduction_ratio": 0.2}, {"reduction_ratio": 0.3}),
    "good model": (
        {"reduction_ratio": 0.8, "bound_active": 0.9},
        {"reduction_ratio": 0.7, "bound_active": 0.9},
    ),
    "little curvature": ({"cosine": 0.95}, {"cosine": 0.85}),
    "badly conditioned": ({"condition_number": 1e11}, {"condition_number": 1e9}),
    "dear": ({"overhead": 0.7}, {"overhead": 0.5}),
}


def test_of_a_quiet_fit_there_is_nothing_to_say() -> None:
    assert diagnose(QUIET) == []


def test_there_is_a_case_for_every_rule() -> None:
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_where_it_is_meant_to_and_only_there(name: str) -> None:
    speaks, silent = CASES[name]
    assert name in [finding.rule for finding in diagnose(QUIET | speaks)]
    assert name not in [finding.rule for finding in diagnose(QUIET | silent)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_needs_what_it_speaks_of_and_is_silent_without(rule: Any) -> None:
    named = {field for _, field, _, _ in string.Formatter().parse(rule.text) if field}
    assert named <= set(rule.needs) <= set(QUIET)
    for missing in rule.needs:
        assert rule.find(QUIET | CASES[rule.name][0] | {missing: None}) is None
    assert rule.advice
    assert rule.why.endswith(".")


def test_findings_have_their_numbers_and_troubles_come_first() -> None:
    found = diagnose(QUIET | {"bound_active": 0.83, "overhead": 0.75, "skipped": 3})
    assert [f.weight for f in found] == ["trouble", "notice", "good"]
    assert str(found[0]).startswith("3 of 1000 steps were skipped")
    assert "83%" in str(found[2])
    assert "kl_radius" in str(found[2])


def test_the_summary_adds_up() -> None:
    summary = Summary()
    assert summary.numbers()["kl_mean"] is None
    summary.add(report(kl=0.1, kl_radius=0.2, step_scale=1.0, overhead=1.0, seconds=1.0))
    summary.add(report(kl=None, step_scale=0.5, overhead=0.0, seconds=3.0, cosine=math.nan))
    summary.add(report(kl=0.3, step_scale=1.0, overhead=0.0, seconds=0.0, skipped=1))
    numbers = summary.numbers()
    assert numbers["steps"] == 3
    assert numbers["kl_mean"] == pytest.approx(0.2)
    assert numbers["kl_max"] == 0.3
    assert numbers["kl_used"] == pytest.approx((0.5 + 0.6) / 2)
    assert numbers["kl_ratio"] == pytest.approx((0.2 + 0.6) / 2)
    assert numbers["measured"] == pytest.approx(2 / 3)
    assert numbers["bound_active"] == pytest.approx(1 / 3)
    assert numbers["step_seconds"] == pytest.approx(4 / 3)
    assert numbers["overhead"] == pytest.approx(0.25)
    assert numbers["cosine"] == 0.5
    assert numbers["skipped"] == 2.0


def test_every_number_that_a_rule_needs_is_in_the_summary() -> None:
    assert set(QUIET) == set(Summary().numbers())


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = torch.randn(8, 3)
        return nn.functional.mse_loss(self.layer(x), x[:, :2])

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(6, 1), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("rich", [True, False])
def test_a_fit_ends_with_it(
    rich: bool, tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich:
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    for shown in (True, False):
        callback = NaturalGradient(show_coverage=False, show_summary=shown)
        L.Trainer(
            max_epochs=1, callbacks=[callback], logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(Line())  # fmt: skip
        said = " ".join(capsys.readouterr().out.split())
        assert ("natural gradient: 6 steps; KL of a step" in said) == shown
        for finding in callback.diagnosis():
            assert (str(finding) in said) == shown


def test_the_documentation_has_every_rule() -> None:
    text = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
    for rule in RULES:
        assert f"| {rule.name} | {rule.why} | {rule.advice} |" in text


def test_what_is_unknown_is_called_so() -> None:
    assert "KL of a step unknown" in terminal.in_words(Summary().numbers())
    assert terminal.in_words(QUIET).endswith("; 10 ms a step, 40% of the time in curvature")
