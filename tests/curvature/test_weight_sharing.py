"""Expand and reduce against the dense Fisher matrix, where theory says they are equal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.block_choice import BlockRule
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    observe,
    randn,
)

POOLINGS = {  # [example, token, output] before the loss
    "mean": lambda z: z.mean(1),
    "sum": lambda z: z.sum(1),
    "none": lambda z: z,
}
RULES = {"expand": BlockRule("kronecker"), "reduce": BlockRule("kronecker", "reduce")}


def deep_linear(outputs):
    return double(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, outputs)))


def parts(dense, sizes):
    """The diagonal blocks of a matrix."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [dense[end - n : end, end - n : end] for n, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(
    ("pooling", "sharing", "exact"),
    [
        ("mean", "reduce", True),
        ("sum", "reduce", True),
        ("none", "expand", True),
        ("mean", "expand", False),
        ("none", "reduce", False),
    ],
)
def test_a_deep_linear_network_s_blocks_are_exact_in_their_own_setting(
    pooling, sharing, exact, outputs
):
    model, x = deep_linear(outputs), randn(4, 5, 3, seed=1)
    parameters, pool = [*model.parameters()], POOLINGS[pooling]
    natural = pool(model(x)).reshape(-1)
    dense = dense_fisher(
        FAMILIES["gaussian"], natural, parameters, torch.ones(len(natural)).double()
    )
    estimates = []
    for seed in range(1 if outputs == 1 and exact else 30):
        fisher, _ = observe(
            parameters,
            lambda: 0.5 * F.mse_loss(pool(model(x)), pool(model(x)).detach(), reduction="sum"),
            draws=4,
            seed=seed,
            rule=RULES[sharing],
        )
        estimates.append([dense_average(block) for block in fisher.blocks])
    sizes = [sum(p.numel() for p in block.parameters) for block in fisher.blocks]
    for samples, part in zip(zip(*estimates, strict=True), parts(dense, sizes), strict=True):
        if not exact:
            error = torch.stack(samples).mean(0) - part
            assert error.norm() > 0.1 * part.norm()
        elif outputs == 1:  # signs square to 1: every single draw is exact
            torch.testing.assert_close(samples[0], part)
        else:
            assert_mean_is(torch.stack(samples), part)


def test_a_convolution_that_is_averaged_over_its_positions_reduces_exactly():
    model = double(nn.Conv2d(2, 1, 2))
    x = randn(5, 2, 4, 3, seed=1)
    parameters = [*model.parameters()]
    natural = model(x).mean((1, 2, 3))
    dense = dense_fisher(FAMILIES["gaussian"], natural, parameters, torch.ones(5).double())
    fisher, _ = observe(
        parameters,
        lambda: (
            0.5 * F.mse_loss(model(x).mean((1, 2, 3)), torch.zeros(5).double(), reduction="sum")
        ),
        rule=RULES["reduce"],
    )
    torch.testing.assert_close(dense_average(fisher.blocks[0]), dense)


def test_positions_that_are_masked_out_are_no_part_of_an_example_s_mean():
    """Averages over the tokens of sentences of different length stay exact."""
    model, x = double(nn.Linear(3, 1)), randn(4, 5, 3, seed=1)
    lengths = torch.tensor([5, 2, 3, 1])
    mask = (torch.arange(5) < lengths[:, None]).double()
    parameters = [*model.parameters()]

    def pooled():
        return (model(x).squeeze(2) * mask).sum(1) / lengths

    dense = dense_fisher(FAMILIES["gaussian"], pooled(), parameters, torch.ones(4).double())
    fisher, _ = observe(
        parameters,
        lambda: 0.5 * F.mse_loss(pooled(), torch.zeros(4).double(), reduction="sum"),
        rule=RULES["reduce"],
    )
    torch.testing.assert_close(dense_average(fisher.blocks[0]), dense)
    assert float(fisher.blocks[0].average("rows")) == 4
