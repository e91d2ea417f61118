"""Nothing about how a loss is scaled changes the step or its KL.

One data set of eight scored rows, presented in every way: as eight examples or as two of four
terms, repeated, in one batch or in two accumulated ones, under each reduction, multiplied by a
loss scale. All must make the same three steps. Scores are a fixed function of the prediction here,
so that a row gets the same score wherever it stands.
"""

import itertools

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from tests.oracle import FAMILIES, double, flat, randn

F = torch.nn.functional

ROWS, FEATURES, STEPS = 8, 3, 3


@pytest.fixture(autouse=True)
def scores_are_a_function_of_the_prediction(monkeypatch):
    def signs(like, generator):
        """±1 by the digits of the prediction, which the root is a smooth function of."""
        return torch.where((like * 1e3).sin() > 0, 1.0, -1.0).to(like)

    monkeypatch.setattr("ngplugin.curvature.likelihoods.likelihood.random_signs", signs)


def loss_elements(family, z, target, reduction):
    """The torch loss of `z` `[examples, terms, classes]`."""
    if family == "categorical":
        return F.cross_entropy(z.movedim(-1, 1), target, reduction=reduction)
    loss = {"gaussian": F.mse_loss, "bernoulli": F.binary_cross_entropy_with_logits}[family]
    return loss(z, target, reduction=reduction)


def three_steps(family, reduction, copies, terms, classes, accumulation, scale):
    """Flattened parameters after each step, and the reported numbers."""
    model = double(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, classes)))
    optimizer = NaturalGradientOptimizer(
        model.parameters(),
        lr=1.0,
        momentum=0.9,
        weight_decay=0.01,
        damping=0.1,
        sampling_damping=0.0,  # more rows rightly count as more evidence, even repeated ones
        refresh_every=1,
        kl_radius=0.02,
        spectrum_every=1,
    )
    x = randn(ROWS, FEATURES, seed=1).reshape(-1, terms, FEATURES)
    y = torch.arange(ROWS) % classes
    if family != "categorical":
        y = (randn(ROWS, classes, seed=2) > 0).double()
    y = y.reshape(-1, terms, *y.shape[1:])
    batches = [
        (a.repeat(copies, *[1] * (a.dim() - 1)), b.repeat(copies, *[1] * (b.dim() - 1)))
        for a, b in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True)
    ]
    path, reports = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for a, b in batches:
            with optimizer.observe():
                if reduction == "none":  # with a padding example that the mask takes out again
                    a = torch.cat([a, 9 * torch.ones_like(a[:1])])
                    b = torch.cat([b, b[:1]])
                    mask = torch.ones(len(a), dtype=a.dtype)
                    mask[-1] = 0
                    elements = loss_elements(family, model(a), b, "none")
                    kept = elements * mask.reshape(-1, *[1] * (elements.dim() - 1))
                    loss = kept.sum() / (mask.sum() * elements[0].numel())
                else:
                    loss = loss_elements(family, model(a), b, reduction)
                if reduction != "sum":
                    loss = loss / accumulation
            (loss * scale).backward()
        optimizer.step()
        path.append(flat([*model.parameters()]))
        report = optimizer.report
        reports.append(
            [
                report.kl,
                report.kl_predicted,
                report.kl_radius,
                report.step_scale,
                report.reduction_ratio,
                report.condition_number,
                report.cosine,
            ]
        )
    return torch.stack(path), torch.tensor(reports, dtype=torch.float64)


references = {}


def reference(family, classes):
    if (family, classes) not in references:
        references[family, classes] = three_steps(family, "mean", 1, 1, classes, 1, 1)
    return references[family, classes]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_presentation_of_the_same_data_makes_the_same_steps(family, reduction, classes):
    path, reports = reference(family, classes)
    assert float((path[1] - path[0]).norm()) > 1e-3
    how = ((1, 1024), (2, 1))
    for copies, terms, (accumulation, scale) in itertools.product((1, 3), (1, 4), how):
        ours, ours_reports = three_steps(
            family, reduction, copies, terms, classes, accumulation, scale
        )
        case = f"copies={copies} terms={terms} accumulation={accumulation} scale={scale}"
        torch.testing.assert_close(
            ours, path, rtol=1e-8, atol=1e-10, msg=lambda m, case=case: f"{case}: {m}"
        )
        torch.testing.assert_close(
            ours_reports, reports, rtol=1e-7, atol=1e-10, msg=lambda m, case=case: f"{case}: {m}"
        )


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("structure", ["auto", "diagonal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_scale_changes_no_step_with_real_random_scores_and_any_damping(
    family, structure, mode, monkeypatch
):
    monkeypatch.undo()

    def run(scale):
        model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        optimizer = NaturalGradientOptimizer(
            model.parameters(), structure=structure, damping=0.1, damping_mode=mode,
            fisher="sampled", draws=2,
        )  # fmt: skip
        y = torch.arange(8) % 2
        target = y if family == "categorical" else torch.stack([y, 1 - y], 1).double()
        for _ in range(4):
            optimizer.zero_grad()
            with optimizer.observe():
                z = model(randn(8, 3, seed=1)).unsqueeze(1)
                loss = loss_elements(family, z, target.unsqueeze(1), "mean")
            (scale * loss).backward()
            optimizer.step()
        return flat([*model.parameters()]), optimizer.report

    one, report = run(1.0)
    other, other_report = run(4096.0)
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
    assert other_report.kl == pytest.approx(report.kl, rel=1e-8)
    assert other_report.kl_predicted == pytest.approx(report.kl_predicted, rel=1e-8)


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_a_scale_that_changes_from_step_to_step_changes_nothing(structure):
    """Such as that of an epoch's last micro-batches, of which there are fewer."""

    def run(scales):
        model = double(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 3)))
        optimizer = NaturalGradientOptimizer(
            model.parameters(),
            lr=0.1,
            structure=structure,
            statistics_every=1,
            measure_every=1,
            kl_radius=None,
        )
        path = []
        for seed, scale in enumerate(scales):
            x, y = randn(ROWS, FEATURES, seed=seed), torch.arange(ROWS) % 3
            optimizer.zero_grad()
            with optimizer.observe():
                loss = scale * F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            path.append(flat([*model.parameters()]))
        return torch.stack(path)

    torch.testing.assert_close(run([1.0, 1.0, 1 / 3, 20.0, 1.0]), run([1.0] * 5))


@pytest.mark.supports("Gradients", "an incomplete last window of accumulated micro-batches")
def test_fewer_micro_batches_at_the_end_make_no_longer_step():
    """Lightning divides each by the number of a full window."""

    def last_step(scale):
        model = double(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 3)))
        optimizer = NaturalGradientOptimizer(
            model.parameters(), lr=0.1, measure_every=1, kl_radius=None, statistics_every=1
        )
        for step in range(6):
            x, y = randn(ROWS, FEATURES, seed=1), torch.arange(ROWS) % 3
            before = flat([*model.parameters()])
            optimizer.zero_grad()
            with optimizer.observe():
                loss = (scale if step == 5 else 1.0) * F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return (flat([*model.parameters()]) - before).norm()

    assert last_step(1 / 3) == pytest.approx(float(last_step(1.0)), rel=1e-9)
