"""Every map with every structure of the Fisher matrix, against autograd's dense one.

Each map's output goes through a fixed function that keeps the examples apart, to three outputs of
a squared error. With `fisher="exact"` every output has a backward pass of its own, so there is no
chance in any average: it equals to rounding what its block's documentation says it stands for,
computed here from the Jacobian of all parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ngplugin.curvature.block_choice import BlockRule
from ngplugin.curvature.blocks import (
    BlockDamping,
    DiagonalBlock,
    EigenBlock,
    GradientKroneckerBlock,
    HalfDiagonalBlock,
    KroneckerBlock,
    UnitBlock,
)
from ngplugin.curvature.exact_rows import ExactRows
from ngplugin.curvature.fisher import Fisher
from tests.oracle import (
    FAMILIES,
    dense_average,
    dense_fisher,
    double,
    in_places,
    jacobian,
    observe,
    randn,
)


class Weighted(nn.Module):
    """A function of the data and of parameters of the given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.empty(shape) for shape in shapes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.weights)


class Tied(nn.Module):
    """An embedding whose transpose makes the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embedding(tokens).tanh(), self.embedding.weight)


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)[0]


class Attention(First):
    """Of the data to itself or to a second input."""

    def __init__(self) -> None:
        super().__init__(nn.MultiheadAttention(4, 2, batch_first=True))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        other = x if memory is None else memory
        return super().forward(x, other, other)


@dataclass(frozen=True)
class Case:
    """A map, its data, and what is to become of it.

    Attributes:
        make: the module; its output has the examples first.
        inputs: several examples, with several rows each where the map has them.
        row: one row; None where there are no rows.
        kinds: of the blocks of `structure="kronecker"`, a letter of `LETTERS` for each parameter.
        outputs: the dimension of the map's output that is its outputs, where the module is nothing
            but a map with outputs first in its weight.
        groups: of it.
        exact: the places of the parameters whose exact rows are had; None: all.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    row: tuple[Tensor, ...] | None
    kinds: str
    outputs: int | None = None
    groups: int = 1
    exact: tuple[int, ...] | None = None


def contraction(function, data, weight, row, exact=None) -> Case:
    make = partial(Weighted, function, weight)
    return Case(make, (randn(*data),), (randn(*row),), "K", exact=exact)


def convolution(kind, sizes, data, row, outputs=1, **options) -> Case:
    kinds = "K" if outputs == 1 and options.get("bias", True) is False else "KK"
    return Case(
        lambda: kind(*sizes, **options),
        (randn(*data),),
        (randn(*row),),
        kinds,
        outputs,
        options.get("groups", 1),
    )


def transposed(kind, sizes, data, row, **options) -> Case:
    return Case(lambda: kind(*sizes, **options), (randn(*data),), (randn(*row),), "KD", exact=())


def norm(make, data, kinds="UU", exact=()) -> Case:
    return Case(make, (randn(*data),), None, kinds, exact=exact)


TOKENS, TOKEN = torch.tensor([[0, 3], [3, 1], [2, 2]]), torch.tensor([[3]])
LETTERS = {KroneckerBlock: "K", GradientKroneckerBlock: "S", HalfDiagonalBlock: "H"}
LETTERS |= {DiagonalBlock: "D", UnitBlock: "U"}
CASES = {
    "linear": Case(lambda: nn.Linear(3, 4), (randn(3, 3),), (randn(1, 3),), "KK", -1),
    "linear without bias": Case(
        lambda: nn.Linear(3, 4, bias=False), (randn(3, 3),), (randn(1, 3),), "K", -1
    ),
    "linear on tokens": Case(
        lambda: nn.Linear(3, 4), (randn(2, 3, 3),), (randn(1, 1, 3),), "KK", -1
    ),
    "conv1d, stride": convolution(nn.Conv1d, (2, 3, 2), (2, 2, 5), (1, 2, 2), stride=2),
    "conv1d, dilation": convolution(nn.Conv1d, (2, 3, 2), (2, 2, 5), (1, 2, 3), dilation=2),
    "conv1d, same": convolution(nn.Conv1d, (2, 3, 2), (2, 2, 3), (1, 2, 1), padding="same"),
    "conv2d": convolution(
        nn.Conv2d, (2, 3, (2, 3)), (2, 2, 3, 3), (1, 2, 1, 1), stride=(2, 3), padding=1
    ),
    "conv2d, groups": convolution(
        nn.Conv2d, (4, 6, 2), (2, 4, 4, 3), (1, 4, 3, 3), groups=2, dilation=2
    ),
    "conv2d, depthwise": convolution(
        nn.Conv2d, (3, 3, 2), (2, 3, 3, 3), (1, 3, 2, 2), groups=3, bias=False
    ),
    "conv2d, circular": convolution(
        nn.Conv2d, (2, 2, 3), (1, 2, 3, 2), (1, 2, 1, 1), padding=1, padding_mode="circular"
    ),
    "conv3d": convolution(nn.Conv3d, (2, 2, 2), (2, 2, 3, 2, 3), (1, 2, 2, 2, 2), groups=2),
    "conv3d, same": convolution(
        nn.Conv3d, (1, 2, 3), (1, 1, 2, 2, 2), (1, 1, 1, 1, 1), padding="same", dilation=2
    ),
    "conv_transpose1d": transposed(
        nn.ConvTranspose1d, (3, 2, 3), (2, 3, 3), (1, 3, 1), stride=2, padding=1
    ),
    "conv_transpose2d": transposed(
        nn.ConvTranspose2d, (4, 4, 2), (2, 4, 2, 2), (1, 4, 1, 1), groups=2, dilation=2
    ),
    "conv_transpose3d": transposed(
        nn.ConvTranspose3d, (2, 3, 2), (2, 2, 2, 1, 2), (1, 2, 1, 1, 1), stride=2, output_padding=1
    ),
    "embedding": Case(lambda: nn.Embedding(5, 3), (TOKENS,), (TOKEN,), "H"),
    "embedding, padding": Case(lambda: nn.Embedding(5, 3, padding_idx=2), (TOKENS,), (TOKEN,), "H"),
    "embedding_bag, mean": Case(lambda: nn.EmbeddingBag(5, 3), (TOKENS,), (TOKEN,), "H", exact=()),
    "embedding_bag, sum": Case(
        lambda: nn.EmbeddingBag(5, 3, mode="sum"), (TOKENS,), (TOKEN,), "H", exact=()
    ),
    "tied embedding": Case(Tied, (TOKENS,), None, "H"),
    "layer_norm": norm(lambda: nn.LayerNorm(4), (2, 3, 4), exact=None),
    "group_norm": norm(lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "batch_norm": norm(lambda: nn.BatchNorm1d(4), (3, 4)),
    "instance_norm": norm(lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 4)),
    "rms_norm": norm(lambda: nn.RMSNorm(4), (2, 3, 4), "D", None),
    "attention": Case(Attention, (randn(2, 3, 4),), (randn(1, 1, 4),), "KKKK"),
    "attention to memory": Case(
        Attention,
        (randn(2, 2, 4), randn(2, 3, 4, seed=1)),
        (randn(1, 1, 4), randn(1, 1, 4, seed=1)),
        "KKKK",
        exact=(2, 3),
    ),
    "bilinear": Case(
        lambda: nn.Bilinear(3, 2, 4),
        (randn(3, 3), randn(3, 2, seed=1)),
        (randn(1, 3), randn(1, 2, seed=1)),
        "KK",
        exact=(1,),
    ),
    "x @ W": contraction(lambda x, w: x @ w, (2, 3, 4), (4, 3), (1, 4)),
    "W @ x": contraction(lambda x, w: (w @ x).T, (4, 3), (3, 4), (4, 1)),
    "einsum, heads": contraction(
        lambda x, w: torch.einsum("bnd,hde->bhne", x, w), (2, 3, 4), (3, 4, 2), (1, 1, 4), ()
    ),
    "einsum, a map for each head": contraction(
        lambda x, w: torch.einsum("bhnd,hde->bhne", x, w), (2, 3, 2, 4), (3, 4, 2), (1, 3, 1, 4), ()
    ),
    "stack": contraction(lambda x, w: x @ w, (3, 2, 1, 4), (2, 4, 3), (1, 2, 1, 4), ()),
    "tensordot": contraction(
        lambda x, w: torch.tensordot(x, w, 2), (3, 2, 3), (2, 3, 4), (1, 2, 3)
    ),
    "baddbmm": Case(
        lambda: Weighted(
            lambda x, w, b: torch.baddbmm(b, x, w).transpose(0, 1), (2, 4, 3), (2, 1, 3)
        ),
        (randn(2, 3, 4),),
        (randn(2, 1, 4),),
        "KK",
        exact=(),
    ),
    "addmm": Case(
        lambda: Weighted(lambda x, w, b: torch.addmm(b, x, w), (4, 3), (3,)),
        (randn(3, 4),),
        (randn(1, 4),),
        "KK",
    ),
    "LSTM": Case(lambda: First(nn.LSTM(3, 2, batch_first=True)), (randn(2, 3, 3),), None, "SSDD"),
    "GRU": Case(lambda: First(nn.GRU(3, 2, batch_first=True)), (randn(2, 3, 3),), None, "SSDD"),
    "weight_norm": Case(
        lambda: weight_norm(nn.Linear(3, 4)), (randn(3, 3),), None, "DDS", exact=(0,)
    ),
    "scale": Case(lambda: Weighted(lambda x, w: x * w, (4,)), (randn(3, 4),), None, "D"),
    "scale, matrix": Case(
        lambda: Weighted(lambda x, w: x * w, (3, 4)), (randn(2, 3, 4),), None, "S"
    ),
}
OUTPUTS = 3  # of an example


def apart(y: Tensor) -> Tensor:
    """Three smooth functions of each example's part of a map's output: `[examples, outputs]`."""
    features = y.flatten(1)
    return (1.5 * features).tanh() @ randn(features.shape[1], OUTPUTS, seed=7)


class Observed:
    """A case with its data, its dense Fisher matrix and blocks."""

    def __init__(self, case: Case, inputs: tuple[Tensor, ...]) -> None:
        self.model, self.inputs = double(case.make(), seed=3), inputs
        self.parameters = [*self.model.parameters()]
        z = self.outputs()
        ones = torch.ones(z.numel()).double()
        self.dense = dense_fisher(FAMILIES["gaussian"], z.reshape(-1), self.parameters, ones)

    def outputs(self) -> Tensor:
        return apart(self.model(*self.inputs))

    def objective(self, shape: tuple[int, ...] = (1, -1)) -> Tensor:
        """In one row, so that an exact Fisher has a backward pass for each output."""
        z = self.outputs().reshape(shape)
        return 0.5 * F.mse_loss(z, torch.zeros_like(z), reduction="sum")

    def fisher(self, structure: str, fisher: Fisher | None = None) -> Fisher:
        rule = BlockRule(structure)
        return observe(self.parameters, self.objective, "exact", fisher=fisher, rule=rule)[0]

    def part(self, parameters) -> Tensor:
        """The dense matrix of some of the parameters, in their order."""
        starts = dict(
            zip(
                map(id, self.parameters),
                torch.tensor([0, *(p.numel() for p in self.parameters)]).cumsum(0).tolist(),
                strict=False,
            )
        )
        places = torch.cat([torch.arange(p.numel()) + starts[id(p)] for p in parameters])
        return self.dense[places[:, None], places]


@cache
def several_rows(name: str) -> Observed:
    return Observed(CASES[name], CASES[name].inputs)


def assert_same(found: Tensor, exact: Tensor) -> None:
    assert float((found - exact).norm()) <= 1e-10 * float(exact.norm()) + 1e-14


# -- diagonal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_the_fisher_s(name):
    seen = several_rows(name)
    fisher = seen.fisher("diagonal")
    for p in seen.parameters:
        block = fisher.block(p)
        assert isinstance(block, DiagonalBlock)
        assert_same(dense_average(block).diagonal(), seen.part([p]).diagonal())


# -- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_exact_block_is_the_fisher_with_all_between_its_parameters(name):
    case = CASES[name]
    seen = several_rows(name)
    exact = ExactRows(forced=True)
    observe(seen.parameters, lambda: seen.objective((-1, OUTPUTS)), fisher=Fisher(exact=exact))
    held = tuple(i for i, p in enumerate(seen.parameters) if exact.holds(p))
    assert held == (tuple(range(len(seen.parameters))) if case.exact is None else case.exact)
    if held:
        rows = torch.cat(exact.block._rows) / exact.block.total_weight**0.5
        assert_same(rows.T @ rows, seen.part(exact.block.parameters))


# -- kronecker and what stands beside it ---------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_which_blocks_there_are(name):
    seen = several_rows(name)
    fisher = seen.fisher("kronecker")
    assert "".join(LETTERS[type(fisher.block(p))] for p in seen.parameters) == CASES[name].kinds


def inside_groups(block, dense):
    """Without what is between the groups of a map, which the block leaves out."""
    n = block._layout.outputs * block._layout.inputs
    return dense * in_places(block, [torch.ones(n, n).double()] * block._layout.groups)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.row])
def test_the_blocks_of_one_row_are_the_fisher_s(name):
    seen = Observed(CASES[name], CASES[name].row)
    for block in seen.fisher("kronecker").blocks:
        exact = seen.part(block.parameters)
        if isinstance(block, DiagonalBlock):
            assert_same(dense_average(block).diagonal(), exact.diagonal())
        elif isinstance(block, HalfDiagonalBlock):
            assert_same(dense_average(block), exact)
        else:
            assert_same(dense_average(block), inside_groups(block, exact))


def factors(y, parameters, outputs, groups):
    """A ⊗ G of a map by the documentation, from the Jacobians of its output and of what follows.

    An input a_r is what the output r, o depends on W_o by; a score is d(z)/d(y).
    """
    places = torch.arange(y.numel()).reshape(y.shape).movedim(outputs, -1)
    places = places.reshape(-1, groups, y.shape[outputs] // groups)  # [row, group, out]
    count = parameters[0].numel()
    columns = [torch.arange(count).reshape(groups, places.shape[-1], -1)]  # [group, out, in]
    if len(parameters) > 1:
        columns.append(torch.arange(count, count + y.shape[outputs]).reshape(groups, -1, 1))
    columns = torch.cat(columns, 2)
    by_weight, scores = jacobian(y, parameters), jacobian(apart(y), [y])
    g = scores[:, places]  # [z, row, group, out]
    counted = (g != 0).any(-1).double()
    A, G = [], []
    for i in range(groups):
        a = by_weight[places[:, i, 0]][:, columns[i, 0]]  # [row, in]
        weight = counted[:, :, i].sum(0)
        A.append(a.T @ (weight[:, None] * a) / weight.sum())
        G.append(torch.einsum("kro,krp->op", g[:, :, i], g[:, :, i]) / len(g))
    dense = torch.zeros(by_weight.shape[1], by_weight.shape[1]).double()
    for i in range(groups):
        own = columns[i].reshape(-1)
        dense[own[:, None], own] = torch.kron(G[i], A[i])
    return dense


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.outputs is not None])
def test_the_factors_of_several_rows_are_those_of_the_documentation(name):
    case = CASES[name]
    seen = several_rows(name)
    (block,) = seen.fisher("kronecker").blocks
    assert list(map(id, block.parameters)) == list(map(id, seen.parameters))
    exact = factors(seen.model(*seen.inputs), seen.parameters, case.outputs, case.groups)
    assert_same(dense_average(block), exact)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "H" in case.kinds])
def test_a_looked_up_weight_s_block_has_the_trace_of_the_fisher_s_rows(name):
    """D counts tokens, S is the second moment of what reaches them; uses add up by their traces."""
    seen = several_rows(name)
    (block,) = seen.fisher("kronecker").blocks
    (weight,) = seen.parameters
    D, S = torch.zeros(5).double(), torch.zeros(3, 3).double()
    for tokens, v, g in uses(seen, name):
        M = torch.einsum("krd,kre->de", g, g)
        counted = (g != 0).any(-1).double()
        if v is None:
            v = torch.zeros(5).double().index_add_(0, tokens, counted.sum(0))
        mean = M / counted.sum()
        D += v * mean.trace()
        S += v.sum() * mean
    exact = torch.kron(torch.diag(D / D.sum()), S) / seen.outputs().numel()
    assert weight.shape == (5, 3)
    assert_same(dense_average(block), exact)


def uses(seen, name):
    """Of the weight: the tokens and d(z)/d(row), `[z, row, dim]`; of a product v and its rows."""
    (tokens,), (weight,) = seen.inputs, seen.parameters
    rows = F.embedding(tokens, weight.detach()).requires_grad_()
    leaf = weight.detach().requires_grad_()
    if name == "tied embedding":
        y = F.linear(rows.tanh(), weight)
    else:
        y = rows.mean(1) if "mean" in name else rows.sum(1) if "sum" in name else rows
    z = apart(y)
    g = jacobian(z, [rows]).reshape(z.numel(), -1, 3)
    if "padding" in name:
        g = g * (tokens.reshape(-1) != 2)[:, None]
    yield tokens.reshape(-1), None, g
    if name == "tied embedding":
        a = rows.detach().tanh().reshape(-1, 3)
        y = F.linear(a.reshape(*tokens.shape, 3), leaf)
        scores = jacobian(apart(y), [y]).reshape(z.numel(), -1, 5)
        counted = (scores != 0).any(-1, keepdim=True).double()
        yield None, scores.square().sum((0, 1)), counted * a


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if {*case.kinds} & {*"SUD"}])
def test_blocks_of_gradients_are_what_they_are_of_the_fisher_for_many_rows(name):
    """The two by two of a feature, the partial traces of a matrix, the diagonal of the rest."""
    seen = several_rows(name)
    for block in seen.fisher("kronecker").blocks:
        exact = seen.part(block.parameters)
        if isinstance(block, UnitBlock):
            n = len(exact) // 2
            mask = torch.eye(n).double().repeat(2, 2)
            assert_same(dense_average(block), exact * mask)
        elif isinstance(block, GradientKroneckerBlock):
            n = block.parameters[0].shape[0]
            four = exact.reshape(n, -1, n, len(exact) // n)
            G, A = four.diagonal(dim1=1, dim2=3).sum(-1), four.diagonal(dim1=0, dim2=2).sum(-1)
            assert_same(dense_average(block), torch.kron(G, A) / exact.trace())
        elif isinstance(block, DiagonalBlock):
            assert_same(dense_average(block).diagonal(), exact.diagonal())


# -- eigen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "K" in case.kinds])
def test_the_eigen_block_is_the_fisher_s_diagonal_along_its_eigenvectors(name):
    seen = several_rows(name)
    fisher = seen.fisher("eigen")
    fisher.refresh(BlockDamping(0.1))
    seen.fisher("eigen", fisher)
    found = [block for block in fisher.blocks if isinstance(block, EigenBlock)]
    assert found
    for block in found:
        U_A, U_G = block._bases()
        kron = [torch.kron(g.contiguous(), a.contiguous()) for a, g in zip(U_A, U_G, strict=True)]
        U, exact = in_places(block, kron), seen.part(block.parameters)
        M = in_places(block, [torch.diag(m.reshape(-1)) for m in block.average("M")])
        assert_same(M.diagonal(), (U.T @ exact @ U).diagonal())
