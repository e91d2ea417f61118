"""Reads a call of a torch function as a linear map: its rows of inputs and of output scores.

One layout for every map, `[group, example, shared, feature]`: a linear layer on tokens shares its
weight over the tokens of an example, a convolution over the pixels of its output, and a grouped
convolution is several maps side by side. After that all maps are the same mathematics (the layout
of Eschenhagen et al. 2023, arXiv:2311.00636).

Each reader has the signature of the torch function it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ngplugin.curvature.taps.convolutions import convolution, transposed_convolution
from ngplugin.curvature.taps.lookups import embedding, embedding_bag
from ngplugin.curvature.taps.map_call import LookupCall as LookupCall
from ngplugin.curvature.taps.map_call import MapCall as MapCall
from ngplugin.curvature.taps.matrices import addmm, bilinear, linear, matmul
from ngplugin.curvature.taps.norms import NORMS
from ngplugin.curvature.taps.norms import NormCall as NormCall
from ngplugin.curvature.taps.norms import read_norm_call as read_norm_call

_READERS: dict[Callable[..., Any], Callable[..., MapCall | LookupCall | None]] = {
    F.linear: linear,
    F.bilinear: bilinear,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.addmm: addmm,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.Tensor.mm: matmul,
    torch.Tensor.addmm: addmm,
    F.conv1d: convolution("conv1d"),
    F.conv2d: convolution("conv2d"),
    F.conv3d: convolution("conv3d"),
    F.conv_transpose1d: transposed_convolution("conv_transpose1d"),
    F.conv_transpose2d: transposed_convolution("conv_transpose2d"),
    F.conv_transpose3d: transposed_convolution("conv_transpose3d"),
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

#: The functions that apply a layer's weights, whether or not they are linear maps.
LAYERS = frozenset((*_READERS, *NORMS, *_RECURRENT))


def read_map_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> MapCall | LookupCall | None:
    """The linear map that a call of a torch function applies, None if it is none we know."""
    reader = _READERS.get(function)
    return None if reader is None else reader(*args, **kwargs)
