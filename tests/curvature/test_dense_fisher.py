"""The blocks' averages against the brute-force Fisher matrix, where theory says they are equal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.fisher import Fisher
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    observe,
    randn,
)

SUMMED = {  # an objective whose terms weigh 1 each
    "categorical": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
    "gaussian": lambda z, y: 0.5 * F.mse_loss(z, y, reduction="sum"),
}


def targets(name, z):
    if name == "categorical":
        return torch.arange(len(z)) % z.shape[-1]
    return (randn(*z.shape, seed=5) > 0).double()


def terms(name, z):
    return z if name == "categorical" else z.reshape(-1)


def averages(model, objective, kind, diagonal, samples, draws):
    """Independent estimates of each block, by the block's parameters."""
    parameters = [*model.parameters()]
    estimates = {}
    for i in range(samples):
        fisher, _ = observe(parameters, objective, kind, draws, 100 + i, diagonal)
        for block in fisher.blocks:
            key = tuple(
                j for j, p in enumerate(parameters) if any(p is q for q in block.parameters)
            )
            estimates.setdefault(key, []).append(dense_average(block))
    return {key: torch.stack(found) for key, found in estimates.items()}


def sub_matrix(dense, parameters, key):
    starts = torch.tensor([0, *(p.numel() for p in parameters)]).cumsum(0)
    places = torch.cat([torch.arange(int(starts[j]), int(starts[j + 1])) for j in key])
    return dense[places[:, None], places]


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
@pytest.mark.parametrize("name", FAMILIES)
def test_kronecker_blocks_of_one_example_are_the_fisher_s_in_the_mean(name, kind):
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = randn(1, 3, seed=1)
    y = targets(name, model(x))
    natural = terms(name, model(x))
    parameters = [*model.parameters()]
    weights = torch.ones(len(natural)).double()
    dense = dense_fisher(FAMILIES[name], natural, parameters, weights)
    found = averages(model, lambda: SUMMED[name](model(x), y), kind, False, 60, 8)
    assert set(found) == {(0, 1), (2, 3)}
    for key, samples in found.items():
        assert_mean_is(samples, sub_matrix(dense, parameters, key))


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
@pytest.mark.parametrize("name", FAMILIES)
def test_diagonal_blocks_are_the_fisher_s_diagonal_in_the_mean(name, kind):
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = randn(5, 3, seed=1)  # of several examples: terms are independent, so g² needs no Jacobian
    y = targets(name, model(x))
    natural = terms(name, model(x))
    parameters = [*model.parameters()]
    weights = torch.ones(len(natural)).double()
    dense = dense_fisher(FAMILIES[name], natural, parameters, weights)
    found = averages(model, lambda: SUMMED[name](model(x), y), kind, True, 60, 8)
    assert set(found) == {(0,), (1,), (2,), (3,)}
    for key, samples in found.items():
        exact = sub_matrix(dense, parameters, key).diagonal()
        assert_mean_is(samples.diagonal(dim1=1, dim2=2), exact)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_deep_linear_network_s_blocks_are_exact_for_squared_error(outputs):
    model = double(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, outputs))
    )
    x, y = randn(6, 3, seed=1), randn(6, outputs, seed=2)
    parameters = [*model.parameters()]
    natural = model(x).reshape(-1)
    weights = torch.ones(len(natural)).double()
    dense = dense_fisher(FAMILIES["gaussian"], natural, parameters, weights)
    found = averages(model, lambda: SUMMED["gaussian"](model(x), y), "propagated", False, 60, 4)
    for key, samples in found.items():
        exact = sub_matrix(dense, parameters, key)
        if outputs == 1:  # signs square to 1: every single draw is exact
            for sample in samples:
                torch.testing.assert_close(sample, exact)
        else:
            assert_mean_is(samples, exact)


def test_a_linear_model_s_block_is_exact_for_one_squared_error_output_with_weights_on_the_loss():
    model = double(nn.Linear(3, 1))
    x, y = randn(6, 3, seed=1), randn(6, 1, seed=2)
    parameters = [*model.parameters()]
    dense = dense_fisher(FAMILIES["gaussian"], model(x).reshape(-1), parameters, torch.ones(6))
    fisher, _ = observe(parameters, lambda: 17.0 * F.mse_loss(model(x), y))
    torch.testing.assert_close(dense_average(fisher.blocks[0]), dense)


def test_a_diagonal_block_weighs_each_term_as_the_objective_does():
    scale = nn.Parameter(torch.tensor(1.5).double())
    x, w = randn(4, seed=1), torch.tensor([1.0, 0.0, 2.0, 0.25]).double()
    # One term at a time, so that the single draw per term is exact.
    for i in range(4):
        if w[i] == 0:
            continue
        fisher, _ = observe(
            [scale], lambda i=i: w[i] * 0.5 * F.mse_loss(scale * x[i : i + 1], x[i : i + 1])
        )
        torch.testing.assert_close(fisher.blocks[0].average("F").squeeze(), x[i] ** 2)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_grouped_convolution_s_block_is_the_fisher_s_for_one_output_position(kernel):
    model = double(nn.Conv2d(4, 6, kernel, groups=2))
    x = randn(1, 4, kernel, kernel, seed=1)
    y = randn(1, 6, 1, 1, seed=2)
    parameters = [*model.parameters()]
    natural = model(x).reshape(-1)
    dense = dense_fisher(FAMILIES["gaussian"], natural, parameters, torch.ones(6).double())
    found = averages(model, lambda: SUMMED["gaussian"](model(x), y), "propagated", False, 60, 4)
    # Groups are independent maps; the Fisher of squared error has nothing between them either.
    assert_mean_is(found[0, 1], dense)


def test_terms_that_are_masked_out_leave_both_factors_alone():
    model = double(nn.Linear(3, 1))
    x, y = randn(6, 3, seed=1), randn(6, 1, seed=2)
    kept = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]).double()

    def masked():
        return (kept * F.mse_loss(model(x), y, reduction="none").squeeze(1)).sum() / kept.sum()

    fisher, _ = observe([*model.parameters()], masked)
    chosen = kept.bool()
    alone, _ = observe([*model.parameters()], lambda: F.mse_loss(model(x[chosen]), y[chosen]))
    torch.testing.assert_close(dense_average(fisher.blocks[0]), dense_average(alone.blocks[0]))


def test_a_tied_weight_adds_up_its_calls():
    weight = nn.Parameter(randn(3, 3, seed=1) / 2)
    x = randn(1, 3, seed=2)
    fisher, observation = observe(
        [weight],
        lambda: 0.5 * F.mse_loss(F.linear(F.linear(x, weight), weight), x, reduction="sum"),
        draws=2,
    )
    assert len(observation.maps) == 2
    (block,) = fisher.blocks
    inner = F.linear(x, weight).detach()
    torch.testing.assert_close(block.averaged_factors()[0][0], (x.T @ x + inner.T @ inner) / 2)
    assert float(block.average("rows")) == 2


def test_draws_are_averaged_and_not_added():
    model = double(nn.Linear(3, 1))
    x, y = randn(6, 3, seed=1), randn(6, 1, seed=2)
    one, _ = observe([*model.parameters()], lambda: F.mse_loss(model(x), y), draws=1)
    five, _ = observe([*model.parameters()], lambda: F.mse_loss(model(x), y), draws=5)
    torch.testing.assert_close(dense_average(one.blocks[0]), dense_average(five.blocks[0]))
    assert float(five.blocks[0].average("rows")) == pytest.approx(6)


def test_a_bias_that_two_weights_add_has_a_block_of_its_own():
    a, b = nn.Parameter(randn(2, 3, seed=1)), nn.Parameter(randn(2, 3, seed=2))
    bias = nn.Parameter(randn(2, seed=3))
    x = randn(4, 3, seed=4)
    fisher, _ = observe(
        [a, b, bias],
        lambda: F.mse_loss(F.linear(x, a, bias).tanh() + F.linear(x, b, bias), randn(4, 2)),
    )
    assert [block.kind for block in fisher.blocks] == ["kronecker", "kronecker", "diagonal"]
    assert fisher.block(bias).parameters == (bias,)
    assert fisher.reason(a) == "weight of linear"


def test_a_bias_missing_from_one_of_the_calls_counts_only_where_it_was_added():
    weight, bias = nn.Parameter(randn(1, 3, seed=1)), nn.Parameter(randn(1, seed=2))
    x, z = randn(2, 3, seed=3), randn(4, 3, seed=4)

    def objective():
        both = torch.cat([F.linear(x, weight, bias), F.linear(z, weight)])
        return 0.5 * F.mse_loss(both, torch.zeros(6, 1).double(), reduction="sum")

    fisher, _ = observe([weight, bias], objective)
    natural = torch.cat([F.linear(x, weight, bias), F.linear(z, weight)]).reshape(-1)
    dense = dense_fisher(FAMILIES["gaussian"], natural, [weight, bias], torch.ones(6))
    torch.testing.assert_close(dense_average(fisher.blocks[0]), dense)


def test_a_parameter_without_a_map_gets_a_diagonal_block_beside_the_others():
    layer, scale = double(nn.Linear(3, 2)), nn.Parameter(torch.ones(2).double())
    fisher, _ = observe(
        [*layer.parameters(), scale],
        lambda: F.mse_loss(layer(randn(4, 3)) * scale, randn(4, 2, seed=1)),
    )
    assert fisher.block(scale).kind == "diagonal"
    assert fisher.reason(scale) == "used by no linear map that is known"
    assert fisher.block(layer.weight).parameters == (layer.weight, layer.bias)
    assert Fisher().reason(scale) == "no observed loss depends on it yet"
