"""Transposed convolutions: rows are input positions, scores are patches of the output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.blocks import BlockDamping
from tests.curvature.test_convolutions import SIZES, each
from tests.curvature.test_taps import gradients
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_damped,
    dense_fisher,
    double,
    flat,
    observe,
    randn,
    unflat,
)

FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def options(dims):
    return [
        {},
        {"stride": 2},
        {"stride": each(dims, 1, 2, 3), "output_padding": each(dims, 0, 1, 2)},
        {"padding": each(dims, 0, 1, 1)},
        {"padding": 1, "stride": 3, "output_padding": 2},
        {"padding": each(dims, 0, 0, 1), "dilation": each(dims, 2, 1, 3)},
        {"groups": 2, "stride": 2, "padding": 1, "dilation": each(dims, 1, 1, 2)},
        {"groups": 4, "stride": (2,), "output_padding": (1,), "padding": (1,)},
        {"dilation": 3, "output_padding": 2, "padding": 1},
    ]


@pytest.mark.parametrize("kernel", [(3, 3, 3), (4, 2, 3)], ids=str)
@pytest.mark.parametrize(
    ("dims", "chosen"), [(d, o) for d in FUNCTIONS for o in options(d)], ids=str
)
@pytest.mark.parametrize("batched", [True, False])
def test_the_rows_give_autograd_s_weight_gradient(dims, chosen, kernel, batched):
    size = [s // 2 for s in SIZES[dims]]
    x = randn(*([3] if batched else []), 8, *size, seed=1)
    groups = chosen.get("groups", 1)
    weight, bias = randn(8, 3, *each(dims, *kernel), seed=2), randn(3 * groups, seed=3)
    exact, ours, a = gradients(FUNCTIONS[dims], x, weight, bias, **chosen)
    torch.testing.assert_close(ours[0], exact[0])
    assert a.shape == (groups, 3 if batched else 1, torch.Size(size).numel(), 8 // groups)


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_block_of_one_input_position_is_the_fisher_s(layer, groups):
    model = double(layer(4, 2 * groups, 2, groups=groups))
    dims = model.weight.dim() - 2
    x = randn(1, 4, *[1] * dims, seed=1)
    y = torch.zeros_like(model(x)).detach()
    parameters = [*model.parameters()]
    natural = model(x).reshape(-1)
    dense = dense_fisher(FAMILIES["gaussian"], natural, parameters, torch.ones(len(natural)))
    samples = []
    for seed in range(80):
        fisher, _ = observe(
            parameters,
            lambda: 0.5 * F.mse_loss(model(x), y, reduction="sum"),
            draws=4,
            seed=seed,
        )
        samples.append(dense_average(fisher.block(model.weight)))
    size = model.weight.numel()
    assert_mean_is(torch.stack(samples), dense[:size, :size])


def test_the_bias_has_a_block_of_its_own_and_says_what_it_is():
    model = double(nn.ConvTranspose1d(2, 3, 2))
    fisher, _ = observe(
        [*model.parameters()],
        lambda: F.mse_loss(model(randn(2, 2, 3)), torch.zeros(2, 3, 4).double()),
    )
    assert [block.kind for block in fisher.blocks] == ["kronecker", "diagonal"]
    assert fisher.reason(model.weight) == "weight of conv_transpose1d"
    assert fisher.reason(model.bias) == "bias of conv_transpose1d"


def test_products_and_saving_know_that_the_inputs_come_first():
    model = double(nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False))
    weight = model.weight
    y = torch.zeros(5, 6, 8).double()
    fisher, _ = observe([weight], lambda: F.mse_loss(model(randn(5, 4, 6)), y))
    fisher.refresh(BlockDamping(0.1))
    g = randn(*weight.shape, seed=4)
    directions, products = fisher.precondition({id(weight): g})
    block = fisher.block(weight)
    exact = torch.linalg.solve(dense_damped(block, 0.1), flat([g]))
    torch.testing.assert_close(directions[id(weight)], unflat(exact, [g])[0])
    torch.testing.assert_close(products[id(weight)], unflat(dense_average(block) @ exact, [g])[0])
    torch.testing.assert_close(
        fisher.product({id(weight): g})[id(weight)],
        unflat(dense_average(block) @ flat([g]), [g])[0],
    )
    other = type(fisher)()
    other.parameters = [weight]
    other.load_state_dict(fisher.state_dict())
    assert torch.equal(other.precondition({id(weight): g})[0][id(weight)], directions[id(weight)])
    assert block.numel() == 3 * 2 * (2**2 + 9**2) + 3 * 2  # two dampings and a count a group
