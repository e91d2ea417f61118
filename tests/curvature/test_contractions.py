"""Contractions with a parameter: their rows, whatever stands where, and the blocks they fill."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.blocks import BlockDamping, KroneckerBlock
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.observe import Observer
from tests.oracle import (
    assert_mean_is,
    dense_average,
    dense_damped,
    flat,
    generator,
    jacobian,
    observe,
    randn,
)


def einsum(equation):
    return lambda x, w: torch.einsum(equation, x, w)


# name: (function of data and weight, shape of the data, of the weight, groups · out · in)
MAPS = {
    "x @ W": (lambda x, w: x @ w, (5, 4), (4, 3), (1, 3, 4)),
    "vector @ W": (lambda x, w: x @ w, (4,), (4, 3), (1, 3, 4)),
    "x @ vector": (lambda x, w: x @ w, (2, 5, 4), (4,), (1, 1, 4)),
    "W @ x": (lambda x, w: w @ x, (4, 5), (3, 4), (1, 3, 4)),
    "W @ vector": (lambda x, w: w @ x, (4,), (3, 4), (1, 3, 4)),
    "W @ stack": (lambda x, w: w @ x, (2, 4, 5), (3, 4), (1, 3, 4)),
    "mv": (lambda x, w: torch.mv(w, x), (4,), (3, 4), (1, 3, 4)),
    "Tensor.mv": (lambda x, w: x.mv(w), (5, 4), (4,), (1, 1, 4)),
    "dot": (lambda x, w: x.dot(w), (4,), (4,), (1, 1, 4)),
    "mm by name": (lambda x, w: torch.mm(mat2=w, input=x), (5, 4), (4, 3), (1, 3, 4)),
    "linear, vector": (F.linear, (2, 5, 4), (4,), (1, 1, 4)),
    "linear, swapped": (lambda x, w: F.linear(w, x), (5, 4), (3, 4), (1, 3, 4)),
    "linear, transposed": (lambda x, w: F.linear(x, w.T), (5, 4), (4, 3), (1, 3, 4)),
    "bmm": (torch.bmm, (2, 5, 4), (2, 4, 3), (2, 3, 4)),
    "bmm, left": (lambda x, w: torch.bmm(w, x), (2, 4, 5), (2, 3, 4), (2, 3, 4)),
    "stacks": (lambda x, w: x @ w, (5, 2, 1, 4), (2, 4, 3), (2, 3, 4)),
    "one for many": (lambda x, w: x @ w, (5, 1, 2, 4), (3, 4, 6), (1, 18, 4)),
    "element of a stack": (lambda x, w: x @ w[1], (5, 4), (2, 4, 3), (2, 3, 4)),
    "range of a stack": (lambda x, w: x @ w[1:], (2, 5, 4), (3, 4, 3), (3, 3, 4)),
    "element, transposed": (lambda x, w: F.linear(x, w[1].T), (5, 4), (2, 4, 3), (2, 3, 4)),
    "some outputs": (lambda x, w: F.linear(x, w[2:4]), (5, 4), (6, 4), (3, 2, 4)),
    "some inputs": (lambda x, w: x @ w[2:4], (5, 2), (6, 3), (3, 3, 2)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 2), (5, 2, 3), (2, 3, 4), (1, 4, 6)),
    "tensordot, dims": (
        lambda x, w: torch.tensordot(w, x, ([2, 0], [1, -1])),
        (5, 3, 2),
        (2, 4, 3),
        (1, 4, 6),
    ),
    "heads": (einsum("bnd,hde->bhne"), (2, 5, 4), (3, 4, 2), (1, 6, 4)),
    "heads, joined": (einsum("bhne,hed->bnd"), (2, 3, 5, 2), (3, 2, 4), (1, 4, 6)),
    "per head": (einsum("bhnd,hde->bhne"), (2, 3, 5, 4), (3, 4, 2), (3, 2, 4)),
    "experts": (einsum("ecd,edh->ech"), (3, 5, 4), (3, 4, 2), (3, 2, 4)),
    "group between": (einsum("bhnd,dhe->bnhe"), (2, 3, 5, 4), (4, 3, 2), (3, 2, 4)),
    "group last": (einsum("big,oig->bog"), (5, 4, 3), (2, 4, 3), (3, 2, 4)),
    "inputs around": (einsum("bij,ioj->bo"), (5, 4, 3), (4, 2, 3), (1, 2, 12)),
    "locally connected": (einsum("bixy,ioxy->boxy"), (2, 3, 2, 2), (3, 4, 2, 2), (4, 4, 3)),
    "ellipsis": (einsum("...d,de->...e"), (2, 5, 4), (4, 3), (1, 3, 4)),
    "output not named": (einsum("bd, de"), (5, 4), (4, 3), (1, 3, 4)),
    "ellipsis, not named": (einsum("...d,de"), (2, 5, 4), (4, 3), (1, 3, 4)),
    "list": (lambda x, w: torch.einsum("bd,de->be", [x, w]), (5, 4), (4, 3), (1, 3, 4)),
    "sublists": (
        lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]),
        (5, 4),
        (4, 3),
        (1, 3, 4),
    ),
    "summed rows": (einsum("bnd,de->be"), (2, 5, 4), (4, 3), (1, 3, 4)),
    "three": (lambda x, w: torch.einsum("bi,oij,bj->bo", x, w, x), (5, 3), (2, 3, 3), (1, 2, 9)),
    "outer": (einsum("b,d->bd"), (5,), (3,), (1, 3, 1)),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_rows_of_a_contraction_give_autograd_s_gradient(name):
    function, data, shape, sizes = MAPS[name]
    x, weight = randn(*data, seed=1), nn.Parameter(randn(*shape, seed=2))
    fisher = Fisher()
    fisher.parameters = [weight]
    with Observer([weight], fisher, False, "propagated", 1, generator()) as observer:
        y = function(x, weight)
    ((call, edge),) = observer.observation.maps
    score = randn(*y.shape, seed=9)
    exact, at_edge = torch.autograd.grad(y, (weight, edge), score)
    assert call.weight is weight
    block = KroneckerBlock(weight, None, call.groups, call.inputs_first, dims=call.dims)
    assert block.takes(call)
    a, g = call.input_rows(), call.score_rows(at_edge)
    assert a.dim() == g.dim() == 4
    assert a.shape[:3] == g.shape[:3]
    assert (call.groups, g.shape[-1], a.shape[-1]) == sizes
    matrices = torch.zeros(sizes).double()
    matrices[call.first : call.first + len(a)] = g.flatten(1, 2).mT @ a.flatten(1, 2)
    (ours,) = block._layout.parts(matrices, [weight])
    torch.testing.assert_close(ours, exact)
    assert torch.equal(block._layout.matrix([ours], matrices.dtype), matrices)


ONE_ROW = [
    *("vector @ W", "W @ vector", "mv", "dot", "linear, transposed", "stacks"),
    *("element of a stack", "some inputs", "heads", "per head", "experts", "group between"),
    *("group last", "inputs around", "locally connected", "three"),
]


@pytest.mark.parametrize("name", ONE_ROW)
def test_the_block_of_one_row_is_the_fisher_in_the_mean(name):
    """F between groups is left out, as the block's places say."""
    function, data, shape, _ = MAPS[name]
    keep = {"heads": (1, 1, 4), "per head": (1, 3, 1, 4), "experts": (3, 1, 4)}
    keep |= {"group between": (1, 3, 1, 4), "group last": (1, 4, 3), "three": (1, 3)}
    keep |= {"inputs around": (1, 4, 3), "locally connected": (1, 3, 2, 2), "stacks": (1, 2, 1, 4)}
    keep |= {"linear, transposed": (1, 4), "element of a stack": (1, 4), "some inputs": (1, 2)}
    x, weight = randn(*keep.get(name, data), seed=1), nn.Parameter(randn(*shape, seed=2))

    def objective():
        y = function(x, weight)
        return 0.5 * F.mse_loss(y, torch.zeros_like(y), reduction="sum")

    J = jacobian(function(x, weight), [weight])
    dense = J.T @ J / len(J)
    samples = []
    for i in range(40):
        fisher, _ = observe([weight], objective, draws=4, seed=i)
        samples.append(dense_average(fisher.blocks[0]))
    (block,) = fisher.blocks
    assert block.kind == "kronecker"
    inside = torch.zeros_like(dense)
    for group in torch.arange(dense.shape[0]).split(dense.shape[0] // block.groups):
        matrix = torch.zeros(block.groups, len(group)).double()
        matrix[group[0] // len(group)] = 1
        like = block._layout.matrix([weight], weight.dtype)
        (mask,) = block._layout.parts(matrix.reshape(like.shape), [weight])
        inside += torch.outer(flat([mask]), flat([mask]))
    assert_mean_is(torch.stack(samples), dense * inside)
    if not block.average("rows").all():
        return  # only some of the groups were used
    fisher.refresh(BlockDamping(0.1))
    v = randn(*shape, seed=3)
    directions, products = fisher.precondition({id(weight): v})
    exact = torch.linalg.solve(dense_damped(block, 0.1), flat([v]))
    torch.testing.assert_close(flat([directions[id(weight)]]), exact)
    torch.testing.assert_close(flat([products[id(weight)]]), dense_average(block) @ exact)


# name: (function of data, weight and bias, shapes of the three, whether the bias joins)
WITH_BIAS = {
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (5, 4), (4, 3), (3,), True),
    "addmm, left": (lambda x, w, b: torch.addmm(b, w, x), (4, 5), (3, 4), (3, 1), True),
    "addmm, over rows": (lambda x, w, b: torch.addmm(b, w, x), (4, 5), (3, 4), (5,), False),
    "addmm, over rows, square": (
        lambda x, w, b: torch.addmm(b, w, x),
        (4, 3),
        (3, 4),
        (3,),
        False,
    ),
    "addmm, table": (lambda x, w, b: torch.addmm(b, x, w), (5, 4), (4, 3), (5, 3), False),
    "addmv": (lambda x, w, b: torch.addmv(b, w, x), (4,), (3, 4), (3,), True),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w), (2, 5, 4), (2, 4, 3), (2, 1, 3), True),
    "expert": (lambda x, w, b: F.linear(x, w[1], b[1]), (5, 4), (2, 3, 4), (2, 3), True),
    "other expert": (lambda x, w, b: F.linear(x, w[1], b[0]), (5, 4), (2, 3, 4), (2, 3), False),
}


@pytest.mark.parametrize("name", WITH_BIAS)
def test_a_bias_joins_where_it_is_added_once_to_each_row(name):
    function, data, shape, offset, joins = WITH_BIAS[name]
    x, weight = randn(*data, seed=1), nn.Parameter(randn(*shape, seed=2))
    bias = nn.Parameter(randn(*offset, seed=3))
    target = torch.zeros_like(function(x, weight, bias))
    fisher, observation = observe(
        [weight, bias], lambda: F.mse_loss(function(x, weight, bias), target)
    )
    assert len(fisher.block(weight).parameters) == 1 + joins
    assert (fisher.block(bias) is fisher.block(weight)) == joins
    if not joins:
        return
    call = observation.maps[0][0]
    y = function(x, weight, bias)
    score = randn(*y.shape, seed=9)
    exact = torch.autograd.grad(y, (weight, bias), score)
    a, g = call.input_rows().flatten(1, 2), call.score_rows(score).flatten(1, 2)
    block = fisher.block(weight)
    matrices = torch.zeros_like(block._layout.matrix([weight, bias], weight.dtype))
    one = torch.ones(*a.shape[:2], 1).double()
    matrices[call.first : call.first + len(a)] = g.mT @ torch.cat([a, one], 2)
    torch.testing.assert_close(block._layout.parts(matrices, exact), [*exact])


NO_MAPS = {
    "a scale": lambda x, w: torch.einsum("bd,d->bd", x, w[0]),
    "a trace": einsum("bd,dd->b"),
    "summed alone": einsum("bd,de->bd"),
    "two parameters": lambda x, w: x @ (w @ w),
    "columns": lambda x, w: x[:, :2] @ w[:, :2].T,
    "steps": lambda x, w: x[:, :2] @ w[::2],
    "reshaped": lambda x, w: x.reshape(-1, 2) @ w.reshape(2, -1),
    "scaled": lambda x, w: torch.addmm(x, x, w, beta=0.5),
}


@pytest.mark.parametrize("name", NO_MAPS)
def test_what_is_no_map_of_the_weight_is_left_to_the_gradient(name):
    weight = nn.Parameter(randn(4, 4, seed=2))
    x = randn(5, 4, seed=1)
    target = torch.zeros_like(NO_MAPS[name](x, weight))
    fisher, observation = observe([weight], lambda: F.mse_loss(NO_MAPS[name](x, weight), target))
    assert not observation.maps
    assert fisher.reason(weight) == "used by no linear map that is known"


def test_an_input_that_wants_a_gradient_is_no_weight():
    """As where the objective contains derivatives by it."""
    x, weight = randn(5, 4, seed=1).requires_grad_(), nn.Parameter(randn(4, 3, seed=2))
    for product in (lambda: x @ weight, lambda: torch.einsum("bi,io->bo", x, weight)):
        fisher, _ = observe([weight], lambda p=product: F.mse_loss(p(), torch.zeros(5, 3).double()))
        assert fisher.block(weight).kind == "kronecker"


def test_a_linear_layer_of_a_parameter_is_the_layer_s_map():
    """As of learned queries: the layer may have other inputs too."""
    queries, weight = nn.Parameter(randn(5, 4, seed=1)), nn.Parameter(randn(3, 4, seed=2))
    fisher, _ = observe(
        [queries, weight], lambda: F.mse_loss(F.linear(queries, weight), torch.zeros(5, 3).double())
    )
    assert fisher.reason(weight) == "weight of linear"
    assert fisher.reason(queries) == "used by no linear map that is known"


def test_a_saved_block_of_a_permuted_weight_is_loaded():
    weight, x = nn.Parameter(randn(4, 3, 2)), randn(2, 3, 5, 4, seed=1)

    def objective():
        y = torch.einsum("bhnd,dhe->bnhe", x, weight)
        return F.mse_loss(y, torch.zeros_like(y))

    fisher, _ = observe([weight], objective)
    fisher.refresh(BlockDamping(0.1))
    other = Fisher()
    other.parameters = [weight]
    other.load_state_dict(fisher.state_dict())
    g = randn(4, 3, 2, seed=4)
    ours, theirs = (f.precondition({id(weight): g})[0][id(weight)] for f in (fisher, other))
    assert torch.equal(ours, theirs)


def test_an_expert_that_no_row_went_to_keeps_its_average_of_inputs_and_loses_score():
    """F of it is less by the steps without it, which G says; A is a mean over rows."""
    weight, x = nn.Parameter(randn(2, 3, 4, seed=1)), randn(5, 4, seed=2)
    block = KroneckerBlock(weight, None, 2, dims=((0,), (1,), (2,)))
    for experts in ((0, 1), (0,)):
        for e in experts:
            _, observation = observe(
                [weight], lambda e=e: F.mse_loss(x @ weight[e].T, torch.zeros(5, 3).double())
            )
            block.add_map_score(observation.maps[0][0], randn(5, 3, seed=3), 1.0)
        block.fold(1.0, 0.5)
    for e in range(2):
        torch.testing.assert_close(block.averaged_factors()[0][e], x.T @ x / 5)
    used, unused = (G.trace() for G in block.average("G"))
    torch.testing.assert_close(unused, used / 3)
