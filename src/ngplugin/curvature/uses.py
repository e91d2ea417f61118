"""How parameters enter the nodes of an autograd graph, so that per-example gradients can be had.

A node that multiplies, adds or convolves a parameter with data keeps what it needs for the
parameter's gradient (torch documents it as `grad_fn._saved_*`). Together with the derivative of a
prediction with respect to the node's output, δ, this gives the gradient row by row and not only
summed up. The graph is the user's own: nothing of the forward pass is replaced or run again, and
what a double backward pass put into it (`create_graph=True`, `torch.func`) is there like the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngplugin.curvature.activation_checkpointing import in_a_backward_pass_of_its_own
from ngplugin.curvature.subclasses import plain
from ngplugin.curvature.taps.convolutions import patch_rows, position_rows

Node = Any  # torch.autograd.graph.Node, with the attributes of its kind
#: δ of the node's output to left `[rows, a]` and right `[rows, b]`, None standing for `b` = 1: the
#: gradient of the `[a, b]` operand is Σ_r left_r ⊗ right_r, with a row for each example or more.
Rows = Callable[[Tensor], tuple[Tensor, Tensor | None]]

# Functions of one tensor: applied to a parameter they leave it free of data.
_UNARY = {
    "Abs", "Alias", "Clone", "Cos", "Exp", "Neg", "Permute", "Pow", "ReshapeAlias", "Select",
    "Sigmoid", "Sin", "Slice", "Softplus", "Sqrt", "Squeeze", "T", "Tanh", "ToCopy", "Transpose",
    "UnsafeView", "Unsqueeze", "View",
}  # fmt: skip
_SAME = {"Alias", "Clone", "ToCopy"}  # keep the values' places
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div"}  # unary too, where a constant is no larger


@dataclass(frozen=True)
class Use:
    """One place where a parameter enters the graph.

    Attributes:
        parameter: it.
        node: whose output δ is taken of.
        read: the gradient of the operand from δ.
        transposed: the operand is the parameter's transpose.
        operand: where the operand is computed, if it is neither the parameter nor its transpose.
        shape: of the operand.
    """

    parameter: Tensor
    node: Node
    read: Rows
    transposed: bool
    operand: GradientEdge | None
    shape: tuple[int, ...]

    def rows(self, delta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of the operand as left ⊗ right, row by row; the left alone without right."""
        return self.read(plain(delta))


@dataclass(frozen=True)
class _Operand:
    parameter: Tensor
    transposed: bool
    edge: GradientEdge | None
    shape: tuple[int, ...]


def find_uses(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[list[Use], dict[int, str]]:
    """Every place where one of the parameters enters what `tensors` were computed from.

    Returns:
        The uses, and for each parameter (by id) that enters in a way that is not known here the
        name of the node.
    """
    return in_a_backward_pass_of_its_own(lambda: _find_uses(tensors, parameters), tensors[0].device)


def _find_uses(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[list[Use], dict[int, str]]:
    watched = {id(p) for p in parameters}
    uses: list[Use] = []
    unknown: dict[int, str] = {}
    seen: set[Node] = set()  # holds the nodes' Python objects, which are their identities
    waiting: list[Node] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        saved = _Saved(node)
        for place, (source, output) in enumerate(node.next_functions):
            if source is None:
                continue
            operand = _operand(source, output)
            if operand is None:
                waiting.append(source)
            elif id(operand.parameter) in watched:
                rule = _RULES.get(_name(node))
                rows = None if rule is None else rule(saved, place, operand.shape)
                if rows is None:
                    unknown.setdefault(id(operand.parameter), node.name())
                else:
                    p, transposed = operand.parameter, operand.transposed
                    uses.append(Use(p, node, rows, transposed, operand.edge, operand.shape))
    for t in tensors:  # a prediction that is a parameter itself
        if t.grad_fn is None and id(t) in watched:
            unknown.setdefault(id(t), "the prediction itself")
    return uses, unknown


class _Saved:
    """A node, each of whose attributes is read once, however often it is asked for."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._node, name)
        setattr(self, name, value)
        return value


def _name(node: Node) -> str:
    """`AddmmBackward0` is `Addmm`, and the backward of `TanhBackward` is `TanhBackward`."""
    return str(node.name()).rpartition("Backward")[0]


def _operand(node: Node, output: int) -> _Operand | None:
    """What a node is if it computes something of one parameter and nothing else."""
    start, moved, transposed = node, False, False
    while hasattr(node, "next_functions"):
        if hasattr(node, "variable"):
            p = node.variable
            if moved:
                metadata = start._input_metadata[output]
                return _Operand(p, False, GradientEdge(start, output), tuple(metadata.shape))
            shape = tuple(reversed(p.shape)) if transposed else tuple(p.shape)
            return _Operand(p, transposed, None, shape)
        name = _name(node)
        sources = [source for source, _ in node.next_functions if source is not None]
        if len(sources) != 1 or not (name in _UNARY or _keeps_shape(node, name)):
            return None
        if name == "T":
            transposed = not transposed
        elif name not in _SAME:
            moved = True
        (node,) = sources
    return None


def _keeps_shape(node: Node, name: str) -> bool:
    """Whether an elementwise operation with a constant leaves the shape as it was."""
    if name not in _ELEMENTWISE:
        return False
    ((source, output),) = [pair for pair in node.next_functions if pair[0] is not None]
    before = source.variable if hasattr(source, "variable") else source._input_metadata[output]
    return tuple(before.shape) == tuple(node._input_metadata[0].shape)


# -- what each kind of node does with its operand ------------------------------------------------


def _mm(node: Node, place: int, shape: tuple[int, ...]) -> Rows:
    """X @ M: δ_r of a row gives x_r ⊗ δ_r. M @ Y: a column."""
    if place == 1:
        x = plain(node._saved_self)
        return lambda delta: (x, delta)
    y = plain(node._saved_mat2)
    return lambda delta: (delta.mT, y.mT)


def _addmm(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    """β b + α X @ M."""
    if place == 0:
        beta = node._saved_beta
        return _broadcast(node, shape, lambda delta: delta * beta)
    alpha = node._saved_alpha
    if place == 2:
        x = plain(node._saved_mat1)
        return lambda delta: (x, delta * alpha)
    y = plain(node._saved_mat2)
    return lambda delta: (delta.mT * alpha, y.mT)


def _mv(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    """X @ v."""
    if place == 0:
        return None
    x = plain(node._saved_self)
    return lambda delta: (x * delta[:, None], None)


def _add(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    alpha = node._saved_alpha if place == 1 else 1
    return _broadcast(node, shape, lambda delta: delta * alpha)


def _sub(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    factor = -node._saved_alpha if place == 1 else 1
    return _broadcast(node, shape, lambda delta: delta * factor)


def _mul(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    other = plain(node._saved_other) if place == 0 else plain(node._saved_self)
    return _broadcast(node, shape, lambda delta: delta * other)


def _div(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    above, below = plain(node._saved_self), plain(node._saved_other)
    if place == 0:
        return _broadcast(node, shape, lambda delta: delta / below)
    return _broadcast(node, shape, lambda delta: -delta * above / below.square())


def _broadcast(
    node: Node, shape: tuple[int, ...], gradient: Callable[[Tensor], Tensor]
) -> Rows | None:
    """An operand that is spread over the output: rows are the dimensions that it lacks."""
    output = tuple(node._input_metadata[0].shape)
    padded = (1,) * (len(output) - len(shape)) + shape
    spread = [i for i, (n, m) in enumerate(zip(output, padded, strict=True)) if n != m or m == 1]
    kept = [i for i in range(len(output)) if i not in spread]
    if not spread:
        return None  # an element of its own for each element of the output: no rows

    def rows(delta: Tensor) -> tuple[Tensor, None]:
        moved = gradient(delta).expand(output).permute(*spread, *kept)
        count = 1
        for i in spread:
            count *= output[i]
        return moved.reshape(count, -1), None

    return rows


def _layer_norm(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    """γ x̂ + β."""
    if place == 0:
        return None
    size = len(shape)
    if place == 2:
        return lambda delta: (delta.flatten(-size).flatten(0, -2), None)
    x, mean, rstd = plain(node._saved_input), plain(node._saved_result1), plain(node._saved_result2)

    def rows(delta: Tensor) -> tuple[Tensor, None]:
        normalized = (x - mean) * rstd
        return (delta * normalized).flatten(-size).flatten(0, -2), None

    return rows


def _convolution(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    """Patches ⊗ δ at each position of an example; several groups are added up to one row."""
    if place == 0 or node._saved_transposed:
        return None
    groups = node._saved_groups
    if place == 2:
        return lambda delta: (position_rows(delta, 1)[0].flatten(0, 1), None)
    x, kernel = plain(node._saved_input), shape[2:]
    margins = [m for p in reversed(node._saved_padding) for m in (p, p)]
    strides, dilations = node._saved_stride, node._saved_dilation

    def rows(delta: Tensor) -> tuple[Tensor, Tensor | None]:
        padded = torch.nn.functional.pad(x, margins)
        inputs = patch_rows(padded, kernel, strides, dilations, groups)  # [group, N, position, in]
        scores = position_rows(delta, groups)
        if groups == 1:
            return scores[0].flatten(0, 1), inputs[0].flatten(0, 1)
        return (scores.mT @ inputs).movedim(1, 0).flatten(1), None

    return rows


def _embedding(node: Node, place: int, shape: tuple[int, ...]) -> Rows | None:
    """A one-hot row ⊗ δ."""
    indices, padding = plain(node._saved_indices).reshape(-1), node._saved_padding_idx
    if node._saved_scale_grad_by_freq:
        return None

    def rows(delta: Tensor) -> tuple[Tensor, Tensor]:
        hot = torch.nn.functional.one_hot(indices, shape[0]).to(delta.dtype)
        return hot * (indices != padding)[:, None], delta.reshape(-1, shape[1])

    return rows


_RULES: dict[str, Callable[[Node, int, tuple[int, ...]], Rows | None]] = {
    "Mm": _mm,
    "Addmm": _addmm,
    "Mv": _mv,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "NativeLayerNorm": _layer_norm,
    "Convolution": _convolution,
    "Embedding": _embedding,
}
