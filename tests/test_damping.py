"""Damping schedules and what is refused as one."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngplugin import (
    ConstantDamping,
    CosineDamping,
    ExponentialDamping,
    KlMatching,
    LevenbergMarquardt,
    LinearDamping,
    NaturalGradientOptimizer,
    OptionError,
)
from ngplugin.damping import as_schedule, damping_at

PATHS = [LinearDamping, ExponentialDamping, CosineDamping]


@pytest.mark.parametrize("path", PATHS)
@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.integers(1, 500))
def test_a_path_runs_from_start_to_end_and_stays_there(path, start, end, steps):
    schedule = path(start, end, steps)
    assert schedule(0) == pytest.approx(start)
    assert schedule(steps) == pytest.approx(end)
    assert schedule(steps + 1000) == pytest.approx(end)


@pytest.mark.parametrize("path", PATHS)
@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.integers(1, 30))
def test_a_path_never_turns_back(path, start, end, steps):
    values = [path(start, end, steps)(step) for step in range(steps + 2)]
    sign = 1 if end >= start else -1
    rounding = 1e-9 * (start + end)
    assert all(sign * (b - a) >= -rounding for a, b in pairwise(values))


def test_half_way_is_the_arithmetic_geometric_or_cosine_middle():
    assert LinearDamping(1.0, 0.0, 10)(5) == pytest.approx(0.5)
    assert ExponentialDamping(1.0, 0.01, 10)(5) == pytest.approx(0.1)
    assert CosineDamping(1.0, 0.0, 10)(5) == pytest.approx(0.5)
    assert CosineDamping(1.0, 0.0, 4)(1) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_a_number_is_constant_and_a_function_is_taken_as_it_is():
    assert as_schedule(0.3)(10**9) == 0.3
    assert as_schedule(1) == ConstantDamping(1.0)
    assert damping_at(lambda step: step / 4, 2) == 0.5


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_numbers_are_refused_wherever_they_enter(bad):
    for make in (
        lambda: as_schedule(bad),
        lambda: ConstantDamping(bad),
        lambda: LinearDamping(bad, 1.0, 3),
        lambda: CosineDamping(1.0, bad, 3),
        lambda: damping_at(lambda step: bad, 7),
    ):
        with pytest.raises(OptionError, match=str(bad)):
            make()


def test_what_is_no_damping_is_refused_with_an_example():
    for bad in ("big", None, True, [1.0]):
        with pytest.raises(OptionError, match="ExponentialDamping"):
            as_schedule(bad)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_of_no_steps_is_refused(path):
    with pytest.raises(OptionError, match="steps=0"):
        path(1.0, 0.5, 0)


@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, 1.0)])
def test_an_exponential_path_to_or_from_zero_is_refused_naming_the_way_out(ends):
    with pytest.raises(OptionError, match="LinearDamping"):
        ExponentialDamping(*ends, 10)


@pytest.mark.parametrize(
    ("damping", "start", "least", "most", "after"),
    [(KlMatching, 0.1, 1e-8, 10.0, 0.11), (LevenbergMarquardt, 1e-3, 1e-15, 1e3, 1e-4)],
)
def test_damping_that_adapts_has_wide_bounds_by_default(damping, start, least, most, after):
    damping = damping()
    assert damping(0) == start
    damping.see(0.9, 1.21)  # by the square root of the ratio of KLs, or a tenth
    assert damping(0) == pytest.approx(after)
    for ratio, bound in ((1e9, most), (1e-9, least)):
        for _ in range(50):
            damping.see(-1.0 if ratio > 1 else 1.0, ratio)
        assert damping(0) == bound


def test_a_schedule_s_bad_value_names_its_step():
    with pytest.raises(OptionError, match="at step 7"):
        damping_at(lambda step: -1.0, 7)


def test_levenberg_marquardt_follows_the_reduction_ratio():
    damping = LevenbergMarquardt(start=1.0, least=0.2, most=30.0)
    for ratio, expected in [
        (0.7, 0.5),
        (0.4, 0.5),
        (0.1, 1.0),
        (-1.0, 2.0),  # faster and faster while it fails
        (-1.0, 8.0),
        (0.3, 8.0),
        (0.0, 16.0),  # and from two again after a success
        (-1.0, 30.0),
        (0.6, 15.0),
    ]:
        damping.see(ratio)
        assert damping(0) == expected
    again = LevenbergMarquardt()
    again.load_state_dict(damping.state_dict())
    assert again.state_dict() == damping.state_dict()
    for _ in range(9):
        damping.see(1.0)
    assert damping(7) == 0.2


@pytest.mark.parametrize("values", [{"start": 0.0}, {"least": 1.0}, {"most": 1e-9}])
def test_levenberg_marquardt_refuses_bounds_that_exclude_its_start(values):
    with pytest.raises(OptionError, match="0 < least <= start <= most"):
        LevenbergMarquardt(**values)


@pytest.mark.parametrize("adaptive", [KlMatching, LevenbergMarquardt])
def test_bounds_may_meet_and_may_not_be_zero(adaptive):
    assert adaptive(start=0.5, least=0.5, most=0.5)(0) == 0.5
    with pytest.raises(OptionError, match="0 < least <= start <= most"):
        adaptive(least=0.0)


def test_automatic_damping_is_a_tenth_for_blocks_that_approximate():
    assert as_schedule("auto")(5) == 0.1


# -- matching the KL -----------------------------------------------------------------------------


def after(ratio, **options):
    damping = KlMatching(start=0.1, **options)
    damping.see(None, ratio)
    return damping(0)


def test_a_prediction_that_came_true_leaves_the_damping():
    assert after(1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("ratio", [None, 0.0, -1.0])
def test_a_ratio_that_says_nothing_leaves_it_too(ratio):
    assert after(ratio) == 0.1


@given(st.floats(1e-6, 1e6), st.floats(0.01, 1.0))
def test_damping_follows_the_ratio_by_at_most_a_factor_of_two(ratio, rate):
    value = after(ratio, rate=rate)
    assert (value - 0.1) * (ratio - 1) >= 0
    assert 0.05 * (1 - 1e-9) <= value <= 0.2 * (1 + 1e-9)
    if 0.5 < ratio**rate < 2:
        assert value == pytest.approx(0.1 * ratio**rate)


@pytest.mark.parametrize("ratio", [math.inf, math.nan])
def test_a_kl_that_is_no_number_doubles_the_damping(ratio):
    # nan <= 0 is false, too: it is not taken for a ratio that says nothing.
    assert after(ratio) == pytest.approx(0.2)


def test_it_keeps_to_its_bounds():
    damping = KlMatching(start=0.1, least=0.05, most=0.3)
    for ratio, bound in ((1e9, 0.3), (1e-9, 0.05)):
        for _ in range(5):
            damping.see(None, ratio)
        assert damping(0) == bound


def test_it_settles_where_the_prediction_comes_true():
    damping = KlMatching(start=1e-4)
    for _ in range(60):
        damping.see(None, (0.02 / damping(0)) ** 0.5)
    assert damping(0) == pytest.approx(0.02, rel=1e-3)


def test_a_saved_one_goes_on():
    one, other = KlMatching(), KlMatching()
    one.see(None, 3.0)
    other.load_state_dict(one.state_dict())
    assert other(0) == one(0) != 0.1


@pytest.mark.parametrize(
    "options", [{"start": 0.0}, {"least": 1.0}, {"most": math.inf}, {"rate": 0.0}, {"rate": 2.0}]
)
def test_bad_numbers_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        KlMatching(**options)


@pytest.mark.parametrize("structure", ["auto", "eigen"])
def test_an_optimizer_asks_for_what_it_learns_from_and_saves_it(structure):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.arange(32) % 3
    make = functools.partial(
        NaturalGradientOptimizer, [*model.parameters()], damping=KlMatching(), structure=structure
    )
    optimizer = make()
    seen = []
    for _ in range(12):
        with optimizer.observe():
            loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(optimizer.report.damping)
    assert len(set(seen)) == 12  # measured at every step
    other = make()
    other.load_state_dict(optimizer.state_dict())
    assert other._engine._damping(0) == optimizer._engine._damping(0)


# -- Levenberg-Marquardt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(1.3, 0.1), (0.76, 0.1), (0.75, 0.5), (0.51, 0.5), (0.5, 1.0), (0.26, 1.0), (0.25, 2.0),
     (0.01, 2.0), (0.0, 2.0), (-5.0, 2.0), (None, 1.0)],
)  # fmt: skip
def test_damping_falls_the_faster_the_better_the_model(ratio, factor):
    damping = LevenbergMarquardt(start=1.0)
    damping.see(ratio)
    assert damping(0) == pytest.approx(factor)


def test_failures_in_a_row_raise_damping_faster_and_a_success_ends_the_row():
    damping = LevenbergMarquardt(start=1.0)
    values = []
    for ratio in (-1.0, -1.0, -1.0, 0.3, -1.0):
        damping.see(ratio)
        values.append(damping(0))
    assert values == [2.0, 8.0, 64.0, 64.0, 128.0]
