"""Factors from 1e-20 to 1e20, denormal ones and singular ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.blocks import (
    AveragedBlock,
    BlockDamping,
    DiagonalBlock,
    EigenBlock,
    GradientKroneckerBlock,
    KroneckerBlock,
    UnitBlock,
)
from ngplugin.curvature.taps import read_map_call
from tests.oracle import flat, generator, randn

ROWS, OUT, IN = 40, 6, 9
supports = pytest.mark.supports


def of_map(kind: type[KroneckerBlock], a: float, g: float, dtype: torch.dtype) -> AveragedBlock:
    """A linear map's block, with inputs and scores of a size."""
    weight = nn.Parameter(torch.zeros(OUT, IN, dtype=dtype))
    x, score = (a * randn(ROWS, IN)).to(dtype), (g * randn(ROWS, OUT, seed=1)).to(dtype)
    block = kind(weight)
    for _ in range(2):  # an eigen block measures along its first basis
        block.add_map_score(read_map_call(F.linear, (x, weight), {}), score, 1.0)
        folded = block.fold(1.0, 0.5)
        block.refresh(BlockDamping(0.1))
    assert folded
    return block


def of_gradients(
    kind: Callable[..., Any], shapes: list[tuple[int, ...]], g: float, dtype: torch.dtype
) -> AveragedBlock:
    """A block from sampled gradients of a size."""
    block: AveragedBlock = kind(*(nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes))
    for seed in range(5):
        block.add_gradient_scores([(g * randn(*s, seed=seed)).to(dtype) for s in shapes], 1.0)
        assert block.fold(1.0, 0.5)
    block.refresh(BlockDamping(0.1))
    return block


BLOCKS: dict[str, Callable[[float, float, torch.dtype], AveragedBlock]] = {
    "kronecker": lambda a, g, dtype: of_map(KroneckerBlock, a, g, dtype),
    "eigen": lambda a, g, dtype: of_map(EigenBlock, a, g, dtype),
    "gradient": lambda a, g, dtype: of_gradients(GradientKroneckerBlock, [(OUT, IN)], a * g, dtype),
    "unit-wise": lambda a, g, dtype: of_gradients(UnitBlock, [(IN,), (IN,)], a * g, dtype),
    "diagonal": lambda a, g, dtype: of_gradients(DiagonalBlock, [(OUT, IN)], a * g, dtype),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def direction(block: AveragedBlock) -> Tensor:
    vectors = [randn(*p.shape, seed=7).to(p.dtype) for p in block.parameters]
    return flat(block.precondition(vectors)[0])


@supports("Faults", "factors from 1e-20 to 1e20")
@every_block
@pytest.mark.parametrize(
    ("a", "g"),
    [(1e-10, 1.0), (1e10, 1.0), (1.0, 1e-10), (1.0, 1e10), (1e10, 1e-10), (1e-10, 1e10)],
)
def test_a_direction_scales_as_one_over_f(name, a, g):
    """In float32: A and G are the squares, and their product is within its range."""
    usual = direction(BLOCKS[name](1.0, 1.0, torch.float32))
    found = direction(BLOCKS[name](a, g, torch.float32))
    expected = usual.double() / (a * g) ** 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3 / (a * g) ** 2)


@pytest.mark.parametrize("kind", [KroneckerBlock, EigenBlock])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spectrum_over_forty_decades_is_inverted(kind, dtype):
    block = of_map(kind, 1.0, 1.0, dtype)
    values = torch.logspace(-20, 20, IN).to(dtype)
    Q = torch.linalg.qr(randn(IN, IN))[0].to(dtype)
    block._averages["inputs"]._sum = (Q * values @ Q.T)[None] * block._averages["inputs"].weight
    block._averages["rows"]._sum.fill_(block._averages["rows"].weight)
    block._averages.pop("M", None)
    block._refreshed = {}
    block.refresh(BlockDamping(1e-3))
    found = direction(block).reshape(OUT, IN).double()
    assert found.isfinite().all()
    if kind is KroneckerBlock:
        A, G = (X[0].double() for X in block.averaged_factors())
        A = A + 1e-3 * A.diagonal().mean() * torch.eye(IN)
        G = G + 1e-3 * G.diagonal().mean() * torch.eye(OUT)
        expected = torch.linalg.inv(G) @ randn(OUT, IN, seed=7) @ torch.linalg.inv(A)
        assert (found - expected).norm() < 1e-2 * expected.norm()


# -- in training ---------------------------------------------------------------------------------

STRUCTURES = ["auto", "kronecker", "eigen", "diagonal", "exact", "matrix-free"]
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def train(structure: str, x: Tensor, steps: int = 7, **options: Any) -> list[float]:
    """The losses, of steps each of which has kept to its radius."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, 2)).to(x.dtype)
    y = torch.arange(len(x)) % 2
    optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure, **options)
    losses = []
    for _ in range(steps):
        with optimizer.observe():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = optimizer.report
        assert report.kl is None or report.kl <= report.kl_radius * (1 + 1e-6)
        assert flat([*model.parameters()]).isfinite().all()
        losses.append(loss.item())
    return losses


X = torch.randn(32, 8, generator=generator(1)).double()
FEATURES = {
    "forty decades of A": torch.logspace(-10, 10, 8).double(),
    "all tiny": torch.full((8,), 1e-10).double(),
    "denormal A": torch.full((8,), 1e-21).double(),
    "denormal": torch.full((8,), 1e-42).double(),
    "all large": torch.full((8,), 1e10).double(),
    "the same": torch.zeros(8).double(),
}


@every_structure
@pytest.mark.parametrize(
    ("features", "dtype"),
    [*((features, torch.float32) for features in FEATURES), ("forty decades of A", torch.float64)],
)
def test_training_goes_on_over_the_range(structure, features, dtype):
    losses = train(structure, (X * FEATURES[features]).to(dtype))
    assert losses[-1] <= losses[0]


@supports("Faults", "no damping with a singular Fisher matrix")
@every_structure
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_no_damping_with_a_singular_fisher(structure, mode):
    """Two features are copies, and there are fewer examples than parameters."""
    x = torch.cat([X, X[:, :2]], 1).float()[:12]
    losses = train(structure, x, damping=0.0, sampling_damping=0.0, damping_mode=mode)
    assert losses[-1] < losses[0]
