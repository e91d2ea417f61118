"""The costs on paper against the real thing: what blocks keep, compute, send; and the page."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.scaling import __main__ as script
from experiments.scaling import blocks as on_paper
from experiments.scaling import measure
from experiments.scaling.assignment import longest_first, makespan
from experiments.scaling.blocks import FEWEST_EXAMPLES, FEWEST_ROWS, HALF, ROWS_PER_SIZE
from experiments.scaling.calibration import Calibration, stored
from experiments.scaling.collectives import all_reduce, broadcasts
from experiments.scaling.costs import PRODUCT_PASSES, cost, curved_share, pace, score_passes
from experiments.scaling.counting import Counter, Network, count_steps
from experiments.scaling.devices import DEVICES, INVERSE_BY_LAPACK
from experiments.scaling.models import (
    MODELS,
    Loose,
    Map,
    Model,
    Norm,
    perceptron,
    transformer,
    vision_transformer,
)
from experiments.scaling.page import RANKS, STRUCTURES, Study
from experiments.scaling.protocol import CURVED_EVERY, Protocol
from experiments.tasks.language_model import Transformer
from experiments.tasks.networks import cnn, dense
from ngplugin import NaturalGradientOptimizer, natural_step
from ngplugin.curvature import products
from ngplugin.curvature.blocks import kronecker as real_kronecker
from ngplugin.curvature.blocks import kronecker_product, matrix_layout
from ngplugin.curvature.blocks.block import BlockDamping
from ngplugin.curvature.blocks.low_rank_factor import LowRankFactor
from ngplugin.curvature.pace import Work
from ngplugin.curvature.taps import map_call

F = torch.nn.functional
A100 = DEVICES["a100"]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration.of(stored())


# -- the models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 25_557_032),
        ("vit-b", 86_567_656),
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("llama-7b", 6_738_415_616),
    ],
)
def test_models_have_as_many_parameters_as_the_published_ones(name, parameters):
    assert MODELS[name].parameters == parameters


class Tied(nn.Module):
    """An embedding that is the output layer too; positions and a token that are added."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 6, 12))
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.inner = nn.Linear(12, 12, bias=False)
        self.norm = nn.RMSNorm(12)

    def forward(self, x):
        h = self.table(x) + self.positions + self.token
        return F.linear(self.norm(self.inner(h)), self.table.weight).flatten(0, 1)


def batch(kind, examples=4):
    """A small model, what its loss is of, and the same on paper."""
    torch.manual_seed(0)
    if kind == "perceptron":
        model, sizes = dense(7, 3, (9, 5)), (7, 9, 5, 3)
        x, y = torch.randn(examples, 7), torch.arange(examples) % 3
        return model, x, y, perceptron("", sizes, examples)
    if kind == "wide":  # factors by eigenvectors, padded matrices
        model, sizes = dense(70, 3, (200, 150)), (70, 200, 150, 3)
        x, y = torch.randn(examples, 70), torch.arange(examples) % 3
        return model, x, y, perceptron("", sizes, examples)
    if kind == "convolutions":  # an image is halved after each
        model = cnn((1, 8, 8), 3, channels=(4, 6))
        maps = Map("linear", 9, 4, 64), Map("linear", 36, 6, 16), Map("linear", 24, 3, bias=True)
        x, y = torch.randn(examples, 1, 8, 8), torch.arange(examples) % 3
        norms = Norm(4, True), Norm(6, True)
        return model, x, y, Model("", maps, norms, logits=3, examples=examples)
    if kind == "grouped":
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 3))
        maps = Map("linear", 18, 3, 4, bias=True, groups=2), Map("linear", 24, 3, bias=True)
        x, y = torch.randn(examples, 4, 4, 4), torch.arange(examples) % 3
        return model, x, y, Model("", maps, logits=3, examples=examples)
    if kind == "transformer":
        model = nn.Sequential(Transformer(11, 6, width=8, heads=2, layers=2), nn.Flatten(0, 1))
        x = torch.arange(examples * 6).reshape(examples, 6) % 11
        on_paper = transformer("", 2, 8, 6, 11, examples=examples, tied=False)
        return model, x, (3 * x + 1).flatten() % 11, on_paper
    maps = Map("tied", 40, 12, 6), Map("linear", 12, 12, 6)
    loose = Loose((1, 6, 12)), Loose((1, 1, 12))
    x = torch.arange(examples * 6).reshape(examples, 6) % 40
    shapes = Model("", maps, (Norm(12, False),), loose, logits=240, examples=examples)
    return Tied(), x, (x + 1).flatten() % 40, shapes


KINDS = ("perceptron", "wide", "convolutions", "grouped", "transformer", "tied")


def real_blocks(optimizer):
    return optimizer._engine.fisher.blocks


def steps(optimizer, model, x, y, count):
    for _ in range(count):
        optimizer.zero_grad()
        with optimizer.observe():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_on_paper_have_the_parameters_of_the_model(kind):
    model, _, _, shapes = batch(kind)
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    assert shapes.tensors == len([*model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_forward_flops_are_those_that_torch_counts(kind):
    model, x, _, shapes = batch(kind)
    # Written out, else torch does not count what is inside.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    attention = 2 if kind == "transformer" else 1  # torch counts the masked half too
    maps = shapes.examples * sum(m.forward for m in shapes.maps)
    assert counter.get_total_flops() == maps + attention * (shapes.forward - maps)


def test_every_model_of_the_page_is_made_of_maps_that_are_tested():
    kinds = {m.kind for model in MODELS.values() for m in model.maps}
    assert kinds == {"linear", "lookup", "tied"}
    assert vision_transformer("", 1, 8, 2, 4, 3, 1).loose == (Loose((1, 5, 8)), Loose((1, 1, 8)))


# -- what blocks keep ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_factor", [8192, 10])
@pytest.mark.parametrize("structure", ["kronecker", "eigen", "diagonal", "identity"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_keep_as_many_numbers_as_the_real_ones(kind, structure, max_factor):
    model, x, y, shapes = batch(kind)
    optimizer = NaturalGradientOptimizer(
        model.parameters(), structure=structure, max_factor=max_factor
    )
    steps(optimizer, model, x, y, 6)
    real = sorted((block.kind, block.numel()) for block in real_blocks(optimizer))
    found = on_paper.blocks(shapes, structure, Protocol(max_factor=max_factor))
    assert real == sorted((b.kind, b.numel) for b in found for _ in range(b.count))


@pytest.mark.parametrize("overhead", [0.15, 1e9])
def test_bytes_are_those_of_the_real_tensors(overhead, monkeypatch):
    """Also where inverses are in bfloat16, whatever this machine multiplies."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda device: True)
    torch.manual_seed(0)
    model, shapes = dense(20, 3, (HALF, HALF - 1)), perceptron("", (20, HALF, HALF - 1, 3), 16)
    optimizer = NaturalGradientOptimizer(
        model.parameters(), structure="kronecker", overhead=overhead
    )
    steps(optimizer, model, torch.randn(16, 20), torch.arange(16) % 3, 3)
    real = 0
    for block in real_blocks(optimizer):
        tensors = [average.value for average in block._averages.values()]
        real += sum(t.numel() * t.element_size() for t in (*tensors, *block._refreshed.values()))
    found = on_paper.blocks(shapes, "kronecker", Protocol(overhead=overhead))
    assert real == sum(b.count * b.bytes for b in found)
    # G of the first layer is as large, A of the second larger by the bias, and padded.
    second = (HALF + 16) ** 2 if overhead > 1 else 0
    assert sum(b.count * b.halves for b in found) == HALF**2 + second + HALF**2


@pytest.mark.parametrize("structure", ["kronecker", "eigen", "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_owner_sends_as_many_bytes_as_an_inversion_gives(kind, structure, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda device: True)
    model, x, y, shapes = batch(kind)
    optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure)
    steps(optimizer, model, x, y, 3)
    damping = BlockDamping(0.1, "relative", 1.0, products="auto", share=0.15, rank=64)
    inverted = [block.invert(damping).tensors for block in real_blocks(optimizer)]
    real = sorted(sum(t.numel() * t.element_size() for t in found.values()) for found in inverted)
    found = on_paper.blocks(shapes, structure, Protocol())
    assert real == sorted(b.sent for b in found for _ in range(b.count))


@pytest.mark.parametrize("overhead", [0.0, 0.05, 0.15, 1.0, 1e9])
@pytest.mark.parametrize("rank", [1, 48, 64, 300])
@pytest.mark.parametrize("rows", [1, 200, 1000])
def test_factors_are_kept_by_as_many_eigenvectors_as_the_package_keeps(rows, rank, overhead):
    block = real_kronecker.KroneckerBlock(torch.zeros(2, 2))
    block.rows = float(rows)
    how = BlockDamping(0.1, share=overhead, rank=rank)
    for size in (20, 65, 128, 129, 449, 451, 602):
        kept, _ = block._inverted("A", torch.eye(size)[None], torch.full((1, 1, 1), 0.1), how)
        found = kept.basis.shape[-1] if isinstance(kept, LowRankFactor) else 0
        assert found == on_paper.kept_rank(size, rows, Protocol(overhead=4 * overhead, rank=rank))


@pytest.mark.parametrize("structure", ["kronecker", "eigen", "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overhead", [0.6, 1e9])
def test_the_optimizer_counts_the_work_on_paper(kind, structure, overhead):
    model, x, y, shapes = batch(kind)
    optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure, overhead=overhead)
    steps(optimizer, model, x, y, 1)
    protocol = Protocol(overhead=overhead)
    found = on_paper.blocks(shapes, structure, protocol)
    work = sum((b.work for b in found for _ in range(b.count)), Work())
    assert dataclasses.astuple(optimizer._engine._work) == pytest.approx(dataclasses.astuple(work))
    assert optimizer.pace == pace(found, protocol)


def test_the_constants_are_those_of_the_package():
    assert products._SMALLEST == HALF
    assert (real_kronecker._FEWEST_ROWS, real_kronecker._ROWS_PER_SIZE) == (
        FEWEST_ROWS,
        ROWS_PER_SIZE,
    )
    assert map_call._FEWEST_EXAMPLES == FEWEST_EXAMPLES
    assert kronecker_product._USUAL_ROWS == on_paper.USUAL_ROWS
    assert kronecker_product._SMALL_SIZE == on_paper.SMALL
    assert kronecker_product._LOWEST_RANK == on_paper.LOWEST_RANK
    assert kronecker_product._AVERAGED == on_paper.AVERAGED
    assert (matrix_layout._EVEN, matrix_layout._SMALL) == (on_paper.EVEN, on_paper.NARROW)
    assert natural_step._CURVED_EVERY == CURVED_EVERY
    options = NaturalGradientOptimizer([nn.Parameter(torch.ones(1))]).options
    for field in dataclasses.fields(Protocol):
        if hasattr(options, field.name):
            assert field.default == getattr(options, field.name), field.name


# -- what blocks compute ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    """A model with blocks of each kind that have inverses."""
    found = {}
    for structure in ("kronecker", "eigen"):
        model, x, y, shapes = batch(request.param)
        optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure)
        steps(optimizer, model, x, y, 6)
        found[structure] = optimizer, model, x, y, on_paper.blocks(shapes, structure, Protocol())
    return found


# Two by two matrices of a feature, which the formulas leave out.
_SMALL = {"unit-wise", "diagonal"}


@pytest.mark.parametrize("structure", ["kronecker", "eigen"])
def test_a_steps_products_have_the_flops_that_torch_counts(trained, structure):
    optimizer, _, _, _, found = trained[structure]
    real = [b for b in real_blocks(optimizer) if b.kind not in _SMALL]
    each = [b for b in found if b.kind not in _SMALL for _ in range(b.count)]
    ways = {
        lambda block, v: block.precondition(v, curved=False): lambda b: b.direction,
        lambda block, v: block.precondition(v): lambda b: (*b.direction, *b.curved),
        lambda block, v: block.product(v): lambda b: b.product,
    }
    for way, products_on_paper in ways.items():
        counted = []
        for block in real:
            vectors = [torch.randn_like(p) for p in block.parameters]
            with FlopCounterMode(display=False) as counter:
                way(block, vectors)
            counted.append(counter.get_total_flops())
        assert sorted(counted) == sorted(sum(x.flops for x in products_on_paper(b)) for b in each)


@pytest.mark.parametrize("measure_every", [1, 2, 6, None])
def test_f_d_is_formed_on_about_as_many_steps_as_on_paper(measure_every, monkeypatch):
    model, x, y, _ = batch("perceptron", examples=64)
    optimizer = NaturalGradientOptimizer(
        model.parameters(), structure="kronecker", measure_every=measure_every, kl_radius=0.01
    )
    steps(optimizer, model, x, y, 40)
    blocks, formed = real_blocks(optimizer), []
    for block in blocks:
        usual = block.precondition

        def precondition(vectors, curved=True, usual=usual):
            formed.append(curved)
            return usual(vectors, curved)

        monkeypatch.setattr(block, "precondition", precondition)
    steps(optimizer, model, x, y, 120)
    share = curved_share(measure_every or 0, 20)
    assert sum(formed) / len(formed) == pytest.approx(share, rel=0.25)


@pytest.mark.parametrize("structure", ["kronecker", "eigen"])
def test_a_statistic_has_the_flops_that_torch_counts(trained, structure):
    """Counted inside the blocks, so that the backward pass of the scores is left out."""
    optimizer, model, x, y, found = trained[structure]
    spent: list[int] = []

    def counted(add, *arguments):
        with FlopCounterMode(display=False) as counter:
            add(*arguments)
        spent.append(counter.get_total_flops())

    names = ("add_map_score", "add_gradient_scores")
    for block in real_blocks(optimizer):
        for name in names:
            if hasattr(block, name) and block.kind not in _SMALL:
                setattr(block, name, partial(counted, getattr(block, name)))
    steps(optimizer, model, x, y, optimizer.options.statistics_every)  # one of them has statistics
    for block in real_blocks(optimizer):
        for name in names:
            vars(block).pop(name, None)
    assert sum(spent) == sum(b.count * b.gram for b in found if b.kind not in _SMALL)


@pytest.mark.parametrize("examples", [1, 16, 31, 32, 100, 257])
@pytest.mark.parametrize("shared", [1, 7, 64])
def test_as_many_examples_are_taken_as_the_package_takes(examples, shared):
    m = Map("linear", 600, 9, shared, bias=True)
    rows = torch.zeros(1, examples, shared, 9)
    call = map_call.MapCall(
        "linear", torch.zeros(9, 600), None, 1, lambda: torch.zeros(1, examples, shared, 600),
        lambda score: score,
    )  # fmt: skip
    taken, _, _ = call.some_rows(rows, max(FEWEST_ROWS, ROWS_PER_SIZE * 601))
    assert taken.shape[1] == on_paper.examples_taken(m, examples)


def test_scores_go_back_at_the_cost_of_a_forward_pass_and_parameters_at_two():
    """What a statistic adds to forward and backward, but for the products of rows."""
    for structure in ("kronecker", "diagonal"):
        model, x, y, shapes = batch("perceptron", examples=64)
        optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure)
        steps(optimizer, model, x, y, 6)
        counted = []
        for _ in range(5):
            optimizer.zero_grad()
            with FlopCounterMode(display=False) as counter, optimizer.observe():
                F.cross_entropy(model(x), y).backward()
            counted.append(counter.get_total_flops())
            optimizer.step()
        found = on_paper.blocks(shapes, structure, Protocol())
        extra = max(counted) - min(counted) - sum(b.count * b.gram for b in found)
        first = 2 * 64 * 7 * 9  # nothing goes back beyond the first layer
        assert extra == score_passes(structure) * shapes.forward - first


def test_a_product_with_all_of_f_costs_four_forward_passes():
    counted = []
    for iterations in (1, 3):
        model, x, y, shapes = batch("perceptron", examples=64)
        optimizer = NaturalGradientOptimizer(
            model.parameters(), structure="matrix-free", cg_iterations=iterations
        )
        steps(optimizer, model, x, y, 6)
        optimizer.zero_grad()
        with optimizer.observe():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        counted.append(counter.get_total_flops())
    found = on_paper.blocks(shapes, "matrix-free", Protocol())
    preconditioned = sum(x.flops for b in found for x in (*b.direction, *b.curved))
    each = (counted[1] - counted[0]) / 2 - preconditioned
    first = 2 * 64 * 7 * 9  # neither way goes on beyond the first layer
    assert each == PRODUCT_PASSES * shapes.forward - 2 * first


def test_cholesky_and_inverse_are_d_cubed_operations():
    """By the textbook's loops, every multiplication, division, addition and root counted."""
    d, count = 24, 0
    A = torch.randn(d, 2 * d, dtype=torch.float64)
    A = A @ A.mT
    L, M = torch.zeros_like(A), torch.zeros_like(A)
    for j in range(d):
        for i in range(j, d):
            total = A[i, j] - L[i, :j] @ L[j, :j]
            L[i, j] = total.sqrt() if i == j else total / L[j, j]
            count += 2 * j + 1
    for j in range(d):  # M = L⁻¹, column by column
        M[j, j] = 1 / L[j, j]
        count += 1
        for i in range(j + 1, d):
            M[i, j] = -(L[i, j:i] @ M[j:i, j]) / L[i, i]
            count += 2 * (i - j)
    for j in range(d):  # the lower half of MᵀM
        for i in range(j, d):
            count += 2 * (d - i) - 1
    torch.testing.assert_close(M.mT @ M, torch.cholesky_inverse(L))
    assert count == pytest.approx(INVERSE_BY_LAPACK * d**3, rel=3 / d)


# -- who inverts what ------------------------------------------------------------------------------

COSTS = st.lists(st.floats(0.0, 1e6), max_size=40)


@given(COSTS, st.integers(1, 20))
def test_every_block_has_one_owner_and_none_waits_long(costs, ranks):
    owner = longest_first(costs, ranks)
    assert len(owner) == len(costs)
    assert all(0 <= rank < ranks for rank in owner)
    # The last block to be done began when no rank was free before.
    longest = max(costs, default=0.0)
    bound = sum(costs) / ranks + (1 - 1 / ranks) * longest
    assert max(longest, sum(costs) / ranks) * (1 - 1e-9) <= makespan(costs, owner)
    assert makespan(costs, owner) <= bound * (1 + 1e-9)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_no_assignment_is_shorter_by_more_than_a_quarter(costs, ranks):
    """Graham's 4/3 - 1/(3 ranks), against all assignments there are."""
    shortest = min(makespan(costs, o) for o in product(range(ranks), repeat=len(costs)))
    found = makespan(costs, longest_first(costs, ranks))
    assert shortest <= found <= (4 / 3 - 1 / (3 * ranks)) * shortest * (1 + 1e-9)


@given(COSTS)
def test_one_rank_has_all_and_many_ranks_one_each(costs):
    assert makespan(costs, longest_first(costs, 1)) == pytest.approx(sum(costs))
    many = longest_first(costs, max(1, len(costs)))
    assert makespan(costs, many) == max(costs, default=0.0)


# -- communication ---------------------------------------------------------------------------------


def test_an_all_reduce_by_hand():
    device = dataclasses.replace(
        A100, link_inside=100.0, link_between=10.0, link_efficiency=1.0, per_node=8,
        latency_inside=0.0, latency_between=0.0,
    )  # fmt: skip
    assert all_reduce(800.0, 1, device) == 0.0
    assert all_reduce(800.0, 2, device) == pytest.approx(8.0)  # all of it once, each way
    assert all_reduce(800.0, 8, device) == pytest.approx(2 * 7 / 8 * 8)
    # In four nodes: an eighth of it for each of a node's adapters, 3/4 of that twice.
    assert all_reduce(800.0, 32, device) == pytest.approx(14 + 2 * 3 / 4 * 10)
    assert broadcasts(800.0, 5, 32, device) == pytest.approx(all_reduce(800.0, 32, device) / 2)


# -- all together ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_more_ranks_never_shorten_sending_nor_prolong_inverting(name, structure, calibration):
    costs = [cost(MODELS[name], structure, r, A100, calibration) for r in RANKS]
    for fewer, more in pairwise(costs):
        assert more.bytes >= fewer.bytes
        assert more.bytes_sent >= fewer.bytes_sent
        if structure != "adamw":
            assert more.seconds["exchange"] >= fewer.seconds["exchange"]
            assert more.seconds["refresh"] <= fewer.seconds["refresh"] * (1 + 1e-12)
            assert more.time > cost(MODELS[name], "adamw", more.ranks, A100, calibration).time
    assert all(value >= 0 for c in costs for value in (*c.seconds.values(), *c.memory.values()))
    assert all(math.isfinite(c.time + c.bytes) for c in costs)


@pytest.mark.parametrize(
    "field", ["statistics_every", "refresh_every", "measure_every", "spectrum_every", "accumulate"]
)
def test_what_is_done_rarely_costs_less_of_a_step(field, calibration):
    usual = Protocol()
    rarer = dataclasses.replace(usual, **{field: 2 * getattr(usual, field)})
    model = MODELS["vit-b"]

    def overhead(protocol):
        adamw = cost(model, "adamw", 8, A100, calibration, protocol)
        return cost(model, "kronecker", 8, A100, calibration, protocol).overhead(adamw)

    assert overhead(rarer) < overhead(usual)


def test_a_smaller_max_factor_needs_less_of_everything(calibration):
    for model in MODELS.values():
        costs = [
            cost(model, "kronecker", 8, A100, calibration, Protocol(max_factor=size))
            for size in (16384, 8192, 4096, 1024, 1)
        ]
        for larger, smaller in pairwise(costs):
            assert smaller.memory["curvature"] <= larger.memory["curvature"]
            assert smaller.bytes_sent <= larger.bytes_sent
            assert smaller.time <= larger.time


def test_a_side_larger_than_max_factor_is_a_diagonal_the_bias_included():
    (down,) = [m for m in MODELS["gpt3-xl"].maps if m.inputs == 8192]
    block = on_paper.kronecker(down, 2, Protocol())
    assert [side.size for side in block.dense] == [2048]  # 8,193 inputs
    assert len(on_paper.kronecker(dataclasses.replace(down, bias=False), 2, Protocol()).dense) == 2


# -- what was counted in the code ------------------------------------------------------------------


def test_the_counter_counts_reads_and_writes_and_what_is_alive():
    with Counter() as counter:
        a = torch.ones(1000)
        assert (counter.moved, counter.alive) == (4000, 4000)
        b = a[::2] + 1.0  # reads half, writes half; the view is free
        assert (counter.moved, counter.alive) == (8000, 6000)
        b.mul_(a[:500])
        assert (counter.moved, counter.alive) == (8000 + 3 * 2000, 6000)
        _ = a.reshape(10, 100) @ a.reshape(100, 10)  # a product is no traffic
        assert counter.moved == 14000
        del a, b
        assert counter.alive <= 400
        assert counter.peak >= 6000


@pytest.mark.parametrize("overhead", [0.0, math.inf])
def test_the_stored_counts_are_those_of_the_code(overhead, calibration):
    """Nearly; after a larger change to a step: python -m experiments.scaling --count."""
    network = Network(3, 160, 256, 192, 96)  # none of those that were fitted
    counts = count_steps("kronecker", network, overhead=overhead)
    model, traffic = network.model(), calibration.traffic["kronecker"]
    found = on_paper.blocks(model, "kronecker", Protocol(overhead=overhead))
    averages, factors, low_rank = (
        sum(b.count * getattr(b, n) for b in found) for n in ("averages", "whole", "low_rank")
    )
    rows = sum(m.count * network.rows * (m.inputs + m.outputs) for m in model.maps)
    logits = network.rows * model.logits
    statistics = traffic.statistics_row * rows + traffic.statistics_average * averages
    held = traffic.step_held_parameter * model.parameters + traffic.step_held_row * rows
    counted, plain, both = counts["statistics"], counts["plain"], counts["statistics, curved"]
    update = traffic.update_parameter * model.parameters + traffic.update_factor * factors
    curved = traffic.curved_parameter * model.parameters + traffic.curved_factor * factors
    refresh = traffic.refresh_average * averages + traffic.refresh_factor * factors
    peak = max(count.kept + count.step_peak for count in counts.values())
    pairs = [
        (plain.updating, update + traffic.update_low_rank * low_rank),
        (counts["curved"].updating - plain.updating, curved),
        (counted.moved - plain.moved, statistics + traffic.statistics_logit * logits),
        (counts["refresh"].updating - both.updating, refresh),
        (peak, held + traffic.step_held_logit * logits),
    ]
    for real, fitted in pairs:
        assert real == pytest.approx(fitted, rel=0.2)


def test_fits_give_back_what_they_are_fitted_to():
    device = measure.this_machine(
        {
            "rates": {"single": 1e11, "half": 4e11, "gram": 2e11, "bandwidth": 1e11},
            "factorizations": {
                "inverse": [[d, 2e-11 * d**3 * (1 + 300 / d)] for d in (64, 256, 1024)],
                "eigh": [[d, 9e-11 * d**3 * (1 + 200 / d)] for d in (64, 256, 1024)],
                "eigvalsh": [[d, 4e-11 * d**3 * (1 + 200 / d)] for d in (64, 256, 1024)],
            },
            "all_reduce": [[b, 2 * 1e-4 + b / 3e9] for b in (256, 2**16, 2**24)],
        }
    )
    assert device.inverse(500) == pytest.approx(2e-11 * 500**3 * 1.6)
    assert device.eigenvectors(500) == pytest.approx(9e-11 * 500**3 * 1.4)
    assert device.eigenvalues(500) == pytest.approx(4e-11 * 500**3 * 1.4)
    assert all_reduce(3e6, 2, device) == pytest.approx(2e-4 + 1e-3)


def test_the_parts_of_a_step_are_told_apart():
    torch.manual_seed(0)
    model, x, y, _ = batch("perceptron")
    optimizer = NaturalGradientOptimizer(model.parameters(), weight_decay=0.01, **measure._OFTEN)
    parts = measure.step_parts(optimizer, lambda: F.cross_entropy(model(x), y), 80)
    assert parts.keys() == {"update", "curved", "statistics", "refresh", "spectrum", "measured"}
    assert min(parts[name] for name in ("update", "statistics", "refresh", "spectrum")) > 1e-5


def test_what_was_measured_is_within_a_factor_of_three_of_what_is_predicted():
    compared = Study.usual(stored()).compared()
    assert len(compared) == 20
    for name, predicted, measured in compared:
        assert 1 / 3 < measured / predicted < 3, name
        if name[1] == "a whole step, on average":
            assert 0.75 < measured / predicted < 1.35, name


# -- the page --------------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_the_script():
    page = script.PAGE.read_text()
    for name, table in Study.usual(stored()).tables().items():
        (text,) = re.findall(f"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
        assert text == table.markdown(), f"{name}: run python -m experiments.scaling"


def test_the_script_writes_the_page_and_the_figure(tmp_path, capsys):
    page, figure = tmp_path / "page.md", tmp_path / "figure.png"
    places = re.compile("(<!-- (.*?) -->).*?(<!-- /\\2 -->)", re.DOTALL)
    emptied = places.sub(r"\1 \3", script.PAGE.read_text())
    page.write_text(emptied)
    assert script.main(["--page", str(page), "--figure", str(figure)]) == 0
    assert page.read_text() == script.PAGE.read_text() != emptied
    assert figure.stat().st_size > 50_000
    assert "kronecker" in capsys.readouterr().out


def test_another_assumption_is_printed_and_leaves_the_page_alone(tmp_path, capsys):
    page = tmp_path / "page.md"
    options = ["--page", str(page), "--model", "gpt2-small", "--examples", "24"]
    options += ["--device", "h100", "--link-between", "1e9", "--refresh-every", "200"]
    assert script.main([*options, "--no-weight-decay"]) == 0
    assert not page.exists()
    assert "24 x 1,024 tokens" in capsys.readouterr().out
