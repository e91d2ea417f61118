"""The Poisson equation on the unit square, solved by a network (a PINN).

    -Δu = f inside, u = 0 on the boundary,   with f such that u = sin(kπx) sin(kπy)

The network minimises the residual of the equation at points (Raissi, Perdikaris & Karniadakis
2019); the known solution serves only to measure how far it is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from experiments.tasks.splits import Examples, SplitData
from experiments.tasks.task import MakeOptimizer, MakeScheduler, Task


class AllPoints(Dataset[Any]):
    """All points at once, as often as asked for."""

    def __init__(self, interior: Tensor, boundary: Tensor, times: int) -> None:
        self.points = (interior, boundary)
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Points [interior, 2] and [boundary, 2], the same for every index."""
        return self.points


class UnitSquare(SplitData):
    """Points of the unit square, full batch; validated and tested on a fine grid.

    Args:
        interior: random points inside.
        boundary: points on the boundary, evenly spaced; a multiple of 4.
        grid: points along each side of the grid that is measured on.
        steps: of training in an epoch, each on all points.
        points_seed: which random points these are. Part of the task, not of a run: keep it.

    Raises:
        ValueError: a number of points that cannot be.
    """

    evaluation_size = 1_000_000  # the whole grid

    def __init__(
        self,
        interior: int = 900,
        boundary: int = 120,
        grid: int = 101,
        steps: int = 100,
        points_seed: int = 0,
    ) -> None:
        super().__init__(1, steps=steps)
        if interior < 1 or boundary < 4 or boundary % 4 or grid < 3:
            raise ValueError(
                f"interior={interior}, boundary={boundary}, grid={grid}: expected numbers of "
                "points, a multiple of 4 on the boundary, and 3 or more along the grid"
            )
        self.interior = interior
        self.boundary = boundary
        self.grid = grid
        self.points_seed = points_seed

    @property
    def dimensions(self) -> dict[str, Any]:
        """Two coordinates, one value."""
        return {"inputs": 2, "outputs": 1}

    def make_splits(self) -> Mapping[str, Dataset[Any]]:
        """The points to train on, and the grid."""
        random = torch.Generator().manual_seed(self.points_seed)
        interior = torch.rand(self.interior, 2, generator=random)
        along = torch.linspace(0, 1, self.boundary // 4 + 1)[:-1]  # a corner begins each side
        zero, one = torch.zeros_like(along), torch.ones_like(along)
        sides = [(along, zero), (one, along), (1 - along, one), (zero, 1 - along)]
        boundary = torch.cat([torch.stack(side, dim=1) for side in sides])
        line = torch.linspace(0, 1, self.grid)
        grid = Examples(torch.cartesian_prod(line, line))
        points = AllPoints(interior, boundary, self.steps or 1)
        return {"train": points, "val": grid, "test": grid}


class PoissonEquation(Task):
    """Minimises the mean squared residual inside, and the mean square on the boundary.

    Measures `error`, |u - u*| / |u*| in the L2 norm over the points of a grid that comes in one
    batch. The network takes points [n, 2] and returns values [n, 1].

    Args:
        network: see above.
        optimizer: see `Task`.
        scheduler: see `Task`.
        boundary_weight: of the mean square on the boundary.
        waves: k above, half waves along each side.

    Raises:
        ValueError: a weight or number of waves that is not positive.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        boundary_weight: float = 1.0,
        waves: int = 1,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        if boundary_weight <= 0 or waves < 1:
            raise ValueError(
                f"boundary_weight={boundary_weight}, waves={waves}: expected a number above 0 and "
                "a positive whole number"
            )
        self.boundary_weight = boundary_weight
        self.waves = waves

    def solution(self, points: Tensor) -> Tensor:
        """u* at points [n, 2], as [n, 1]."""
        return torch.sin(self.waves * math.pi * points).prod(dim=1, keepdim=True)

    def residual(self, points: Tensor) -> Tensor:
        """-Δu - f at points [n, 2], as [n, 1]."""
        source = 2 * (self.waves * math.pi) ** 2 * self.solution(points)
        return -laplacian(self, points) - source

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of interior points [n, 2] and boundary points [m, 2]."""
        interior, boundary = batch
        residual, edge = self.residual(interior), self(boundary)
        inside = F.mse_loss(residual, torch.zeros_like(residual))
        return inside + self.boundary_weight * F.mse_loss(edge, torch.zeros_like(edge))

    def measure(self, batch: tuple[Tensor]) -> dict[str, Tensor]:
        """The relative error at grid points [n, 2]."""
        (points,) = batch
        exact = self.solution(points)
        return {"error": (self(points) - exact).norm() / exact.norm()}


def laplacian(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """∂²u/∂x² + ∂²u/∂y² + ... at points [n, d], as [n, 1]; can be differentiated further.

    Args:
        function: [n, d] -> [n, 1], each row by itself.
        points: where; they are taken as constants.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(function(points).sum(), points, create_graph=True)  # [n, d]
        total = torch.zeros_like(points[:, 0])
        for i in range(points.shape[1]):
            (second,) = torch.autograd.grad(slope[:, i].sum(), points, create_graph=True)
            total = total + second[:, i]
        return total[:, None]
