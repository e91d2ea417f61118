"""A second opinion: the curvature matrices of curvlinops, written by others with other means."""

import pytest
import torch
from curvlinops import FisherType, GGNLinearOperator, KFACLinearOperator
from torch import nn

from ngplugin.curvature.matrix_free import BatchFisher
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    flat,
    observe,
    randn,
    unflat,
)

LOSSES = {
    "categorical": nn.CrossEntropyLoss,
    "bernoulli": nn.BCEWithLogitsLoss,
    "gaussian": nn.MSELoss,
}


def problem(network, outputs, family):
    """Model, inputs and targets."""
    if network == "mlp":
        model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)), (6, 4)
    else:
        convolution = nn.Conv2d(2, 2, 3, padding=1, stride=2)
        model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(18, outputs))
        x = (6, 2, 5, 5)
    y = torch.arange(6) % outputs
    if family != "categorical":
        y = (randn(6, outputs, seed=5) > 0).double()
    return double(model), randn(*x, seed=1), y


def matrix(operator):
    return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def kronecker(model, loss, data):
    """K-FAC with the exact output curvature, weight and bias in one block, pixels as rows."""
    parameters = [*model.parameters()]
    return matrix(
        KFACLinearOperator(
            model,
            loss,
            parameters,
            data,
            fisher_type=FisherType.TYPE2,
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_the_fisher_matrix_is_their_gauss_newton_matrix(network, family, reduction):
    model, x, y = problem(network, 3, family)
    parameters, loss = [*model.parameters()], LOSSES[family](reduction=reduction)
    operator = GGNLinearOperator(model, loss, parameters, [(x, y)], check_deterministic=False)
    theirs = matrix(operator)

    _, observation = observe(parameters, lambda: loss(model(x), y))
    weights = observation.scored[0].weights
    natural = model(x) if family == "categorical" else model(x).reshape(-1)
    dense = weights.sum() * dense_fisher(FAMILIES[family], natural, parameters, weights)
    torch.testing.assert_close(dense, theirs, rtol=1e-10, atol=1e-12)

    batch = BatchFisher([observation], parameters, 1.0)
    v = randn(len(theirs), seed=9)
    parts = dict(zip(map(id, parameters), unflat(v, parameters), strict=True))
    product = batch.product(parts)
    product = flat([product[id(p)] for p in parameters])
    torch.testing.assert_close(product, theirs @ v, rtol=1e-10, atol=1e-12)


def blocks(model, loss, x, y, seed=0, diagonal=False):
    """Each block's part of F, and where in the vector of all parameters it stands."""
    parameters = [*model.parameters()]
    fisher, observation = observe(
        parameters, lambda: loss(model(x), y), draws=4, seed=seed, diagonal=diagonal
    )
    total = observation.scored[0].weights.sum()
    end = 0
    for block in fisher.blocks:  # which hold the parameters in their order
        start, end = end, end + sum(p.numel() for p in block.parameters)
        yield slice(start, end), total * dense_average(block)


@pytest.mark.parametrize("family", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_kronecker_blocks_are_theirs_exactly_for_one_output(network, family):
    # Where signs square to 1 every single draw is exact.
    model, x, y = problem(network, 1, family)
    loss = LOSSES[family]()
    theirs = kronecker(model, loss, [(x, y)])
    for place, ours in blocks(model, loss, x, y):
        torch.testing.assert_close(ours, theirs[place, place], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_kronecker_blocks_are_theirs_in_the_mean(network, family):
    model, x, y = problem(network, 3, family)
    loss = LOSSES[family]()
    theirs = kronecker(model, loss, [(x, y)])
    draws = [list(blocks(model, loss, x, y, seed)) for seed in range(20)]
    for i, (place, _) in enumerate(draws[0]):
        assert_mean_is(torch.stack([draw[i][1] for draw in draws]), theirs[place, place])


@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_diagonal_blocks_are_the_diagonal_of_theirs_in_the_mean(network, family):
    model, x, y = problem(network, 3, family)
    loss = LOSSES[family]()
    operator = GGNLinearOperator(
        model, loss, [*model.parameters()], [(x, y)], check_deterministic=False
    )
    theirs = matrix(operator).diagonal()
    draws = [list(blocks(model, loss, x, y, seed, True)) for seed in range(20)]
    for i, (place, _) in enumerate(draws[0]):
        found = torch.stack([draw[i][1].diagonal() for draw in draws])
        assert_mean_is(found, theirs[place])
