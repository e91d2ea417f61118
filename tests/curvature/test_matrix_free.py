"""Products with the whole Fisher matrix of a batch, against the dense one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngplugin.curvature.likelihoods.bernoulli import Bernoulli
from ngplugin.curvature.likelihoods.gaussian import Gaussian
from ngplugin.curvature.likelihoods.huber import Huber
from ngplugin.curvature.likelihoods.laplace import Laplace
from ngplugin.curvature.likelihoods.normal import Normal
from ngplugin.curvature.likelihoods.poisson import Poisson
from ngplugin.curvature.matrix_free import BatchFisher
from tests.curvature.test_dense_fisher import SUMMED, targets, terms
from tests.oracle import (
    FAMILIES,
    dense_fisher,
    double,
    flat,
    generator,
    jacobian,
    observe,
    randn,
    unflat,
)

X = randn(6, 4, seed=1)
IMAGES = randn(6, 2, 5, 5, seed=2)
SEQUENCES = randn(6, 3, 4, seed=3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.layer(x).tanh(), self.layer.weight.t())[:, :3]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(4, 3, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0][:, -1]


class Attending(nn.Module):
    """Attention whose fused kernel has no second derivative."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).sum((1, 2))[:, :3]


class Derived(nn.Module):
    """Predicts by its own derivatives, as a physics-informed network does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.layers(x).sum(), x, create_graph=True)
        return slope[:, :3] + slope[:, 1:].square()


MODELS = {
    "mlp": (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), X),
    "cnn": (
        nn.Sequential(
            nn.Conv2d(2, 2, 3), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)
        ),
        IMAGES,
    ),
    "batch norm": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), X),
    "dropout": (nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Linear(5, 3)), X),
    "transformer layer": (
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 4, dropout=0.2, batch_first=True),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        SEQUENCES,
    ),
    "fused attention": (Attending(), SEQUENCES),
    "tied weights": (Tied(), X),
    "lstm": (Recurrent(), SEQUENCES),
    "derivatives": (Derived(), X),
}
MODELS = {name: (double(model), x) for name, (model, x) in MODELS.items()}


def watched(parameters, objective, seed=7):
    """The batch's Fisher matrix, and Σw."""
    torch.manual_seed(seed)
    _, observation = observe(parameters, objective)
    total = float(sum(loss.weights.sum() for loss in observation.scored))
    return BatchFisher([observation], parameters, total), total


def multiply(batch, parameters, vector):
    parts = dict(zip(map(id, parameters), unflat(vector, parameters), strict=True))
    product = batch.product(parts)
    return flat([product[id(p)] for p in parameters])


def dense(batch, parameters):
    unit = torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64)
    return torch.stack([multiply(batch, parameters, row) for row in unit])


def assert_near(found, exact):
    assert float((found - exact).abs().max()) <= 1e-10 * float(exact.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_product_is_that_with_the_dense_matrix(name, family):
    model, x = MODELS[name]
    parameters = [*model.parameters()]
    y = targets(family, model(x))
    batch, _ = watched(parameters, lambda: 3 * SUMMED[family](model(x), y))
    buffers = [b.clone() for b in model.buffers()]
    random = torch.get_rng_state()
    products = [multiply(batch, parameters, v) for v in vectors(parameters)]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(p.grad is None for p in parameters)

    torch.manual_seed(7)
    natural = terms(family, model(x))
    weights = torch.ones(len(natural)).double()
    exact = dense_fisher(FAMILIES[family], natural, parameters, weights)
    for v, product in zip(vectors(parameters), products, strict=True):
        assert_near(product, exact @ v)


def vectors(parameters, count=3):
    size = sum(p.numel() for p in parameters)
    return [randn(size, seed=20 + i) for i in range(count)]


def test_several_losses_count_with_their_weights():
    model, x = MODELS["mlp"]
    parameters, y = [*model.parameters()], targets("categorical", MODELS["mlp"][0](X))

    def objective():
        z = model(x)
        per_term = F.binary_cross_entropy_with_logits(z, targets("bernoulli", z), reduction="none")
        mask = torch.arange(18).double().reshape(6, 3) % 4 / 3
        return 3 * F.cross_entropy(z, y) + (mask * per_term).sum() + F.mse_loss(z, randn(6, 3)) / 4

    batch, total = watched(parameters, objective)
    z = model(x)
    parts = [
        ("categorical", z, torch.full((6,), 0.5)),
        ("bernoulli", z.reshape(-1), torch.arange(18).double() % 4 / 3),
        ("gaussian", z.reshape(-1), torch.full((18,), 2 / 18 / 4)),
    ]
    exact = sum(
        w.sum() * dense_fisher(FAMILIES[family], eta, parameters, w.double())
        for family, eta, w in parts
    )
    assert_near(total * dense(batch, parameters), exact)


OTHER_LOSSES = {  # with the Fisher information of their natural parameters, worked out by hand
    "poisson": (lambda z: F.poisson_nll_loss(z, torch.ones_like(z), reduction="sum"), torch.exp),
    "l1": (
        lambda z: F.l1_loss(z, torch.zeros_like(z), reduction="sum"),
        lambda z: (1 / z.abs().mean()).expand_as(z),
    ),
    "normal": (
        lambda z: -torch.distributions.Normal(z, 2.0).log_prob(torch.zeros_like(z)).sum(),
        lambda z: torch.full_like(z, 0.25),
    ),
    "geometric": (
        lambda z: (
            -torch.distributions.Geometric(logits=z).log_prob(torch.ones_like(z).detach()).sum()
        ),
        lambda z: 1 - z.sigmoid(),
    ),
    "gamma": (
        lambda z: -torch.distributions.Gamma(3.0, z.exp()).log_prob(torch.ones_like(z)).sum(),
        lambda z: torch.full_like(z, 3.0),
    ),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_other_losses_have_the_fisher_information_of_their_distribution(name):
    loss, information = OTHER_LOSSES[name]
    model, x = MODELS["mlp"]
    parameters = [*model.parameters()]
    batch, total = watched(parameters, lambda: loss(model(x)))
    z = model(x).reshape(-1)
    J = jacobian(z, parameters)
    assert_near(total * dense(batch, parameters), J.T @ (information(z).detach()[:, None] * J))


@pytest.mark.parametrize(
    "likelihood",
    [
        Gaussian(randn(5)),
        Bernoulli(randn(5)),
        Poisson(randn(5)),
        Laplace(randn(5)),
        Huber(randn(5), torch.tensor(0.7).double()),
        Normal(torch.stack([randn(5), randn(5, seed=1).exp()], -1)),
    ],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_a_diagonal_information_is_the_square_of_a_propagated_score(likelihood):
    score = likelihood.propagated_score(generator())
    v = randn(*score.shape, seed=3)
    torch.testing.assert_close(likelihood.information(v), score.square() * v)


def test_a_distribution_with_tensors_that_depend_on_each_other_counts_once():
    # Normalized logits and what they were made from: moved on their own they are no distribution.
    model, x = MODELS["mlp"]
    parameters, y = [*model.parameters()], torch.arange(6) % 3
    by_class, one = watched(
        parameters,
        lambda: -torch.distributions.Categorical(logits=model(x)).log_prob(y).sum(),
    )
    by_loss, other = watched(parameters, lambda: F.cross_entropy(model(x), y, reduction="sum"))
    assert one == other
    assert_near(dense(by_class, parameters), dense(by_loss, parameters))


def covariance(z):
    return torch.stack([torch.stack([2 + z[0] ** 2, z[1]]), torch.stack([z[1], 2 + z[2] ** 2])])


def test_a_multivariate_normal_has_its_textbook_information():
    # I_ij = ½ tr(S⁻¹ ∂_i S S⁻¹ ∂_j S) for the covariance S of a fixed mean.
    z = nn.Parameter(0.5 * randn(3, seed=1))
    batch, total = watched(
        [z],
        lambda: (
            -torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance(z))
            .log_prob(randn(5, 2))
            .sum()
        ),
    )
    slopes = torch.autograd.functional.jacobian(covariance, z.detach()).permute(2, 0, 1)
    whitened = torch.linalg.inv(covariance(z.detach())) @ slopes
    exact = 0.5 * torch.einsum("iab,jba->ij", whitened, whitened)
    assert total == 5
    assert_near(dense(batch, [z]), exact)


@settings(max_examples=20)
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 10**6), st.floats(-3, 3))
def test_products_are_linear_symmetric_and_positive(name, seed, scale):
    model, x = MODELS[name]
    parameters = [*model.parameters()]
    y = torch.arange(6) % 3
    batch, _ = watched(parameters, lambda: F.cross_entropy(model(x), y))
    size = sum(p.numel() for p in parameters)
    u, v = randn(size, seed=seed), randn(size, seed=seed + 1)
    Fu, Fv = multiply(batch, parameters, u), multiply(batch, parameters, v)
    both = multiply(batch, parameters, u + scale * v)
    torch.testing.assert_close(both, Fu + scale * Fv, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(u @ Fv, v @ Fu, rtol=1e-9, atol=1e-10)
    assert float(u @ Fu) >= 0


def test_micro_batches_add_up():
    model, x = MODELS["mlp"]
    parameters, y = [*model.parameters()], torch.arange(6) % 3
    whole, total = watched(parameters, lambda: F.cross_entropy(model(x), y))
    halves = [
        observe(parameters, lambda i=i: 0.5 * F.cross_entropy(model(x[i::2]), y[i::2]))[1]
        for i in range(2)
    ]
    parted = BatchFisher(halves, parameters, total)
    assert_near(dense(parted, parameters), dense(whole, parameters))


def test_hooks_of_the_parameters_do_not_fire_and_parts_that_are_missing_are_zero():
    model, x = MODELS["mlp"]
    parameters = [*model.parameters()]
    batch, _ = watched(parameters, lambda: F.mse_loss(model(x), torch.zeros(6, 3).double()))
    fired = []
    handle = parameters[0].register_hook(fired.append)
    v = torch.zeros_like(flat(parameters))
    v[: parameters[0].numel()] = 1
    short = batch.product({id(parameters[0]): torch.ones_like(parameters[0])})
    handle.remove()
    assert not fired
    assert_near(flat([short[id(p)] for p in parameters]), multiply(batch, parameters, v))


def test_a_parameter_that_no_prediction_depends_on_has_a_product_of_zero():
    model, x = MODELS["mlp"]
    spare = nn.Parameter(torch.ones(2).double())
    parameters = [*model.parameters(), spare]
    batch, _ = watched(parameters, lambda: F.mse_loss(model(x), torch.zeros(6, 3).double()))
    assert not batch.product({id(spare): torch.ones_like(spare)})[id(spare)].any()


def test_what_was_computed_under_no_grad_is_a_constant():
    model, x = MODELS["mlp"]
    parameters = [*model.parameters()]

    def predict():
        with torch.no_grad():
            fixed = model(x)
        return model(x) * fixed

    batch, _ = watched(parameters, lambda: 0.5 * F.mse_loss(predict(), X[:, :3], reduction="sum"))
    J = jacobian(predict().reshape(-1), parameters)
    assert_near(dense(batch, parameters), J.T @ J / 18)


def test_the_information_of_a_laplace_is_that_of_its_scores():
    """Whose KL, made of an absolute value, has no second derivative to be read off."""
    model, x = double(nn.Linear(3, 1)), randn(20, 3, seed=1)
    parameters = [*model.parameters()]
    _, observation = observe(
        parameters,
        lambda: -torch.distributions.Laplace(model(x), 0.5).log_prob(randn(20, 1, seed=2)).mean(),
    )
    J = jacobian(model(x), parameters)
    v = randn(4, seed=3)
    found = BatchFisher([observation], parameters, 1.0).product(
        {id(p): part for p, part in zip(parameters, unflat(v, parameters), strict=True)}
    )
    wanted = J.T @ (J @ v) / 0.5**2 / 20
    torch.testing.assert_close(flat([found[id(p)] for p in parameters]), wanted)
