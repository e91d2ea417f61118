"""Per-example Jacobian rows against one backward pass a row."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

from ngplugin.curvature.jacobian import CoupledExamples, Jacobian
from tests.oracle import double, jacobian, randn

F = torch.nn.functional


def rows_of(prediction, parameters, graph=None):
    """J of a prediction `[N]`, and what entered in an unknown way."""
    graph = graph or Jacobian([prediction], parameters, len(prediction))
    layouts = graph.layouts(lambda v: [v.to(prediction.dtype)])
    return graph.rows([torch.ones_like(prediction)], layouts, torch.float64)


def assert_rows_are_right(prediction, parameters):
    graph = Jacobian([prediction], parameters, len(prediction))
    assert not graph.unknown
    rows = rows_of(prediction, parameters, graph)
    exact = jacobian(prediction, parameters)
    torch.testing.assert_close(rows, exact, rtol=1e-10, atol=1e-10 * float(exact.abs().max()))


def tanh_net(*sizes):
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return double(nn.Sequential(*layers[:-1]))


def derivative(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def laplacian(u, x):
    first = derivative(u, x)
    return sum(derivative(first[:, i], x)[:, i] for i in range(x.shape[1]))


def test_rows_of_a_perceptron():
    net = tanh_net(3, 5, 4, 1)
    assert_rows_are_right(net(randn(7, 3))[:, 0], [*net.parameters()])


def test_rows_of_a_laplacian():
    net, x = tanh_net(2, 5, 4, 1), randn(7, 2).requires_grad_()
    assert_rows_are_right(laplacian(net(x)[:, 0], x), [*net.parameters()])


def test_rows_of_a_bilaplacian_which_is_a_fourth_derivative():
    net, x = tanh_net(2, 4, 3, 1), randn(5, 2).requires_grad_()
    assert_rows_are_right(laplacian(laplacian(net(x)[:, 0], x), x), [*net.parameters()])


@pytest.mark.parametrize("inner", ["jacrev", "hessian"])
def test_rows_of_a_laplacian_by_function_transforms(inner):
    net, x = tanh_net(2, 5, 4, 1), randn(6, 2)

    def u(point):
        return net(point)[0]

    second = torch.func.hessian(u) if inner == "hessian" else jacrev(jacrev(u))
    assert_rows_are_right(vmap(lambda point: second(point).trace())(x), [*net.parameters()])


def test_rows_of_a_network_met_by_two_sets_of_points_at_once():
    net = tanh_net(2, 5, 1)
    inside, edge = randn(6, 2).requires_grad_(), randn(4, 2, seed=1)
    u = net(torch.cat([inside, edge]))[:, 0]
    residual = derivative(u[:6], inside)[:, 0] + u[:6]
    assert_rows_are_right(residual, [*net.parameters()])
    assert_rows_are_right(u[6:].square(), [*net.parameters()])


def test_rows_of_tokens_sequence_first_and_batch_first():
    layer, head = double(nn.Linear(3, 4)), double(nn.Linear(4, 1), seed=1)
    x = randn(5, 6, 3)  # five tokens of six examples
    parameters = [*layer.parameters(), *head.parameters()]
    assert_rows_are_right(head(layer(x).tanh().sum(0))[:, 0], parameters)
    assert_rows_are_right(head(layer(x.mT.mT.movedim(1, 0)).tanh().sum(1))[:, 0], parameters)


def test_rows_of_examples_in_another_order():
    net, order = tanh_net(3, 5, 1), torch.tensor([3, 0, 5, 1, 4, 2])
    x = randn(6, 3)
    assert_rows_are_right(net(x)[:, 0][order], [*net.parameters()])


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_convolutions(groups):
    first = double(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=groups))
    second = double(nn.Conv2d(4, 1, (1, 2), dilation=(1, 2)), seed=1)
    y = second(first(randn(3, 2, 7, 7)).tanh()).tanh().sum((1, 2, 3))
    assert_rows_are_right(y, [*first.parameters(), *second.parameters()])


def test_rows_of_a_tied_weight_used_both_ways():
    weight = nn.Parameter(randn(4, 3) / 2)
    y = F.linear(F.linear(randn(6, 3), weight).tanh(), weight.T).sum(1)
    assert_rows_are_right(y, [weight])
    assert_rows_are_right((weight @ randn(3, 6, seed=1)).tanh().sum(0), [weight])


def test_rows_of_parameters_that_are_no_matrices():
    scale, offset, rate = (
        nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate([(3,), (3,), ()])
    )
    table, norm = nn.Parameter(randn(5, 3, seed=3)), double(nn.LayerNorm(3))
    x = randn(6, 3, seed=4)
    hidden = norm((x - offset) * scale / (1 + 2 * rate.exp()))
    hidden = hidden + F.embedding(torch.tensor([0, 4, 4, 1, 0, 2]), table)
    y = (hidden.tanh() * rate).sum(1)
    assert_rows_are_right(y, [scale, offset, rate, table, *norm.parameters()])


def test_a_masked_weight_is_the_parameter_s_own_function():
    weight, mask = nn.Parameter(randn(4, 3)), (randn(4, 3, seed=1) > 0).double()
    y = F.linear(randn(6, 3, seed=2), weight * mask).tanh().sum(1)
    assert_rows_are_right(y, [weight])


def test_a_use_of_an_unknown_kind_is_named():
    weight, other = nn.Parameter(randn(3, 3)), nn.Parameter(randn(3, 1))
    y = torch.einsum("ni,oi->no", randn(6, 3), weight).tanh() @ other
    graph = Jacobian([y], [weight, other], 6)
    assert set(graph.unknown) == {id(weight)}
    assert "Bmm" in graph.unknown[id(weight)]


def test_examples_that_meet_in_a_batch_normalization_are_found_out():
    net = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)))
    with pytest.raises(CoupledExamples, match="several examples"):
        rows_of(net(randn(6, 3))[:, 0], [*net.parameters()])


def test_nothing_of_the_user_s_graph_is_used_up():
    net, x = tanh_net(2, 5, 1), randn(6, 2).requires_grad_()
    alone = torch.autograd.grad(laplacian(net(x)[:, 0], x).sum(), [*net.parameters()][:-1])
    y = laplacian(net(x)[:, 0], x)
    rows_of(y, [*net.parameters()])
    again = torch.autograd.grad(y.sum(), [*net.parameters()][:-1])
    for a, b in zip(alone, again, strict=True):
        assert torch.equal(a, b)
