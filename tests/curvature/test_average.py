"""The running average against the weighted mean written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngplugin.curvature.average import RunningAverage
from tests.oracle import randn

decays = st.floats(0.0, 0.999)


def weights_of(used):
    """The weight of each value in the average, decays given one an update."""
    weights = []
    for decay in used:
        weights = [decay * w for w in weights] + [1 - decay]
    return torch.tensor(weights, dtype=torch.float64)


@given(st.lists(decays, min_size=1, max_size=8))
def test_the_average_is_the_weighted_mean_of_all_values_whatever_the_decays(used):
    values = randn(len(used), 3)
    average = RunningAverage()
    for value, decay in zip(values, used, strict=True):
        average.update(value, decay)
    w = weights_of(used)
    torch.testing.assert_close(average.value, (w / w.sum()) @ values)


@given(st.lists(decays, min_size=1, max_size=8))
def test_the_effective_count_is_kish_s(used):
    average = RunningAverage()
    for decay in used:
        average.update(torch.ones(1), decay)
    w = weights_of(used)
    assert average.effective_count == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))


def test_with_little_forgetting_the_first_values_count_equally():
    average = RunningAverage()
    for value in (1.0, 2.0, 6.0):
        average.update(torch.tensor([value]).double(), 1 - 1e-9)
    assert float(average.value) == pytest.approx(3.0)
    assert average.effective_count == pytest.approx(3.0)


def test_one_value_is_its_own_average_and_is_not_kept_by_reference():
    value = randn(4)
    average = RunningAverage()
    average.update(value, 0.9)
    expected = value.clone()
    value.zero_()
    torch.testing.assert_close(average.value, expected)


def test_an_empty_average_is_false_and_counts_nothing():
    average = RunningAverage()
    assert not average
    assert average.effective_count == 0
    average.update(torch.zeros(2), 0.5)
    assert average


def test_a_saved_average_continues_bit_for_bit_and_apart_from_the_original():
    one = RunningAverage()
    for i in range(3):
        one.update(randn(4, seed=i), 0.7)
    other = RunningAverage()
    other.load_state_dict(one.state_dict(), randn(4))
    for i in range(3, 6):
        one.update(randn(4, seed=i), 0.7)
    for i in range(3, 6):
        other.update(randn(4, seed=i), 0.7)
    assert torch.equal(one.value, other.value)
    assert one.effective_count == other.effective_count
