"""Matrix products in as little precision as curvature needs, where the hardware is faster so."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

#: In what float32 gradients are multiplied by the inverses: bfloat16 where that is fast, or not.
Products = Literal["auto", "full"]

_SMALLEST = 128  # of a factor; the product with a smaller one is over before it is converted


def inverse_dtype(matrix: Tensor, products: Products) -> torch.dtype:
    """In what the inverse of a factor is to be kept, and with it multiplied.

    bfloat16 has 8 bits: a direction is then off by about half a percent of its own length, far less
    than by the sampling noise of its factors. What the step does to the prediction is measured with
    the parameters as they are then, so the bound on its KL holds all the same.

    Args:
        matrix: the factors, `[group, d, d]`.
        products: `"full"`: the factor's own. `"auto"`: bfloat16 for float32 factors of a size of
            128 or more, where the hardware has products of it.
    """
    small = matrix.shape[-1] < _SMALLEST or matrix.dtype != torch.float32
    if products == "full" or small or not multiplies_bfloat16(matrix.device):
        return matrix.dtype
    return torch.bfloat16


@functools.cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16, by what it says of itself.

    It is asked and not timed, so that a run can be repeated.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
        return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
    return False


def multiply(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """X Y, computed in `dtype` and returned in the wider precision of the two."""
    if X.dtype == Y.dtype == dtype:
        return X @ Y
    return (X.to(dtype) @ Y.to(dtype)).to(torch.promote_types(X.dtype, Y.dtype))


@contextlib.contextmanager
def quick_float32() -> Iterator[None]:
    """Products of float32 on a CPU by oneDNN, which may round their operands to bfloat16.

    For second moments: the operands are statistics, and the sum over their rows is in float32, so
    that what comes out is positive semi-definite; rounding the result itself would cost that.
    Processors of AMD, to which torch's default library gives slow code, become twice as fast
    without any rounding.
    """
    backend = getattr(torch.backends.mkldnn, "matmul", None)  # not in every torch
    if backend is None or not torch.backends.mkldnn.is_available():
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
