"""Linear layers and products of matrices, vectors and stacks of matrices, as contractions.

Each reader has the signature of the torch function it reads. It gives None where what is added is
scaled, or the notation is one that is not read.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ngplugin.curvature.taps.contractions import Contraction


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Contraction:
    """Reads `F.linear`, whose weight may be a vector."""
    rows = string.ascii_uppercase[: input.dim() - 1]
    outs = "o" if weight.dim() == 2 else ""
    return Contraction(
        "linear", (input, weight), (rows + "i", outs + "i"), rows + outs, bias, weight=1
    )


def matmul(*sides: Tensor, **named: Tensor) -> Contraction:
    """Reads `torch.matmul` and what it does for given shapes: mm, mv, bmm, dot.

    Each of them has a name of its own for the side on the right.
    """
    if "input" in named:
        sides = (named.pop("input"),)
    return _product("matmul", *sides, *named.values())


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Contraction | None:
    """Reads `torch.addmm`, input + mat1 @ mat2."""
    return _product("addmm", mat1, mat2, input) if alpha == beta == 1 else None


def addmv(
    input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1
) -> Contraction | None:
    """Reads `torch.addmv`, input + mat @ vec."""
    return _product("addmv", mat, vec, input) if alpha == beta == 1 else None


def baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Contraction | None:
    """Reads `torch.baddbmm`, input + batch1 @ batch2."""
    return _product("baddbmm", batch1, batch2, input) if alpha == beta == 1 else None


def bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Contraction:
    """Reads `F.bilinear`: linear in the products of the one's features with the other's."""
    rows = string.ascii_uppercase[: input1.dim() - 1]
    labels = rows + "i", rows + "j", "oij"
    return Contraction("bilinear", (input1, input2, weight), labels, rows + "o", bias, weight=2)


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Contraction | None:
    """Reads `torch.tensordot`."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        pairs = [*zip(range(a.dim() - dims, a.dim()), range(dims), strict=True)]
    else:
        of_a, of_b = ([d] if isinstance(d, int) else [*d] for d in dims)
        pairs = [(i % a.dim(), j % b.dim()) for i, j in zip(of_a, of_b, strict=True)]
    left = [*string.ascii_lowercase[: a.dim()]]
    right = [*string.ascii_uppercase[: b.dim()]]
    for i, j in pairs:
        right[j] = left[i]
    shared = {left[i] for i, _ in pairs}
    output = "".join(t for t in left + right if t not in shared)
    return Contraction("tensordot", (a, b), ("".join(left), "".join(right)), output)


def einsum(equation: Any, *operands: Any) -> Contraction | None:
    """Reads `torch.einsum` with an equation in letters."""
    tensors: Sequence[Tensor] = operands
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        tensors = operands[0]
    if not isinstance(equation, str):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    spare = [c for c in string.ascii_letters if c not in equation]
    widest = ""
    for i, (text, t) in enumerate(zip(labels, tensors, strict=True)):
        if "..." in text:  # the last of what it stands for are aligned
            count = t.dim() - len(text) + 3
            letters = "".join(spare[:count][::-1])
            widest = max(widest, letters, key=len)
            labels[i] = text.replace("...", letters)
    if not arrow:
        letters = "".join(labels)
        output = "..." + "".join(sorted(c for c in {*letters} - {*widest} if letters.count(c) == 1))
    return Contraction("einsum", tuple(tensors), tuple(labels), output.replace("...", widest))


def _product(kind: str, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Contraction:
    """The product of two matrices, of stacks of them, or of vectors; as `torch.matmul` aligns them.

    Where one side has a single matrix for many of the other's, that dimension of size 1 is one of
    its own, and the product has the many.
    """
    one = [*string.ascii_uppercase[: left.dim() - 2][::-1]] if left.dim() > 2 else []
    other = [*string.ascii_uppercase[: right.dim() - 2][::-1]] if right.dim() > 2 else []
    stacked = [*max(one, other, key=len)]
    for k in range(1, min(len(one), len(other)) + 1):
        if left.shape[-2 - k] == 1 != right.shape[-2 - k]:
            one[-k] = one[-k].lower()
        elif left.shape[-2 - k] != right.shape[-2 - k]:
            other[-k] = other[-k].lower()
    rows, columns = "x" if left.dim() > 1 else "", "z" if right.dim() > 1 else ""
    labels = "".join(one) + rows + "y", "".join(other) + "y" + columns
    return Contraction(kind, (left, right), labels, "".join(stacked) + rows + columns, bias)
