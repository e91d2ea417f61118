"""Brute force: dense Fisher matrices and damped blocks, and the shortest way to a built block."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from hypothesis import settings
from torch import Tensor, nn

from ngplugin.curvature.blocks import (
    Block,
    DiagonalBlock,
    HalfDiagonalBlock,
    KroneckerBlock,
    UnitBlock,
)
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ngplugin.curvature.objective import ObjectiveWeight
from ngplugin.curvature.observe import Observation, Observer

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
) -> tuple[Fisher, Observation]:
    """F/Σw of one observed objective, folded, in units of unit dispersion."""
    fisher = fisher or Fisher(diagonal)
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


def kronecker_places(block: KroneckerBlock) -> list[Tensor]:
    """For each group, where the row-major elements of its `[out, in]` matrix stand.

    Places count over the block's parameters one after another: the weight, then the bias.
    """
    weight = block.parameters[0]
    places = torch.arange(weight.numel())
    if block.dims is not None:
        groups, outs, ins = block.dims
        places = places.reshape(weight.shape).permute(*groups, *outs, *ins)
        places = places.reshape(block.groups, math.prod(weight.shape[d] for d in outs), -1)
    else:
        places = places.reshape(block.groups, weight.shape[0] // block.groups, -1)
    if block.inputs_first:
        places = places.mT
    if len(block.parameters) > 1:
        bias = weight.numel() + torch.arange(block.parameters[1].numel())
        bias = bias.reshape(block.groups, -1, 1)
        places = torch.cat([places, bias], 2)
    return [group.reshape(-1) for group in places]


def dense_average(block: Block) -> Tensor:
    """The block's present average of F/Σw as a matrix over its flattened parameters."""
    if isinstance(block, DiagonalBlock):
        return torch.diag(block._average.value.reshape(-1))
    if isinstance(block, UnitBlock):
        return units_dense(block._average.value)
    if isinstance(block, HalfDiagonalBlock):
        return torch.kron(torch.diag(block._average_D.value), block._average_S.value)
    assert isinstance(block, KroneckerBlock)
    return kronecker_dense(block, block._average_A.value, block._average_G.value)


def units_dense(units: Tensor) -> Tensor:
    """`[feature, 2, 2]` over all scales, then all offsets."""
    return torch.cat(
        [torch.cat([torch.diag(units[:, i, j]) for j in range(2)], 1) for i in range(2)]
    )


def kronecker_dense(block: KroneckerBlock, A: Tensor, G: Tensor) -> Tensor:
    """A ⊗ G; row-major vec(G V A) is (G ⊗ A) vec(V)."""
    size = sum(p.numel() for p in block.parameters)
    M = torch.zeros(size, size, dtype=A.dtype)
    for places, a, g in zip(kronecker_places(block), A, G, strict=True):
        M[places[:, None], places] = torch.kron(g, a)
    return M


def dense_damped(
    block: Block, value: float, mode: str = "relative", sampling: float = 0.0
) -> Tensor:
    """The damped matrix from the average, by the formulas of the documentation."""
    if isinstance(block, DiagonalBlock):
        F, n = dense_average(block), block._average.effective_count
        more = (value + sampling / n) * F.diagonal().mean() if mode == "relative" else value
        return F + more * torch.eye(len(F), dtype=F.dtype)
    if isinstance(block, UnitBlock):
        F, n = dense_average(block), block._average.effective_count
        own = block._average.value.diagonal(dim1=1, dim2=2).mean(1).repeat(2)
        more = value * own.mean() + 2 * sampling / n * own if mode == "relative" else value
        return F + more * torch.eye(len(F)).to(F)
    if isinstance(block, HalfDiagonalBlock):
        D, S = torch.diag(block._average_D.value), block._average_S.value
        tr_d, tr_s = D.trace() / len(D), S.trace() / len(S)
        if mode == "relative":
            n = block._average_D.effective_count * block._average_rows.value
            more_d, more_s = value * tr_d, (value + sampling * len(S) / n) * tr_s
        else:
            pi = (tr_d / tr_s).sqrt()
            more_d, more_s = pi * value**0.5, value**0.5 / pi
        more_d = more_d + block._average_row.value
        return torch.kron(
            D + more_d * torch.eye(len(D)).to(D), S + more_s * torch.eye(len(S)).to(S)
        )
    assert isinstance(block, KroneckerBlock)
    damped = []
    A, G = block._average_A.value, block._average_G.value
    rows = block._average_A.effective_count * block._average_rows.value.reshape(-1)
    for a, g, n in zip(A, G, rows, strict=True):
        tr_a, tr_g = a.trace() / len(a), g.trace() / len(g)
        if mode == "relative":
            more_a = (value + sampling * len(a) / n) * tr_a
            more_g = (value + sampling * len(g) / n) * tr_g
        else:
            pi = (tr_a / tr_g).sqrt()
            more_a, more_g = pi * value**0.5, value**0.5 / pi
        damped.append((a + more_a * torch.eye(len(a)).to(a), g + more_g * torch.eye(len(g)).to(g)))
    return kronecker_dense(
        block, torch.stack([a for a, _ in damped]), torch.stack([g for _, g in damped])
    )


# -- randomness ------------------------------------------------------------------------------


def assert_mean_is(samples: Tensor, exact: Tensor, errors: float = 5.0) -> None:
    """The mean over the first axis lies within standard errors of `exact`, element by element.

    Elements that do not vary have to be right to rounding.
    """
    error = samples.std(0) / len(samples) ** 0.5
    off = (samples.mean(0) - exact).abs()
    rounding = 1e-9 * (1 + exact.abs())
    assert (off <= errors * error + rounding).all(), f"off by {(off / (error + rounding)).max()}"
