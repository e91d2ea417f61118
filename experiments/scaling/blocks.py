"""What one block of the Fisher matrix keeps, computes and sends, by its shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.scaling.models import Map, Model, Norm
from experiments.scaling.protocol import Protocol, Structure
from ngplugin.curvature.pace import Work

HALF = 128  # the smallest factor whose inverse is kept, and multiplied, in bfloat16
FEWEST_ROWS, ROWS_PER_SIZE, FEWEST_EXAMPLES = 256, 0.25, 8  # of a statistic that is thinned
SMALL, LOWEST_RANK = 128, 32  # a factor of this size is kept whole; eigenvectors of a larger one
USUAL_ROWS = 1024  # of a step, by which blocks go that do not see theirs
AVERAGED = 32  # rows of a second moment that take as long as averaging it
EVEN, NARROW = 16, 64  # columns are a multiple of, where there is a bias and they are more than


@dataclass(frozen=True)
class Side:
    """The factors over one side of a weight, one a group.

    Attributes:
        size: d.
        dense: a whole matrix each; else a diagonal.
        groups: how many.
        padding: columns of zeros that what a refresh makes has besides.
        rank: r, of a matrix that a refresh keeps by its leading eigenvectors; 0 if it is whole.
    """

    size: int
    dense: bool
    groups: int = 1
    padding: int = 0
    rank: int = 0

    @property
    def numbers(self) -> int:
        """Of the averages of all groups."""
        return self.groups * self.size ** (2 if self.dense else 1)

    @property
    def columns(self) -> int:
        """D with its padding."""
        return self.size + self.padding

    @property
    def inverse(self) -> int:
        """Numbers that are multiplied with to solve: X⁻¹, or Q and K."""
        if not self.dense:
            return 0
        columns, r = self.columns, self.rank
        return self.groups * (columns * r + r**2 if r else columns**2)

    @property
    def refreshed(self) -> int:
        """Numbers of a refresh: X undamped, its inverse and the damping; T, Q, K and two more."""
        columns, r = self.columns, self.rank
        matrix = r**2 + 1 if r else columns ** (2 if self.dense else 1)
        return self.groups * (matrix + 1) + self.inverse

    @property
    def whole(self) -> bool:
        """Whether a refresh keeps a matrix of d x d."""
        return self.dense and not self.rank

    @property
    def half(self) -> bool:
        """Whether inverses are in bfloat16."""
        return self.whole and self.size >= HALF

    def product(self, n: int) -> Product:
        """With n vectors for each group; by the eigenvectors Q (z Qᵀ v), z being r x r."""
        columns, r = self.columns, self.rank
        each = 4 * columns * r + 2 * r**2 if r else 2 * columns**2
        return Product(self.groups * n * each if self.dense else 0, self.half)

    def second_moment(self, rows: int) -> int:
        """FLOPs of XᵀX, a multiplication and an addition for each row."""
        return 2 * self.groups * rows * self.columns**2 if self.dense else 0


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
        inverse: of these, what directions are found with.
        gram: FLOPs of a statistic, in float32.
        rows: numbers in the rows of inputs and scores of a statistic.
        carried: FLOPs of a refresh beside the factorizations, in float32.
        direction: products of every step, d = (F + damping)⁻¹ v.
        curved: products of F d besides.
        product: of F with a vector that is no d.
        work: what the optimizer counts to settle how often curvature is due.
    """

    kind: str
    count: int
    parameters: int
    averages: int
    refreshed: int
    halves: int = 0
    dense: tuple[Side, ...] = ()
    sent: int = 0
    inverse: int = 0
    gram: int = 0
    rows: int = 0
    carried: int = 0
    direction: tuple[Product, ...] = ()
    curved: tuple[Product, ...] = ()
    product: tuple[Product, ...] = ()
    work: Work = field(default_factory=Work)

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

    @property
    def whole(self) -> int:
        """Of these, of which a refresh keeps all; an eigen block its eigenvectors."""
        return sum(side.numbers for side in self.dense if side.whole)

    @property
    def low_rank(self) -> int:
        """Parameters, once for each side that is kept by its leading eigenvectors."""
        return self.parameters * sum(side.rank > 0 for side in self.dense)


def blocks(model: Model, structure: Structure, protocol: Protocol) -> list[Block]:
    """The blocks that `structure` gives a model; AdamW has none.

    `"identity"` and `"matrix-free"` have Kronecker blocks beside them: to predict the KL of a step
    with, and as the preconditioner.
    """
    if structure == "adamw":
        return []
    return [*_blocks(model, structure, protocol)]


def _blocks(model: Model, structure: Structure, protocol: Protocol) -> Iterator[Block]:
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
            yield half_diagonal(m, model.examples, protocol)
        elif structure == "eigen":
            yield eigen(m, model.examples, protocol)
        else:
            yield kronecker(m, model.examples, protocol)
    for n in model.norms:
        yield unit(n) if n.offset else diagonal(n.features, n.count)
    for loose in model.loose:
        sides = [size for size in loose.shape if size > 1]
        if len(sides) > 1:
            yield gradient_kronecker(sides[0], math.prod(sides[1:]), protocol)
        else:
            yield diagonal(loose.parameters)


def examples_taken(m: Map, examples: int) -> int:
    """Of a batch, for a statistic: evenly spaced ones, so many that their rows are enough.

    All of fewer than 32 examples are taken, whatever the number of their rows.
    """
    fewest = max(FEWEST_ROWS, round(ROWS_PER_SIZE * max(m.inputs + m.bias, m.outputs)))
    every = max(1, min(round(examples * m.shared / fewest), examples // FEWEST_EXAMPLES))
    return math.ceil(examples / every)


def kept_rank(size: int, rows: int, protocol: Protocol) -> int:
    """By how many eigenvectors a refresh keeps a dense factor; 0 if it is whole.

    A product with a factor takes d multiplications for each element of the layer's matrix, 2 r by
    its eigenvectors; forward and backward take 3 for each row. Where d is more than a quarter of
    `overhead` of that, r is as many as the share allows, between 32 and `rank`.

    Args:
        size: d.
        rows: of the layer in a step, on one rank.
        protocol: has `overhead` and `rank`.
    """
    room = 3 * protocol.overhead / 4 * rows
    rank = max(LOWEST_RANK, int(min(protocol.rank, room / 2)))
    return 0 if size <= max(room, 2 * rank, SMALL) else rank


def kronecker(m: Map, examples: int, protocol: Protocol) -> Block:
    """A ⊗ G of a linear map; the bias is one more input."""
    A, G = _sides(m, protocol.max_factor)
    step_rows = protocol.accumulate * examples * m.shared
    A, G = (_kept(side, step_rows, protocol) for side in (A, G))
    rows = examples_taken(m, examples) * m.shared
    return Block(
        "kronecker",
        m.count,
        m.groups * A.size * G.size,
        averages=A.numbers + G.numbers + m.groups,  # and the number of rows
        gram=sum(s.second_moment(rows) for s in (A, G)),
        rows=m.groups * rows * (A.columns + G.size),
        work=_work(3 * step_rows, (A, protocol.accumulate * rows), (G, protocol.accumulate * rows)),
        **_inverted(A, G),
    )


def half_diagonal(m: Map, examples: int, protocol: Protocol) -> Block:
    """A diagonal over the vocabulary, a matrix over the dimensions: embeddings, also tied ones."""
    S, D = _kept(Side(m.outputs, True), USUAL_ROWS, protocol), Side(m.inputs, False)
    rows = m.shared if m.once else examples * m.shared
    uses = 2 if m.kind == "tied" else 1
    return Block(
        "half-diagonal kronecker",
        m.count,
        S.size * D.size,
        averages=uses * (S.numbers + D.numbers + 1),  # and the number of rows
        gram=uses * S.second_moment(rows),
        rows=rows * (S.size + (S.size + D.size if uses == 2 else 0)),
        work=_work(0 if m.kind == "lookup" else 3 * USUAL_ROWS, (S, USUAL_ROWS), (D, 0)),
        **_inverted(S, D),
    )


def gradient_kronecker(outputs: int, inputs: int, protocol: Protocol) -> Block:
    """A ⊗ G of a matrix that no map is known of, from its sampled gradient."""
    A, G = (
        _kept(Side(size, size <= protocol.max_factor), USUAL_ROWS, protocol)
        for size in (inputs, outputs)
    )
    return Block(
        "gradient-kronecker",
        1,
        inputs * outputs,
        averages=A.numbers + G.numbers + 1,  # and the number of draws
        gram=A.second_moment(outputs) + G.second_moment(inputs),
        rows=2 * inputs * outputs,
        work=_work(3 * USUAL_ROWS, (A, outputs), (G, inputs)),
        **_inverted(A, G),
    )


def unit(n: Norm) -> Block:
    """A 2 x 2 matrix for each feature's scale and offset; its products are next to nothing."""
    f = n.features
    return Block(
        "unit-wise",
        n.count,
        2 * f,
        averages=4 * f,
        refreshed=9 * f,  # matrices, inverses, and the damping
        sent=4 * 9 * f,
        inverse=4 * 4 * f,
        rows=2 * f,
    )


def diagonal(size: int, count: int = 1) -> Block:
    """One number for each parameter, as it is on average and as it was at the last refresh."""
    refreshed = size + 1  # and the damping
    return Block(
        "diagonal", count, size, averages=size, refreshed=refreshed, sent=4 * refreshed,
        inverse=4 * refreshed, rows=size,
    )  # fmt: skip


def eigen(m: Map, examples: int, protocol: Protocol) -> Block:
    """Eigenvectors of A and G, and second moments M along them, one for each parameter."""
    A, G = _sides(m, protocol.max_factor)
    taken = examples_taken(m, examples)
    rows = taken * m.shared
    P = m.groups * A.size * G.size
    sides = tuple(s for s in (A, G) if s.dense)
    turn = sum(_beside(s, A, G) for s in sides)  # UᵀV or V U, both sides
    refreshed = A.numbers + G.numbers + P + 4 * m.groups  # bases, M, settings of the damping
    step_rows, k = protocol.accumulate * examples * m.shared, protocol.accumulate
    work = _work(3 * step_rows, (A, k * rows), (G, k * rows), inversion=6)
    along = m.groups * k * rows * (A.size**2 + G.size**2 + A.size * G.size)
    return Block(
        "eigen",
        m.count,
        P,
        averages=A.numbers + G.numbers + m.groups + P,
        refreshed=refreshed + P,  # and the damping, which every rank makes of these
        dense=sides,
        sent=4 * refreshed,
        inverse=4 * refreshed,
        gram=sum(s.second_moment(rows) for s in (A, G)) + _squared_gradients(A, G, taken, rows),
        rows=m.groups * rows * (A.columns + G.size),
        work=replace(work, statistics=work.statistics + along),
        # R = U_newᵀ U_old, then its elementwise square times M
        carried=sum(2 * s.groups * s.size**3 + _beside(s, A, G) for s in sides),
        direction=(Product(2 * turn, False),),  # to the basis and back
        curved=(Product(turn, False),),  # back
        product=(Product(2 * turn, False),),
    )


def _work(each: float, *sides: tuple[Side, float], inversion: float = 1) -> Work:
    """Multiplications, as the optimizer counts them to settle how often curvature is due.

    Args:
        each: of the pass forward and backward, for each element of the weight.
        sides: each with the rows of its second moment.
        inversion: d³ of it that a whole factor takes.
    """
    groups = sides[0][0].groups
    passing = each * groups * math.prod(side.size for side, _ in sides)
    dense = [(side, rows) for side, rows in sides if side.dense]
    moments = sum(side.size**2 * (rows + AVERAGED) for side, rows in dense)
    inversions = sum(
        2 * side.size**2 * side.rank + 4 * side.size * side.rank**2
        if side.rank
        else inversion * side.size**3
        for side, _ in dense
    )
    return Work(passing, passing / 3 + groups * moments, groups * inversions, maps=1)


def _sides(m: Map, max_factor: int) -> tuple[Side, Side]:
    """A over the inputs, G over the outputs."""
    inputs = m.inputs + m.bias
    padding = -inputs % EVEN if m.bias and inputs > NARROW else 0
    return (
        Side(inputs, inputs <= max_factor, m.groups, padding),
        Side(m.outputs, m.outputs <= max_factor, m.groups),
    )


def _kept(side: Side, rows: int, protocol: Protocol) -> Side:
    """As a refresh keeps it."""
    return replace(side, rank=kept_rank(side.size, rows, protocol)) if side.dense else side


def _beside(side: Side, A: Side, G: Side) -> int:
    """FLOPs of a factor of an eigen block times a matrix of the weight's shape."""
    return 2 * side.groups * A.size * G.size * side.size if side.dense else 0


def _inverted(A: Side, G: Side) -> dict[str, Any]:
    """What follows from inverting each factor and multiplying a gradient with both.

    D = G⁻¹ M A⁻¹, and of F d = G D A the half that the factors' own damping does not give free:
    the product with the smaller side.
    """
    both = A.product(G.size), G.product(A.columns)
    refreshed = A.refreshed + G.refreshed
    halves = sum(s.inverse for s in (A, G) if s.half)
    return {
        "refreshed": refreshed,
        "dense": tuple(s for s in (A, G) if s.dense),
        "halves": halves,
        "sent": 4 * refreshed - 2 * halves,
        "inverse": 4 * (A.inverse + G.inverse) - 2 * halves,
        "direction": both,
        "curved": (both[1] if A.size >= G.size else both[0],),
        "product": both,
    }


def _squared_gradients(A: Side, G: Side, examples: int, rows: int) -> int:
    """Σ_n (U_Gᵀ S_n U_A)², S_n the gradient of one example: rows are turned, or gradients are."""
    shared, (i, o) = rows // examples, (A.size, G.size)
    turned_rows = sum(2 * rows * s.numbers for s in (A, G) if s.dense)
    turned_gradients = sum(examples * _beside(s, A, G) for s in (A, G))
    rows_first = shared * (i**2 + o**2) < i * o * (i + o)
    return 2 * A.groups * rows * i * o + (turned_rows if rows_first else turned_gradients)
