"""A batch of no numbers leaves a normalization's running statistics as they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngplugin.lightning.running_statistics import RunningStatistics
from tests.small_fits import Points, fit


class Normalized(Points):
    """Some batch is not what it should be."""

    def __init__(self, bad: float | None, at: int = 3) -> None:
        super().__init__()
        self.bad, self.at = bad, at
        self.seen: list[Tensor] = []

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        norm = self.net[1]
        self.seen.append(torch.cat([norm.running_mean, norm.running_var]))
        if self.bad is not None and self.trainer.global_step == self.at:
            x = x.index_fill(0, torch.tensor(0), self.bad)
            self.bad = None  # a skipped step is no step of the trainer's
        return super().training_step((x, y), batch_idx)


@pytest.mark.supports("Faults", "a batch of nan or inf in a model with BatchNorm")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_batch_does_not_spoil_what_evaluation_relies_on(bad: float, at: int) -> None:
    module = Normalized(bad, at)
    fit(module, steps=8)
    before, after = module.seen[at], module.seen[at + 1]
    assert torch.equal(before, after)
    assert torch.stack(module.seen).isfinite().all()
    assert not torch.equal(module.seen[-2], module.seen[-1])  # good batches go on to count
    module.eval()
    assert module.net(torch.randn(3, 6)).isfinite().all()


def test_good_batches_leave_them_bit_for_bit_as_they_are_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, other = Normalized(None), Normalized(None)
    fit(module)
    monkeypatch.setattr(RunningStatistics, "keep", lambda self: None)
    fit(other)
    assert all(map(torch.equal, module.seen, other.seen))


def test_each_dtype_has_its_own_and_what_was_moved_is_taken_anew() -> None:
    net = nn.Sequential(
        nn.BatchNorm1d(2), nn.BatchNorm2d(3).double(), nn.BatchNorm1d(2, affine=False)
    )
    net[2].track_running_stats, net[2].running_mean = False, None
    statistics = RunningStatistics(net)
    third = 1 / torch.tensor(3.0).double()
    net[1].running_var.fill_(third)
    statistics.keep()
    net[1].running_var[1], net[0].running_mean[0] = torch.nan, torch.inf
    statistics.keep()
    assert net[1].running_var.tolist() == [third] * 3
    assert net[0].running_mean.tolist() == [0, 0]
    net[0].half()
    net[0].running_mean.fill_(0.5)
    statistics.keep()
    net[0].running_mean.fill_(torch.nan)
    statistics.keep()
    assert net[0].running_mean.tolist() == [0.5, 0.5]
