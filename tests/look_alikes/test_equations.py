"""Shaped like libraries for differential equations: labelled tensors, conditions, closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.look_alikes.look_alike import look_alike, one_run, point
from tests.oracle import generator


class LabelTensor(torch.Tensor):
    """Columns have names; `extract` takes some of them and keeps the graph."""

    labels: list[str]

    @staticmethod
    def __new__(cls, x: Tensor, labels: list[str]) -> LabelTensor:
        made = x.as_subclass(cls)
        made.labels = [*labels]
        return made

    def extract(self, *labels: str) -> LabelTensor:
        columns = [self.labels.index(label) for label in labels]
        return LabelTensor(self.as_subclass(Tensor)[:, columns], [*labels])

    def clone(self, *args: Any, **kwargs: Any) -> LabelTensor:
        return LabelTensor(super().clone(*args, **kwargs), self.labels)

    def detach(self) -> LabelTensor:
        return LabelTensor(super().detach(), self.labels)

    def requires_grad_(self, mode: bool = True) -> LabelTensor:
        return LabelTensor(super().requires_grad_(mode), self.labels)


def derivative(u: LabelTensor, x: LabelTensor, by: str) -> LabelTensor:
    (all_of_them,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    return LabelTensor(all_of_them.as_subclass(Tensor), x.labels).extract(by)


def laplacian(u: LabelTensor, x: LabelTensor) -> Tensor:
    parts = (derivative(derivative(u, x, d), x, d).as_subclass(Tensor) for d in x.labels)
    return sum(parts, torch.zeros(()))


def load(x: LabelTensor) -> Tensor:
    return (torch.pi * x.as_subclass(Tensor)).sin().prod(1, keepdim=True)


class Condition:
    """Where an equation holds, and what is to be zero there."""

    def __init__(self, points: Tensor, residual: Callable[..., Tensor]) -> None:
        self.points = points
        self.residual = residual


class Poisson:
    """Δu = -load in a square, u = 0 around it; with `factor` the load's size is to be found."""

    def __init__(self, inverse: bool = False) -> None:
        g = generator(2)
        edge = torch.rand(80, 2, generator=g)
        edge[:40, 0], edge[40:, 1] = (edge[:40, 0] > 0.5).float(), (edge[40:, 1] > 0.5).float()
        inside = torch.rand(240, 2, generator=g)
        self.parameters = {"factor": nn.Parameter(torch.tensor(0.3))} if inverse else {}
        self.conditions = {
            "inside": Condition(inside, self.equation),
            "edge": Condition(edge, lambda u, x: u),
        }
        if inverse:
            known = (torch.pi * inside).sin().prod(1, keepdim=True) / (2 * torch.pi**2)
            self.conditions["data"] = Condition(inside, lambda u, x: u - known.to(u.dtype))

    def equation(self, u: LabelTensor, x: LabelTensor) -> Tensor:
        return laplacian(u, x) + self.parameters.get("factor", 1.0) * load(x)


class Conditions(Dataset[Any]):
    """One item, the points of all conditions."""

    def __init__(self, problem: Poisson, repeats: int) -> None:
        self.points = {name: c.points for name, c in problem.conditions.items()}
        self.repeats = repeats

    def __len__(self) -> int:
        return self.repeats

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.points


class TorchOptimizer:
    """A class and its keywords, hooked up to parameters when there are some."""

    def __init__(self, optimizer_class: type, **kwargs: Any) -> None:
        self.optimizer_class, self.kwargs = optimizer_class, kwargs

    def hook(self, parameters: Any) -> torch.optim.Optimizer:
        return self.optimizer_class(parameters, **self.kwargs)


class Solver(L.LightningModule):
    """Calls one network once for each condition, and adds up weighted mean squares."""

    weights = {"inside": 1.0, "edge": 10.0, "data": 100.0}  # noqa: RUF012

    def __init__(self, problem: Poisson, optimizer: TorchOptimizer, loss: nn.Module | None) -> None:
        super().__init__()
        self.problem = problem
        self.net = nn.Sequential(
            nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)
        )
        self.optimizer = optimizer
        self.loss = loss if loss is not None else nn.MSELoss()
        self.loss.reduction = "none"

    def forward(self, x: LabelTensor) -> LabelTensor:
        return LabelTensor(self.net(x).as_subclass(Tensor), ["u"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total = torch.zeros((), dtype=self.dtype)
        for name, points in batch.items():
            x = LabelTensor(points.detach().clone(), ["x", "y"]).requires_grad_()
            residual = self.problem.conditions[name].residual(self(x), x)
            each = self.loss(residual, torch.zeros_like(residual))
            total = total + self.weights[name] * each.as_subclass(Tensor).mean()
        self.log("loss", total)
        return total

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer.hook(self.net.parameters())
        if self.problem.parameters:
            optimizer.add_param_group({"params": [*self.problem.parameters.values()]})
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)]


def data(problem: Poisson) -> DataLoader[Any]:
    return DataLoader(Conditions(problem, repeats=5), batch_size=None)


adam = TorchOptimizer(torch.optim.Adam, lr=1e-3)


@point(4, "several weighted conditions of unreduced squares")
@point(10, "a subclass of Tensor with labels, and Trainer(precision='64-true')")
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_an_equation_is_solved_with_labelled_tensors(precision: Any) -> None:
    problem = Poisson()
    run = look_alike(
        lambda: Solver(problem, adam, None), data(problem), 0.1, max_epochs=6, precision=precision
    )
    assert set(run.blocks().values()) == {"exact"}
    assert run.coverage.losses == ("mse_loss",)


@point(5, "residuals by nn.L1Loss")
def test_residuals_may_be_absolute() -> None:
    problem = Poisson()
    run = look_alike(lambda: Solver(problem, adam, nn.L1Loss()), data(problem), 0.7, max_epochs=12)
    assert run.coverage.losses == ("l1_loss",)


@point(8, "a raw parameter of the problem in a group of its own")
def test_an_unknown_of_the_problem_is_trained_with_the_network() -> None:
    def make() -> Solver:
        return Solver(Poisson(inverse=True), adam, None)

    run = look_alike(make, data(Poisson(inverse=True)), 0.1, max_epochs=12)
    assert 0.4 < float(run.module.problem.parameters["factor"]) < 1.0  # from 0.3 on its way to 1
    assert run.blocks()["parameter 6"] == "exact"
    assert len(run.rates[0]) == 2


@point(10, "LBFGS, whose step calls its closure many times")
def test_lbfgs_is_replaced_by_steps_that_call_their_closure_once() -> None:
    problem = Poisson()

    def make() -> Solver:
        lbfgs = TorchOptimizer(torch.optim.LBFGS, lr=0.5, max_iter=5)
        return Solver(problem, lbfgs, None)

    without = one_run(make, data(problem), natural=False, max_epochs=2, precision="64-true")
    run = one_run(make, data(problem), natural=True, max_epochs=6, precision="64-true")
    assert without.calls > 10
    assert run.calls == 30
    assert run.losses[-1] < 0.1 * run.losses[0]
    assert run.warnings <= without.warnings
