"""The race: who is measured how, and what it leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import compare
from experiments.compare import Course, Curve
from experiments.tasks.classifier import Classifier

CNN = ("data=digits", "model=cnn")


def test_a_race_leaves_its_numbers_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "0", "1", "--steps", "8", "--grid", "0.001", "0.01", "0.0001"]
    compare.main([*options, "--folder", str(tmp_path)])
    record = json.loads((tmp_path / "digits_mlp-constant.json").read_text())
    curves = [Curve(**curve) for curve in record["curves"]]
    assert [(c.optimizer, c.seed) for c in curves] == [
        ("adamw", 0), ("natgrad", 0), ("adamw", 1), ("natgrad", 1),
    ]  # fmt: skip
    for adamw, natgrad in (curves[:2], curves[2:]):
        assert adamw.losses[0] == natgrad.losses[0]  # the same weights
        assert adamw.steps == natgrad.steps == list(range(9))
    assert all(c.lr == 1.0 for c in curves if c.optimizer == "natgrad")
    assert all(c.seconds[0] == 0 and c.seconds == sorted(c.seconds) for c in curves)
    assert (tmp_path / "digits_mlp-constant.png").stat().st_size > 10_000
    assert "adamw: steps" in capsys.readouterr().out


def test_evaluation_leaves_training_as_it_was() -> None:
    # BatchNorm is what an evaluation could disturb.
    runs = [
        compare.run(Course(CNN, 12, points=points), "adamw", 0.01, 0, "cosine")
        for points in (12, 1)
    ]
    assert runs[0].losses[-1] == runs[1].losses[-1]


def test_evaluation_ends_in_training_mode() -> None:
    data, module = compare.make(Course(CNN, 1), seed=0)
    compare.take(Curve("adamw", 0.1, 0), 0, 0.0, module, data)
    assert all(part.training for part in module.modules())


def test_the_loss_taken_is_that_of_the_whole_training_set() -> None:
    data, module = compare.make(Course(("experiment=digits_mlp",), 1), seed=0)
    curve = Curve("adamw", 0.1, 0)
    compare.take(curve, 0, 0.0, module, data)
    whole = module.loss(data.splits["train"][:])
    assert curve.losses == pytest.approx([whole.item()])
    assert set(curve.measured) == {"loss", "accuracy"}


@pytest.mark.parametrize("task", ["graph_network", "poisson_pinn"])
def test_other_tasks_race_too(task: str) -> None:
    course = replace(compare.COURSES[task], steps=3, points=3)
    curve = compare.run(course, "natgrad", 1.0, 0, "constant")
    assert curve.steps == [0, 1, 2, 3]
    assert curve.losses[-1] < curve.losses[0]


def test_a_race_by_seconds_ends_when_they_are_spent() -> None:
    course = Course(CNN, 1000, seconds=0.2, points=2)
    curve = compare.run(course, "adamw", 0.01, 0, "constant")
    assert curve.seconds[-1] >= 0.2 > curve.seconds[-2]
    assert 2 <= len(curve.steps) <= 3
    assert curve.steps[-1] < 1000


def test_the_best_learning_rate_is_looked_for_beyond_the_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pretend(task: object, name: str, lr: float, seed: int, schedule: str) -> Curve:
        return Curve(name, lr, seed, [0], [0.0], [float("nan") if lr > 1 else abs(lr - 0.3)])

    monkeypatch.setattr(compare, "run", pretend)
    task = compare.COURSES["digits_mlp"]
    assert compare.tune(task, "adamw", 0, "constant", [0.1, 0.01]) == pytest.approx(0.3)


def test_a_threshold_is_reached_once() -> None:
    curve = Curve("adamw", 0.1, 0, [0, 5, 10, 15], [0.0, 1.0, 2.0, 3.0], [2.0, 0.4, 0.6, 0.1])
    assert curve.reach(0.5) == (5, 1.0)
    assert curve.reach(0.05) is None
    assert compare.thresholds([curve], (1.0, 0.5, 0.01)) == [1.0, 0.5, 0.1]


def test_a_race_needs_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--optimizers", "natgrad"])
    assert "adamw is what the others are measured against" in capsys.readouterr().err


def test_batches_are_the_same_for_every_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {"adamw": [], "muon": []}
    real = Classifier.loss
    for name, taken in seen.items():

        def spy(self: Classifier, batch: tuple, _to: list = taken) -> torch.Tensor:
            if torch.is_grad_enabled():
                _to.append(batch[1])
            return real(self, batch)

        monkeypatch.setattr(Classifier, "loss", spy)
        course = replace(compare.COURSES["digits_mlp"], steps=3, points=1)
        compare.run(course, name, 0.01, 7, "constant")
    assert len(seen["adamw"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_seconds_and_a_schedule_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--seconds", "1", "--schedule", "cosine"])
    assert "a schedule has to know its steps" in capsys.readouterr().err
