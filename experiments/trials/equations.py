"""PINA, equations with networks: `python -m experiments.trials.equations`."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback
from pina import Condition, LabelTensor, Trainer
from pina.domain import CartesianDomain
from pina.equation import Equation
from pina.equation.zoo import FixedValue
from pina.model import FeedForward
from pina.operator import laplacian
from pina.optim import TorchOptimizer
from pina.problem import BaseProblem, InverseProblem, SpatialProblem
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver

from experiments.trials.trial import QUIET, Trial, main

LIBRARY = "pina-mathlab"


def _solve(
    problem: BaseProblem, optimizer: TorchOptimizer, epochs: int, callbacks: list[Callback]
) -> None:
    """An epoch is one batch: 20 x 20 points inside, 160 on the boundary."""
    problem.discretise_domain(20, "grid", domains=["D"])
    problem.discretise_domain(160, "random", domains=["boundary"])
    model = FeedForward(2, 1, layers=[20, 20], func=torch.nn.Tanh)
    solver = PhysicsInformedSingleModelSolver(problem, model, optimizer=optimizer)
    Trainer(solver, max_epochs=epochs, callbacks=callbacks, **QUIET).train()


def poisson(callbacks: list[Callback]) -> None:
    """The library's own formulation; its usual optimizer."""
    _solve(Poisson2DSquareProblem(), TorchOptimizer(torch.optim.Adam, lr=0.005), 200, callbacks)


def poisson_lbfgs(callbacks: list[Callback]) -> None:
    """The optimizer that the library's users change to when Adam stalls."""
    optimizer = TorchOptimizer(torch.optim.LBFGS, line_search_fn="strong_wolfe")
    _solve(Poisson2DSquareProblem(), optimizer, 30, callbacks)


def _forced(x: LabelTensor, u: LabelTensor, unknown: dict[str, torch.Tensor]) -> LabelTensor:
    force = torch.sin(torch.pi * x.extract(["x"])) * torch.sin(torch.pi * x.extract(["y"]))
    return laplacian(u, x, components=["u"], d=["x", "y"]) - unknown["k"] * force


class Force(SpatialProblem, InverseProblem):
    """How strong a force is, from where it bends a membrane to; k = 2π² ≈ 19.7."""

    output_variables = ["u"]  # noqa: RUF012
    spatial_domain = CartesianDomain({"x": [0, 1], "y": [0, 1]})
    unknown_parameter_domain = CartesianDomain({"k": [1, 40]})
    domains = {"D": spatial_domain, "boundary": spatial_domain.partial()}  # noqa: RUF012

    def __init__(self) -> None:
        inside = Condition(domain="D", equation=Equation(_forced))
        boundary = Condition(domain="boundary", equation=FixedValue(0.0))
        points = torch.rand(100, 2)  # [points, xy]
        bent = -torch.sin(torch.pi * points).prod(1, keepdim=True)  # [points, 1]
        measured = Condition(input=LabelTensor(points, ["x", "y"]), target=LabelTensor(bent, ["u"]))
        self._conditions = {"D": inside, "boundary": boundary, "measured": measured}
        super().__init__()

    @property
    def conditions(self) -> dict[str, Condition]:
        """The equation inside, zero at the boundary, and what was measured."""
        return self._conditions


def inverse(callbacks: list[Callback]) -> None:
    """A bare parameter beside the network, in a parameter group of its own."""
    _solve(Force(), TorchOptimizer(torch.optim.Adam, lr=0.005), 200, callbacks)


TRIALS = [
    Trial("pina_poisson", LIBRARY, "Poisson equation; squared residual", poisson),
    Trial("pina_lbfgs", LIBRARY, "Poisson equation; squared residual", poisson_lbfgs),
    Trial("pina_inverse", LIBRARY, "inverse Poisson; squared residual", inverse),
]

if __name__ == "__main__":
    main(TRIALS)
