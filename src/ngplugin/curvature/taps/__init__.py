"""Reads a call of a torch function as a linear map: its rows of inputs and of output scores.

One layout for every map, `[group, example, shared, feature]`: a linear layer on tokens shares its
weight over the tokens of an example, a convolution over the pixels of its output, and a grouped
convolution is several maps side by side. After that all maps are the same mathematics (the layout
of Eschenhagen et al. 2023, arXiv:2311.00636).

Each reader has the signature of the torch function it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
import torch.nn.functional as F

from ngplugin.curvature.taps.contractions import Contraction
from ngplugin.curvature.taps.convolutions import convolution, transposed_convolution
from ngplugin.curvature.taps.lookups import embedding, embedding_bag
from ngplugin.curvature.taps.map_call import Dimensions as Dimensions
from ngplugin.curvature.taps.map_call import LookupCall as LookupCall
from ngplugin.curvature.taps.map_call import MapCall as MapCall
from ngplugin.curvature.taps.map_call import as_matrices as as_matrices
from ngplugin.curvature.taps.map_call import as_weight as as_weight
from ngplugin.curvature.taps.matrices import (
    addmm,
    addmv,
    baddbmm,
    bilinear,
    einsum,
    linear,
    matmul,
    tensordot,
)
from ngplugin.curvature.taps.norms import NORMS
from ngplugin.curvature.taps.norms import NormCall as NormCall
from ngplugin.curvature.taps.norms import read_norm_call as read_norm_call

_READERS: dict[Callable[..., Any], Callable[..., MapCall | LookupCall | None]] = {
    F.conv1d: convolution("conv1d"),
    F.conv2d: convolution("conv2d"),
    F.conv3d: convolution("conv3d"),
    F.conv_transpose1d: transposed_convolution("conv_transpose1d"),
    F.conv_transpose2d: transposed_convolution("conv_transpose2d"),
    F.conv_transpose3d: transposed_convolution("conv_transpose3d"),
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}
_PRODUCTS: dict[Callable[..., Any], Callable[..., Contraction | None]] = {
    F.linear: linear,
    F.bilinear: bilinear,
    torch.einsum: einsum,
    torch.tensordot: tensordot,
}
for _name in ("matmul", "mm", "mv", "bmm", "dot"):
    _PRODUCTS[getattr(torch, _name)] = _PRODUCTS[getattr(torch.Tensor, _name)] = matmul
_PRODUCTS[torch.Tensor.__matmul__] = matmul
for _reader in (addmm, addmv, baddbmm):
    _PRODUCTS[getattr(torch, _reader.__name__)] = _reader
    _PRODUCTS[getattr(torch.Tensor, _reader.__name__)] = _reader

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

#: The functions that apply a layer's weights, whether or not they are linear maps.
LAYERS = frozenset((*_READERS, *_PRODUCTS, *NORMS, *_RECURRENT))


def read_map_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: Container[int] | None = None,
) -> MapCall | LookupCall | None:
    """The linear map that a call of a torch function applies, None if it is none we know.

    Args:
        function: as is.
        args: as is.
        kwargs: as is.
        weights: the ids of what may be the map's weight. None: whatever stands in a weight's place,
            the last operand of a product.
    """
    if function in _READERS:
        call = _READERS[function](*args, **kwargs)
        return call if call and (weights is None or id(call.weight) in weights) else None
    product = _PRODUCTS[function](*args, **kwargs) if function in _PRODUCTS else None
    return None if product is None else product.map(weights)
