"""Matrix products and bilinear maps with a parameter: as good as a linear layer."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.blocks import BlockDamping
from ngplugin.curvature.taps import read_map_call
from tests.oracle import dense_average, double, flat, observe, randn

PRODUCTS = {
    "@": (operator.matmul, "matmul"),
    "torch.matmul": (torch.matmul, "matmul"),
    "Tensor.matmul": (lambda x, w: x.matmul(w), "matmul"),
    "torch.mm": (torch.mm, "matmul"),
    "Tensor.mm": (lambda x, w: x.mm(w), "matmul"),
    "@ transposed": (lambda x, w: F.linear(x, w.T), "linear"),
}
X, Y = randn(5, 4, seed=1), randn(5, 3, seed=2)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_linear_map_of_the_transposed_weight(name):
    function, kind = PRODUCTS[name]
    weight = nn.Parameter(randn(4, 3, seed=3))
    transposed = nn.Parameter(weight.detach().T.contiguous())
    fisher, _ = observe([weight], lambda: F.mse_loss(function(X, weight), Y))
    other, _ = observe([transposed], lambda: F.mse_loss(F.linear(X, transposed), Y))
    assert fisher.reason(weight) == f"weight of {kind}"
    for each in (fisher, other):
        each.refresh(BlockDamping(0.1))
    g = randn(4, 3, seed=4)
    for ours, theirs in zip(
        fisher.precondition({id(weight): g}),
        other.precondition({id(transposed): g.T}),
        strict=True,
    ):
        torch.testing.assert_close(ours[id(weight)], theirs[id(transposed)].T)


@pytest.mark.parametrize("function", [torch.addmm, lambda b, x, w: b.addmm(x, w)])
def test_a_product_with_an_offset_has_its_bias_in_the_block(function):
    weight, bias = nn.Parameter(randn(4, 3, seed=3)), nn.Parameter(randn(3, seed=5))
    layer = double(nn.Linear(4, 3))
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias)
    fisher, _ = observe([weight, bias], lambda: F.mse_loss(function(bias, X, weight), Y))
    other, _ = observe([*layer.parameters()], lambda: F.mse_loss(layer(X), Y))
    assert fisher.block(weight).parameters == (weight, bias)
    assert fisher.reason(bias) == "bias of addmm, an input of value 1"
    for each in (fisher, other):
        each.refresh(BlockDamping(0.1))
    g, h = randn(4, 3, seed=4), randn(3, seed=6)
    ours, _ = fisher.precondition({id(weight): g, id(bias): h})
    theirs, _ = other.precondition({id(layer.weight): g.T, id(layer.bias): h})
    torch.testing.assert_close(ours[id(weight)], theirs[id(layer.weight)].T)
    torch.testing.assert_close(ours[id(bias)], theirs[id(layer.bias)])


def test_a_scaled_addition_is_no_map():
    weight, bias = nn.Parameter(randn(4, 3)), nn.Parameter(randn(3))
    assert read_map_call(torch.addmm, (bias, X, weight), {"beta": 0.5}) is None
    assert read_map_call(torch.addmm, (bias, X, weight), {"alpha": 2}) is None


def test_a_weight_used_in_both_directions_is_known_by_its_gradient_only():
    """A tied autoencoder: neither factorization holds for both uses."""
    weight = nn.Parameter(randn(3, 4))
    fisher, _ = observe(
        [weight], lambda: F.mse_loss(F.linear(F.linear(X, weight).tanh(), weight.T), X)
    )
    assert fisher.block(weight).kind == "gradient-kronecker"
    assert fisher.reason(weight) == "weight of linear, which no one map's block can hold"


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_the_rows_of_a_bilinear_map_give_autograd_s_gradients(shape):
    second = randn(*shape, 2, seed=8)
    x, weight, bias = randn(*shape, 4, seed=1), randn(6, 4, 2, seed=2), randn(6, seed=3)
    weight.requires_grad_()
    bias.requires_grad_()
    y = F.bilinear(x, second, weight, bias)
    score = randn(*y.shape, seed=9)
    exact = torch.autograd.grad(y, (weight, bias), score)
    call = read_map_call(F.bilinear, (x, second, weight, bias), {})
    a, g = call.input_rows().flatten(0, 2), call.score_rows(score).flatten(0, 2)
    torch.testing.assert_close((g.T @ a).reshape(weight.shape), exact[0])
    torch.testing.assert_close(g.sum(0), exact[1])


def test_a_bilinear_map_has_one_block_if_its_products_are_not_too_many():
    layer = double(nn.Bilinear(4, 3, 2))
    fisher, _ = observe(
        [*layer.parameters()], lambda: F.mse_loss(layer(X, Y), torch.zeros(5, 2).double())
    )
    assert [block.kind for block in fisher.blocks] == ["kronecker"]
    assert fisher.reason(layer.weight) == "weight of bilinear"
    assert len(flat([dense_average(fisher.blocks[0])])) == (2 * (4 * 3 + 1)) ** 2
    large = nn.Parameter(torch.zeros(1, 100, 50))
    assert read_map_call(F.bilinear, (torch.zeros(2, 100), torch.zeros(2, 50), large), {}) is None
