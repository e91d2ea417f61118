"""The gradient-Kronecker block against the dense Fisher matrix, and what gets one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.block_choice import BlockRule
from ngplugin.curvature.blocks import BlockDamping, GradientKroneckerBlock
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    flat,
    observe,
    randn,
)


def multiplied(weight, x):
    """A linear layer by calls that are no map we know."""
    return (weight * x[:, None]).sum(-1)


def averaged(model, objective, rule=None, samples=30, draws=10):
    """E[SᵀS] and E[SSᵀ], over Σw, of the model's one matrix."""
    found = []
    for seed in range(samples):
        fisher, _ = observe([model], objective, draws=draws, seed=seed, rule=rule)
        (block,) = fisher.blocks
        found.append((block.average("A"), block.average("G")))
    return [torch.stack(factor) for factor in zip(*found, strict=True)]


def test_the_factors_are_the_partial_traces_of_the_fisher_matrix():
    weight, x = nn.Parameter(randn(3, 4)), randn(5, 4, seed=1)
    natural = multiplied(weight, x).tanh()
    dense = dense_fisher(
        FAMILIES["gaussian"], natural.reshape(-1), [weight], torch.ones(15).double()
    ).reshape(3, 4, 3, 4)
    A, G = averaged(
        weight, lambda: 0.5 * F.mse_loss(multiplied(weight, x).tanh(), randn(5, 3), reduction="sum")
    )
    assert_mean_is(G[:, 0], torch.einsum("iojo->ij", dense))
    assert_mean_is(A[:, 0], torch.einsum("ioip->op", dense))


def test_a_kronecker_product_is_found_as_it_is_and_with_its_trace():
    """One example: F = A ⊗ G; and with many draws the estimate of it is near."""
    weight, x = nn.Parameter(randn(3, 4)), randn(1, 4, seed=1)
    dense = dense_fisher(
        FAMILIES["gaussian"], multiplied(weight, x).reshape(-1), [weight], torch.ones(3).double()
    )
    fisher, _ = observe(
        [weight],
        lambda: 0.5 * F.mse_loss(multiplied(weight, x), randn(1, 3), reduction="sum"),
        draws=600,
    )
    (block,) = fisher.blocks
    assert block.kind == "gradient-kronecker"
    assert fisher.reason(weight) == "used by no linear map that is known"
    assert (dense_average(block) - dense).norm() < 0.15 * dense.norm()
    torch.testing.assert_close(dense_average(block).trace(), dense.trace())


def test_one_output_needs_one_draw():
    weight, x = nn.Parameter(randn(2, 3)), randn(1, 3, seed=1)
    dense = dense_fisher(
        FAMILIES["gaussian"],
        multiplied(weight, x).sum().reshape(1),
        [weight],
        torch.ones(1).double(),
    )
    fisher, _ = observe(
        [weight], lambda: 0.5 * F.mse_loss(multiplied(weight, x).sum(), torch.zeros(()).double())
    )
    torch.testing.assert_close(dense_average(fisher.blocks[0]), dense)


@pytest.mark.parametrize(("limit", "dims"), [(4, (3, 3)), (3, (2, 3)), (2, (2, 2))])
def test_a_side_beyond_the_limit_is_kept_as_its_diagonal_and_named(limit, dims):
    weight, x = nn.Parameter(randn(3, 4)), randn(5, 4, seed=1)
    whole, _ = observe([weight], lambda: F.mse_loss(multiplied(weight, x), randn(5, 3)))
    fisher, _ = observe(
        [weight],
        lambda: F.mse_loss(multiplied(weight, x), randn(5, 3)),
        rule=BlockRule(max_factor=limit),
    )
    for name, dim, size, side in zip("AG", dims, (4, 3), ("inputs", "outputs"), strict=True):
        full, ours = whole.blocks[0].average(name), fisher.blocks[0].average(name)
        expected = full if dim == 3 else full.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(ours, expected)
        note = f"; {side} {size} > max_factor: kept diagonal"
        assert (note in fisher.reason(weight)) == (dim == 2)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((3, 4), (3, 4)), ((1, 3, 4), (3, 4)), ((3, 2, 2), (3, 4)), ((3,), None), ((1, 3), None)],
)
def test_a_parameter_with_two_sides_is_a_matrix_of_them(shape, sides):
    parameter = nn.Parameter(randn(*shape))
    fisher, _ = observe(
        [parameter], lambda: F.mse_loss(parameter.sin(), torch.zeros(shape).double())
    )
    (block,) = fisher.blocks
    if sides is None:
        assert block.kind == "diagonal"
        return
    assert isinstance(block, GradientKroneckerBlock)
    assert [block.average(name).shape[-1] for name in "GA"] == [*sides]


def test_scales_of_a_normalization_stay_diagonal_whatever_their_shape():
    norm = double(nn.LayerNorm((2, 3), bias=False))
    x = randn(4, 2, 3, seed=1)
    fisher, _ = observe([norm.weight], lambda: F.mse_loss(norm(x), randn(4, 2, 3)))
    assert [block.kind for block in fisher.blocks] == ["diagonal"]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_have_one_and_go_on_as_saved(cell):
    rnn = cell(3, 4, batch_first=True).double()
    parameters, x = [*rnn.parameters()], randn(5, 6, 3, seed=1)

    def objective():
        return F.mse_loss(rnn(x)[0], randn(5, 6, 4, seed=2))

    fisher, _ = observe(parameters, objective)
    kinds = ["gradient-kronecker"] * 2 + ["diagonal"] * 2
    assert [fisher.block(p).kind for p in parameters] == kinds
    fisher.refresh(BlockDamping(0.1))
    other = type(fisher)()
    other.parameters = parameters
    other.load_state_dict(fisher.state_dict())
    g, results = {id(p): randn(*p.shape, seed=i) for i, p in enumerate(parameters)}, []
    for each in (fisher, other):
        observe(parameters, objective, seed=3, fisher=each)
        each.refresh(BlockDamping(0.1, sampling=1.0))
        results.append(flat([*each.precondition(g)[0].values()]))
    assert torch.equal(*results)


def test_with_a_large_input_no_square_of_it_is_allocated():
    layer = nn.Linear(50_000, 2)
    x = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    fisher, _ = observe([*layer.parameters()], lambda: F.mse_loss(layer(x), torch.zeros(3, 2)))
    fisher.refresh(BlockDamping(0.1))
    (block,) = fisher.blocks
    assert block.kind == "kronecker"
    assert block.numel() < 3 * 50_001
    assert fisher.reason(layer.weight) == (
        "weight of linear; inputs 50,001 > max_factor: kept diagonal"
    )
    direction, _ = fisher.precondition({id(layer.weight): torch.ones(2, 50_000)})
    assert direction[id(layer.weight)].isfinite().all()
