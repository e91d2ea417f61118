"""Rows of maps: their products must add up to what autograd says, whatever the layout."""

import pytest
import torch
import torch.nn.functional as F

from ngplugin.curvature.taps import read_map_call
from tests.oracle import randn


def gradients(function, x, weight, bias, **options):
    """Autograd's weight and bias gradient, and those put together from the rows."""
    weight.requires_grad_()
    bias.requires_grad_()
    y = function(x, weight, bias, **options)
    score = randn(*y.shape, seed=9)
    exact = torch.autograd.grad(y, (weight, bias), score)
    call = read_map_call(function, (x, weight), {"bias": bias, **options})
    a, g = call.input_rows(), call.score_rows(score)
    assert a.dim() == g.dim() == 4
    assert a.shape[:3] == g.shape[:3]
    assert a.shape[0] == call.groups
    ours = g.flatten(1, 2).mT @ a.flatten(1, 2)  # [group, out, in]
    ours = (ours.mT if call.inputs_first else ours).reshape(weight.shape)
    return exact, (ours, g.sum((1, 2)).reshape(-1)), a


CONVOLUTIONS = [
    {},
    {"stride": 2},
    {"stride": (2, 1)},
    {"padding": 1},
    {"padding": (2, 1)},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": "same", "dilation": (1, 3)},
    {"dilation": 2, "padding": (1, 2)},
    {"dilation": (2, 1), "stride": (1, 2)},
    {"groups": 2},
    {"groups": 2, "stride": 2, "padding": 1, "dilation": 2},
    {"groups": 4, "padding": "same"},
]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 1), (4, 2)])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_the_rows_of_a_convolution_give_autograd_s_gradients(options, kernel):
    x = randn(3, 4, 8, 7, seed=1)
    weight = randn(8, 4 // options.get("groups", 1), *kernel, seed=2)
    exact, ours, a = gradients(F.conv2d, x, weight, randn(8, seed=3), **options)
    torch.testing.assert_close(ours, exact)
    assert a.shape[1] == 3


def test_an_unbatched_image_is_one_example():
    exact, ours, a = gradients(
        F.conv2d, randn(2, 5, 6, seed=1), randn(4, 2, 3, 3, seed=2), randn(4, seed=3), padding=1
    )
    torch.testing.assert_close(ours, exact)
    assert a.shape == (1, 1, 30, 18)


def test_a_one_element_stride_or_padding_stands_for_both_directions():
    exact, ours, _ = gradients(
        F.conv2d,
        randn(2, 2, 6, 6, seed=1),
        randn(4, 2, 3, 3, seed=2),
        randn(4, seed=3),
        stride=(2,),
        padding=(1,),
        dilation=(2,),
    )
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5, 4), (2, 3, 5, 4)], ids=str)
def test_the_rows_of_a_linear_layer_give_autograd_s_gradients(shape):
    exact, ours, a = gradients(
        F.linear, randn(*shape, seed=1), randn(6, 4, seed=2), randn(6, seed=3)
    )
    torch.testing.assert_close(ours, exact)
    examples = shape[0] if len(shape) > 1 else 1
    assert a.shape == (1, examples, torch.Size(shape).numel() // 4 // examples, 4)


def test_arguments_may_come_by_keyword_and_the_bias_may_be_missing():
    x, weight = randn(2, 4), randn(6, 4)
    call = read_map_call(F.linear, (), {"weight": weight, "input": x})
    assert call.weight is weight
    assert call.bias is None
    assert call.kind == "linear"
    assert read_map_call(torch.conv2d, (randn(1, 2, 3, 3), randn(2, 2, 1, 1)), {}).kind == "conv2d"


def test_other_functions_are_no_maps():
    assert read_map_call(torch.relu, (randn(3),), {}) is None


def test_reading_a_call_keeps_no_graph():
    x = randn(2, 4).requires_grad_()
    call = read_map_call(F.linear, (x * 2, randn(3, 4)), {})
    assert call.input_rows().grad_fn is None
