"""What one block of the Fisher matrix keeps, computes and sends, by its shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.scaling.models import Map, Model, Norm
from experiments.scaling.protocol import Protocol, Structure

HALF = 128  # the smallest factor whose inverse is kept, and multiplied, in bfloat16
FEWEST_ROWS, ROWS_PER_SIZE, FEWEST_EXAMPLES = 1024, 2, 16  # of a statistic that is thinned


@dataclass(frozen=True)
class Side:
    """The factors over one side of a weight, one a group.

    Attributes:
        size: d.
        dense: a whole matrix each; else a diagonal.
        groups: how many.
    """

    size: int
    dense: bool
    groups: int = 1

    @property
    def numbers(self) -> int:
        """Of all groups."""
        return self.groups * self.size ** (2 if self.dense else 1)

    @property
    def inverse(self) -> int:
        """Numbers of the inverses."""
        return self.numbers if self.dense else 0

    @property
    def half(self) -> bool:
        """Whether inverses are in bfloat16."""
        return self.dense and self.size >= HALF


@dataclass(frozen=True)
class Product:
    """FLOPs of matrix products in the precision of a factor's inverse."""

    flops: int
    half: bool


@dataclass(frozen=True)
class Block:
    """One block, or several of one shape. All numbers but `count` are of one.

    Attributes:
        kind: as the coverage table has it.
        count: how many there are.
        parameters: that it holds.
        averages: numbers that are averaged over steps, and over ranks at a refresh.
        refreshed: numbers that a refresh makes.
        halves: of these, in bfloat16.
        dense: the sides to be factorized.
        sent: bytes that the owner of the block sends to the others after a refresh.
        gram: FLOPs of a statistic, in float32.
        rows: numbers in the rows of inputs and scores of a statistic.
        carried: FLOPs of a refresh beside the factorizations, in float32.
        step: products that a step takes.
        product: of F with a vector.
    """

    kind: str
    count: int
    parameters: int
    averages: int
    refreshed: int
    halves: int = 0
    dense: tuple[Side, ...] = ()
    sent: int = 0
    gram: int = 0
    rows: int = 0
    carried: int = 0
    step: tuple[Product, ...] = ()
    product: tuple[Product, ...] = ()

    @property
    def numel(self) -> int:
        """Numbers kept, as `Block.numel()` of ngplugin counts them."""
        return self.averages + self.refreshed

    @property
    def bytes(self) -> int:
        """Of the numbers kept: float32, but for inverses in bfloat16."""
        return 4 * self.numel - 2 * self.halves

    @property
    def factors(self) -> int:
        """Numbers of the dense factors."""
        return sum(side.numbers for side in self.dense)


def blocks(model: Model, structure: Structure, protocol: Protocol) -> list[Block]:
    """The blocks that `structure` gives a model; AdamW has none.

    `"identity"` and `"matrix-free"` have Kronecker blocks beside them: to predict the KL of a step
    with, and as the preconditioner.
    """
    if structure == "adamw":
        return []
    return [*_blocks(model, structure, protocol.max_factor)]


def _blocks(model: Model, structure: Structure, max_factor: int) -> Iterator[Block]:
    if structure == "diagonal":
        for m in model.maps:
            weight = m.groups * m.inputs * m.outputs
            yield diagonal(weight, m.count)
            if m.bias:
                yield diagonal(m.groups * m.outputs, m.count)
        for n in model.norms:
            yield diagonal(n.features, n.count * (1 + n.offset))
        for loose in model.loose:
            yield diagonal(loose.parameters)
        return
    for m in model.maps:
        if m.kind != "linear":
            yield half_diagonal(m, model.examples)
        elif structure == "eigen":
            yield eigen(m, model.examples, max_factor)
        else:
            yield kronecker(m, model.examples, max_factor)
    for n in model.norms:
        yield unit(n) if n.offset else diagonal(n.features, n.count)
    for loose in model.loose:
        sides = [size for size in loose.shape if size > 1]
        if len(sides) > 1:
            yield gradient_kronecker(sides[0], math.prod(sides[1:]), max_factor)
        else:
            yield diagonal(loose.parameters)


def examples_taken(m: Map, examples: int) -> int:
    """Of a batch, for a statistic: evenly spaced ones, so many that their rows are enough.

    All of fewer than 32 examples are taken, whatever the number of their rows.
    """
    fewest = max(FEWEST_ROWS, ROWS_PER_SIZE * max(m.inputs + m.bias, m.outputs))
    every = max(1, min(round(examples * m.shared / fewest), examples // FEWEST_EXAMPLES))
    return math.ceil(examples / every)


def kronecker(m: Map, examples: int, max_factor: int) -> Block:
    """A ⊗ G of a linear map; the bias is one more input."""
    A, G = _sides(m, max_factor)
    rows = examples_taken(m, examples) * m.shared
    return Block(
        "kronecker",
        m.count,
        m.groups * A.size * G.size,
        averages=A.numbers + G.numbers + m.groups,  # and the number of rows
        refreshed=sum(s.numbers + s.inverse + s.groups for s in (A, G)),  # and the damping
        gram=sum(_second_moment(s, rows) for s in (A, G)),
        rows=m.groups * rows * (A.size + G.size),
        **_inverted(A, G),
    )


def half_diagonal(m: Map, examples: int) -> Block:
    """A diagonal over the vocabulary, a matrix over the dimensions: embeddings, also tied ones."""
    S, D = Side(m.outputs, True), Side(m.inputs, False)
    rows = m.shared if m.once else examples * m.shared
    uses = 2 if m.kind == "tied" else 1
    return Block(
        "half-diagonal kronecker",
        m.count,
        S.size * D.size,
        averages=uses * (S.numbers + D.numbers + 1),  # and the number of rows
        refreshed=2 * S.numbers + D.numbers + 2,
        gram=uses * _second_moment(S, rows),
        rows=rows * (S.size + (S.size + D.size if uses == 2 else 0)),
        **_inverted(S, D),
    )


def gradient_kronecker(outputs: int, inputs: int, max_factor: int) -> Block:
    """A ⊗ G of a matrix that no map is known of, from its sampled gradient."""
    A, G = Side(inputs, inputs <= max_factor), Side(outputs, outputs <= max_factor)
    return Block(
        "gradient-kronecker",
        1,
        inputs * outputs,
        averages=A.numbers + G.numbers + 1,  # and the number of draws
        refreshed=sum(s.numbers + s.inverse + 1 for s in (A, G)),
        gram=_second_moment(A, outputs) + _second_moment(G, inputs),
        rows=2 * inputs * outputs,
        **_inverted(A, G),
    )


def unit(n: Norm) -> Block:
    """A 2 x 2 matrix for each feature's scale and offset; its products are next to nothing."""
    f = n.features
    return Block(
        "unit-wise", n.count, 2 * f, averages=4 * f, refreshed=9 * f, sent=4 * 4 * f, rows=2 * f
    )


def diagonal(size: int, count: int = 1) -> Block:
    """One number for each parameter, as it is on average and as it was at the last refresh."""
    return Block("diagonal", count, size, averages=size, refreshed=size + 1, rows=size)


def eigen(m: Map, examples: int, max_factor: int) -> Block:
    """Eigenvectors of A and G, and second moments M along them, one for each parameter."""
    A, G = _sides(m, max_factor)
    taken = examples_taken(m, examples)
    rows = taken * m.shared
    P = m.groups * A.size * G.size
    sides = tuple(s for s in (A, G) if s.dense)
    turn = sum(_beside(s, A, G) for s in sides)  # UᵀV or V U, both sides
    return Block(
        "eigen",
        m.count,
        P,
        averages=A.numbers + G.numbers + m.groups + P,
        refreshed=A.numbers + G.numbers + 2 * P + 4 * m.groups,  # bases, M, damping, settings
        dense=sides,
        sent=4 * (A.numbers + G.numbers + P),
        gram=sum(_second_moment(s, rows) for s in (A, G)) + _squared_gradients(A, G, taken, rows),
        rows=m.groups * rows * (A.size + G.size),
        # R = U_newᵀ U_old, then its elementwise square times M
        carried=sum(2 * s.groups * s.size**3 + _beside(s, A, G) for s in sides),
        step=(Product(3 * turn, False),),  # to the basis; back, of the direction and of F d
        product=(Product(2 * turn, False),),
    )


def _sides(m: Map, max_factor: int) -> tuple[Side, Side]:
    """A over the inputs, G over the outputs."""
    inputs = m.inputs + m.bias
    return (
        Side(inputs, inputs <= max_factor, m.groups),
        Side(m.outputs, m.outputs <= max_factor, m.groups),
    )


def _second_moment(side: Side, rows: int) -> int:
    """Rows and columns of XᵀX, a multiplication and an addition for each row."""
    return 2 * rows * side.numbers if side.dense else 0


def _beside(side: Side, A: Side, G: Side) -> int:
    """FLOPs of a factor times a matrix of the weight's shape."""
    return 2 * side.groups * A.size * G.size * side.size if side.dense else 0


def _inverted(A: Side, G: Side) -> dict[str, Any]:
    """What follows from inverting each factor and multiplying a gradient with both.

    D = G⁻¹ M A⁻¹, and of F d = G D A the half that the factors' own damping does not give free:
    the product with the smaller side.
    """
    dense = tuple(s for s in (A, G) if s.dense)
    step = [Product(_beside(s, A, G), s.half) for s in dense]
    smaller = G if A.size >= G.size else A
    step += [Product(_beside(smaller, A, G), smaller.half)] if smaller.dense else []
    return {
        "dense": dense,
        "halves": sum(s.numbers for s in dense if s.half),
        "sent": sum((2 if s.half else 4) * s.numbers for s in dense),
        "step": tuple(step),
        "product": tuple(Product(_beside(s, A, G), s.half) for s in dense),
    }


def _squared_gradients(A: Side, G: Side, examples: int, rows: int) -> int:
    """Σ_n (U_Gᵀ S_n U_A)², S_n the gradient of one example: rows are turned, or gradients are."""
    shared, (i, o) = rows // examples, (A.size, G.size)
    turned_rows = sum(2 * rows * s.numbers for s in (A, G) if s.dense)
    turned_gradients = sum(examples * _beside(s, A, G) for s in (A, G))
    rows_first = shared * (i**2 + o**2) < i * o * (i + o)
    return 2 * A.groups * rows * i * o + (turned_rows if rows_first else turned_gradients)
