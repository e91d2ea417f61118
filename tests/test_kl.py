"""The quadratic model of the KL, and its measurement, against the divergence written out."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.objective import ObjectiveWeight
from ngplugin.kl_measurement import KlMeasurement
from tests.oracle import FAMILIES, dense_fisher, double, flat, generator, moved, observe, randn

F = torch.nn.functional

LOSS = {
    "categorical": lambda z: F.cross_entropy(z, torch.arange(len(z)) % z.shape[1]),
    "bernoulli": lambda z: F.binary_cross_entropy_with_logits(z, (z.detach() > 0.3).double()),
    "gaussian": lambda z: F.mse_loss(z, torch.ones_like(z)),
}


def network():
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


@pytest.mark.parametrize("name", FAMILIES)
def test_half_delta_f_delta_is_the_kl_up_to_third_order(name):
    model, x = network(), randn(6, 3, seed=1)
    parameters = [*model.parameters()]

    def natural():
        z = model(x)
        return z if name == "categorical" else z.reshape(-1)

    eta = natural()
    fisher = dense_fisher(FAMILIES[name], eta, parameters, torch.ones(len(eta)).double())
    before = FAMILIES[name](eta.detach())
    direction = randn(len(fisher), seed=2) / len(fisher) ** 0.5

    def error(h):
        with moved(parameters, h * direction):
            kl = before.kl(FAMILIES[name](natural().detach())).mean()
        return float(kl - 0.5 * h**2 * direction @ fisher @ direction)

    for h in (0.04, 0.02):
        assert error(h) / error(h / 2) == pytest.approx(8.0, rel=0.15)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_measurement_is_the_kl_and_the_fall_of_the_loss_of_the_moved_model(name):
    model, x = network(), randn(6, 3, seed=1)
    parameters = [*model.parameters()]
    _, observation = observe(parameters, lambda: LOSS[name](model(x)))
    loss = LOSS[name](model(x)).item()
    z = model(x).detach()
    delta = 0.3 * randn(flat(parameters).numel(), seed=3)
    with moved(parameters, delta):
        kl, fall = KlMeasurement().measure([observation])
        after = model(x).detach()
        if name == "bernoulli":  # whose targets are made from the prediction
            y = (z > 0.3).double()
            exact_fall = loss - F.binary_cross_entropy_with_logits(after, y).item()
        else:
            exact_fall = loss - LOSS[name](model(x)).item()
    if name != "categorical":
        z, after = z.reshape(-1), after.reshape(-1)
    divergence = FAMILIES[name](z).kl(FAMILIES[name](after))
    weight = 2.0 if name == "gaussian" else 1.0  # mse is twice the negative log-likelihood
    assert kl == pytest.approx(weight * float(divergence.mean()), rel=1e-9)
    assert fall == pytest.approx(exact_fall, rel=1e-9)


@pytest.mark.parametrize("noise_variance", ["auto", 0.25])
def test_nats_of_squared_error_are_counted_at_the_noise_variance(noise_variance):
    model, x, y = network(), randn(6, 3, seed=1), randn(6, 3, seed=2)
    _, observation = observe([*model.parameters()], lambda: F.mse_loss(model(x), y))
    weight = ObjectiveWeight.of(observation.scored, noise_variance)
    mse = F.mse_loss(model(x), y).item()
    variance = mse if noise_variance == "auto" else 0.25
    assert weight.total == pytest.approx(2.0)
    assert weight.nats == pytest.approx(2.0 * variance)
    assert weight.nll == pytest.approx(0.5 * mse / variance)
    assert weight.squares == pytest.approx(18 * (2 / 18) ** 2)


def test_an_objective_s_weight_adds_up_its_losses_each_at_its_own_dispersion():
    model, x, y = network(), randn(6, 3, seed=1), randn(6, 3, seed=2)

    def objective():
        z = model(x)
        return 3 * F.cross_entropy(z, torch.arange(6) % 3) + 0.5 * F.mse_loss(z, y)

    _, observation = observe([*model.parameters()], objective)
    weight = ObjectiveWeight.of(observation.scored, "auto")
    z = model(x).detach()
    mse, ce = float(F.mse_loss(z, y)), float(F.cross_entropy(z, torch.arange(6) % 3))
    assert weight.total == pytest.approx(3 + 1)
    assert weight.nats == pytest.approx(3 + mse)
    assert weight.nll == pytest.approx((3 * ce + 0.5 * mse) / (3 + mse))


def test_nothing_scored_or_nothing_finite_has_no_weight():
    assert ObjectiveWeight.of([], "auto") is None
    z = nn.Parameter(torch.tensor([float("nan"), 1.0]))
    with pytest.raises(AssertionError):
        observe([z], lambda: F.mse_loss(z * 1, torch.zeros(2)))


def test_a_divergence_that_rounding_made_negative_is_none():
    loss = SimpleNamespace(
        weights=torch.ones(4),
        dispersion=lambda noise_variance: torch.tensor(1.0),
        nll=lambda: torch.tensor(-1e-9),
    )
    assert ObjectiveWeight.of([loss], "auto") == ObjectiveWeight(4.0, 4.0, 4.0, 0.0)


def test_a_prediction_that_is_its_target_but_for_rounding_trains_on():
    z = nn.Parameter(torch.randn(64, 3, generator=generator(3)) * 1e-4)
    optimizer = NaturalGradientOptimizer([z])
    for _ in range(4):
        with optimizer.observe():
            loss = F.kl_div(z.log_softmax(1), z.detach().softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert z.isfinite().all()


def test_a_squared_error_of_exactly_zero_has_a_finite_weight_in_nats():
    z = nn.Parameter(randn(3))
    _, observation = observe([z], lambda: F.mse_loss(z * 1, z.detach().clone()))
    assert ObjectiveWeight.of(observation.scored, "auto").nats > 0


class Hidden(torch.autograd.Function):
    """Doubles its input where no observer sees it."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def steps(optimizer, predict, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        with optimizer.observe():
            loss = LOSS["categorical"](predict())
        loss.backward()
        optimizer.step()
        yield optimizer.report


def test_where_the_forward_pass_cannot_be_recorded_one_warning_says_why_and_steps_go_on():
    model, x = network(), randn(6, 3, seed=1)
    optimizer = NaturalGradientOptimizer(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = list(steps(optimizer, lambda: Hidden.apply(model(x))))
    assert [report.kl for report in reports] == [None] * 3
    assert all(report.kl_predicted > 0 for report in reports)
    messages = [str(w.message) for w in caught if "ngplugin" in str(w.message)]
    assert len(messages) == 1
    assert "custom autograd.Function" in messages[0]


def test_a_forward_pass_that_a_replay_does_not_give_back_is_predicted_only():
    model, x = network(), randn(6, 3, seed=1)
    shift = torch.zeros(3).double()  # state of the model's own, changed behind the tape

    def predict():
        z = model(x) + shift
        shift[0] += 1
        return z

    with pytest.warns(UserWarning, match="gives another prediction"):
        reports = list(steps(NaturalGradientOptimizer(model.parameters()), predict))
    assert [report.kl for report in reports] == [None] * 3


def test_the_reported_kl_is_that_of_the_step_as_applied():
    model, x = network(), randn(6, 3, seed=1)
    optimizer = NaturalGradientOptimizer(model.parameters(), kl_radius=0.01, weight_decay=0.1)
    for _ in range(12):
        before = FAMILIES["categorical"](model(x).detach())
        (report,) = steps(optimizer, lambda: model(x), 1)
        if report.kl is not None:
            exact = before.kl(FAMILIES["categorical"](model(x).detach())).mean()
            assert report.kl == pytest.approx(float(exact), rel=1e-6)
            assert report.kl <= 1.5 * report.kl_radius
    assert report.step == 11


@pytest.mark.parametrize("kl_radius", [1e9, 1e-3])
def test_the_reduction_ratio_of_a_quadratic_is_one_for_whole_and_for_shortened_steps(kl_radius):
    layer = double(nn.Linear(3, 1))
    x, y = randn(8, 3, seed=1), randn(8, 1, seed=2)
    optimizer = NaturalGradientOptimizer(
        layer.parameters(),
        momentum=0.0,
        damping=0.0,
        sampling_damping=0.0,
        kl_radius=kl_radius,
        lr=0.5,
    )
    with optimizer.observe():
        loss = F.mse_loss(layer(x), y)
    loss.backward()
    optimizer.step()
    assert (optimizer.report.step_scale < 1) == (kl_radius < 1)
    assert optimizer.report.reduction_ratio == pytest.approx(1.0)
