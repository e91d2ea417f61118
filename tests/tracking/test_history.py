"""Of a long fit a few thousand steps are kept, evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngplugin.history import History, Thinned
from tests.tracking.test_metrics import report
from tests.tracking.test_spectra import block


@given(st.integers(1, 400), st.integers(1, 20))
def test_what_is_kept_is_evenly_spaced_and_bounded(count: int, half: int) -> None:
    thinned: Thinned[int] = Thinned(2 * half)
    for i in range(count):
        thinned.add(i)
    spacing = thinned.kept[1] - thinned.kept[0] if len(thinned.kept) > 1 else 1
    assert thinned.kept == [*range(0, count, spacing)]
    assert min(count, half) <= len(thinned.kept) <= 2 * half


def test_measured_steps_are_kept_however_seldom_they_are() -> None:
    history = History()
    for step in range(20_001):
        history.add(report(step=step, kl=0.1 if step % 1000 == 1 else None))
    measured = [each.step for each in history.reports if each.kl is not None]
    assert measured == [*range(1, 20_000, 1000)]
    assert len(history.reports) < 2100
    assert [each.step for each in history.reports] == sorted({r.step for r in history.reports})


@pytest.mark.parametrize("blocks", [1, 100, 10_000])
def test_spectra_of_many_blocks_are_kept_less_often(blocks: int) -> None:
    history = History()
    for step in range(5000 if blocks == 1 else 100):
        history.add(report(step=step, spectra=(block(),) * blocks))
    kept = history.spectra.kept
    assert kept[0][0] == 0
    assert len(kept) * blocks <= max(4000, 16 * blocks)
    assert len(kept) >= 8
    assert not any(each.spectra for each in history.reports)  # not a second time
