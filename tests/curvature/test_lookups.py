"""Embeddings: look-ups as linear maps of one-hot inputs that are never written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.block_choice import BlockRule
from ngplugin.curvature.blocks import BlockDamping
from ngplugin.curvature.taps import read_map_call
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    flat,
    observe,
    randn,
)

TOKENS = torch.tensor([[3, 1, 0, 3], [5, 3, 1, 1]])


def gradient(function, *args, **options):
    """Autograd's gradient of the weight, the second argument, and that of the rows."""
    args[1].requires_grad_()
    y = function(*args, **options)
    score = randn(*y.shape, seed=9)
    (exact,) = torch.autograd.grad(y, args[1], score)
    call = read_map_call(function, args, options)
    one_hot = F.one_hot(call.indices, len(exact)).to(score)  # [rows, vocabulary]
    return exact, one_hot.T @ call.score_rows(score), call


@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[0], TOKENS[0, 1], TOKENS.int()], ids=str)
def test_the_rows_of_an_embedding_give_autograd_s_gradient(tokens, padding):
    exact, ours, call = gradient(F.embedding, tokens, randn(6, 4), padding_idx=padding)
    torch.testing.assert_close(ours, exact)
    assert call.kind == "embedding"


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("form", ["matrix", "offsets", "last offset"])
def test_the_rows_of_an_embedding_bag_give_autograd_s_gradient(mode, padding, form):
    args, more = (TOKENS, randn(6, 4)), {}
    if form != "matrix":  # an empty bag in the middle
        args = TOKENS.reshape(-1), randn(6, 4), torch.tensor([0, 3, 3, 7])
    if form == "last offset":
        args, more = (*args[:2], torch.tensor([0, 3, 3, 8])), {"include_last_offset": True}
    exact, ours, call = gradient(F.embedding_bag, *args, mode=mode, padding_idx=padding, **more)
    torch.testing.assert_close(ours, exact)
    assert call.kind == "embedding_bag"


def test_weights_in_a_bag_count():
    exact, ours, _ = gradient(
        F.embedding_bag, TOKENS, randn(6, 4), mode="sum", per_sample_weights=randn(2, 4, seed=2)
    )
    torch.testing.assert_close(ours, exact)


def test_the_largest_of_a_bag_is_no_linear_map():
    assert read_map_call(F.embedding_bag, (TOKENS, randn(6, 4)), {"mode": "max"}) is None


def classifier(table, head):
    """Summed cross-entropy of a linear layer on embedded tokens."""
    tokens = torch.tensor([1, 4])
    return lambda: F.cross_entropy(head(table(tokens)), torch.tensor([0, 2]), reduction="sum")


def test_the_block_is_the_kronecker_block_of_one_hot_inputs():
    weight = nn.Parameter(randn(6, 3))
    tokens = torch.tensor([1, 4, 4, 0, 1, 1])
    y = randn(6, 3, seed=1)
    looked_up, _ = observe([weight], lambda: F.mse_loss(F.embedding(tokens, weight), y))
    transposed = nn.Parameter(weight.detach().T.contiguous())
    one_hot = F.one_hot(tokens, 6).double()
    multiplied, _ = observe([transposed], lambda: F.mse_loss(F.linear(one_hot, transposed), y))
    ours, theirs = looked_up.block(weight), multiplied.block(transposed)
    torch.testing.assert_close(
        torch.diag(ours.averaged_factors()[1][0]), theirs.averaged_factors()[0][0]
    )
    torch.testing.assert_close(ours.averaged_factors()[0][0], theirs.averaged_factors()[1][0])
    assert looked_up.reason(weight) == "weight of embedding"
    looked_up.refresh(BlockDamping(0.1))
    assert ours.numel() == 2 * 6 + 3 * 3**2 - 3**2 + 3**2 + 3  # two dampings, one count


def test_one_token_s_block_is_the_fisher_s_in_the_mean():
    table, head = double(nn.Embedding(4, 3)), double(nn.Linear(3, 3))
    token = torch.tensor([2])
    natural = head(table(token))
    dense = dense_fisher(FAMILIES["categorical"], natural, [table.weight], torch.ones(1).double())
    samples = []
    for seed in range(60):
        fisher, _ = observe(
            [table.weight],
            lambda: F.cross_entropy(head(table(token)), torch.tensor([0])),
            draws=8,
            seed=seed,
        )
        samples.append(dense_average(fisher.blocks[0]))
    assert_mean_is(torch.stack(samples), dense)


def test_padding_counts_in_neither_factor():
    table = double(nn.Embedding(5, 2, padding_idx=0))
    y = randn(4, 2)
    fisher, _ = observe(
        [table.weight],
        lambda: 0.5 * F.mse_loss(table(torch.tensor([0, 1, 0, 3])), y, reduction="sum"),
    )
    block = fisher.blocks[0]
    expected = torch.tensor([0, 0.5, 0, 0.5, 0]).double()
    torch.testing.assert_close(block.averaged_factors()[1][0], expected)
    # 2 rows of 2 in 8 terms
    assert float(block.averaged_factors()[0][0].trace()) == pytest.approx(4 / 8)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_a_token_never_seen_moves_no_further_than_this_batch_alone_would_move_it(mode):
    """In a vocabulary of thousands, a new token's gradient meets a frequency of zero."""
    table = double(nn.Embedding(5000, 2))
    seen = torch.arange(100) % 7
    fisher, _ = observe(
        [table.weight], lambda: F.mse_loss(table(seen), torch.zeros(100, 2).double())
    )
    fisher.refresh(BlockDamping(0.1 if mode == "relative" else 1e-8, mode))
    g = torch.zeros(5000, 2).double()
    g[4321] = randn(2) / 100  # it came once in a hundred
    directions, _ = fisher.precondition({id(table.weight): g})
    d = directions[id(table.weight)]
    newton = torch.linalg.solve(fisher.blocks[0].averaged_factors()[0][0], g[4321] * 100)
    assert d[4321].norm() < 1.01 * newton.norm()
    assert d[:4321].abs().max() == 0


def test_a_tied_weight_adds_up_both_uses_over_either_side():
    weight = nn.Parameter(randn(5, 3) / 2)
    tokens = torch.tensor([1, 4, 1])

    def objective():
        logits = F.linear(F.embedding(tokens, weight).tanh(), weight)
        return F.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="sum")

    fisher, _ = observe([weight], objective)
    (block,) = fisher.blocks
    assert fisher.reason(weight) == "weight of embedding and linear"
    # The same two uses, apart: the same seed draws the same scores.
    tables = nn.Parameter(weight.detach().clone()), nn.Parameter(weight.detach().clone())

    def apart():
        logits = F.linear(F.embedding(tokens, tables[0]).tanh(), tables[1])
        return F.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="sum")

    separate, _ = observe([*tables], apart)
    looked_up = dense_average(separate.block(tables[0])).reshape(5, 3, 5, 3)
    multiplied = dense_average(separate.block(tables[1])).reshape(5, 3, 5, 3)
    exact = looked_up + multiplied
    ours = dense_average(block).reshape(5, 3, 5, 3)
    over_dim = torch.einsum("idie->de", exact)
    torch.testing.assert_close(torch.einsum("idie->de", ours), over_dim)
    over_vocabulary = torch.einsum("idjd->ij", exact).diagonal()
    torch.testing.assert_close(torch.einsum("idjd->ij", ours).diagonal(), over_vocabulary)


def test_a_weight_first_seen_as_a_matrix_changes_its_block_when_it_is_looked_up():
    weight, bias = nn.Parameter(randn(5, 3)), nn.Parameter(randn(5, seed=1))
    x, y = randn(4, 3, seed=2), torch.arange(4)
    fisher, _ = observe([weight, bias], lambda: F.cross_entropy(F.linear(x, weight, bias), y))
    assert fisher.block(weight).kind == "kronecker"
    assert fisher.block(bias) is fisher.block(weight)
    embedded = F.embedding

    def both():
        return F.cross_entropy(F.linear(embedded(y, weight), weight, bias), y)

    observe([weight, bias], both, fisher=fisher)
    assert fisher.block(weight).kind == "half-diagonal kronecker"
    assert fisher.block(weight).ready
    assert fisher.block(bias).kind == "diagonal"
    assert fisher.reason(bias) == "bias of linear"


def test_an_output_layer_with_a_large_vocabulary_keeps_a_diagonal():
    x, y = randn(9, 3), torch.arange(9) % 5
    for outputs, dims in ((6, 3), (7, 2)):
        layer = double(nn.Linear(3, outputs))
        fisher, _ = observe(
            [*layer.parameters()],
            lambda m=layer: F.cross_entropy(m(x), y),
            rule=BlockRule(max_factor=6),
        )
        assert fisher.block(layer.weight).average("G").dim() == dims
    assert fisher.reason(layer.weight) == (
        "weight of linear; outputs 7 > max_factor: kept diagonal"
    )


def test_a_saved_block_goes_on_as_it_was():
    table, head = double(nn.Embedding(6, 3)), double(nn.Linear(3, 3))
    parameters = [table.weight]
    fisher, _ = observe(parameters, classifier(table, head))
    fisher.refresh(BlockDamping(0.1))
    other = type(fisher)()
    other.parameters = parameters
    other.load_state_dict(fisher.state_dict())
    for each in (fisher, other):  # one more statistic, so that the averages matter too
        observe(parameters, classifier(table, head), seed=5, fisher=each)
    g = randn(6, 3, seed=4)
    one, two = (each.precondition({id(table.weight): g}) for each in (fisher, other))
    assert all(
        torch.equal(a[id(table.weight)], b[id(table.weight)]) for a, b in zip(one, two, strict=True)
    )
    assert torch.equal(
        flat([dense_average(fisher.blocks[0])]), flat([dense_average(other.blocks[0])])
    )
    assert other.reason(table.weight) == "weight of embedding"
