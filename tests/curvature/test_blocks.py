"""Damped inverses, products and eigenvalues against dense linear algebra."""

import math

import pytest
import torch
from torch import nn

from ngplugin.curvature.blocks import (
    BlockDamping,
    DiagonalBlock,
    EigenBlock,
    ExactBlock,
    GradientKroneckerBlock,
    HalfDiagonalBlock,
    KroneckerBlock,
    UnitBlock,
)
from ngplugin.curvature.blocks.block import rounding
from ngplugin.curvature.blocks.matrix_layout import MatrixLayout
from ngplugin.curvature.blocks.symmetric import diagonal_of, eigenvalues
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.spectrum import counted
from ngplugin.curvature.taps import read_map_call
from tests.oracle import dense_average, dense_damped, flat, randn

F = torch.nn.functional

DAMPINGS = [
    BlockDamping(0.3, "relative", 0.0),
    BlockDamping(0.3, "relative", 1.0),
    BlockDamping(0.0, "relative", 2.0),
    BlockDamping(0.3, "absolute"),
    BlockDamping(1e-4, "absolute"),
]


def kronecker(layout, bias=True, steps=3, kind=KroneckerBlock, **options):
    """A block after a few statistics of different batch sizes, decay 0.8."""
    if layout in ("linear", "widening", "tokens"):
        out, into = {"linear": (3, 5), "widening": (7, 3), "tokens": (3, 5)}[layout]
        weight = nn.Parameter(randn(out, into))
        shared = (3,) if layout == "tokens" else ()
        inputs = [randn(4 + i, *shared, into, seed=i) for i in range(steps)]
        function, keywords, groups = F.linear, {}, 1
    else:
        groups = {"conv2d": 1, "grouped": 2}[layout]
        weight = nn.Parameter(randn(4, 4 // groups, 2, 2))
        inputs = [randn(2 + i, 4, 3, 4, seed=i) for i in range(steps)]
        function, keywords = F.conv2d, {"groups": groups}
    offset = nn.Parameter(randn(weight.shape[0])) if bias else None
    block = kind(weight, offset, groups, **options)
    for i, x in enumerate(inputs):
        output = function(x, weight, offset, **keywords)
        call = read_map_call(function, (x, weight, offset), keywords)
        block.add_map_score(call, randn(*output.shape, seed=20 + i), 1.0)
        assert block.fold(5.0 + i, 0.8)
        if kind is EigenBlock:  # whose eigenvalues are measured along eigenvectors
            assert block.refresh(BlockDamping(0.5)) is Remedy.NONE
    return block


def eigen(layout, **options):
    return kronecker(layout, kind=EigenBlock, **options)


def gradient_kronecker(shape=(3, 1, 2, 2), **options):
    block = GradientKroneckerBlock(nn.Parameter(randn(*shape)), **options)
    for i in range(3):
        for draw in range(2):
            block.add_gradient_scores([randn(*shape, seed=2 * i + draw)], 0.5)
        assert block.fold(2.0, 0.8)
    return block


def diagonal():
    block = DiagonalBlock(nn.Parameter(randn(3, 4)))
    for i in range(3):
        block.add_gradient_scores([randn(3, 4, seed=i)], 1.0)
        assert block.fold(2.0, 0.8)
    return block


def half_diagonal(tied=True):
    weight = nn.Parameter(randn(6, 3))
    block = HalfDiagonalBlock(weight)
    for i in range(3):
        tokens, x = torch.arange(5 + i) * 2 % 5, randn(4, 3, seed=i)
        block.add_map_score(
            read_map_call(F.embedding, (tokens, weight), {}), randn(5 + i, 3, seed=20 + i), 1.0
        )
        if tied:
            block.add_map_score(
                read_map_call(F.linear, (x, weight), {}), randn(4, 6, seed=30 + i), 0.5
            )
        assert block.fold(5.0 + i, 0.8)
    return block


def unit():
    block = UnitBlock(nn.Parameter(randn(2, 3)), nn.Parameter(randn(2, 3, seed=1)))
    for i in range(4):
        block.add_gradient_scores([randn(2, 3, seed=i), randn(2, 3, seed=9 + i)], 1.0)
        assert block.fold(2.0, 0.8)
    return block


BLOCKS = {
    "linear": lambda: kronecker("linear"),
    "linear without bias": lambda: kronecker("linear", bias=False),
    "linear with more outputs": lambda: kronecker("widening"),
    "conv2d": lambda: kronecker("conv2d"),
    "grouped conv2d": lambda: kronecker("grouped"),
    "grouped conv2d without bias": lambda: kronecker("grouped", bias=False),
    "tokens, reduced": lambda: kronecker("tokens", weight_sharing="reduce"),
    "linear with many inputs": lambda: kronecker("linear", max_factor=4),
    "linear with many outputs": lambda: kronecker("widening", max_factor=4),
    "grouped conv2d with many inputs": lambda: kronecker("grouped", max_factor=4),
    "eigen": lambda: eigen("linear"),
    "eigen without bias": lambda: eigen("linear", bias=False),
    "eigen conv2d": lambda: eigen("conv2d"),
    "eigen grouped conv2d": lambda: eigen("grouped"),
    "eigen, reduced": lambda: eigen("tokens", weight_sharing="reduce"),
    "eigen with many inputs": lambda: eigen("grouped", max_factor=4),
    "gradient-kronecker": gradient_kronecker,
    "gradient-kronecker with one long side": lambda: gradient_kronecker(max_factor=3),
    "gradient-kronecker with long sides": lambda: gradient_kronecker(max_factor=2),
    "diagonal": diagonal,
    "unit-wise": unit,
    "embedding": lambda: half_diagonal(tied=False),
    "tied embedding": half_diagonal,
}
every_block = pytest.mark.parametrize("name", BLOCKS)
every_damping = pytest.mark.parametrize("damping", DAMPINGS, ids=str)


def statistic(block, factor):
    """Make the next fold's statistic the present average, but `factor` times as large."""
    averages = {name: block.average(name) for name in block._averages}
    first = next((name for name in ("F", "M", "G") if name in averages), None)
    names = {first} if first else {"looked up M", "multiplied v"}
    block._added = averages
    block._statistic = lambda added, _: {
        name: factor * value if name in names else value for name, value in added.items()
    }
    if isinstance(block, GradientKroneckerBlock):  # either trace is that of F
        block._statistic = lambda added, _: {
            key: added[key] if key == "draws" else factor * added[key] for key in added
        }


def vectors(block, seed=50):
    return [randn(*p.shape, seed=seed + i) for i, p in enumerate(block.parameters)]


@every_damping
@every_block
def test_preconditioning_solves_the_dense_damped_system(name, damping):
    block = BLOCKS[name]()
    if name == "diagonal" and damping.value == 0:
        damping = BlockDamping(0.1, damping.mode, damping.sampling)
    assert block.refresh(damping) is Remedy.NONE
    g = vectors(block)
    direction, product = block.precondition(g)
    dense = dense_damped(block, damping.value, damping.mode, damping.sampling)
    exact = torch.linalg.solve(dense, flat(g))
    torch.testing.assert_close(flat(direction), exact, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(flat(product), dense_average(block) @ exact, rtol=1e-8, atol=1e-10)
    assert [t.shape for t in direction] == [p.shape for p in block.parameters]


@every_block
def test_the_product_is_with_the_undamped_matrix(name):
    block = BLOCKS[name]()
    block.refresh(BlockDamping(0.5))
    v = vectors(block)
    torch.testing.assert_close(flat(block.product(v)), dense_average(block) @ flat(v))


@every_damping
@every_block
def test_extreme_eigenvalues_are_those_of_the_dense_matrices(name, damping):
    block = BLOCKS[name]()
    block.refresh(damping)
    low, high, damped_low, damped_high = block.spectrum().extremes
    plain = torch.linalg.eigvalsh(dense_average(block))
    dense = dense_damped(block, damping.value, damping.mode, damping.sampling)
    damped = torch.linalg.eigvalsh(dense)
    for ours, exact in ((high, plain[-1]), (damped_low, damped[0]), (damped_high, damped[-1])):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-12)
    assert float((low - plain[0]).abs()) < 1e-10 * float(high)


@every_block
def test_eigenvalues_are_counted_as_those_of_the_dense_matrix(name):
    block = BLOCKS[name]()
    block.refresh(BlockDamping(0.1))
    exact = torch.linalg.eigvalsh(dense_average(block)).clamp_min(0)
    ours, theirs = block.spectrum().counts.cumsum(0), counted(exact[None])[0].cumsum(0)
    assert ours[-1] == theirs[-1] == len(exact)
    # Where it is a product, what is counted may be a bin off.
    assert (theirs[:-1] <= ours[1:] + 1e-6).all()
    assert (ours[:-1] <= theirs[1:] + 1e-6).all()


@every_block
def test_the_mean_eigenvalue_is_the_trace_over_the_size(name):
    block = BLOCKS[name]()
    dense = dense_average(block)
    torch.testing.assert_close(block.mean_eigenvalue(), dense.trace() / len(dense))


def test_relative_damping_is_free_of_scale_and_absolute_damping_is_not():
    def direction(mode, scale):
        block = kronecker("linear", steps=0)
        x = randn(8, 5, seed=1)
        call = read_map_call(F.linear, (x, *block.parameters), {})
        block.add_map_score(call, scale * randn(8, 3, seed=2), 1.0)
        block.fold(1.0, 0.0)
        block.refresh(BlockDamping(0.1, mode))
        return flat(block.precondition(vectors(block))[0])

    torch.testing.assert_close(direction("relative", 10.0) * 100, direction("relative", 1.0))
    assert not torch.allclose(direction("absolute", 10.0) * 100, direction("absolute", 1.0))


def test_absolute_damping_adds_lambda_and_cross_terms_only():
    block = kronecker("linear")
    block.refresh(BlockDamping(0.3, "absolute"))
    excess = dense_damped(block, 0.3, "absolute") - dense_average(block) - 0.3 * torch.eye(18)
    assert float(torch.linalg.eigvalsh(excess)[0]) > 0
    A, G = block.factors
    torch.testing.assert_close(A.damping * G.damping, torch.full((1, 1, 1), 0.3).double())


def test_the_floor_lifts_the_damping_of_a_block_whose_fisher_has_vanished():
    block = kronecker("linear")
    mean = float(block.mean_eigenvalue())
    block.refresh(BlockDamping(0.1, floor=100 * mean))
    A, G = block.factors
    mean_A = float(A.matrix.diagonal(dim1=1, dim2=2).mean())
    assert float(A.damping * G.damping) == pytest.approx(0.1**2 * 100 * mean)
    assert float(A.damping) == pytest.approx(0.1 * mean_A)
    block = diagonal()
    mean, most = float(block.mean_eigenvalue()), float(block.average("F").max())
    floor = (mean + most) / 2
    block.refresh(BlockDamping(0.1, floor=floor))
    assert float(block._factor().damping) == pytest.approx(0.1 * floor)


def test_a_diagonal_of_rounding_errors_is_damped_as_the_largest_block():
    block = diagonal()
    largest = 7.0 * float(block.average("F").max()) / rounding(torch.float64) ** 2
    block.refresh(BlockDamping(0.1, floor=largest * rounding(torch.float64) ** 2))
    assert float(block._factor().damping) == pytest.approx(0.1 * largest)


@every_block
def test_between_refreshes_the_product_grows_with_the_average_s_trace(name):
    block = BLOCKS[name]()
    block.refresh(BlockDamping(0.2))
    old, v = flat(block.product(vectors(block))), vectors(block)
    before = float(dense_average(block).trace())
    statistic(block, 90.0)
    block.fold(1.0, 0.5)
    # Groups share the growth here, since every group's factors were scaled alike.
    growth = float(dense_average(block).trace()) / before
    assert growth > 2
    torch.testing.assert_close(flat(block.product(v)), growth * old)
    direction, product = block.precondition(v)
    torch.testing.assert_close(flat(product), flat(block.product(direction)))
    along, curvature = torch.tensor(3.0), torch.tensor(0.5)
    block.see_curvature(along, curvature)
    torch.testing.assert_close(block.curvature(along), curvature, check_dtype=False)
    block.refresh(BlockDamping(0.2))
    assert block.growth == 1
    assert not block.knows_curvature


@every_block
def test_a_block_says_whether_it_can_be_damped_anew(name):
    block = BLOCKS[name]()
    block.refresh(BlockDamping(0.2))
    assert block.redamp(BlockDamping(0.3)) == block.redampable


def test_what_was_nothing_at_the_refresh_is_not_said_to_have_grown():
    block = DiagonalBlock(nn.Parameter(randn(3)))
    for score in (torch.zeros(3).double(), randn(3)):
        block.add_gradient_scores([score], 1.0)
        assert block.fold(1.0, 0.5)
        if not score.any():
            block.refresh(BlockDamping(0.1))
    assert block.growth == 1


def test_growth_from_next_to_nothing_is_a_number():
    block = DiagonalBlock(nn.Parameter(torch.ones(3)))
    for size in (1e-20, 1.0):
        block.add_gradient_scores([torch.full((3,), size)], 1.0)
        assert block.fold(1.0, 0.0)
        if size < 1:
            block.refresh(BlockDamping(0.1))
    assert math.isfinite(block.growth)
    assert block.growth > 1e30


@every_block
def test_a_statistic_that_is_not_finite_is_dropped(name):
    block = BLOCKS[name]()
    before = dense_average(block)
    statistic(block, torch.inf)
    assert not block.fold(1.0, 0.5)
    assert torch.equal(dense_average(block), before)
    assert block.fold(1.0, 0.5)  # it is gone, and nothing was added since
    assert torch.equal(dense_average(block), before)


@every_block
def test_what_is_discarded_is_never_folded(name):
    block = BLOCKS[name]()
    before = dense_average(block)
    block._added = {"F": torch.ones(1)}
    block.discard()
    assert block.fold(1.0, 0.5)
    assert torch.equal(dense_average(block), before)


@pytest.mark.parametrize("eigenvalue", [-1.0, 0.0])
def test_a_failed_factorization_keeps_the_old_inverse(eigenvalue):
    block = kronecker("linear")
    assert block.refresh(BlockDamping(0.1)) is Remedy.NONE
    v = vectors(block)
    before = flat(block.precondition(v)[0])
    block._averages["inputs"]._sum.zero_()[0].fill_diagonal_(eigenvalue)
    assert block.refresh(BlockDamping(0.0)) is Remedy.OLD_INVERSE
    assert torch.equal(flat(block.precondition(v)[0]), before)


def test_a_matrix_that_is_singular_in_float32_is_factorized_in_float64():
    # [[1, a], [a, c]] with c = a² rounded up to float32, so that c - a² vanishes there.
    a = 1 + 5 / 2**14
    A = torch.tensor([[[1.0, a], [a, a * a]]])
    assert float(A[0, 1, 1]) > a * a
    block = KroneckerBlock(nn.Parameter(torch.randn(1, 2)), None, 1)
    block._added = {"inputs": A, "rows": torch.ones(1, 1, 1), "G": torch.ones(1, 1, 1)}
    block.fold(1.0, 0.0)
    assert block.refresh(BlockDamping(0.0)) is Remedy.FLOAT64
    inverse = block.factors[0].inverse
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse, torch.linalg.inv(A.double()).float(), rtol=1e-3, atol=0)


def test_an_element_that_no_prediction_depends_on_does_not_move():
    block = DiagonalBlock(nn.Parameter(randn(3)))
    block.add_gradient_scores([torch.tensor([1.0, 0.0, 2.0]).double()], 1.0)
    block.fold(1.0, 0.0)
    block.refresh(BlockDamping(0.0))
    (direction,), _ = block.precondition([torch.ones(3).double()])
    assert direction.tolist() == [1.0, 0.0, 0.25]


@every_block
def test_a_saved_block_gives_the_same_products_and_the_same_future(name):
    one = BLOCKS[name]()
    one.refresh(BlockDamping(0.2))
    other = type(one).made(one.parameters, one.layout())
    other.load_state_dict(one.state_dict())
    v = vectors(one)
    for block in (one, other):
        block.refresh(BlockDamping(0.1))
    for ours, theirs in zip(one.precondition(v), other.precondition(v), strict=True):
        assert torch.equal(flat(ours), flat(theirs))


def test_blocks_of_bfloat16_parameters_are_kept_in_float32():
    weight = nn.Parameter(torch.randn(3, 5).bfloat16())
    block = KroneckerBlock(weight, None, 1)
    x = torch.randn(4, 5).bfloat16()
    block.add_map_score(read_map_call(F.linear, (x, weight), {}), torch.randn(4, 3).bfloat16(), 1.0)
    block.fold(1.0, 0.9)
    block.refresh(BlockDamping(0.1))
    assert block.factors[0].matrix.dtype == torch.float32
    (direction,), _ = block.precondition([torch.randn(3, 5).bfloat16()])
    assert direction.dtype == torch.bfloat16


@pytest.mark.parametrize("use", ["looked up", "multiplied"])
def test_rows_count_whose_score_is_not_all_zero(use):
    weight = nn.Parameter(randn(6, 3))
    block = HalfDiagonalBlock(weight)
    if use == "looked up":
        call = read_map_call(F.embedding, (torch.tensor([4, 1, 2]), weight), {})
        score = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).double()
    else:
        call = read_map_call(F.linear, (randn(3, 3), weight), {})
        score = torch.eye(6)[:3].double() * torch.tensor([[1.0], [0.0], [2.0]])
    block.add_map_score(call, score, 1.0)
    assert block.fold(1.0, 0.0)
    assert block.average(f"{use} rows") == 2
    v = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0] if use == "looked up" else [1.0, 0.0, 4.0, 0.0, 0.0, 0.0]
    assert block.average(f"{use} v")[0].tolist() == v


@pytest.mark.parametrize(
    "block", [DiagonalBlock, UnitBlock, GradientKroneckerBlock], ids=lambda kind: kind.kind
)
def test_directions_have_the_precision_of_their_parameters(block):
    size = (2, 3) if block is not UnitBlock else (3,)
    count = 1 + (block is UnitBlock)
    parameters = [nn.Parameter(torch.randn(size).bfloat16()) for _ in range(count)]
    made = block(*parameters)
    made.add_gradient_scores([torch.randn(size).bfloat16() for _ in parameters], 1.0)
    made.fold(1.0, 0.0)
    made.refresh(BlockDamping(0.1))
    for tensors in (*made.precondition(parameters), made.product(parameters)):
        assert [t.dtype for t in tensors] == [torch.bfloat16] * len(parameters)


def test_damping_is_by_default_relative_without_more_for_small_samples_or_small_blocks():
    default = BlockDamping(0.1)
    assert default == BlockDamping(0.1, "relative", 0.0, 0.0, "full", math.inf, 64)
    assert diagonal().note() == ""
    assert ExactBlock([nn.Parameter(randn(3))]).growth == 1


@pytest.mark.parametrize(
    ("inputs", "columns"), [(5, 6), (63, 64), (64, 80), (100, 112), (111, 112)]
)
def test_a_bias_makes_a_wide_matrix_wider_by_zeros_up_to_an_even_width(inputs, columns):
    weight, bias = randn(3, inputs), randn(3, seed=1)
    layout = MatrixLayout(weight, bias)
    assert layout.columns == columns
    assert MatrixLayout(weight).columns == inputs
    padded = layout.matrix([weight, bias], torch.float64, padded=True)
    assert padded.shape == (1, 3, columns)
    assert layout.matrix([weight, bias], weight.dtype).shape == (1, 3, inputs + 1)
    torch.testing.assert_close(padded[0, :, :inputs], weight)
    torch.testing.assert_close(padded[0, :, inputs], bias)
    assert not padded[0, :, inputs + 1 :].any()
    for ours, theirs in zip(layout.parts(padded, [weight, bias]), (weight, bias), strict=True):
        assert torch.equal(ours, theirs)


def test_eigenvalues_that_fail_are_computed_in_double_precision(monkeypatch):
    compute = torch.linalg.eigvalsh

    def fails_in_single(M):
        if M.dtype == torch.float32:
            raise torch.linalg.LinAlgError("made to fail")
        return compute(M)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails_in_single)
    M = (randn(6, 6) @ randn(6, 6).T).float()[None]
    torch.testing.assert_close(eigenvalues(M), compute(M.double()).clamp_min(0).float())


def test_eigenvalues_that_cannot_be_had_are_no_numbers(monkeypatch):
    def fails(M):
        raise torch.linalg.LinAlgError("made to fail")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    for size in (1, 3):
        found = eigenvalues(randn(2, size, size))
        assert found.shape == (2, size)
        assert found.isnan().all()


def test_a_row_that_is_only_looked_up_counts_as_one_of_all_that_were():
    block = half_diagonal(tied=False)
    expected = 1 / block.average("looked up v").sum()
    torch.testing.assert_close(block._rare().squeeze(), expected)
    assert float(expected) != pytest.approx(1.0)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_sampling_damping_never_counts_less_than_one_row(share):
    weight = nn.Parameter(randn(3, 5))
    block = KroneckerBlock(weight, None)
    call = read_map_call(F.linear, (randn(1, 5), weight), {})
    block.add_map_score(call, randn(1, 3), share)
    assert block.fold(1.0, 0.0)
    A, G = torch.ones(1, 5, 5), torch.ones(1, 3, 3)
    shares = block._damping_shares(A, G, BlockDamping(0.5, sampling=1.0))
    assert [float(s) for s in shares] == pytest.approx([0.5 + 5, 0.5 + 3])


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_absolute_damping_is_finite_beside_a_factor_that_has_vanished(damping, swapped):
    weight, x = nn.Parameter(torch.ones(3, 3)), torch.ones(1, 3)
    block = KroneckerBlock(weight, None)
    block.add_map_score(read_map_call(F.linear, (x, weight), {}), x, 1.0)
    assert block.fold(1.0, 0.0)
    vanished, large = torch.zeros(1, 3, 3), 1e30 * torch.eye(3)[None]
    factors = (vanished, large) if swapped else (large, vanished)
    found = torch.cat(block._dampings(*factors, BlockDamping(damping, "absolute")))
    assert found.isfinite().all()
    assert (found > 0).all() == (damping > 0)


@pytest.mark.parametrize(("size", "rank"), [(128, None), (129, 64), (200, 64)])
def test_a_factor_is_kept_whole_up_to_twice_its_rank(size, rank):
    block = kronecker("linear")
    how = BlockDamping(0.1, share=128 / (3 * float(block.rows)), rank=64)
    assert block._kept_rank(size, how) == rank


def test_groups_of_a_convolution_are_divided_further_with_their_inputs():
    weight, x = nn.Parameter(randn(4, 2, 2, 2)), randn(5, 4, 3, 4)
    call = read_map_call(F.conv2d, (x, weight), {"groups": 2})
    score = randn(*F.conv2d(x, weight, groups=2).shape, seed=1)
    divided, whole = KroneckerBlock(weight, None, 4), KroneckerBlock(weight, None, 2)
    for block in (divided, whole):
        assert block.takes(call)
        block.add_map_score(call, score, 1.0)
        assert block.fold(2.0, 0.0)
    A, of_two = divided.average("inputs"), whole.average("inputs")
    torch.testing.assert_close(A, of_two.repeat_interleave(2, 0))
    assert not torch.allclose(A[0], A[2])


def test_a_diagonal_does_not_keep_its_matrix():
    M = randn(1, 6, 6)
    diagonal = diagonal_of(M)
    assert torch.equal(diagonal[0], M[0].diagonal())
    assert diagonal.untyped_storage().nbytes() == 6 * 8


@pytest.mark.parametrize("make", [unit, diagonal], ids=["unit-wise", "diagonal"])
def test_a_diagonal_grows_as_a_whole(make):
    block = make()
    block.refresh(BlockDamping(0.2))
    v, before = vectors(block), float(dense_average(block).trace())
    old = flat(block.product(v))
    scores = [torch.zeros_like(p) for p in block.parameters]
    scores[0][0] = 30.0  # some elements more than others
    block.add_gradient_scores(scores, 1.0)
    block.fold(2.0, 0.5)
    growth = float(dense_average(block).trace()) / before
    assert growth > 2
    torch.testing.assert_close(flat(block.product(v)), growth * old)


@pytest.mark.parametrize("kind", [KroneckerBlock, EigenBlock], ids=lambda kind: kind.kind)
def test_a_group_that_no_map_has_used_yet_is_scaled_as_the_others_are(kind):
    weight, x, g = nn.Parameter(randn(4, 2, 2, 2)), randn(5, 4, 3, 4), randn(4, 2, 2, 2, seed=2)
    score = randn(*F.conv2d(x, weight, groups=2).shape, seed=1)
    score[:, 2:] = 0.0  # the second of two groups
    block = kind(weight, None, 2)
    for _ in range(2):
        block.add_map_score(read_map_call(F.conv2d, (x, weight), {"groups": 2}), score, 1.0)
        assert block.fold(2.0, 0.5)
        assert block.refresh(BlockDamping(0.1)) is Remedy.NONE
    (d,), _ = block.precondition([g])
    if kind is EigenBlock:
        scale = block.average("M")[0].mean()
    else:
        A, G = (X[0].diagonal().mean() for X in block.averaged_factors())
        scale = A * G
    torch.testing.assert_close(d[2:], g[2:] / scale)


@pytest.mark.parametrize("layout", ["linear", "grouped"])
def test_the_work_of_a_block_is_that_of_its_last_step(layout):
    blocks = [kronecker(layout, steps=steps) for steps in (1, 2, 3)]  # each of a row more
    one, two, three = (block.work(BlockDamping(0.1)).statistics for block in blocks)
    assert three - two == pytest.approx(two - one)
    assert two > one


def test_each_process_averages_statistics_of_its_own(monkeypatch):
    block = diagonal()
    alone = block.effective_count("F")
    monkeypatch.setattr("ngplugin.curvature.blocks.averaged.ranks", lambda: 4)
    assert block.effective_count("F") == 4 * alone


def test_the_numbers_kept_are_counted():
    for block, numbers in (
        (kronecker("grouped"), 3 * 2 * (9**2 + 2**2)),
        (diagonal(), 2 * 12),
        (unit(), 3 * 4 * 6),
    ):
        assert block.refresh(BlockDamping(0.1)) is Remedy.NONE
        assert numbers <= block.numel() < 1.2 * numbers  # dampings and counts too
