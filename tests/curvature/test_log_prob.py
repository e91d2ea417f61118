"""Distributions that are scored by `log_prob`: scores, divergences, weights and training."""

import functools
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.likelihoods import read_log_prob
from ngplugin.curvature.likelihoods.log_prob import _seed
from tests.oracle import assert_mean_is, generator, observe, randn

N = 3_000


class Triangle(D.Distribution):
    """A user's own: discrete on {0, 1, 2} with logits (0, a, 2a), sampled by hand."""

    support = D.constraints.integer_interval(0, 2)

    def __init__(self, slope):
        self.slope = slope
        super().__init__(slope.shape, validate_args=False)

    def _table(self):
        return (self.slope.unsqueeze(-1) * torch.arange(3.0).to(self.slope)).log_softmax(-1)

    def log_prob(self, value):
        return (self._table() * (value.unsqueeze(-1) == torch.arange(3.0))).sum(-1)

    def sample(self, sample_shape=()):
        return D.Categorical(logits=self._table()).sample(sample_shape)


class Unsampled(Triangle):
    sample = D.Distribution.sample


def mixture(t):
    return D.MixtureSameFamily(
        D.Categorical(logits=t[..., :2]), D.Normal(t[..., 2:4], t[..., 4:6].exp())
    )


def skewed(t):
    base = D.Normal(t[..., 0], t[..., 1].exp())
    return D.TransformedDistribution(
        base,
        [D.transforms.AffineTransform(t[..., 2], t[..., 3].exp()), D.transforms.ExpTransform()],
    )


def triangular(t):
    diagonal = t[..., 2:4].exp().diag_embed()
    lower = F.pad(t[..., 4:5], (0, 1)).unsqueeze(-2)
    return diagonal + torch.cat([torch.zeros_like(lower), lower], -2)


def wishart(t):
    return D.Wishart(torch.full(t.shape[:-1], 5.0).to(t), scale_tril=t.exp().diag_embed())


def low_rank(t):
    return D.LowRankMultivariateNormal(t[..., :2], t[..., 2:4, None], t[..., 4:6].exp())


def mixed_vectors(t):
    means = t[..., 2:6].unflatten(-1, (2, 2))
    return D.MixtureSameFamily(
        D.Categorical(logits=t[..., :2]), D.Independent(D.Normal(means, 1.0), 1)
    )


FOURS = torch.tensor([[i, j, 4 - i - j] for i in range(5) for j in range(5 - i)]).double()
AXIS = torch.linspace(-9, 9, 301, dtype=torch.float64)
PLANE = (torch.cartesian_prod(AXIS, AXIS), (AXIS[1] - AXIS[0]).square())
WARM = torch.tensor(1.5).double()


# Name: size of θ, the distribution of θ [..., size], and where its values lie:
# how many labels for a discrete one, all its labels, an interval, a plane, None where the KL is
# known, or a function: its Fisher information.
CASES = {
    "Normal": (2, lambda t: D.Normal(t[..., 0], t[..., 1].exp()), (-30, 30)),
    "StudentT": (2, lambda t: D.StudentT(5.0, t[..., 0], t[..., 1].exp()), (-400, 400)),
    "NegativeBinomial": (2, lambda t: D.NegativeBinomial(t[..., 0].exp(), logits=t[..., 1]), 400),
    "Poisson": (1, lambda t: D.Poisson(t[..., 0].exp()), 60),
    "Categorical": (3, lambda t: D.Categorical(logits=t), 3),
    "Categorical of probs": (3, lambda t: D.Categorical(probs=t.sigmoid()), 3),
    "Bernoulli": (1, lambda t: D.Bernoulli(logits=t[..., 0]), 2),
    "Bernoulli of probs": (1, lambda t: D.Bernoulli(t[..., 0].sigmoid()), 2),
    "Beta": (2, lambda t: D.Beta(2 + t[..., 0].exp(), 2 + t[..., 1].exp()), (1e-9, 1 - 1e-9)),
    "Gamma": (2, lambda t: D.Gamma(2 + t[..., 0].exp(), t[..., 1].exp()), (1e-9, 80)),
    "LogNormal": (2, lambda t: D.LogNormal(t[..., 0], 0.4 + 0 * t[..., 1]), (1e-9, 40)),
    "transformed": (4, lambda t: skewed(0.2 * t), (1e-9, 200)),
    "mixture": (6, mixture, (-60, 60)),
    "user's own": (1, lambda t: Triangle(t[..., 0]), 3),
    "Dirichlet": (3, lambda t: D.Dirichlet(t.exp()), None),
    "MultivariateNormal": (
        5,
        lambda t: D.MultivariateNormal(t[..., :2], scale_tril=triangular(t)),
        None,
    ),
    "MultivariateNormal of covariance": (
        5,
        lambda t: D.MultivariateNormal(t[..., :2], triangular(t) @ triangular(t).mT),
        None,
    ),
    "Independent": (
        4,
        lambda t: D.Independent(D.Normal(t[..., :2], t[..., 2:4].exp()), 1),
        None,
    ),
    "Laplace": (2, lambda t: D.Laplace(t[..., 0], t[..., 1].exp()), (-60, 60)),
    "Cauchy": (2, lambda t: D.Cauchy(t[..., 0], t[..., 1].exp()), (-9000, 9000)),
    "Exponential": (1, lambda t: D.Exponential(t[..., 0].exp()), (1e-9, 60)),
    "HalfNormal": (1, lambda t: D.HalfNormal(t[..., 0].exp()), (0, 30)),
    "HalfCauchy": (1, lambda t: D.HalfCauchy(t[..., 0].exp()), (0, 9000)),
    "Gumbel": (2, lambda t: D.Gumbel(t[..., 0], t[..., 1].exp()), (-20, 80)),
    "Weibull": (2, lambda t: D.Weibull(t[..., 0].exp(), 2.5 + t[..., 1].exp()), (1e-9, 10)),
    "Pareto": (1, lambda t: D.Pareto(WARM, 5 + t[..., 0].exp()), (1.5, 90)),
    "VonMises": (2, lambda t: D.VonMises(t[..., 0], t[..., 1].exp()), (-3.14159265, 3.14159265)),
    "Geometric": (1, lambda t: D.Geometric(logits=t[..., 0]), 300),
    "Binomial": (1, lambda t: D.Binomial(5, logits=t[..., 0]), 6),
    "Multinomial": (3, lambda t: D.Multinomial(4, logits=t), FOURS),
    "OneHotCategorical": (3, lambda t: D.OneHotCategorical(logits=t), torch.eye(3).double()),
    "LowRankMultivariateNormal": (6, low_rank, None),
    "Wishart": (2, wishart, lambda t: 10 * torch.eye(2).double()),  # 2 df in each log scale
    "RelaxedBernoulli": (
        1,
        lambda t: D.RelaxedBernoulli(WARM, logits=t[..., 0]),
        (1e-9, 1 - 1e-9),
    ),
    "ContinuousBernoulli": (1, lambda t: D.ContinuousBernoulli(logits=3 + t[..., 0]), (0, 1)),
    "Kumaraswamy": (
        2,
        lambda t: D.Kumaraswamy(2 + t[..., 0].exp(), 2 + t[..., 1].exp()),
        (1e-3, 1 - 1e-3),
    ),
    "Chi2": (1, lambda t: D.Chi2(4 + t[..., 0].exp()), (1e-9, 120)),
    "InverseGamma": (2, lambda t: D.InverseGamma(9 + t[..., 0].exp(), t[..., 1].exp()), (1e-3, 9)),
    "LogisticNormal": (4, lambda t: D.LogisticNormal(t[..., :2], t[..., 2:].exp()), None),
    "Independent counts": (2, lambda t: D.Independent(D.Poisson(t.exp()), 1), None),
    "mixture of vectors": (6, mixed_vectors, PLANE),
}
# Whose Fisher information is found exactly: by few outcomes, or by the KL that torch knows.
EXACT = [
    "Normal", "Poisson", "Categorical", "Categorical of probs", "Bernoulli", "Bernoulli of probs",
    "Beta", "Gamma", "LogNormal", "Dirichlet", "Independent", "Cauchy", "Exponential",
    "HalfNormal", "HalfCauchy", "Pareto", "Binomial", "OneHotCategorical", "Chi2", "InverseGamma",
    "LogisticNormal", "Independent counts",
]  # fmt: skip


def observed(distribution, value):
    """The call as the observer makes it."""
    call = read_log_prob(distribution, value)
    return replace(call, shape=distribution.log_prob(value).shape)


def theta(name, *batch):
    size = CASES[name][0]
    return (0.5 * randn(size, seed=size)).expand(*batch, size).clone()


def has_kl(name):
    p, q = (CASES[name][1](theta(name) + step) for step in (0.0, 0.1))
    try:
        D.kl_divergence(p, q)
    except NotImplementedError:
        return False
    return True


def grid(name):
    where = CASES[name][2]
    if isinstance(where, torch.Tensor):
        return where, torch.ones(len(where)).double()
    if where is PLANE:
        return PLANE[0], PLANE[1].expand(len(PLANE[0]))
    if isinstance(where, int):
        return torch.arange(where).double(), torch.ones(where).double()
    x = torch.linspace(*where, 400_001, dtype=torch.float64)
    volume = torch.full_like(x, float(x[1] - x[0]))
    volume[[0, -1]] /= 2
    return x, volume


@functools.cache
def exact_fisher(name):
    """E_y[s sᵀ], by quadrature, by adding up over all labels, or as the Hessian of the KL."""
    t = theta(name)
    make = CASES[name][1]
    if callable(CASES[name][2]):
        return CASES[name][2](t)
    if CASES[name][2] is None:
        return torch.autograd.functional.hessian(lambda u: D.kl_divergence(make(t), make(u)), t)
    y, volume = grid(name)
    score = torch.func.jacrev(lambda u, v: make(u).log_prob(v))
    scores = torch.func.vmap(score, in_dims=(None, 0))
    if len(y) < 1000:  # one by one, for some write in place

        def scores(u, v):
            return torch.stack([score(u, label) for label in v])

    D.Distribution.set_default_validate_args(False)
    try:
        s = scores(t, y)
        p = make(t).log_prob(y).exp() * volume
    finally:
        D.Distribution.set_default_validate_args(True)
    return torch.einsum("y,yi,yj->ij", p, s, s)


REGISTERED = [name for name in CASES if has_kl(name)]
ESTIMATED = [name for name in CASES if name not in REGISTERED]


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
@pytest.mark.parametrize("name", CASES)
def test_scores_have_mean_zero_and_the_covariance_of_the_exact_score(name, kind):
    leaf = theta(name, N).requires_grad_()
    distribution = CASES[name][1](leaf)
    call = observed(distribution, distribution.sample())
    before = torch.get_rng_state()
    ((scores, share),) = call.scores(kind, torch.ones(N).double(), 1, generator(1))
    assert share == 1
    assert torch.equal(before, torch.get_rng_state())
    (at_theta,) = torch.autograd.grad(call.predictions, leaf, scores)
    size = at_theta.shape[1]
    assert_mean_is(at_theta, torch.zeros(size).double())
    exact = exact_fisher(name)
    squares = at_theta[:, :, None] * at_theta[:, None, :]
    off = (squares.mean(0) - exact).abs()
    assert (off <= 5 * squares.std(0) / N**0.5 + 1e-3 * exact.abs().max()).all()


def passes(name, kind, weights, draws=1):
    """Each score at θ, `[passes, terms, size]`, and its share."""
    leaf = theta(name, len(weights)).requires_grad_()
    torch.manual_seed(3)
    distribution = CASES[name][1](leaf)
    value = distribution.sample()
    call = observed(distribution, value)
    rows, shares = [], []
    for scores, share in call.scores(kind, weights, draws, generator()):
        rows.append(torch.autograd.grad(call.predictions, leaf, scores, retain_graph=True)[0])
        shares.append(share)
    own = torch.autograd.grad(-distribution.log_prob(value).sum(), leaf)[0]
    return torch.stack(rows), torch.tensor(shares, dtype=torch.float64), own


@pytest.mark.parametrize("name", CASES)
def test_all_columns_of_a_root_add_up_to_the_fisher_information(name):
    weights = torch.tensor([1.0, 4.0, 0.0]).double()
    rows, shares, _ = passes(name, "exact", weights)
    assert float(shares.sum()) == pytest.approx(1.0)
    found = torch.einsum("p,pti,ptj->tij", shares, rows, rows)
    exact = weights[:, None, None] * exact_fisher(name)
    if name in EXACT:
        tolerance = 1e-3 if CASES[name][2] is not None else 1e-8
        assert float((found - exact).abs().max()) <= tolerance * float(exact.abs().max())
    else:  # from 32 draws a term
        assert float(found[0].trace() / exact[0].trace()) == pytest.approx(1, abs=0.9)
        assert not found[2].any()


@pytest.mark.parametrize("name", CASES)
def test_an_empirical_score_is_the_data_s_own_up_to_its_sign(name):
    weights = torch.tensor([1.0, 4.0, 0.0] * 4).double()
    rows, shares, own = passes(name, "empirical", weights, draws=2)
    assert shares.tolist() == [0.5, 0.5]
    exact = weights.sqrt()[:, None] * own
    torch.testing.assert_close(rows.abs(), exact.abs().expand_as(rows))
    signs = (rows * exact).sum(-1).sign()[:, weights > 0]
    assert signs.unique().tolist() == [-1, 1]
    assert not torch.equal(signs[0], signs[1])


@pytest.mark.parametrize(
    ("make", "bounds"),
    [
        (lambda t: D.Uniform(-t.exp(), t.exp()), "Uniform"),
        (lambda t: D.Pareto(t.exp(), 3.0), "Pareto"),
        (lambda t: D.Independent(D.Uniform(-t.exp(), 1.0), 0), "Independent"),
    ],
)
def test_a_support_that_the_model_moves_has_no_fisher_information_and_is_named(make, bounds):
    leaf = randn(4).abs().requires_grad_()
    distribution = make(leaf)
    with pytest.warns(UserWarning, match=f"log_prob of {bounds} says nothing"):
        assert read_log_prob(distribution, distribution.sample()) is None


def test_a_class_that_keeps_its_shape_back_is_understood_all_the_same():
    class Shapeless(Triangle):
        def __init__(self, slope):
            self.slope = slope
            D.Distribution.__init__(self, validate_args=False)

    slope = (0.3 * torch.ones(N).double()).requires_grad_()
    weights = torch.ones(N).double()
    for kind in ("sampled", "propagated"):
        call = observed(Shapeless(slope), torch.zeros(N).double())
        ((scores,), _) = next(iter(call.scores(kind, weights, 1, generator())))
        p = D.Categorical(logits=Triangle(slope[:1].detach())._table()).probs
        labels = torch.arange(3.0).double()
        variance = (p * labels.square()).sum() - (p * labels).sum().square()
        assert_mean_is(scores.square(), variance)


@pytest.mark.parametrize("name", CASES)
def test_scores_depend_on_their_generator_alone_and_weigh_by_a_square_root(name):
    leaf = theta(name, 5).requires_grad_()
    distribution = CASES[name][1](leaf)
    call = observed(distribution, distribution.sample())

    def at_theta(weights, seed):
        ((scores, _),) = call.scores("sampled", weights, 1, generator(seed))
        return torch.autograd.grad(call.predictions, leaf, scores, retain_graph=True)[0]

    one = at_theta(torch.ones(5).double(), 3)
    torch.manual_seed(1)
    assert torch.equal(one, at_theta(torch.ones(5).double(), 3))
    weights = torch.tensor([0.0, 1.0, 4.0, 9.0, 0.25]).double()
    torch.testing.assert_close(at_theta(weights, 3), weights.sqrt().unsqueeze(1) * one)


@pytest.mark.parametrize("name", CASES)
def test_minus_log_p_is_what_is_observed(name):
    leaf = theta(name, 4).requires_grad_()
    distribution = CASES[name][1](leaf)
    value = distribution.sample()
    factors = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    log_p = distribution.log_prob(value)
    (exact,) = torch.autograd.grad(-(factors.abs() * log_p).sum(), leaf, retain_graph=True)
    call = observed(distribution, value)
    weights = call.weights(factors)
    assert weights.tolist() == factors.abs().tolist()

    tensors = [t.detach().requires_grad_() for t in call.predictions]
    nll = (weights * -call._with(tensors).log_prob(value)).sum()
    grads = torch.autograd.grad(nll, tensors, allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad(call.predictions, leaf, grads)[0]
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(call.likelihood().nll(value), -log_p.detach())
    assert (call.likelihood().divergence(value) >= 0).all()
    for t in (*call.detached().predictions, call.likelihood().distribution.log_prob(value)):
        assert not t.requires_grad


def moved(name, call, step):
    """The call's predictions at θ + step."""
    distribution = CASES[name][1]((theta(name, *call.shape) + step).requires_grad_())
    distribution.sample()  # works out and caches what it did for the call
    return read_log_prob(distribution, call.target).predictions


@pytest.mark.parametrize("name", REGISTERED)
def test_kl_is_that_of_torch_distributions(name):
    leaf = theta(name, 4).requires_grad_()
    distribution = CASES[name][1](leaf)
    call = observed(distribution, distribution.sample())
    step = 0.1 * randn(4, leaf.shape[1], seed=5)
    other = CASES[name][1](leaf.detach() + step)
    there = call.likelihood(moved(name, call, step))
    ours = call.likelihood().kl(there)
    torch.testing.assert_close(ours, D.kl_divergence(distribution, other).detach())
    with torch.no_grad():  # some are made of derivatives
        assert not call.likelihood().kl(there).requires_grad


@pytest.mark.parametrize("name", ESTIMATED)
def test_kl_without_closed_form_is_estimated_from_the_same_samples_every_time(name):
    leaf = theta(name, N).requires_grad_()
    distribution = CASES[name][1](leaf)
    call = observed(distribution, distribution.sample())
    step = 0.1 * randn(leaf.shape[1], seed=5)
    now = call.likelihood(moved(name, call, step))
    before = torch.get_rng_state()
    ours = call.likelihood().kl(now)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(ours, call.likelihood().kl(now))
    assert (ours >= 0).all()
    y, volume = grid(name)
    p = CASES[name][1](theta(name)).log_prob(y)
    q = CASES[name][1](theta(name) + step).log_prob(y)
    exact = (p.exp() * (p - q) * volume).sum()
    assert_mean_is(ours, exact)
    assert not call.likelihood().kl(call.likelihood()).any()


@pytest.mark.parametrize(
    ("batch", "sample", "shape"),
    [((), (3,), (3,)), ((2,), (2,), (2,)), ((2,), (4, 2), (4, 2)), ((3, 1), (3, 4), (3, 4)),
     ((3, 1), (2, 3, 4), (2, 3, 4)), ((1, 3, 1), (2, 3, 4), (2, 3, 4)), ((2,), (), (2,))],
    ids=str,
)  # fmt: skip
def test_every_term_draws_its_own_label_however_the_argument_broadcasts(batch, sample, shape):
    m = randn(*batch).requires_grad_()
    call = observed(D.Normal(m * 1, torch.full_like(m, 1e-6)), randn(*sample))
    assert call.shape == shape
    y = call.likelihood().sample(0)
    assert y.shape == shape
    torch.testing.assert_close(y, m.detach().expand(shape), rtol=0, atol=1e-4)
    assert y.unique().numel() == y.numel()  # none is used twice
    vectors = D.Independent(D.Normal((m * 1).unsqueeze(-1).expand(*batch, 5), 1.0), 1)
    call = observed(vectors, randn(*sample, 5))
    assert call.likelihood().sample(0).shape == (*shape, 5)
    weights = torch.ones(shape).double().reshape(-1)
    ((scores, _),) = call.scores("sampled", weights, 1, generator())
    back = torch.autograd.grad(call.predictions, m, scores)
    assert back[0].shape == m.shape
    assert call.likelihood().kl(call.likelihood()).shape == weights.shape


# -- through the observer ----------------------------------------------------------------------


class Doubled(D.Transform):
    """A user's own, which is equal to nothing but itself."""

    domain = codomain = D.constraints.real
    bijective = True

    def _call(self, x):
        return 2 * x

    def _inverse(self, y):
        return y / 2

    def log_abs_det_jacobian(self, x, y):
        return torch.full_like(x, 2.0).log()


@pytest.mark.parametrize("cache_size", [0, 1])
def test_a_kl_that_takes_transforms_to_be_the_same_is_exact_where_they_hold_nothing(cache_size):
    mean, moved = randn(5).requires_grad_(), randn(5, seed=1)
    observed = D.TransformedDistribution(D.Normal(mean, 1.0), [Doubled(cache_size)])
    call = replace(read_log_prob(observed, moved), shape=torch.Size([5]))
    kl = call.likelihood().kl(call.likelihood((moved,)))
    exact = D.kl_divergence(D.Normal(mean, 1.0), D.Normal(moved, 1.0))
    # One that caches is copied, and two copies are not the same: then it is estimated.
    assert torch.equal(kl, exact) == (cache_size == 0)


@pytest.mark.parametrize("kind", ["sampled", "propagated", "exact"])
def test_terms_that_share_one_of_their_tensors_have_scores_in_it_too(kind):
    mean, shift = randn(5).requires_grad_(), torch.tensor(0.3).double().requires_grad_()
    halves = D.TransformedDistribution(
        D.Normal(mean, 1.0), [D.transforms.AffineTransform(shift, 2.0)]
    )
    call = observed(halves, randn(5, seed=2))
    assert {t.shape for t in call.predictions} == {torch.Size([5]), torch.Size([])}
    for seeds, _ in call.scores(kind, torch.ones(5).double(), 3, generator()):
        of_shift, of_mean = sorted(seeds, key=torch.numel)
        torch.testing.assert_close(of_shift, of_mean.sum() / 2)
        assert of_mean.abs().min() > 0 or kind == "exact"
    exact = [*call.scores("exact", torch.ones(5).double(), 1, generator())]
    assert len(exact) == 32  # as many as labels are drawn, each for all terms


class Summed(D.Distribution):
    """A user's own, which adds up its terms and does not say where it lives."""

    def __init__(self, mean):
        self.center = mean
        super().__init__(mean.shape, validate_args=False)

    def log_prob(self, value):
        return -0.5 * (value - self.center).square().sum()

    def sample(self, sample_shape=()):
        return D.Normal(self.center.detach(), 1.0).sample(sample_shape)


def test_terms_that_are_added_up_within_are_one_term():
    mean, y = randn(5).requires_grad_(), randn(5, seed=1)
    call = observed(Summed(mean), y)
    assert call.shape == ()
    likelihood = call.likelihood()
    assert likelihood.sample(0).shape == (5,)
    assert likelihood.divergence(y).tolist() == [0.5]
    ((score,), share), *_ = call.scores("empirical", torch.ones(1).double(), 1, generator())
    assert share == 1
    torch.testing.assert_close(score.abs(), (mean - y).abs().detach())


class Keyed(D.Normal):
    """A user's own, which keeps its tensors in a dictionary."""

    def __init__(self, mean):
        self.table = {"mean": mean}
        super().__init__(mean.detach(), 1.0)

    def log_prob(self, value):
        return -0.5 * (value - self.table["mean"]).square()


def test_tensors_in_a_dictionary_are_found_and_replaced():
    mean, moved = randn(5).requires_grad_(), randn(5, seed=1)
    call = read_log_prob(Keyed(mean), moved)
    assert call.predictions == (mean,)
    assert not call.likelihood((moved,)).nll(moved).any()
    torch.testing.assert_close(call.likelihood().nll(moved), 0.5 * (moved - mean).square())


def test_only_the_outermost_log_prob_counts():
    m = nn.Parameter(randn(4, 2))
    for make in (
        lambda t: D.Independent(D.Normal(t, 1.0), 1),
        lambda t: D.Independent(D.Bernoulli(logits=t), 1),  # calls a recognised loss
        lambda t: D.MixtureSameFamily(D.Categorical(logits=t), D.Normal(t, 1.0)),
    ):
        y = make(m.detach()).sample()
        _, observation = observe([m], lambda make=make, y=y: -make(m * 1).log_prob(y).mean())
        (scored,) = observation.scored
        assert observation.recognised == 1
        assert scored.weights.tolist() == [0.25] * 4
        assert scored.call.name == f"log_prob of {type(make(m)).__name__}"
        assert scored.call.predictions
        assert all(t.grad_fn is None for t in scored.call.predictions)


def test_what_no_model_computed_or_is_not_differentiated_says_nothing():
    m = nn.Parameter(randn(4))

    def objective():
        prior = D.Normal(torch.zeros(4).double(), 1.0).log_prob(m * 1)
        Unsampled(m * 1).log_prob(torch.zeros(4))
        with torch.no_grad():
            D.Normal(m * 1, 1.0).log_prob(torch.zeros(4))
        D.Normal(m * 1, 1.0).log_prob(torch.zeros(4))  # a metric, no part of the objective
        return F.mse_loss(m * 1, torch.zeros(4).double()) - prior.mean()

    _, observation = observe([m], objective)
    # A density that the parameter is scored under predicts nothing; it has its own curvature.
    own = "the Gauss-Newton matrix of a loss of its own"
    assert [loss.call.name for loss in observation.scored] == [own, "mse_loss"]
    assert observation.recognised == 2


def test_a_distribution_that_builds_another_from_what_it_hides_is_seen_through():
    network = nn.Linear(3, 1).double()

    class Hidden(D.Distribution):
        def log_prob(self, value):
            return D.Normal(network(randn(5, 3)).squeeze(1), 1.0).log_prob(value)

        def sample(self, sample_shape=()):
            raise AssertionError

    y = randn(5, seed=2)
    hidden = Hidden(validate_args=False)
    _, observation = observe([*network.parameters()], lambda: -hidden.log_prob(value=y).sum())
    assert [loss.call.name for loss in observation.scored] == ["log_prob of Normal"]


def test_the_methods_are_as_before_outside_also_after_an_exception():
    m = nn.Parameter(randn(4))
    optimizer = NaturalGradientOptimizer([m])
    kinds = (D.Distribution, D.Normal, D.Independent, Triangle)
    before = [vars(kind)["log_prob"] for kind in kinds]
    with optimizer.observe():
        assert all(
            vars(kind)["log_prob"] is not old for kind, old in zip(kinds, before, strict=True)
        )
        assert "log_prob" not in vars(Unsampled)
    assert [vars(kind)["log_prob"] for kind in kinds] == before
    with pytest.raises(RuntimeError, match="user's own"), optimizer.observe():
        raise RuntimeError("user's own")
    with pytest.raises(ValueError, match="value argument"), optimizer.observe():
        D.Bernoulli(logits=m * 1).log_prob(torch.full((4,), 7.0))
    assert [vars(kind)["log_prob"] for kind in kinds] == before
    # And a call that failed does not make the next one an inner one.
    with optimizer.observe():
        with pytest.raises(ValueError, match="value argument"):
            D.Bernoulli(logits=m * 1).log_prob(torch.full((4,), 7.0))
        loss = -D.Bernoulli(logits=m * 1).log_prob(torch.ones(4).double()).mean()
    loss.backward()
    optimizer.step()


def test_what_another_thread_scores_is_none_of_ours():
    m = nn.Parameter(randn(4))

    def objective():
        def other():
            D.Normal(m * 1, 1.0).log_prob(torch.zeros(4))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return -D.Normal(m * 1, 1.0).log_prob(torch.zeros(4)).mean()

    _, observation = observe([m], objective)
    assert observation.recognised == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "propagated") for name in CASES]
    + [("Normal", kind) for kind in ("sampled", "exact", "empirical")],
)
def test_training_lowers_the_loss_and_measures_its_steps(name, kind):
    torch.manual_seed(0)
    size, make, _ = CASES[name]
    x = randn(60, 3, seed=11)
    y = make(0.7 * (x @ randn(3, size, seed=12))).sample()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, size)).double()
    optimizer = NaturalGradientOptimizer(model.parameters(), fisher=kind)
    losses, measured = [], 0
    for _ in range(4):
        with optimizer.observe():
            loss = -make(model(x)).log_prob(y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        kl = optimizer.report.kl
        measured += kl is not None and 0 < kl < 1
    assert losses[-1] < losses[0] - 0.01
    assert measured == 4


def test_no_two_losses_are_drawn_from_the_same_seed():
    g = generator()
    assert len({_seed(g) for _ in range(300)}) == 300


def test_terms_that_share_a_prediction_have_a_root_as_exact_as_one_term_has():
    mean = torch.zeros(2).double().requires_grad_()
    call = observed(D.Normal(mean * 1, torch.full_like(mean, 2.0)), randn(5, 2))
    for (score, *_), share in call.scores("propagated", torch.ones(10).double(), 3, generator()):
        assert share == pytest.approx(1 / 3)
        torch.testing.assert_close(score.square(), torch.full((2,), 5 / 4).double())
