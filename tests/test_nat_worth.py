"""The running noise variance: a hand-computed average, free of scale, and saved."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.objective import ObjectiveWeight
from ngplugin.nat_worth import BatchNatWorth, RunningNatWorth
from tests.oracle import double, flat, randn

DECAY, STEPS = 0.7, 5


def network():
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def optimizer_of(model, **options):
    return NaturalGradientOptimizer(
        model.parameters(), noise_variance="running", decay=DECAY, damping=0.1, **options
    )


def step(model, optimizer, i, scale=1.0):
    """One step on a batch of its own, whose noise varies much; returns the batch's error before."""
    x, y = randn(6, 3, seed=i), (1 + i % 3) * randn(6, 2, seed=50 + i)
    optimizer.zero_grad()
    with optimizer.observe():
        loss = scale * F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item() / scale


def test_it_is_the_debiased_exponential_average_of_what_a_nat_was_worth():
    worth, values = RunningNatWorth(DECAY), [4.0, 1.0, 0.25, 9.0]
    for t, value in enumerate(values):
        total = 2.0 + t  # a batch of another weight
        weight = worth.see(ObjectiveWeight(total, value * total, 3.0, 0.5))
        shares = [(1 - DECAY) * DECAY ** (t - i) for i in range(t + 1)]
        pairs = zip(shares, values, strict=False)
        average = sum(share * v for share, v in pairs) / (1 - DECAY ** (t + 1))
        assert weight.nats / weight.total == pytest.approx(average, rel=1e-12)
        assert weight.nll == pytest.approx(0.5 * value / average, rel=1e-12)
        assert (weight.total, weight.squares) == (total, 3.0)


def test_that_of_a_batch_leaves_its_weight_as_it_is():
    weight = ObjectiveWeight(2.0, 3.0, 1.0, 0.5)
    assert BatchNatWorth("auto").see(weight) is weight


def test_steps_are_measured_at_the_average_of_the_mean_squared_errors():
    model = network()
    optimizer = optimizer_of(model, kl_radius=None)
    with_batch = NaturalGradientOptimizer(model.parameters(), kl_radius=None, decay=DECAY)
    errors = []
    for i in range(STEPS):
        errors.append(step(model, optimizer, i))
    weight = optimizer._engine._weight
    shares = [DECAY ** (STEPS - 1 - i) for i in range(STEPS)]
    average = sum(s * e for s, e in zip(shares, errors, strict=True)) / sum(shares)
    assert weight.nats / weight.total == pytest.approx(average, rel=1e-9)
    assert errors[-1] != pytest.approx(average, rel=0.1)
    step(model, with_batch, STEPS)
    assert with_batch._engine._weight.nll == pytest.approx(0.5)


def test_a_loss_scale_changes_neither_steps_nor_kl():
    paths = []
    for scale in (1.0, 4096.0):
        model = network()
        optimizer = optimizer_of(model, kl_radius=0.02)
        kls = []
        for i in range(STEPS):
            step(model, optimizer, i, scale)
            kls.append(optimizer.report.kl)
        paths.append(torch.cat([flat([*model.parameters()]), torch.tensor(kls).double()]))
    torch.testing.assert_close(*paths, rtol=1e-9, atol=1e-11)


def test_the_kl_of_a_step_is_in_nats_of_the_average():
    def kls(**options):
        model = network()
        optimizer = NaturalGradientOptimizer(
            model.parameters(), decay=DECAY, kl_radius=1e9, lr=0.1, **options
        )
        reported = []
        for i in range(2):
            step(model, optimizer, i)
            weight = optimizer._engine._weight
            reported.append(optimizer.report.kl * weight.nats / weight.total)
        return reported

    assert kls(noise_variance="running") == pytest.approx(kls(noise_variance=1.0), rel=1e-9)


def test_a_checkpoint_goes_on_bit_by_bit_and_one_without_it_starts_anew():
    model = network()
    optimizer = optimizer_of(model)
    for i in range(3):
        step(model, optimizer, i)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    resumed = network()
    resumed.load_state_dict(weights)
    other = optimizer_of(resumed)
    other.load_state_dict(state)
    for i in range(3, 6):
        step(model, optimizer, i)
        step(resumed, other, i)
        assert torch.equal(flat([*model.parameters()]), flat([*resumed.parameters()]))
        assert other._engine._weight == optimizer._engine._weight
    del state["natgrad"]["nat_worth"]
    other.load_state_dict(state)
    step(resumed, other, 6)
    assert other._engine._weight.nll == pytest.approx(0.5)
