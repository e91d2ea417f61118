"""Attention: its packed projections are seen inside the function that hides them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.block_choice import BlockRule
from ngplugin.curvature.blocks import BlockDamping, KroneckerBlock
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.observe import Observer
from ngplugin.curvature.taps import read_map_call
from tests.oracle import dense_average, double, flat, generator, observe, randn

X, MEMORY, OTHER = randn(2, 5, 4, seed=1), randn(2, 3, 4, seed=2), randn(2, 3, 4, seed=3)
KINDS = {
    "self": (X, X, X),
    "encoder-decoder": (X, MEMORY, MEMORY),
    "three inputs": (X, MEMORY, OTHER),
}


def attention(**options):
    return double(nn.MultiheadAttention(4, 2, batch_first=True, **options))


def objective(layer, inputs):
    return lambda: F.mse_loss(layer(*inputs)[0], torch.zeros(2, 5, 4).double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_give_autograd_s_gradient_of_the_packed_projection(kind, bias):
    layer = attention(bias=bias)
    loss = objective(layer, KINDS[kind])
    fisher, observation = observe([*layer.parameters()], loss)
    exact = torch.autograd.grad(loss(), [*layer.parameters()])
    block = fisher.block(layer.in_proj_weight)
    assert block.groups == (1 if kind == "self" else 3)
    assert block.parameters == tuple(
        p for p in (layer.in_proj_weight, layer.in_proj_bias) if p is not None
    )
    assert fisher.block(layer.out_proj.weight).kind == "kronecker"
    assert len(fisher.blocks) == 2
    # The scores of the true loss in place of drawn ones: the rows must give its gradient.
    gathered = torch.zeros(12, 4).double()
    scores = iter(score_of_each_linear(loss, layer))
    for call, _ in observation.maps:
        score = next(scores)
        if call.weight is layer.in_proj_weight:
            a, g = call.input_rows().flatten(1, 2), call.score_rows(score).flatten(1, 2)
            size = 12 // call.groups
            for i, part in enumerate(g.mT @ a):
                gathered[(call.first + i) * size :][:size] += part
    torch.testing.assert_close(gathered, exact[0])


def score_of_each_linear(loss, layer):
    """d(loss)/d(output) of each linear call inside, in order."""
    sink = Fisher()
    sink.parameters = [*layer.parameters()]
    observer = Observer(sink.parameters, sink, False, "propagated", 1, generator())
    with observer:
        value = loss()
    return torch.autograd.grad(value, [edge for _, edge in observer.observation.maps])


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_those_of_the_projections_written_out(kind, weight_sharing):
    """Three linear layers and attention in plain calls have the same factors.

    In plain calls the examples come first, inside of attention the tokens.
    """
    layer, rule = attention(), BlockRule("kronecker", weight_sharing)
    inputs = KINDS[kind]
    pieces = [nn.Parameter(w.detach().clone()) for w in layer.in_proj_weight.chunk(3)]
    offsets = [nn.Parameter(b.detach().clone()) for b in layer.in_proj_bias.chunk(3)]

    def plain():
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (2, 2)).transpose(1, 2)
            for x, w, b in zip(inputs, pieces, offsets, strict=True)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.mse_loss(layer.out_proj(mixed), torch.zeros(2, 5, 4).double())

    hidden, _ = observe([*layer.parameters()], objective(layer, inputs), rule=rule)
    open_, _ = observe([*pieces, *offsets, *layer.out_proj.parameters()], plain, rule=rule)
    block = hidden.block(layer.in_proj_weight)
    for i, w in enumerate(pieces):
        A, G = (X[0] for X in open_.block(w).averaged_factors())
        if kind == "self":
            torch.testing.assert_close(block.averaged_factors()[0][0], A)
            G_packed = block.average("G")[0]
            torch.testing.assert_close(G_packed[4 * i : 4 * i + 4, 4 * i : 4 * i + 4], G)
        else:
            torch.testing.assert_close(block.averaged_factors()[0][i], A)
            torch.testing.assert_close(block.average("G")[i], G)
    torch.testing.assert_close(
        dense_average(hidden.block(layer.out_proj.weight)),
        dense_average(open_.block(layer.out_proj.weight)),
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_tokens_without_a_batch_are_one_example(batch_first):
    layer, x = double(nn.MultiheadAttention(4, 2, batch_first=batch_first)), X[0]
    fisher, _ = observe(
        [*layer.parameters()],
        lambda: F.mse_loss(layer(query=x, key=x, value=x)[0], torch.zeros(5, 4).double()),
        rule=BlockRule("kronecker", "reduce"),
    )
    assert all((block.average("rows") == 1).all() for block in fisher.blocks)


def test_keys_and_values_of_other_widths_have_blocks_of_their_own():
    layer = attention(kdim=3, vdim=6)
    fisher, _ = observe(
        [*layer.parameters()], objective(layer, (X, randn(2, 3, 3), randn(2, 3, 6)))
    )
    for name in ("q", "k", "v"):
        assert fisher.block(getattr(layer, f"{name}_proj_weight")).kind == "kronecker"


def test_a_projection_used_whole_and_in_pieces_has_one_block_of_pieces():
    layer = attention()

    def both():
        return objective(layer, (X, X, X))() + objective(layer, (X, MEMORY, MEMORY))()

    fisher, _ = observe([*layer.parameters()], objective(layer, (X, X, X)))
    assert fisher.block(layer.in_proj_weight).groups == 1
    _, observation = observe([*layer.parameters()], both, fisher=fisher)
    block = fisher.block(layer.in_proj_weight)
    assert block.groups == 3
    calls = [call for call, _ in observation.maps if call.weight is layer.in_proj_weight]
    assert [(call.groups, call.first) for call in calls] == [(1, 0), (3, 0), (3, 1)]
    assert block.average("rows").flatten().tolist() == [20, 16, 16]


def test_rows_of_the_whole_are_divided_among_the_pieces():
    weight = nn.Parameter(randn(6, 4))
    x, score = randn(5, 4, seed=1), randn(5, 6, seed=2)
    block = KroneckerBlock(weight, None, 3)
    call = read_map_call(F.linear, (x, weight), {})
    assert block.takes(call)
    block.add_map_score(call, score, 1.0)
    block.fold(1.0, 0.0)
    for i in range(3):
        g = score[:, 2 * i : 2 * i + 2]
        torch.testing.assert_close(block.averaged_factors()[0][i], x.T @ x / 5)
        torch.testing.assert_close(block.average("G")[i], g.T @ g)
    assert not block.takes(read_map_call(F.linear, (x, weight[:1]), {}))
    assert not block.takes(read_map_call(F.linear, (randn(5, 6), weight.T), {}))


def test_a_piece_that_is_never_used_does_not_hinder_the_others():
    weight = nn.Parameter(randn(6, 3))
    fisher, _ = observe(
        [weight], lambda: F.mse_loss(F.linear(randn(5, 3), weight[2:4]), torch.zeros(5, 2).double())
    )
    assert set(fisher.refresh(BlockDamping(0.1))) == {Remedy.NONE}
    g = torch.zeros(6, 3).double()
    g[2:4] = randn(2, 3)
    directions, _ = fisher.precondition({id(weight): g})
    assert directions[id(weight)][:2].abs().max() == 0
    assert directions[id(weight)][2:4].abs().min() > 0


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_in_training_is_seen_whole_and_replayed(norm_first):
    layer = nn.TransformerEncoderLayer(
        4, 2, 8, dropout=0.3, batch_first=True, norm_first=norm_first
    ).double()
    parameters = [*layer.parameters()]
    torch.manual_seed(0)
    fisher, observation = observe(
        parameters, lambda: F.mse_loss(layer(X), torch.zeros(2, 5, 4).double())
    )
    assert {block.kind for block in fisher.blocks} == {"kronecker", "unit-wise"}
    assert len(fisher.blocks) == 6  # in, out, two linear layers, two normalizations
    # Dropout falls as it fell: the same parameters give the same prediction.
    ((scored, predictions),) = observation.replay()
    torch.testing.assert_close(predictions, scored.call.predictions)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.mul_(1.5)
    ((_, moved),) = observation.replay()
    assert not torch.allclose(moved[0], predictions[0])


@pytest.mark.parametrize("training", [True, False])
def test_observing_changes_neither_the_output_nor_the_gradients(training):
    layer = attention(dropout=0.5).train(training)
    parameters = [*layer.parameters()]
    ends = []
    for watch in (True, False):
        torch.manual_seed(3)
        outputs = []

        def loss(outputs=outputs):
            outputs.append(layer(X, X, X)[0])
            return F.mse_loss(outputs[0], torch.zeros(2, 5, 4).double())

        if watch:
            observe(parameters, loss)
        else:
            loss()
        score = randn(2, 5, 4, seed=7)
        ends.append(outputs[0].detach())
        torch.manual_seed(3)
        layer.zero_grad()
        (layer(X, X, X)[0] * score).sum().backward()
        ends.append(flat([p.grad for p in parameters]))
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])


def test_a_weight_s_view_is_traced_to_its_parameter_only_where_it_is_a_piece():
    weight, x = nn.Parameter(randn(6, 4)), randn(3, 4)
    call = read_map_call(F.linear, (x, weight[2:4]), {})
    assert call.weight is weight
    assert (call.groups, call.first) == (3, 1)
    assert read_map_call(F.linear, (x, weight[4:6]), {}).first == 2
    assert read_map_call(F.linear, (x[:, :2], weight[:, :2]), {}) is None
    assert read_map_call(F.linear, (x, weight[::2]), {}) is None
    many = nn.Parameter(randn(40, 4))
    assert read_map_call(F.linear, (x, many[3:4]), {}) is None
    leaf = randn(6, 4)[:3].requires_grad_()  # a view, but itself what is trained
    assert read_map_call(F.linear, (x, leaf), {}).weight is leaf
