"""Spectra reach the loggers that can show them, and come back from the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.spectrum import BINS, EDGES, BlockSpectrum, counted, counted_products
from ngplugin.tracking.spectra import FILE, log_spectra, read_spectra
from tests.tracking.conftest import Fit, history


@given(
    st.lists(st.floats(1e-11, 1e7), min_size=1, max_size=20),
    st.lists(st.floats(1e-11, 1e7), min_size=1, max_size=20),
)
def test_products_are_counted_as_they_would_be_one_by_one(a: list[float], g: list[float]) -> None:
    ours = counted_products(counted(_row(a)), counted(_row(g)))
    assert float(ours.sum()) == pytest.approx(len(a) * len(g))
    nonzero = ours[1:].cumsum(0)
    eps = torch.finfo(torch.float64).eps
    kept_a = [x for x in a if x > eps * max(a)]
    kept_g = [x for x in g if x > eps * max(g)]
    assert float(ours[0]) == len(a) * len(g) - len(kept_a) * len(kept_g)
    products = [x * y for x in kept_a for y in kept_g]
    for i in range(1, BINS - 1):  # within a bin
        assert sum(p < EDGES[i] * (1 - 1e-9) for p in products) <= float(nonzero[i]) + 1e-6
        assert float(nonzero[i - 1]) <= sum(p < EDGES[i + 1] * (1 + 1e-9) for p in products) + 1e-6


def test_more_are_counted_than_ones_can_be_added_up_to_in_float32() -> None:
    many = 2**24 + 4
    assert float(counted(torch.ones(1, 1).expand(1, many)).sum()) == many


def _row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def block(name: str = "layer.weight", **changes: Any) -> BlockSpectrum:
    counts = [0.0] * (1 + BINS)
    counts[0], counts[50], counts[53] = 2.0, 3.0, 1.5
    values = {"low": 1e-9, "high": 2.0, "damped_low": 1e-3, "damped_high": 2.5, **changes}
    return BlockSpectrum(name, tuple(counts), **values)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    nothing = BlockSpectrum("bias", (3.0, *[0.0] * BINS), math.nan, math.nan, math.nan, math.nan)
    log_spectra([logger], [block(), nothing], 7)
    log_spectra([logger], [block("other")], 9, optimizer=1)
    log_spectra([logger], [], 11)
    path = Path(logger.log_dir) / FILE
    path.write_text(path.read_text() + '{"step": 12, "opti')  # cut off in the middle
    (step, optimizer, (first, second)), (later, of, _) = read_spectra(path)
    assert (step, optimizer, later, of) == (7, 0, 9, 1)
    assert first == block()
    assert first.condition == pytest.approx(2500)
    assert second.counts == nothing.counts
    assert math.isnan(second.high)


def test_loggers_get_histograms_and_numbers_of_every_block(fit: Fit) -> None:
    times = [*read_spectra(fit.csv / FILE)]
    names = [b.name for b in times[0][2]]
    assert names == ["net.0.weight", "net.1.weight", "net.2.weight"]
    assert [sum(b.counts) for b in times[0][2]] == [5 * 7, 2 * 5, 3 * 6]
    assert len(times) >= 2
    written = history(fit.wandb)
    for place, name in enumerate(names):
        steps = [step for step, _, _ in times]
        assert [e.step for e in fit.tensorboard.Histograms(f"natgrad/spectrum/{name}")] == steps
        rows = [row for row in written if f"natgrad/spectrum/{name}" in row]
        assert [row["trainer/global_step"] for row in rows] == steps
        first, *edges = rows[0][f"natgrad/spectrum/{name}"]["bins"]
        assert first < edges[-1]
        for number, values in {
            "condition": [blocks[place].condition for _, _, blocks in times],
            "effective_rank": [blocks[place].effective_rank for _, _, blocks in times],
        }.items():
            key = f"natgrad/{number}/{name}"
            assert [row[key] for row in rows] == pytest.approx(values, rel=1e-4)
            board = [e.value for e in fit.tensorboard.Scalars(key)]
            assert board == pytest.approx(values, rel=1e-4)


def test_the_effective_rank_is_that_of_the_eigenvalues() -> None:
    def rank(values: list[float]) -> float:
        counts = tuple(counted(_row(values))[0].tolist())
        return BlockSpectrum("", counts, 0.0, 1.0, 0.1, 1.1).effective_rank

    assert rank([2.0] * 7) == pytest.approx(7)
    assert rank([1.0, 0.0, 0.0]) == pytest.approx(1)
    assert math.isnan(rank([0.0, 0.0]))
    values = torch.logspace(-3, 2, 50, dtype=torch.float64)
    p = values / values.sum()
    assert rank(values.tolist()) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=0.1)


def test_reports_have_spectra_on_the_steps_on_which_they_were_computed() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = NaturalGradientOptimizer(model.parameters(), spectrum_every=5)
    found = []
    for i in range(12):
        with optimizer.observe():
            loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert optimizer.report is not None
        if optimizer.report.spectra:
            found.append(i)
            (only,) = optimizer.report.spectra
            assert only.name == "parameter 0"
            assert only.condition == pytest.approx(optimizer.report.condition_number, rel=1e-5)
    assert found[0] == 0
    assert 2 <= len(found) <= 3
