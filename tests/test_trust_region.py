"""The bound on a step: its radius, its memory of what was measured, and steps that keep to it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.trust_region import NoTrustRegion, TrustRegion
from tests.oracle import dense_average, double, flat, randn

F = torch.nn.functional
positive = st.floats(1e-9, 1e9)


# -- the rules -----------------------------------------------------------------------------------


def test_the_radius_follows_the_schedule_squared():
    bound = TrustRegion(0.03)
    assert bound.radius(1.0) == pytest.approx(0.03)
    assert bound.radius(0.5) == pytest.approx(0.03 / 4)
    assert bound.radius(0.0) == 0


@pytest.mark.parametrize(("nll", "share"), [(7.0, 1.0), (0.5, 1.0), (0.25, 0.5**1.1), (0.0, 0.0)])
def test_the_radius_is_cut_where_the_prediction_is_nearer_than_half_a_nat(nll, share):
    bound = TrustRegion(0.03)
    bound.see_loss(nll)
    assert bound.radius(1.0) == pytest.approx(0.03 * share)
    assert bound.radius(0.5) == pytest.approx(0.03 * share / 4)


def test_no_radius_is_larger_than_the_distance_from_the_data():
    bound = TrustRegion(3.0)
    for nll in (9.0, 0.6):
        bound = TrustRegion(3.0)
        bound.see_loss(nll)
        assert bound.radius(0.5) == pytest.approx(min(3.0, nll) / 4)


def test_the_loss_seen_is_smoothed_but_falls_as_fast_as_the_loss():
    bound = TrustRegion(0.1)
    for nll in (0.2, 0.4):
        bound.see_loss(nll)
    assert bound.radius(1.0) == pytest.approx(0.1 * (2 * 0.3) ** 1.1)
    bound.see_loss(1e-6)
    assert bound.radius(1.0) == pytest.approx(0.1 * (2 * 2e-6) ** 1.1)


@given(positive, st.floats(1e-3, 1.0), positive, positive)
def test_a_scaled_step_s_calibrated_prediction_never_exceeds_the_radius(
    predicted, schedule, before, measured
):
    bound = TrustRegion(0.03)
    bound.calibrate(0, before, measured)
    scale = bound.scale(predicted, schedule)
    assert 0 < scale <= 1
    aim = 2 / 3 * bound.radius(schedule)
    assert scale**2 * predicted * max(1.0, bound.ratio) <= aim * (1 + 1e-9)
    if scale < 1:  # and is no shorter than it has to be
        assert scale**2 * predicted * bound.ratio == pytest.approx(aim)


@given(positive)
def test_a_measurement_within_the_radius_passes_and_beyond_is_cut_to_two_thirds_of_it(measured):
    bound = TrustRegion(0.03)
    factor = bound.shrink(measured, 1.0)
    if measured <= 0.03:
        assert factor is None
    else:
        assert factor**2 * measured == pytest.approx(0.02)
    assert bound.room(measured, 1.0) ** 2 * measured == pytest.approx(0.02)


def test_what_just_keeps_to_a_bound_passes():
    bound = TrustRegion(0.03)
    assert bound.shrink(0.03, 1.0, rise=0.03) is None
    assert bound.shrink(0.03, 1.0, rise=0.031) == 0.5
    # A rate of zero makes no step, whose KL is zero.
    assert bound.scale(0.0, 0.0) == 1
    assert bound.shrink(0.0, 0.0) is None


@pytest.mark.parametrize("measured", [math.inf, math.nan])
def test_a_kl_that_is_no_number_cuts_the_step_to_a_tenth(measured):
    assert TrustRegion(0.03).shrink(measured, 1.0) == 0.1


def test_calibration_rises_at_once_falls_half_way_and_never_counts_below_one():
    bound = TrustRegion(0.03)
    assert bound.ratio == 1
    bound.calibrate(0, 1.0, 4.0)
    assert bound.ratio == pytest.approx(4.0)
    bound.calibrate(1, 1.0, 100.0)
    assert bound.ratio == pytest.approx(100.0)
    bound.calibrate(2, 1.0, 1.0)
    assert bound.ratio == pytest.approx(10.0)  # half-way in logarithms
    for step in range(3, 20):
        bound.calibrate(step, 1.0, 1e-3)
    assert bound.ratio == 1


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [(0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1e-320, 1e300)],
)
def test_a_useless_measurement_teaches_nothing(predicted, measured):
    bound = TrustRegion(0.03)
    bound.calibrate(0, 1.0, 5.0)
    before = bound.state_dict()
    bound.calibrate(1, predicted, measured)
    assert bound.state_dict() == before


@pytest.mark.parametrize("measured", [math.inf, math.nan])
def test_a_kl_that_is_no_number_makes_the_next_step_shorter_and_measured(measured):
    bound = TrustRegion(0.03)
    for step in range(20, 24):
        bound.calibrate(step, 1.0, 5.0)
    assert not bound.measurement_due(24)
    bound.calibrate(24, 1.0, measured)
    assert bound.ratio == pytest.approx(500)
    assert bound.measurement_due(25)


def measured_steps(bound, ratios):
    """Which steps were measured, when a measurement at step i would give ratios(i)."""
    steps = []
    for step in range(60):
        if bound.measurement_due(step):
            steps.append(step)
            bound.calibrate(step, 1.0, ratios(step))
    return steps


def test_the_first_steps_are_all_measured_then_fewer_while_measurements_agree():
    steps = measured_steps(TrustRegion(0.03, measure_every=8, measure_first=4), lambda step: 3.0)
    assert steps == [0, 1, 2, 3, 11, 19, 27, 35, 43, 51, 59]
    steps = measured_steps(TrustRegion(0.03, measure_every=8, measure_first=1), lambda step: 3.0)
    assert steps == [0, 1, 3, 7, 15, 23, 31, 39, 47, 55]


def test_after_a_surprise_the_next_steps_are_measured_again():
    bound = TrustRegion(0.03, measure_every=8, measure_first=1)
    steps = measured_steps(bound, lambda step: 3.0 if step < 20 else 300.0)
    assert steps == [0, 1, 3, 7, 15, 23, 24, 26, 30, 38, 46, 54]


def test_measurements_that_keep_exceeding_the_prediction_are_made_on_every_step():
    steps = measured_steps(TrustRegion(0.03, measure_first=1), lambda step: 3.0**step)
    assert len(steps) == 60


def test_a_kl_that_is_smaller_than_expected_is_no_surprise():
    bound = TrustRegion(0.03, measure_every=8, measure_first=1)
    steps = measured_steps(bound, lambda step: 300.0 if step < 20 else 3.0)
    assert steps == [0, 1, 3, 7, 15, 23, 31, 39, 47, 55]


def test_a_step_that_takes_statistics_leaves_its_measurement_to_the_next_unless_surprised():
    bound = TrustRegion(0.03, measure_every=8, measure_first=1)
    steps = []
    for step in range(40):
        if bound.measurement_due(step, busy=step % 5 == 0):
            steps.append(step)
            bound.calibrate(step, 1e-3, 1e-3, surprise=step == 24)
    assert steps == [0, 1, 3, 7, 16, 24, 25, 27, 31, 39]  # not 15; 25 after a surprise


def test_from_the_second_of_two_steps_on_a_measurement_waits_for_a_better_one():
    bound = TrustRegion(0.03, measure_every=8, measure_first=0)
    assert bound.measurement_due(0, busy=True)
    bound.calibrate(0, 1e-3, 1e-3)
    assert bound.measurement_due(1, busy=True)
    bound.calibrate(1, 1e-3, 1e-3)
    assert [bound.measurement_due(step, busy=True) for step in (2, 3, 4)] == [False, False, True]


def test_by_default_ten_steps_are_measured_and_then_every_sixth():
    steps = measured_steps(TrustRegion(0.03), lambda step: 3.0)
    assert steps == [*range(10), 15, 21, 27, 33, 39, 45, 51, 57]


@pytest.mark.parametrize(("kl_radius", "large"), [(0.05, False), (0.051, True)])
def test_a_radius_beyond_a_twentieth_of_a_nat_is_large(kl_radius, large):
    bound = TrustRegion(kl_radius, measure_every=8, measure_first=1)
    assert (len(measured_steps(bound, lambda step: 3.0)) == 60) == large


def test_steps_of_a_large_radius_are_all_measured_and_may_not_raise_the_loss_by_much():
    bound = TrustRegion(1.0, measure_every=8, measure_first=1)
    assert measured_steps(bound, lambda step: 3.0) == [*range(60)]
    assert bound.shrink(0.5, 1.0, rise=0.009) is None
    assert bound.shrink(0.5, 1.0, rise=0.011) == 0.5


def test_without_measurements_none_is_due():
    assert not any(TrustRegion(0.03, measure_every=None).measurement_due(i) for i in range(30))


def test_no_trust_region_lets_everything_pass():
    bound = NoTrustRegion()
    bound.see_loss(0.0)
    bound.calibrate(0, 1.0, 1e9)
    assert bound.radius(0.5) == math.inf
    assert bound.scale(1e9, 1.0) == 1
    assert bound.shrink(1e9, 1.0) is None
    assert not bound.measurement_due(0)
    assert bound.room(1.0, 0.5) == math.inf
    due = [step for step in range(10) if NoTrustRegion(measure_every=4).measurement_due(step)]
    assert due == [0, 4, 8]
    bound.load_state_dict(TrustRegion(0.03).state_dict())
    assert bound.state_dict() == {}


def test_a_saved_bound_decides_as_the_original_and_an_empty_state_starts_anew():
    one, other = TrustRegion(0.03), TrustRegion(0.03)
    one.see_loss(0.1)
    one.calibrate(12, 1.0, 7.0)
    other.load_state_dict(one.state_dict())
    assert other.radius(0.7) == one.radius(0.7)
    assert other.scale(3.0, 0.7) == one.scale(3.0, 0.7)
    assert [other.measurement_due(s) for s in range(10, 20)] == [
        one.measurement_due(s) for s in range(10, 20)
    ]
    other.load_state_dict({})
    assert other.scale(3.0, 0.7) == one.scale(3.0, 0.7)


# -- steps of an optimizer -----------------------------------------------------------------------

SCHEDULES = {
    "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.01, 1.0, 15),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2.0, total_steps=40),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 10, 0.1),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 8),
}


def classifier():
    model = double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(),
                                 nn.Linear(6, 3)))  # fmt: skip
    x = randn(24, 4, seed=1)
    return model, lambda: F.cross_entropy(model(x), torch.arange(24) % 3)


def regression():
    model = double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    x = randn(24, 4, seed=1)
    y = (x[:, :2] * x[:, 2:]).sin()
    return model, lambda: F.mse_loss(model(x), y)


def predicted_kl(optimizer, delta):
    """½ΔᵀFΔ/Σw from the blocks' averages, block by block, in nats per term."""
    engine, total = optimizer._engine, 0.0
    for block in engine.fisher.blocks:
        part = flat([delta[id(p)] for p in block.parameters])
        total += 0.5 * float(part @ dense_average(block) @ part)
    return total * engine._weight.total / engine._weight.nats


@pytest.mark.parametrize("problem", [classifier, regression])
@pytest.mark.parametrize("structure", ["auto", "diagonal"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_is_predicted_or_measured_beyond_the_radius(schedule, structure, problem):
    model, loss_of = problem()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.5},
    ]
    optimizer = NaturalGradientOptimizer(
        groups, lr=1.0, momentum=0.9, structure=structure, refresh_every=1, statistics_every=1
    )
    scheduler = SCHEDULES[schedule](optimizer)
    measured = 0
    for _ in range(40):
        before = {id(p): p.detach().clone() for p in model.parameters()}
        optimizer.zero_grad()
        with optimizer.observe():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        report = optimizer.report
        assert report.kl_predicted <= 2 / 3 * report.kl_radius * (1 + 1e-6)
        delta = {id(p): p.detach() - before[id(p)] for p in model.parameters()}
        assert predicted_kl(optimizer, delta) == pytest.approx(
            report.kl_predicted, rel=1e-5, abs=1e-13
        )
        if report.kl is not None:
            measured += 1
            assert report.kl <= report.kl_radius
        share = max(g["lr"] / g.get("max_lr", g["initial_lr"]) for g in optimizer.param_groups)
        nll = optimizer._engine._bound._nll
        assert report.kl_radius == pytest.approx(0.05 * min(1, 2 * nll) ** 1.1 * share**2)
        scheduler.step()
    assert measured >= 8


@settings(max_examples=12)
@given(
    momentum=st.floats(0.0, 0.99),
    nesterov=st.booleans(),
    weight_decay=st.floats(0.0, 5.0),
    kl_radius=st.floats(1e-8, 10.0),
    lr=st.floats(1e-4, 1e4),
    damping=st.floats(1e-4, 10.0),
    statistics_every=st.integers(1, 7),
    refresh_every=st.integers(1, 7),
)
def test_no_option_lets_a_step_beyond_the_radius(weight_decay, lr, **options):
    model, loss_of = regression()
    optimizer = NaturalGradientOptimizer(
        model.parameters(), lr=lr, weight_decay=weight_decay, **options
    )
    moved = False
    for _ in range(14):
        optimizer.zero_grad()
        with optimizer.observe():
            loss = loss_of()
        loss.backward()
        before = flat([*model.parameters()])
        optimizer.step()
        report = optimizer.report
        moved |= bool((flat([*model.parameters()]) != before).any())
        assert report.kl_predicted <= 2 / 3 * report.kl_radius * (1 + 1e-6)
        assert report.kl is None or report.kl <= report.kl_radius
    assert moved


def test_a_step_whose_kl_stays_too_large_is_taken_back_bit_by_bit(monkeypatch):
    model, loss_of = classifier()
    optimizer = NaturalGradientOptimizer(model.parameters())
    for hostile in (False, True):
        if hostile:
            monkeypatch.setattr(TrustRegion, "shrink", lambda *_: 0.5)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with optimizer.observe():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(same) if hostile else not any(same)
        assert optimizer.report.rejected == int(hostile)
    assert optimizer.report.step_scale == 0
    assert optimizer.report.shrinks == 4


def test_a_rejected_step_is_learnt_from_so_that_a_later_one_is_taken(monkeypatch):
    """A prediction that saturates at once: shrinking by the quadratic model is never enough."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, y = torch.randn(16, 4).double(), torch.arange(16) % 3
    optimizer = NaturalGradientOptimizer(model.parameters())
    measure = type(optimizer._engine._length._measurement).measure

    def steep(self, observations):
        kl, reduction = measure(self, observations)
        if abs(kl) < 1e-25:  # the parameters have not moved
            return 0.0, reduction
        return 3 * abs(kl) ** 0.1, reduction  # at once large, and hardly smaller for a shorter step

    monkeypatch.setattr(type(optimizer._engine._length._measurement), "measure", steep)
    rejected = []
    for _ in range(12):
        with optimizer.observe():
            loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rejected.append(optimizer.report.rejected)
    assert rejected[0] == 1
    assert 0 in rejected


def test_where_the_kl_can_never_be_measured_steps_are_much_shorter():
    bound = TrustRegion(0.03)
    assert bound.scale(0.0199, 1.0) == 1.0
    bound.distrust()
    assert bound.scale(0.02, 1.0) == pytest.approx(300**-0.5)
    assert TrustRegion(0.03, measure_every=None).scale(0.02, 1.0) == pytest.approx(300**-0.5)
    measured = TrustRegion(0.03)
    measured.calibrate(0, 0.01, 0.02)
    measured.distrust()  # what was once measured counts for more
    assert measured.ratio == pytest.approx(2.0)
