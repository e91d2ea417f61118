"""No rate, radius or damping makes a run end above its start: the grid's corners, its script."""

import itertools
import json
import math

import pytest

from experiments import grid

TINY = {
    "digits_mlp": ("experiment=digits_mlp", "data.batch_size=64"),
    "cnn": ("data=digits", "model=cnn", "model.channels=[8,8]"),
    "autoencoder": (
        "experiment=autoencoder",
        "data=digits",
        "data.batch_size=64",
        "data.pixels=unit",
        "model.hidden=[48,24]",
        "model.code=8",
    ),
    "implicit_image": (
        "experiment=implicit_image",
        "data.batch_size=256",
        "model.hidden=[32,32]",
        "model.features=64",
        "data.height=30",
        "data.width=40",
    ),
    "char_transformer": (
        "experiment=char_transformer",
        "data.batch_size=4",
        "data.context=24",
        "model.width=16",
        "model.layers=1",
        "model.heads=2",
    ),
}
CORNERS = [*itertools.product((0.01, 10.0), (1e-5, 1.0), (1e-8, 1.0))]


@pytest.mark.parametrize("task", TINY)
@pytest.mark.parametrize(("lr", "kl_radius", "damping"), CORNERS)
def test_no_run_ends_above_its_start(task, lr, kl_radius, damping):
    cell = grid.train(TINY[task], 8, lr, kl_radius, damping)
    assert not cell.failed, cell
    assert cell.kl_over_radius <= 1.0


def test_without_a_bound_runs_do_end_above_their_start(monkeypatch):
    """What the bound is there for, and that a failure shows."""
    made = grid.NaturalGradientOptimizer
    monkeypatch.setattr(
        grid, "NaturalGradientOptimizer",
        lambda params, lr, kl_radius, damping: made(params, lr, kl_radius=None, damping=damping),
    )  # fmt: skip
    assert grid.train(TINY["implicit_image"], 8, 10.0, 1e-2, 1e-8).failed


def cell(end, **where):
    place = {"lr": 1.0, "kl_radius": 0.1, "damping": 0.01, **where}
    return grid.Cell(**place, steps=3, start=2.0, end=end, rejected=0, skipped=0, shrinks=1,
                     kl_over_radius=0.5)  # fmt: skip


@pytest.mark.parametrize(("end", "failed"), [(1.0, 0), (2.0, 0), (3.0, 1), (math.nan, 1)])
def test_the_script_says_how_many_failed_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch, capsys, end, failed
):
    trained = []

    def train(overrides, steps, lr, kl_radius, damping):
        trained.append(lr)
        return cell(end if lr == 10 else 1.0, lr=lr)

    monkeypatch.setattr(grid, "train", train)
    options = ["--task", "digits_mlp", "--kl-radius", "0.1", "--damping", "0.01"]
    options += ["--folder", str(tmp_path)]
    assert grid.main([*options, "--lr", "1"]) == 0
    assert grid.main([*options, "--lr", "1", "10"]) == failed
    assert trained == [1.0, 10.0]
    assert f"{failed} of 2 runs ended above their start" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "grid-digits_mlp.json").read_text())) == 2
    assert (tmp_path / "grid.png").stat().st_size > 1000
    grid.main([*options, "--lr", "1", "--fresh"])
    assert trained == [1.0, 10.0, 1.0]
