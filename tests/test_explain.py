"""The pictures of what natural gradient is: what they show is so, and the script writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.explain import __main__ as script
from experiments.explain import balls, divergences, gaussians, labels, paths, plane
from ngplugin import NaturalGradientOptimizer


@pytest.fixture(scope="module")
def descents() -> paths.Paths:
    return paths.measure()


def test_the_two_pairs_are_equally_far_in_parameters_only() -> None:
    near, far = gaussians.measure()
    # (difference of means)² / 2 variance
    assert near.kl == pytest.approx(1 / (2 * 0.5**2))
    assert far.kl == pytest.approx(1 / (2 * 5**2))


def test_the_fisher_information_is_the_curvature_of_the_kl() -> None:
    place, h = (4.6, 0.35), 1e-4
    F = plane.fisher(place)
    for step in (np.array([h, 0]), np.array([0, h]), np.array([h, -h])):
        exact = plane.kl(place, place[0] + step[0], place[1] + step[1])
        assert exact == pytest.approx(0.5 * step @ F @ step, rel=1e-2)


def test_no_step_of_the_same_kl_lowers_the_loss_more_than_the_natural_one() -> None:
    data = plane.sepals()
    for step in balls.measure():
        F = plane.fisher(step.place)
        assert step.natural @ F @ step.natural == pytest.approx(2 * balls.NATS)
        angles = np.linspace(0, 2 * np.pi, 360)
        circle = np.stack([np.cos(angles), np.sin(angles)], 1) @ np.linalg.inv(
            np.linalg.cholesky(F)
        )
        small = 1e-4  # where the loss is a plane
        falls = [
            plane.loss(*step.place, data) - plane.loss(*(step.place + small * d), data)
            for d in circle
        ]
        unit = step.natural / np.sqrt(2 * balls.NATS)
        own = plane.loss(*step.place, data) - plane.loss(*(step.place + small * unit), data)
        assert own == pytest.approx(max(falls), rel=1e-3)


def test_paths_of_natural_gradient_do_not_depend_on_the_writing(descents: paths.Paths) -> None:
    assert paths.apart(descents.natural) < 0.05
    assert paths.apart(descents.gradient) > 10 * paths.apart(descents.natural)
    data = plane.sepals()
    best = plane.loss(data.mean().item(), data.std(unbiased=False).item(), data)
    for path in descents.natural:
        assert plane.loss(*path[-1], data) == pytest.approx(best, abs=0.01)
    assert paths.caption(descents) in script.PAGE.read_text(), "run `python -m experiments.explain`"


def test_the_line_has_the_natural_gradient_of_the_package() -> None:
    line = labels.Line.of_iris()
    start = np.array(labels.STARTS[0])
    net = nn.Linear(1, 1).double()
    with torch.no_grad():
        net.weight.fill_(start[0])
        net.bias.fill_(start[1])
    optimizer = NaturalGradientOptimizer(
        net.parameters(), momentum=0.0, kl_radius=None, structure="kronecker", fisher="exact",
        damping=1e-10, sampling_damping=0.0, layer_balance="natural", noise_variance=1.0,
    )  # fmt: skip
    with optimizer.observe():
        outputs = net(torch.tensor(line.inputs[:, :1]))
        loss = nn.functional.mse_loss(outputs, torch.tensor(line.targets)[:, None])
    loss.backward()
    optimizer.step()
    moved = np.array([net.weight.item(), net.bias.item()]) - start
    assert moved == pytest.approx(line.direction("natural gradient", start), rel=1e-5)
    assert start + moved == pytest.approx(line.best(), rel=1e-5)


def test_with_the_labels_of_the_data_the_step_is_another() -> None:
    assert max(labels.reach(1.0)) < 0.5
    assert min(labels.reach(0.1)) > 2
    steps = {kind: max(map(len, found)) for kind, found in labels.measure().items()}
    assert steps["natural gradient"] < steps["empirical Fisher"] < steps["gradient"]


def test_no_step_of_any_network_leaves_its_radius() -> None:
    runs = divergences.measure(steps=12)
    for reports in runs.values():
        assert all(r.kl is not None and 0 < r.kl <= r.kl_radius for r in reports)
    assert max(divergences.ratios(runs[divergences.SHOWN])) > 10


def test_the_script_writes_pictures_and_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    shutil.copy(script.PAGE, page)
    names = ["gaussians", "balls", "labels"]  # the others take seconds
    assert script.main([*names, "--page", str(page), "--results", str(tmp_path)]) == 0
    for name in names:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert page.read_text() == script.PAGE.read_text(), "run `python -m experiments.explain`"


def test_a_picture_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["spheres"])
    assert "expected one of gaussians, balls" in capsys.readouterr().err
