"""Parameters that are not plain dense leaves used by one map: derived, sparse, lazy, complex."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.observe import Observer
from tests.oracle import assert_mean_is, double, flat, generator, jacobian, observe, randn

X, Y = randn(6, 4, seed=1), randn(6, 3, seed=2)


def trained(parameters, loss, steps=3, **options):
    """The optimizer and the losses of a few steps."""
    optimizer = NaturalGradientOptimizer(parameters, **options)
    losses = []
    for _ in range(steps):
        with optimizer.observe():
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    assert torch.stack(losses).isfinite().all()
    return optimizer, losses


def blocks(optimizer):
    return [row.block for row in optimizer.coverage().rows]


# -- weights that are used otherwise than by a map -------------------------------------------------


def test_a_weight_divided_by_its_norm_is_no_map_although_the_norm_is_a_product_with_it():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3)).double()
    weight = layer.parametrizations.weight.original
    fisher, observation = observe([*layer.parameters()], lambda: F.mse_loss(layer(X), Y))
    assert any(call.weight is weight for call, _ in observation.maps)
    assert fisher.reason(weight) == "used by a linear map and otherwise"
    assert fisher.block(weight).kind not in ("kronecker", "half-diagonal kronecker")


def test_a_weight_that_is_also_in_a_penalty_keeps_its_map():
    model = double(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)))
    tokens = torch.tensor([0, 1, 2, 2, 4, 1])

    def objective():
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.mse_loss(model(tokens), Y) + 0.1 * penalty

    fisher, _ = observe([*model.parameters()], objective)
    kinds = [fisher.block(p).kind for p in model.parameters()]
    assert kinds == ["half-diagonal kronecker", "kronecker", "kronecker"]


def test_a_map_s_block_is_given_up_with_the_first_other_use():
    layer = double(nn.Linear(4, 3))
    parameters = [*layer.parameters()]
    fisher, _ = observe(parameters, lambda: F.mse_loss(layer(X), Y))
    assert fisher.block(layer.weight).kind == "kronecker"
    observe(parameters, lambda: F.mse_loss(layer(X) + layer.weight.sum(1), Y), fisher=fisher)
    assert fisher.block(layer.weight).kind not in ("kronecker", "half-diagonal kronecker")
    assert fisher.block(layer.bias) is not None


def test_uses_are_compared_once_and_by_no_randomness_of_the_run():
    layer = double(nn.Linear(4, 3))
    fisher = Fisher()
    fisher.parameters = [*layer.parameters()]
    states, compared = [], []
    fisher.compare = lambda weight, other: (  # type: ignore[method-assign]
        compared.append(other),
        Fisher.compare(fisher, weight, other),
    )
    for penalty in (0.0, 1.0, 1.0):
        private = generator()
        observer = Observer(fisher.parameters, fisher, False, "propagated", 1, private)
        with observer:
            loss = F.mse_loss(layer(X), Y)
            loss = loss + layer.weight.square().sum() if penalty else loss
        loss.backward()
        fisher.discard()
        states.append(private.get_state())
    assert compared == [False]
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("kind", ["kronecker", "half-diagonal kronecker"])
def test_a_weight_that_no_score_reaches_at_first_waits_for_one(kind):
    """As the first factor of a low-rank adapter, whose second is zero."""
    tokens = torch.tensor([0, 1, 2, 2, 4, 1])
    first = nn.Linear(4, 2, bias=False) if kind == "kronecker" else nn.Embedding(5, 2)
    second = nn.Linear(2, 3)
    nn.init.zeros_(second.weight)
    x = X.float() if kind == "kronecker" else tokens
    parameters = [first.weight, *second.parameters()]
    before = first.weight.detach().clone()
    for steps in (1, 3):
        optimizer, _ = trained(parameters, lambda: F.mse_loss(second(first(x)), Y.float()), steps)
        assert optimizer.report.failed_factorizations == 0
        assert blocks(optimizer) == [kind, "kronecker", "kronecker"]
        assert torch.equal(first.weight, before) == (steps == 1)


# -- gradients and parameters of other kinds -------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_make_the_steps_that_dense_ones_make(kind):
    tokens = torch.tensor([[0], [1], [2], [2], [4], [1]])
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table, layer = kind(5, 4, sparse=sparse), nn.Linear(4, 3)
        indices = tokens if kind is nn.EmbeddingBag else tokens[:, 0]
        parameters = [*table.parameters(), *layer.parameters()]
        trained(parameters, lambda t=table, n=layer, i=indices: F.mse_loss(n(t(i)), Y.float()))
        ends.append(flat(parameters))
    assert torch.equal(*ends)


def test_parameters_that_the_first_batch_shapes_are_trained_and_measured_from_the_first_step():
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))
    optimizer, _ = trained(model.parameters(), lambda: F.mse_loss(model(X.float()), Y.float()), 1)
    assert blocks(optimizer) == [*2 * ["kronecker"], *2 * ["unit-wise"], *2 * ["kronecker"]]
    assert optimizer.report.kl is not None


def test_a_complex_parameter_has_the_diagonal_of_its_real_and_imaginary_parts():
    weight = nn.Parameter(torch.complex(randn(3, 4, seed=3), randn(3, 4, seed=4)))
    x = torch.complex(X[:1], randn(1, 4, seed=5))

    def predict(w):
        return torch.einsum("bi,oi->bo", x, w).real

    real = torch.view_as_real(weight.detach()).clone().requires_grad_()
    J = jacobian(predict(torch.view_as_complex(real)), [real])
    exact = J.square().sum(0) / 3
    target = torch.zeros(1, 3).double()
    samples = []
    for i in range(40):
        fisher, _ = observe(
            [weight], lambda: 0.5 * F.mse_loss(predict(weight), target, reduction="sum"), seed=i
        )
        samples.append(fisher.block(weight).average("F").reshape(-1))
    assert fisher.block(weight).kind == "diagonal"
    assert_mean_is(torch.stack(samples), exact)
    before = weight.detach().clone()
    _, losses = trained([weight], lambda: F.mse_loss(predict(weight), target), 5)
    assert losses[-1] < losses[0]
    assert (weight != before).all()


# -- other classes of tensors ----------------------------------------------------------------------


class Labelled(Tensor):
    """A tensor with names of its columns, which results of operations keep the class of."""

    @staticmethod
    def __new__(cls, data, labels):
        return super().__new__(cls, data)

    def __init__(self, data, labels):
        self.labels = labels


class OwnParameter(nn.Parameter):
    """A parameter of another class."""


def test_an_input_of_another_class_survives_and_its_model_is_covered():
    model = double(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    x = Labelled(X, [*"abcd"])
    seen = []

    def objective():
        assert x.labels == [*"abcd"]
        seen.append(model(x))
        return F.mse_loss(seen[0], Y)

    fisher, observation = observe([*model.parameters()], objective)
    assert isinstance(seen[0], Labelled)
    assert [block.kind for block in fisher.blocks] == ["kronecker"]
    ((scored, predictions),) = observation.replay()
    torch.testing.assert_close(predictions, scored.call.predictions)


def test_a_parameter_of_another_class_beside_buffers_and_unused_ones():
    weight, unused = OwnParameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(2))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    numbers = torch.ones(3, dtype=torch.int64)
    optimizer, losses = trained(
        [weight, unused, frozen],
        lambda: F.mse_loss(F.linear(X.float(), weight) * frozen * numbers, Y.float()),
    )
    assert losses[-1] < losses[0]
    assert type(weight) is OwnParameter
    assert blocks(optimizer) == ["kronecker", "none", "none"]
    assert [row.reason for row in optimizer.coverage().rows[1:]] == [
        "no observed loss depends on it yet",
        "frozen",
    ]
    assert not unused.any()


# -- parameters that do not count ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["auto", "diagonal"])
def test_an_offset_that_a_normalization_takes_away_again_stays_where_it_is(structure, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    offset = nn.Parameter(torch.zeros(8, dtype=dtype))
    x = torch.randn(64, 4, dtype=dtype)
    y = torch.arange(64) % 3
    parameters = [*model.parameters(), offset]
    bias = model[0].bias.detach().clone()

    def loss():
        return F.cross_entropy(model[1:](model[0](x) + offset), y)

    _, losses = trained(parameters, loss, 20, structure=structure)
    assert losses[-1] < 0.9 * losses[0]
    assert offset.abs().max() < 0.01
    if structure == "diagonal":
        assert (model[0].bias - bias).abs().max() < 0.01
