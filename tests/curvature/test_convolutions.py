"""Convolutions of every dimension: the rows' products must add up to what autograd says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.curvature.test_taps import gradients
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    observe,
    randn,
)

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = {1: (9,), 2: (8, 7), 3: (5, 6, 7)}


def each(dims, *values):
    """One option for each dimension, the last ones of those given."""
    return values[-dims:]


def options(dims):
    return [
        {},
        {"stride": 2},
        {"stride": each(dims, 1, 2, 3)},
        {"padding": each(dims, 0, 2, 1)},
        {"padding": "same"},
        {"padding": "valid", "stride": 2},
        {"padding": "same", "dilation": each(dims, 1, 2, 3)},
        {"dilation": 2, "padding": 2},
        {"groups": 2, "stride": 2, "padding": 1, "dilation": each(dims, 1, 1, 2)},
        {"groups": 4, "padding": "same"},
        {"stride": (2,), "padding": (1,), "dilation": (2,)},
    ]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("dims", "chosen"), [(d, o) for d in FUNCTIONS for o in options(d)], ids=str
)
@pytest.mark.parametrize("batched", [True, False])
def test_the_rows_give_autograd_s_gradients(dims, chosen, kernel, batched):
    x = randn(*([3] if batched else []), 4, *SIZES[dims], seed=1)
    weight = randn(8, 4 // chosen.get("groups", 1), *each(dims, *kernel), seed=2)
    exact, ours, a = gradients(FUNCTIONS[dims], x, weight, randn(8, seed=3), **chosen)
    torch.testing.assert_close(ours, exact)
    assert a.shape[1] == (3 if batched else 1)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_other_paddings_than_zeros_are_seen(layer, mode):
    """Padding comes as a call of its own: one output position has its exact block."""
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[layer]
    model = double(layer(2, 2, 4, padding=1, padding_mode=mode))
    x, y = randn(1, 2, *[2] * dims, seed=1), randn(1, 2, *[1] * dims, seed=2)
    parameters = [*model.parameters()]
    natural = model(x).reshape(-1)
    dense = dense_fisher(FAMILIES["gaussian"], natural, parameters, torch.ones(2).double())
    samples = []
    for seed in range(60):
        fisher, _ = observe(
            parameters, lambda: 0.5 * F.mse_loss(model(x), y, reduction="sum"), seed=seed
        )
        samples.append(dense_average(fisher.blocks[0]))
    assert fisher.reason(model.weight) == f"weight of conv{dims}d"
    assert fisher.blocks[0].parameters == (model.weight, model.bias)
    assert_mean_is(torch.stack(samples), dense)
