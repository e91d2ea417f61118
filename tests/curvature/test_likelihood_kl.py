"""The measured KL of every likelihood and of losses by hand, against sums over all labels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch import distributions as D

from ngplugin import declare
from ngplugin.kl_measurement import KlMeasurement
from tests.oracle import assert_mean_is, generator, moved, observe, randn

Z, STEP, SIDE = randn(3, 3, seed=1), 0.3 * randn(3, 3, seed=2), randn(3, 3, seed=3)
T, R, Q, Y = randn(3, 3, seed=4), SIDE.sigmoid(), randn(3, 3, seed=5).softmax(1), torch.arange(3)
A, B = torch.tensor([[0.5, 1.5, 3.0], [2.0, 0.25, 1.0]]).double()  # weights
Labels = tuple[Tensor, float]  # all of them, and the volume of each


class Density(NamedTuple):
    of: Callable[[Tensor], Any]  # of z; has the terms' `log_prob`
    labels: Labels


def line(low: float, high: float) -> Labels:
    x = torch.linspace(low, high, 100_001, dtype=torch.float64)
    return (x[:-1] + x[1:]) / 2, float(x[1] - x[0])


def count(labels: int) -> Labels:
    return torch.arange(labels).double(), 1.0


AXIS = torch.linspace(-9, 9, 251, dtype=torch.float64)
PLANE = torch.cartesian_prod(AXIS, AXIS), float(AXIS[1] - AXIS[0]) ** 2
TILTED = torch.tensor([[1.0, 0.4], [0.4, 0.5]]).double()
REAL, POSITIVE, UNIT = line(-40, 40), line(0, 80), line(0, 1)


def rho(x: Tensor) -> Tensor:
    near = x.abs().clamp_max(0.5)
    return near * (x.abs() - 0.5 * near)


def log_total(s: float) -> Tensor:
    return ((-rho(REAL[0]) / s).exp().sum() * REAL[1]).log()


# The scales under which T is likeliest.
SPREAD = float((Z - T).abs().mean())
SCALE = minimize_scalar(
    lambda s: float(rho(Z - T).mean() / s + log_total(s)), (0.1, 1), tol=1e-10
).x


class Huber:
    def __init__(self, z: Tensor) -> None:
        self.location = z.flatten()

    def log_prob(self, y: Tensor) -> Tensor:
        return -rho(y - self.location) / SCALE - log_total(SCALE)


HUBER = Density(Huber, REAL)
CATEGORICAL = Density(lambda z: D.Categorical(logits=z), count(3))
BERNOULLI = Density(lambda z: D.Bernoulli(logits=z.flatten()), count(2))
DISTRIBUTIONS = {
    "Normal": Density(lambda z: D.Normal(z[:, 0], z[:, 1].exp()), REAL),
    "Independent": Density(lambda z: D.Independent(D.Normal(z[:, :2], R[:, :2]), 1), PLANE),
    "Categorical": CATEGORICAL,
    "OneHotCategorical": Density(
        lambda z: D.OneHotCategorical(probs=z.exp()), (torch.eye(3).double(), 1.0)
    ),
    "Bernoulli": BERNOULLI,
    "Binomial": Density(lambda z: D.Binomial(5, logits=z.flatten()), count(6)),
    "Poisson": Density(lambda z: D.Poisson(z.flatten().exp()), count(60)),
    "Exponential": Density(lambda z: D.Exponential((z.flatten() / 4).exp()), POSITIVE),
    "Gamma": Density(lambda z: D.Gamma(3 + z[:, 0].exp(), z[:, 1].exp()), POSITIVE),
    "Beta": Density(lambda z: D.Beta(3 + z[:, 0].exp(), 3 + z[:, 1].exp()), UNIT),
    "LogNormal": Density(lambda z: D.LogNormal(z[:, 0] / 3, 0.4), POSITIVE),
    "MultivariateNormal": Density(
        lambda z: D.MultivariateNormal(z[:, :2], TILTED * z[:, 2:, None].exp()), PLANE
    ),
    "Gumbel": Density(lambda z: D.Gumbel(z[:, 0], (z[:, 1] / 4).exp()), REAL),
    "Laplace": Density(lambda z: D.Laplace(z[:, 0], z[:, 1].exp()), REAL),
}


class Case(NamedTuple):
    loss: Callable[[Tensor], Tensor]
    density: Density
    weights: Tensor | float  # of the terms in the loss


def scored(density: Density, at: Tensor = Z) -> Case:
    torch.manual_seed(0)
    y, terms = density.of(at).sample(), density.of(at).batch_shape.numel()
    return Case(lambda z: -density.of(z).log_prob(y).mean(), density, 1 / terms)


def declared(z: Tensor) -> Tensor:
    loss = 2 * (B * (z - T).square()).sum()
    declare(loss, D.Normal(z, 0.5), T, weight=B)
    return loss


LOSSES = {
    "cross entropy": Case(lambda z: F.cross_entropy(z, Y), CATEGORICAL, 1 / 3),
    "cross entropy, weighted, smoothed and of a missing label": Case(
        lambda z: F.cross_entropy(z, torch.tensor([2, -100, 1]), weight=A, label_smoothing=0.2),
        CATEGORICAL,
        (0.8 * A[[2, 0, 1]] + 0.2 * A.mean()) * torch.tensor([1, 0, 1]) / (A[2] + A[1]),
    ),
    "cross entropy of soft targets": Case(
        lambda z: F.cross_entropy(z, Q, weight=A, label_smoothing=0.2, reduction="sum"),
        CATEGORICAL,
        (0.8 * Q + 0.2 / 3) @ A,
    ),
    "nll_loss": Case(
        lambda z: F.nll_loss(z.log_softmax(1), Y, weight=A, reduction="none") @ B,
        CATEGORICAL,
        A * B,
    ),
    "kl_div": Case(
        lambda z: F.kl_div(z.log_softmax(1), 2 * Q, reduction="batchmean"), CATEGORICAL, 2 / 3
    ),
    "binary cross entropy": Case(
        lambda z: F.binary_cross_entropy(z.sigmoid(), R), BERNOULLI, 1 / 9
    ),
    "binary cross entropy, weighted": Case(
        lambda z: F.binary_cross_entropy_with_logits(z, R, weight=B, pos_weight=A),
        BERNOULLI,
        ((R * A + 1 - R) * B / 9).flatten(),
    ),
    "soft margin": Case(lambda z: F.soft_margin_loss(z, T.sign()), BERNOULLI, 1 / 9),
    "squared error": Case(
        lambda z: F.mse_loss(z, T), Density(lambda z: D.Normal(z.flatten(), 1.0), REAL), 2 / 9
    ),
    "gaussian_nll_loss": Case(
        lambda z: F.gaussian_nll_loss(z[:, 0], T[:, 0], z[:, 1].exp()),
        Density(lambda z: D.Normal(z[:, 0], (z[:, 1] / 2).exp()), REAL),
        1 / 3,
    ),
    "gaussian_nll_loss of a known variance": Case(
        lambda z: F.gaussian_nll_loss(z[:, 0], T[:, 0], A),
        Density(lambda z: D.Normal(z[:, 0], A.sqrt()), REAL),
        1 / 3,
    ),
    "poisson_nll_loss": Case(
        lambda z: F.poisson_nll_loss(z, T.exp().round()), DISTRIBUTIONS["Poisson"], 1 / 9
    ),
    "poisson_nll_loss of rates": Case(
        lambda z: F.poisson_nll_loss(z.exp(), T.exp().round(), log_input=False, eps=0.1),
        Density(lambda z: D.Poisson(z.flatten().exp() + 0.1), count(60)),
        1 / 9,
    ),
    "absolute error": Case(
        lambda z: F.l1_loss(z, T),
        Density(lambda z: D.Laplace(z.flatten(), SPREAD), REAL),
        SPREAD / 9,
    ),
    "huber_loss": Case(lambda z: F.huber_loss(z, T, delta=0.5), HUBER, SCALE / 9),
    "smooth_l1_loss": Case(lambda z: F.smooth_l1_loss(z, T, beta=0.5), HUBER, SCALE / 4.5),
    "declared": Case(declared, Density(lambda z: D.Normal(z.flatten(), 0.5), REAL), B.repeat(3)),
    **{f"log_prob of {name}": scored(density) for name, density in DISTRIBUTIONS.items()},
}
HIDDEN = {"log_prob of Laplace"}  # torch's KL hides its second derivative in an absolute value
DRAWN = {"log_prob of Laplace", "log_prob of Gumbel", "log_prob of MultivariateNormal"}


def observed(loss: Callable[[Tensor], Tensor], z: Tensor = Z) -> tuple[nn.Parameter, Any]:
    leaf = nn.Parameter(z.clone())
    return leaf, observe([leaf], lambda: loss(leaf @ torch.eye(3).double()))[1]


def measured(leaf: Tensor, observation: Any, step: Tensor) -> tuple[float, float]:
    with moved([leaf], step.flatten()):
        return KlMeasurement().measure([observation])


def kl_of_terms(leaf: Tensor, observation: Any, step: Tensor) -> Tensor:
    with moved([leaf], step.flatten()):
        ((loss, now),) = observation.replay()
    return loss.likelihood.kl(loss.call.likelihood(now))


def curvature(leaf: Tensor, observation: Any, along: Tensor, h: float = 2e-3) -> float:
    """d²KL/dh², extrapolated: the next term of a Laplace distribution's KL is |h|³."""
    coarse, fine = (
        sum(measured(leaf, observation, sign * step * along)[0] for sign in (1, -1)) / step**2
        for step in (h, h / 2)
    )
    return 2 * fine - coarse


def tangents(leaf: Tensor, observation: Any, along: Tensor, h: float = 1e-4) -> list[Tensor]:
    """How the predictions move."""
    ends = []
    for step in (h, -h):
        with moved([leaf], step * along.flatten()):
            ((_, now),) = observation.replay()
        ends.append(now)
    return [(a - b) / (2 * h) for a, b in zip(*ends, strict=True)]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def exact_kl(density: Density, z: Tensor, other: Tensor) -> Tensor:
    y, volume = density.labels
    log_p, log_q = (density.of(at).log_prob(y[:, None]) for at in (z, other))
    torch.testing.assert_close(log_p.exp().sum(0) * volume, torch.ones_like(log_p[0]))
    return (log_p.exp() * (log_p - log_q)).sum(0) * volume


def exact_information(case: Case) -> Tensor:
    """w E_y[(d log p/dh)²] along SIDE, of every term."""
    y, volume = case.density.labels
    log_p, slope = torch.autograd.functional.jvp(
        lambda z: case.density.of(z).log_prob(y[:, None]), Z, SIDE
    )
    return (log_p.exp() * slope.square()).sum(0) * volume * case.weights


@pytest.mark.parametrize("name", LOSSES)
def test_the_measured_kl_is_a_sum_over_all_labels_and_the_fall_that_of_the_loss(name):
    loss, density, weights = LOSSES[name]
    leaf, observation = observed(loss)
    for step in (STEP, -4 * STEP):
        kl, fall = measured(leaf, observation, step)
        exact = (weights * exact_kl(density, Z, Z + step)).sum()
        assert kl == pytest.approx(float(exact), rel=2e-6)
        assert fall == pytest.approx(float(loss(Z) - loss(Z + step)), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_no_kl_is_negative_and_that_of_no_step_is_zero(name):
    leaf, observation = observed(LOSSES[name].loss)
    assert kl_of_terms(leaf, observation, 0 * STEP).abs().max() < 1e-15
    for size in (1e-7, 1e-3, 1.0, 4.0):
        assert (kl_of_terms(leaf, observation, size * SIDE) >= -1e-15).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_measured_kl_curves_with_the_fisher_information(name):
    exact = float(exact_information(LOSSES[name]).sum())
    assert curvature(*observed(LOSSES[name].loss), SIDE) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in HIDDEN])
def test_products_with_the_information_are_those_of_the_fisher_information(name):
    leaf, observation = observed(LOSSES[name].loss)
    (loss,), along = observation.scored, tangents(leaf, observation, SIDE)
    product = inner(loss.call.information(loss.weights, along), along)
    assert product == pytest.approx(float(exact_information(LOSSES[name]).sum()), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in DRAWN])
def test_exact_scores_of_every_term_square_to_its_fisher_information(name):
    leaf, observation = observed(LOSSES[name].loss)
    (loss,), along = observation.scored, tangents(leaf, observation, SIDE)
    for i, exact in enumerate(exact_information(LOSSES[name])):
        weights = torch.where(torch.arange(len(loss.weights)) == i, loss.weights, 0.0)
        passes = loss.call.scores("exact", weights, 1, generator())
        square = sum(share * inner(score, along) ** 2 for score, share in passes)
        assert square == pytest.approx(float(exact), rel=1e-4, abs=1e-12)


ESTIMATED = {
    "StudentT": Density(lambda z: D.StudentT(5.0, z[:, 0], z[:, 1].exp()), line(-400, 400)),
    "NegativeBinomial": Density(
        lambda z: D.NegativeBinomial(z[:, 0].exp(), logits=z[:, 1]), count(300)
    ),
    "mixture": Density(
        lambda z: D.MixtureSameFamily(
            D.Categorical(logits=z[:, :2]), D.Normal(z[:, 1:], z[:, :2].exp())
        ),
        REAL,
    ),
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_a_kl_without_closed_form_is_right_on_average_and_curves_as_its_products_say(name):
    z, step, along = (t[:1].expand(2_000, 3) for t in (Z, STEP, SIDE))
    leaf, observation = observed(scored(ESTIMATED[name], z).loss, z)
    kl = kl_of_terms(leaf, observation, step)
    assert (kl >= 0).all()
    assert not kl_of_terms(leaf, observation, 0 * step).any()
    assert_mean_is(kl, exact_kl(ESTIMATED[name], Z[:1], Z[:1] + STEP[:1]))
    (loss,), moving = observation.scored, tangents(leaf, observation, along)
    product = inner(loss.call.information(loss.weights, moving), moving)
    assert curvature(leaf, observation, along) == pytest.approx(product, rel=1e-3)


# -- losses by hand --------------------------------------------------------------------------------

BY_HAND = {
    "squared error": lambda z: (z - T).square().sum(),
    "cross entropy": lambda z: -(z.log_softmax(1) * Q).mean(),
    "evidential": lambda z: (z[:, 1].exp() * (z[:, 0] - T[:, 0]).square() + z[:, 2].cosh()).sum(),
    "student": lambda z: 3 * torch.log1p((z - T).square() / 0.1).mean(),  # not convex
}


def bregman_of(loss: Callable[[Tensor], Tensor], g: Tensor, step: Tensor) -> Tensor:
    return loss(Z + step) - loss(Z) - (g * step).sum()


@pytest.mark.parametrize("name", BY_HAND)
def test_the_kl_of_a_loss_by_hand_is_the_larger_of_its_bregman_divergence_and_quadratic(name):
    loss, larger = BY_HAND[name], set()
    leaf, observation = observed(lambda z: 2 * loss(z))
    H = torch.autograd.functional.hessian(loss, Z)
    rows = torch.stack([H[i, :, i] for i in range(3)])  # no two of them meet
    values, vectors = torch.linalg.eigh(rows)
    absolute = vectors @ values.abs().diag_embed() @ vectors.mT
    (g,) = torch.autograd.grad(loss(leaf), leaf)
    for size in (0.0, 1.0, -1.0, 4.0, -4.0):
        step = size * STEP
        quadratic = 0.5 * torch.einsum("ni,nij,nj->", step, absolute, step)
        bregman = bregman_of(loss, g, step)
        kl, fall = measured(leaf, observation, step)
        assert kl == pytest.approx(2 * float(torch.maximum(quadratic, bregman)), rel=1e-6)
        assert fall == pytest.approx(2 * float(loss(Z) - loss(Z + step)))
        larger.add(bool(bregman > quadratic))
    assert name == "squared error" or larger == {True, False}
    exact = 2 * float(torch.einsum("ni,nij,nj->", SIDE, absolute, SIDE))
    assert curvature(leaf, observation, SIDE) == pytest.approx(exact, rel=1e-4)
    (found,) = observation.scored
    assert inner(found.call.information(found.weights, [SIDE]), [SIDE]) == pytest.approx(exact)


def test_the_kl_of_a_loss_without_curvature_is_that_of_its_slopes():
    def pinball(z: Tensor) -> Tensor:
        return torch.maximum(0.1 * (T - z), 0.9 * (z - T)).sum()

    leaf, observation = observed(pinball)
    (g,) = torch.autograd.grad(pinball(leaf), leaf)
    for size in (0.1, -0.1, 1.0, 10.0):
        # With κ = 9/(2L) a Newton step of the nine elements would take all of the loss away.
        quadratic = 0.5 * 9 / (2 * pinball(Z)) * (g * size * STEP).square().sum()
        exact = torch.maximum(quadratic, bregman_of(pinball, g, size * STEP))
        assert measured(leaf, observation, size * STEP)[0] == pytest.approx(float(exact))
