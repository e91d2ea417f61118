"""Contractions of tensors as linear maps of one of them.

A contraction is what `torch.einsum` computes: every dimension has a label, and labels that the
output lacks are summed over. It is linear in each of its operands. Where one of them is a weight,
its labels say what map it is:

* in the weight and in the output: an output of the map;
* in the weight and in another operand: an input;
* in all three: a group, one of several maps side by side;
* not in the weight, but in the output: the rows that share the weight.

All matrix products are contractions. The weight need not be the parameter itself: packed weights
are applied piece by piece (the query, key and value of attention, an expert of many), tied ones
transposed. Such a view is traced back to its parameter.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplugin.curvature.taps.map_call import Dimensions, MapCall

_MOST_PIECES = 16  # of a packed weight: each piece has factors of its own
_LARGEST_PRODUCT = 4096  # products of several operands, whose second moments are to be kept


@dataclass(frozen=True)
class Contraction:
    """A sum of products: `torch.einsum(",".join(labels) + "->" + output, *operands) + bias`.

    Attributes:
        kind: what the coverage table calls it.
        operands: the tensors.
        labels: of each operand's dimensions, a character each.
        output: the labels of the output's dimensions.
        bias: what is added, broadcast to the output's shape.
        weight: the place of the operand that is the weight where several could be; None: then
            none is, since weights that are multiplied with each other are no map of any data.
    """

    kind: str
    operands: tuple[Tensor, ...]
    labels: tuple[str, ...]
    output: str
    bias: Tensor | None = None
    weight: int | None = None

    def map(self, weights: Container[int] | None) -> MapCall | None:
        """The map that it is, with the weight among those of the given ids; None if it is none."""
        places = [len(self.operands) - 1]
        if weights is not None:
            places = [i for i, t in enumerate(self.operands) if id(_origin(t)) in weights]
        if self.weight in places:
            places = [self.weight]
        return self.map_of(places[0]) if len(places) == 1 else None

    def map_of(self, place: int) -> MapCall | None:
        """The map that the operand at `place` is; None if it is none that a block could hold."""
        sizes = self._sizes()
        piece = _piece(self.operands[place], self.labels[place])
        if sizes is None or piece is None:
            return None
        others = set("".join(t for i, t in enumerate(self.labels) if i != place))
        dims = _dimensions(piece, others, self.output)
        if dims is None:
            return None
        groups, outs, ins = ["".join(piece.labels[d] for d in part) for part in dims]
        groups = groups.replace(_SELECTED, "")
        rows = "".join(t for t in self.output if t not in groups + outs)
        if any(self.output.count(t) != 1 for t in groups + outs + rows):
            return None
        features = math.prod(sizes[t] for t in ins)
        if len(self.operands) > 2 and features > _LARGEST_PRODUCT:
            return None

        operands = [t.detach() for i, t in enumerate(self.operands) if i != place]
        labels = [t for i, t in enumerate(self.labels) if i != place]

        def input_rows() -> Tensor:
            wanted = groups + rows + ins
            if len(operands) == 1 and len(labels[0]) == len(wanted):
                x = operands[0].permute([labels[0].index(t) for t in wanted])
            else:
                dtype = operands[0].dtype
                for t in operands[1:]:
                    dtype = torch.promote_types(dtype, t.dtype)
                equation = ",".join(labels) + "->" + wanted
                x = torch.einsum(equation, *(t.to(dtype) for t in operands))
            return _as_rows(x, len(groups), len(rows))

        def score_rows(score: Tensor) -> Tensor:
            g = score.permute([self.output.index(t) for t in groups + rows + outs])
            return _as_rows(g, len(groups), len(rows))

        bias, joins = self._bias_of(piece, dims, groups + outs)
        weight, parts = piece.weight, [piece.weight.shape[d] for d in dims[0]]
        count = math.prod(parts)
        if piece.whole or 0 in dims[0]:
            if count > _MOST_PIECES and not (dims[1] and dims[2]):
                return None
            inner = math.prod(parts[1:])  # the dimension that a piece is of is the slowest
            first = 0 if piece.whole else piece.start * inner
            plain = {((), (0,), (*range(1, weight.dim()),)): False}
            plain |= {((), (*range(1, weight.dim()),), (0,)): True}
            if dims in plain:
                return MapCall(
                    self.kind, weight, bias, 1, input_rows, score_rows, plain[dims], joins
                )
            return MapCall(
                self.kind, weight, bias, count, input_rows, score_rows, False, joins, first, dims
            )
        if weight.dim() != 2 or parts or not (dims[1] and dims[2]):
            return None
        # Some of the outputs, or of the inputs: the weight is several maps, a piece each.
        size = math.gcd(piece.start, piece.size, weight.shape[0])
        pieces, covered = weight.shape[0] // size, piece.size // size
        if pieces > _MOST_PIECES:
            return None

        def divided(t: Tensor) -> Tensor:
            return t.reshape(*t.shape[1:-1], covered, size).movedim(2, 0)

        def repeated(t: Tensor) -> Tensor:
            return t.expand(covered, *t.shape[1:])

        first = piece.start // size
        if dims[2] == (0,):
            return MapCall(
                self.kind,
                weight,
                bias,
                pieces,
                lambda: divided(input_rows()),
                lambda score: repeated(score_rows(score)),
                True,
                bias is None,
                first,
            )
        return MapCall(
            self.kind,
            weight,
            bias,
            pieces,
            lambda: repeated(input_rows()),
            lambda score: divided(score_rows(score)),
            False,
            joins,
            first,
        )

    def _sizes(self) -> dict[str, int] | None:
        """The size of each label; None where a dimension stands twice or is broadcast."""
        sizes: dict[str, int] = {}
        for operand, labels in zip(self.operands, self.labels, strict=True):
            if len(set(labels)) < len(labels):
                return None
            for label, size in zip(labels, operand.shape, strict=True):
                if sizes.setdefault(label, size) != size:
                    return None
        return sizes

    def _bias_of(self, piece: _Piece, dims: Dimensions, outs: str) -> tuple[Tensor | None, bool]:
        """The parameter that is added to the output, and whether once to each row's outputs."""
        if self.bias is None:
            return None, True
        bias = _origin(self.bias)
        if not bias.is_leaf:
            return None, True
        added_once = [t for t in self.output if t in outs] == [*outs] and all(
            label in outs or size == 1
            for label, size in zip(reversed(self.output), reversed(self.bias.shape), strict=False)
        )
        sizes = [piece.weight.shape[d] for d in (*dims[0], *dims[1])]
        if piece.whole:
            same_part = bias.numel() == self.bias.numel() == math.prod(sizes)
        else:
            start = self.bias.storage_offset() - bias.storage_offset()
            same_part = [*bias.shape] == sizes and start == piece.start * bias.stride(0)
        return bias, added_once and same_part and self.bias.is_contiguous()


_SELECTED = " "  # the label of a dimension of which an index has picked one element


@dataclass(frozen=True)
class _Piece:
    """What a tensor is of a parameter: all of it, or a range of its first dimension.

    Attributes:
        weight: the parameter.
        labels: of the parameter's dimensions.
        start: the range's first.
        size: its length.
        whole: it is all of the parameter.
    """

    weight: Tensor
    labels: str
    start: int
    size: int
    whole: bool


def _piece(t: Tensor, labels: str) -> _Piece | None:
    """Trace a tensor back to its parameter; None if it is another kind of view."""
    weight = _origin(t)
    if weight is t:
        size = t.shape[0] if t.dim() else 1
        return _Piece(weight, labels, 0, size, True)
    if not weight.is_contiguous() or not weight.numel() or t.is_complex():
        return None
    start, rest = divmod(int(t.storage_offset() - weight.storage_offset()), weight.stride(0))
    if rest:
        return None
    found: dict[int, int] = {}  # dimension of the weight -> of the tensor
    for i, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        same = [d for d in range(weight.dim()) if weight.stride(d) == stride and d not in found]
        exact = [d for d in same if weight.shape[d] == size]
        place = next(iter(exact), 0 if 0 in same else None)
        if place is None:
            return None
        found[place] = i
    missing = [d for d in range(weight.dim()) if d not in found]
    if missing not in ([], [0]):
        return None
    traced = "".join(labels[found[d]] if d in found else _SELECTED for d in range(weight.dim()))
    size = t.shape[found[0]] if 0 in found else 1
    return _Piece(weight, traced, start, size, size == weight.shape[0])


def _dimensions(piece: _Piece, others: set[str], output: str) -> Dimensions | None:
    """What the weight's dimensions are; None if it is summed over alone, or only scales."""
    groups, outs, ins = [], [], []
    for d, label in enumerate(piece.labels):
        inside, outside = label in others, label in output
        if label == _SELECTED or (inside and outside):
            groups.append(d)
        elif outside:
            outs.append(d)
        elif inside:
            ins.append(d)
        else:
            return None
    return (tuple(groups), tuple(outs), tuple(ins)) if outs or ins else None


def _as_rows(t: Tensor, groups: int, rows: int) -> Tensor:
    """Dimensions of groups, of rows and of features to `[group, example, shared, feature]`."""
    shape = t.shape
    group, feature = shape[:groups].numel(), shape[groups + rows :].numel()
    example = shape[groups] if rows else 1
    return t.reshape(group, example, shape[groups + min(rows, 1) : groups + rows].numel(), feature)


def _origin(t: Tensor) -> Tensor:
    """What a tensor is a differentiable view of, or the tensor itself."""
    base = t._base
    return t if base is None or t.is_leaf else base
