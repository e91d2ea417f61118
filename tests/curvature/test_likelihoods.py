"""Scores, divergences and dispersions against exact expectations and torch.distributions."""

import math

import pytest
import torch
from torch import distributions

from ngplugin.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from ngplugin.curvature.likelihoods.distribution_root import DrawnRoot
from ngplugin.curvature.likelihoods.normal import Normal
from tests.oracle import FAMILIES, assert_mean_is, generator, output_fisher, randn

NATURAL = {
    "categorical": torch.tensor([1.2, -0.7, 0.3, 2.0], dtype=torch.float64),
    "bernoulli": torch.tensor(0.8, dtype=torch.float64),
    "gaussian": torch.tensor(-0.4, dtype=torch.float64),
}


def as_distribution(name, eta):
    return {
        "categorical": lambda: distributions.Categorical(logits=eta),
        "bernoulli": lambda: distributions.Bernoulli(logits=eta),
        "gaussian": lambda: distributions.Normal(eta, 1.0),
    }[name]()


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_have_mean_zero_and_the_covariance_of_the_exact_score(name, kind):
    eta = NATURAL[name]
    likelihood = FAMILIES[name](eta.expand(40_000, *eta.shape).clone())
    score = getattr(likelihood, f"{kind}_score")(generator(1)).reshape(40_000, -1)
    assert_mean_is(score, torch.zeros(score.shape[1], dtype=torch.float64))
    outer = score[:, :, None] * score[:, None, :]
    assert_mean_is(outer, output_fisher(FAMILIES[name], eta))


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_different_terms_are_independent(name):
    eta = NATURAL[name]
    likelihood = FAMILIES[name](eta.expand(40_000, *eta.shape).clone())
    for kind in ("sampled", "propagated"):
        score = getattr(likelihood, f"{kind}_score")(generator(2)).reshape(20_000, 2, -1)
        cross = score[:, 0, :, None] * score[:, 1, None, :]
        assert_mean_is(cross, torch.zeros(cross.shape[1:], dtype=torch.float64))


@pytest.mark.parametrize("name", ["bernoulli", "gaussian"])
def test_a_propagated_score_of_one_output_squares_to_its_fisher_information_exactly(name):
    eta = randn(50) * 3
    score = FAMILIES[name](eta).propagated_score(generator())
    exact = torch.stack([output_fisher(FAMILIES[name], e)[0, 0] for e in eta])
    torch.testing.assert_close(score**2, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_depend_on_nothing_but_their_generator(name):
    likelihood = FAMILIES[name](NATURAL[name].expand(20, *NATURAL[name].shape).clone())
    before = torch.get_rng_state()
    for kind in ("sampled_score", "propagated_score"):
        one = getattr(likelihood, kind)(generator(7))
        torch.manual_seed(99)
        assert torch.equal(one, getattr(likelihood, kind)(generator(7)))
    torch.set_rng_state(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_is_that_of_torch_distributions(name):
    eta, other = randn(6, 4, seed=1), randn(6, 4, seed=2)
    if name != "categorical":
        eta, other = eta.reshape(-1), other.reshape(-1)
    exact = distributions.kl_divergence(as_distribution(name, eta), as_distribution(name, other))
    torch.testing.assert_close(FAMILIES[name](eta).kl(FAMILIES[name](other)), exact)


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_from_itself_is_zero_and_curves_with_the_fisher_information(name):
    eta = NATURAL[name].unsqueeze(0)
    direction = randn(*eta.shape, seed=3)
    one = FAMILIES[name](eta)
    assert float(one.kl(one)) == 0
    h = 1e-4
    moved = FAMILIES[name](eta + h * direction)
    d = direction.reshape(-1)
    quadratic = 0.5 * d @ output_fisher(FAMILIES[name], NATURAL[name]) @ d
    assert float(one.kl(moved)) / h**2 == pytest.approx(float(quadratic), rel=1e-3)


def test_kl_of_far_logits_is_finite_and_right():
    sure, opposite = torch.tensor([60.0]).double(), torch.tensor([-60.0]).double()
    assert float(Bernoulli(sure).kl(Bernoulli(opposite))) == pytest.approx(60.0)
    a, b = torch.tensor([[60.0, 0.0]]).double(), torch.tensor([[0.0, 60.0]]).double()
    assert float(Categorical(a).kl(Categorical(b))) == pytest.approx(60.0)


def test_a_class_that_is_masked_out_counts_nothing_in_a_kl():
    a = torch.tensor([[0.3, -math.inf, 1.0]]).double()
    b = torch.tensor([[0.1, -math.inf, 0.2]]).double()
    exact = Categorical(a[:, [0, 2]]).kl(Categorical(b[:, [0, 2]]))
    torch.testing.assert_close(Categorical(a).kl(Categorical(b)), exact)


@pytest.mark.parametrize("name", FAMILIES)
def test_nll_of_a_drawn_label_is_minus_log_p_less_its_smallest_value(name):
    eta = randn(12, 4, seed=4)
    if name != "categorical":
        eta = eta.reshape(-1)
    torch.manual_seed(0)
    p = as_distribution(name, eta)
    y = p.sample()
    least = 0.5 * math.log(2 * math.pi) if name == "gaussian" else 0.0
    torch.testing.assert_close(FAMILIES[name](eta).nll(y), -p.log_prob(y) - least)


def test_nll_of_soft_targets_is_the_kl_from_them():
    q = randn(5, 3, seed=5).softmax(-1)
    eta = randn(5, 3, seed=6)
    exact = distributions.kl_divergence(
        distributions.Categorical(probs=q), distributions.Categorical(logits=eta)
    )
    torch.testing.assert_close(Categorical(eta).nll(q), exact)
    r, logit = randn(5, seed=7).sigmoid(), randn(5, seed=8)
    exact = distributions.kl_divergence(
        distributions.Bernoulli(probs=r), distributions.Bernoulli(logits=logit)
    )
    torch.testing.assert_close(Bernoulli(logit).nll(r), exact)


def test_nll_is_zero_where_the_prediction_equals_the_target():
    q = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(Categorical(q.clamp_min(1e-300).log()).nll(q).abs().max()) < 1e-12
    r = torch.tensor([0.25, 0.5]).double()
    assert float(Bernoulli(r.logit()).nll(r).abs().max()) < 1e-12
    assert float(Gaussian(r).nll(r).abs().max()) == 0


def test_the_gaussian_variance_is_the_weighted_mean_square_or_as_given():
    eta, y = randn(5, seed=1), randn(5, seed=2)
    w = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0]).double()
    likelihood = Gaussian(eta)
    expected = float((w * (eta - y) ** 2).sum() / w.sum())
    assert float(likelihood.dispersion(y, w, "auto")) == pytest.approx(expected)
    assert float(likelihood.dispersion(y, w, 0.3)) == pytest.approx(0.3)
    y[2] = math.nan  # as a target may be that is masked out
    assert float(likelihood.dispersion(y, w, "auto")) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_other_families_have_no_dispersion(name):
    likelihood = FAMILIES[name](NATURAL[name].unsqueeze(0))
    assert float(likelihood.dispersion(torch.zeros(1), torch.ones(1), "auto")) == 1
    assert float(likelihood.dispersion(torch.zeros(1), torch.ones(1), 5.0)) == 1


def test_both_parts_of_a_normal_score_are_of_one_draw():
    eta = torch.stack([randn(50), randn(50, seed=1).exp()], -1).requires_grad_()
    score = Normal(eta.detach()).sampled_score(generator(1))
    mean, v = eta.unbind(-1)
    y = (mean - score[:, 0] * v).detach()  # of which the first part tells
    nll = -distributions.Normal(mean, v.sqrt()).log_prob(y)
    torch.testing.assert_close(score, torch.autograd.grad(nll.sum(), eta)[0])


def test_drawn_scores_are_columns_of_a_root():
    mean, y = randn(6), randn(3, 6, seed=1)
    root = DrawnRoot([mean], lambda t: (y - t[0]).square() / 2, 3)
    vector = randn(6, 3, seed=2)
    (found,) = root(vector)
    torch.testing.assert_close(found, ((mean - y).mT * vector).sum(1) / 3**0.5)
