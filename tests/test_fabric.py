"""Lightning Fabric wraps model and optimizer; natural gradient works through its wrappers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplugin import NaturalGradientOptimizer

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()

Make = Callable[[Any], Optimizer]


def own(params: Any) -> Optimizer:
    return NaturalGradientOptimizer(params)


def wrapped(params: Any) -> Optimizer:
    return NaturalGradientOptimizer.wrap(torch.optim.AdamW(params, lr=1e-3))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def train(model: Any, optimizer: Any, backward: Callable[[Tensor], Any], steps: int = 12) -> Tensor:
    for _ in range(steps):
        with optimizer.observe():
            loss = loss_of(model)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.mark.parametrize("make", [own, wrapped])
def test_fabric_takes_the_steps_of_a_plain_loop(fabric: Fabric, make: Make) -> None:
    plain = network()
    expected = train(plain, make(plain.parameters()), torch.Tensor.backward)
    module = network()
    model, optimizer = fabric.setup(module, make(module.parameters()))
    assert torch.equal(train(model, optimizer, fabric.backward), expected)
    assert optimizer.report.step == 11
    assert {row.block for row in optimizer.coverage().rows} == {"kronecker"}


@pytest.mark.supports("Loops", "Lightning Fabric: step(closure)")
def test_a_closure_is_observed_by_itself(fabric: Fabric) -> None:
    module = network()
    model, optimizer = fabric.setup(module, own(module.parameters()))
    before = loss_of(model).item()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        fabric.backward(loss)
        return loss

    for _ in range(8):
        optimizer.step(closure)
    assert loss_of(model).item() < 0.5 * before


@pytest.mark.supports("Loops", "Lightning Fabric: schedulers on the optimizer that was set up")
def test_a_scheduler_scales_the_radius(fabric: Fabric) -> None:
    module = network()
    model, optimizer = fabric.setup(module, own(module.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(model, optimizer, fabric.backward, steps=1)
    radius = optimizer.report.kl_radius
    scheduler.step()
    train(model, optimizer, fabric.backward, steps=1)
    assert optimizer.report.kl_radius == pytest.approx(radius / 4)


@pytest.mark.supports("Loops", "Lightning Fabric: save() and load(), resuming bit for bit")
def test_resuming_is_bit_exact(fabric: Fabric, tmp_path: Path) -> None:
    def start() -> Any:
        module = network()
        return fabric.setup(module, own(module.parameters()))

    model, optimizer = start()
    train(model, optimizer, fabric.backward, steps=6)
    fabric.save(tmp_path / "half", {"model": model, "optimizer": optimizer})
    whole = train(model, optimizer, fabric.backward, steps=6)
    model, optimizer = start()
    fabric.load(tmp_path / "half", {"model": model, "optimizer": optimizer})
    assert torch.equal(train(model, optimizer, fabric.backward, steps=6), whole)
