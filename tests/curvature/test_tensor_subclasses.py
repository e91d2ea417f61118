"""Tensors that carry more than numbers, as those of libraries for equations or images do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin import NaturalGradientOptimizer
from tests.oracle import double, flat, generator


class Labelled(torch.Tensor):
    """Has labels, which its own methods hand on and torch functions do not."""

    def __new__(cls, data, labels):
        made = data.as_subclass(cls)
        made.labels = labels
        return made

    def to(self, *args, **kwargs):
        return Labelled(super().to(*args, **kwargs), self.labels)

    def clone(self, *args, **kwargs):
        return Labelled(super().clone(*args, **kwargs), self.labels)

    def detach(self):
        return Labelled(super().detach(), self.labels)


def residual(model, x):
    """The equation Δu = x₀ x₁ at the points x, with derivatives of the network inside."""
    x = x.as_subclass(torch.Tensor).clone().requires_grad_().as_subclass(type(x))
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    laplacian = sum(
        torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    )
    return laplacian - x[:, 0] * x[:, 1]


def by_hand(model, x):
    return residual(model, x).square().mean()


def recognised(model, x):
    r = residual(model, x)
    return F.mse_loss(r, torch.zeros_like(r), reduction="none").mean()


def in_place(model, x):
    u = model(x)
    u += 1.0
    u[:, 0] *= 2.0
    return F.mse_loss(u, torch.ones_like(u))


def one_run(loss, points):
    model = double(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 1)))
    optimizer = NaturalGradientOptimizer(model.parameters(), measure_every=1)
    reports = []
    for _ in range(3):
        with optimizer.observe():
            value = loss(model, points())
        optimizer.zero_grad()
        value.as_subclass(torch.Tensor).backward()
        optimizer.step()
        reports.append(optimizer.report)
    return flat([*model.parameters()]), reports, optimizer.coverage()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [recognised, by_hand, in_place])
def test_a_subclass_of_tensor_is_trained_on_as_a_tensor_is(loss):
    x = torch.rand(12, 2, generator=generator(3), dtype=torch.float64)
    theta, reports, coverage = one_run(loss, lambda: x.clone())
    labelled, of_labelled, same_coverage = one_run(loss, lambda: Labelled(x.clone(), ["x", "y"]))
    torch.testing.assert_close(labelled, theta)
    assert [r.kl for r in of_labelled] == pytest.approx([r.kl for r in reports])
    assert all(r.kl is not None for r in reports)
    assert same_coverage == coverage
