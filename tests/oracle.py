"""Brute force: dense Fisher matrices and damped blocks, and the shortest way to a built block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from hypothesis import settings
from torch import Tensor, nn

from ngplugin.curvature.block_choice import BlockRule
from ngplugin.curvature.blocks import (
    Block,
    DiagonalBlock,
    EigenBlock,
    GradientKroneckerBlock,
    HalfDiagonalBlock,
    UnitBlock,
)
from ngplugin.curvature.blocks.kronecker_product import KroneckerProductBlock
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ngplugin.curvature.objective import ObjectiveWeight
from ngplugin.curvature.observation import Observation
from ngplugin.curvature.observe import Observer

torch.set_num_threads(1)
# The same examples in every run, and no time limit on a busy machine.
settings.register_profile("ngplugin", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ngplugin")

FAMILIES: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def double(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with fixed random parameters of moderate size, biases included."""
    model = model.double()
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p.shape[1:].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / fan_in**0.5)
    return model


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([t.numel() for t in like])
    return [part.reshape(t.shape) for part, t in zip(parts, like, strict=True)]


@contextlib.contextmanager
def moved(parameters: Sequence[Tensor], delta: Tensor) -> Iterator[None]:
    """The parameters with `delta` added, for the duration."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, unflat(delta, parameters), strict=True):
            p.add_(d)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


# -- the dense Fisher matrix -----------------------------------------------------------------


def output_fisher(family: type[Likelihood], eta: Tensor) -> Tensor:
    """E_y[s sᵀ] of one term, the expectation over y taken exactly; `[outputs, outputs]`."""
    if family is Gaussian:  # s = η - y, y ~ N(η, 1)
        return torch.eye(eta.numel(), dtype=eta.dtype)
    if family is Bernoulli:
        p = eta.reshape(()).sigmoid()
        return sum(q * (p - y) ** 2 for y, q in ((0.0, 1 - p), (1.0, p))).reshape(1, 1)
    p = eta.softmax(-1)
    H = torch.zeros(len(p), len(p), dtype=eta.dtype)
    for c in range(len(p)):
        s = p - torch.eye(len(p), dtype=eta.dtype)[c]
        H += p[c] * torch.outer(s, s)
    return H


def jacobian(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """One backward pass an output: `[outputs, parameters]`."""
    rows = []
    for value in outputs.reshape(-1):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            flat(
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def dense_fisher(
    family: type[Likelihood], natural: Tensor, parameters: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """F/Σw with F = Σ w_i J_iᵀ H_i J_i, natural `[terms, ...]` with its graph."""
    total = sum(p.numel() for p in parameters)
    F = torch.zeros(total, total, dtype=natural.dtype)
    for eta, w in zip(natural, weights, strict=True):
        J = jacobian(eta, parameters)
        F += w * J.T @ output_fisher(family, eta.detach()) @ J
    return F / weights.sum()


# -- blocks ----------------------------------------------------------------------------------


def observe(
    parameters: Sequence[Tensor],
    objective: Callable[[], Tensor],
    kind: str = "propagated",
    draws: int = 1,
    seed: int = 0,
    diagonal: bool = False,
    fisher: Fisher | None = None,
    rule: BlockRule | None = None,
) -> tuple[Fisher, Observation]:
    """F/Σw of one observed objective, folded, in units of unit dispersion."""
    fisher = fisher or Fisher(BlockRule("diagonal") if diagonal else rule)
    fisher.parameters = [*parameters]
    observer = Observer(parameters, fisher, True, kind, draws, generator(seed))
    with observer:
        loss = objective()
    loss.backward()
    for p in parameters:
        p.grad = None
    weight = ObjectiveWeight.of(observer.observation.scored, 1.0)
    assert weight is not None
    assert fisher.fold(weight.total, 0.0) == 0
    return fisher, observer.observation


def dense_average(block: Block) -> Tensor:
    """The block's present average of F/Σw as a matrix over its flattened parameters."""
    if isinstance(block, DiagonalBlock):
        return torch.diag(block.average("F").reshape(-1))
    if isinstance(block, UnitBlock):
        return units_dense(block.average("F"))
    if isinstance(block, EigenBlock) and block.inverted:
        return eigen_dense(block, block.average("M"))
    assert isinstance(block, KroneckerProductBlock)
    return kronecker_dense(block, *block.averaged_factors())


def units_dense(units: Tensor) -> Tensor:
    """`[feature, 2, 2]` over all scales, then all offsets."""
    return torch.cat(
        [torch.cat([torch.diag(units[:, i, j]) for j in range(2)], 1) for i in range(2)]
    )


def in_places(block: KroneckerProductBlock, matrices: Sequence[Tensor]) -> Tensor:
    """A matrix over each group's `[out, in]` elements, row by row, put where these stand.

    Places count over the block's parameters one after another: the weight, then the bias.
    """
    size = sum(p.numel() for p in block.parameters)
    numbers = unflat(torch.arange(size), block.parameters)
    M = torch.zeros(size, size, dtype=matrices[0].dtype)
    for group, matrix in zip(block._layout.matrix(numbers, torch.int64), matrices, strict=True):
        places = group.reshape(-1)
        M[places[:, None], places] = matrix
    return M


def kronecker_dense(block: KroneckerProductBlock, A: Tensor, G: Tensor) -> Tensor:
    """A ⊗ G; row-major vec(G V A) is (G ⊗ A) vec(V)."""
    A, G = (torch.diag_embed(X) if X.dim() == 2 else X for X in (A, G))
    return in_places(block, [torch.kron(g, a) for a, g in zip(A, G, strict=True)])


def eigen_dense(block: EigenBlock, M: Tensor) -> Tensor:
    """Eigenvalues `[group, out, in]` along the present basis, as a matrix."""
    U_A, U_G = (torch.diag_embed(U) if U.dim() == 2 else U.contiguous() for U in block._bases())
    return in_places(
        block,
        [
            torch.kron(g, a) @ torch.diag(m.reshape(-1)) @ torch.kron(g, a).T
            for a, g, m in zip(U_A, U_G, M, strict=True)
        ],
    )


def equal_eigenvalues(X: Tensor) -> Tensor:
    """(tr X)² / tr X² of one matrix."""
    eigenvalues = torch.linalg.eigvalsh(X)
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def sample_sizes(block: KroneckerProductBlock) -> list[tuple[float, float]]:
    """On how many rows A and G rest, for each group."""
    A, G = block.averaged_factors()
    count = block.effective_count(next(iter(block._averages)))
    if isinstance(block, GradientKroneckerBlock):
        a, g = (torch.diag(X[0]) if X.dim() == 2 else X[0] for X in (A, G))
        draws = count * float(block.average("draws"))
        return [(draws * float(equal_eigenvalues(g)), draws * float(equal_eigenvalues(a)))]
    names = [name for name in block._averages if name.endswith("rows")]
    counted = sum(block.average(name) for name in names)  # of a weight that is used in two ways
    rows = [count * float(n) for n in counted.reshape(-1)]
    return [(n, torch.inf if isinstance(block, HalfDiagonalBlock) else n) for n in rows]


def dense_damped(
    block: Block, value: float, mode: str = "relative", sampling: float = 0.0
) -> Tensor:
    """The damped matrix from the average, by the formulas of the documentation."""
    if isinstance(block, DiagonalBlock):
        F, n = dense_average(block), block.effective_count("F")
        more = (value + sampling / n) * F.diagonal().mean() if mode == "relative" else value
        return F + more * torch.eye(len(F), dtype=F.dtype)
    if isinstance(block, UnitBlock):
        F, n = dense_average(block), block.effective_count("F")
        own = block.average("F").diagonal(dim1=1, dim2=2).mean(1).repeat(2)
        more = value * own.mean() + 2 * sampling / n * own if mode == "relative" else value
        return F + more * torch.eye(len(F)).to(F)
    assert isinstance(block, KroneckerProductBlock)
    averages = block.averaged_factors()
    sizes = [1 if X.dim() == 2 else X.shape[-1] for X in averages]
    shares = [
        [value + sampling * size / n for size, n in zip(sizes, rows, strict=True)]
        for rows in sample_sizes(block)
    ]
    if isinstance(block, EigenBlock):
        damped = []
        for M, (a, g) in zip(block.average("M"), shares, strict=True):
            more = a * M.mean(1, keepdim=True) + g * M.mean(0) + a * g * M.mean()
            damped.append(M + (more if mode == "relative" else value))
        return eigen_dense(block, torch.stack(damped))
    factors = []
    for a, g, share in zip(*averages, shares, strict=True):
        a, g = (torch.diag(X) if X.dim() == 1 else X for X in (a, g))
        tr_a, tr_g = a.trace() / len(a), g.trace() / len(g)
        if mode == "relative":
            more_a, more_g = share[0] * tr_a, share[1] * tr_g
        else:
            pi = (tr_a / tr_g).sqrt()
            more_a, more_g = pi * value**0.5, value**0.5 / pi
        if isinstance(block, HalfDiagonalBlock):
            more_g = more_g + float(block._rare())
        factors.append((a + more_a * torch.eye(len(a)).to(a), g + more_g * torch.eye(len(g)).to(g)))
    A, G = (torch.stack(X) for X in zip(*factors, strict=True))
    return kronecker_dense(block, A, G)


# -- randomness ------------------------------------------------------------------------------


def assert_mean_is(samples: Tensor, exact: Tensor, errors: float = 5.0) -> None:
    """The mean over the first axis lies within standard errors of `exact`, element by element.

    Elements that do not vary have to be right to rounding.
    """
    error = samples.std(0) / len(samples) ** 0.5
    off = (samples.mean(0) - exact).abs()
    rounding = 1e-9 * (1 + exact.abs())
    assert (off <= errors * error + rounding).all(), f"off by {(off / (error + rounding)).max()}"
