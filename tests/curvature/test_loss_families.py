"""Losses of counts, variances, absolute and soft-target errors: families, readers and training.

Scores, divergences and weights against torch.distributions, quadrature and autograd on the loss.
"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import distributions, nn

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.likelihoods import read_loss_call
from ngplugin.curvature.likelihoods.huber import Huber
from ngplugin.curvature.likelihoods.laplace import Laplace
from ngplugin.curvature.likelihoods.loss_calls import RECOGNISED
from ngplugin.curvature.likelihoods.normal import Normal
from ngplugin.curvature.likelihoods.poisson import Poisson
from tests.oracle import assert_mean_is, generator, observe, randn

REDUCTIONS = ["none", "mean", "sum"]
LEGACY = [{"size_average": a, "reduce": r} for a in (True, False) for r in (True, False)]
THRESHOLDS = [0.05, 1.0, 4.0]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def huber(a):
    return lambda eta: Huber(eta, double(a).squeeze())


def huber_rho(x, a):
    return torch.where(x.abs() <= a, 0.5 * x**2, a * (x.abs() - 0.5 * a))


def huber_density(x, a):
    """The normalized density on a grid."""
    p = (-huber_rho(x, a)).exp()
    return p / torch.trapezoid(p, x)


GRID = torch.linspace(-400, 400, 1_600_001, dtype=torch.float64)


# -- families --------------------------------------------------------------------------------

CASES = {
    "poisson": (Poisson, double(0.7), double(math.exp(0.7)).diag()),
    "normal": (Normal, double(0.3, 0.5), double(2.0, 2.0).diag()),  # 1/v, 1/(2v²)
    "laplace": (Laplace, double(0.3), double(1.0).diag()),
    **{
        f"huber {a}": (
            huber(a),
            double(0.2),
            torch.trapezoid(huber_density(GRID, a) * GRID.clamp(-a, a) ** 2, GRID).reshape(1, 1),
        )
        for a in THRESHOLDS
    },
}


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
@pytest.mark.parametrize("name", CASES)
def test_scores_have_mean_zero_and_the_covariance_of_the_exact_score(name, kind):
    family, eta, exact = CASES[name]
    rows = eta.expand(40_000, len(eta)).clone()
    likelihood = family(rows if len(eta) > 1 else rows.squeeze(1))
    score = getattr(likelihood, f"{kind}_score")(generator(1))
    assert score.shape == likelihood.natural.shape
    score = score.reshape(40_000, -1)
    assert_mean_is(score, torch.zeros(len(eta), dtype=torch.float64))
    rounding = 1e-5 * exact.abs()  # of the quadrature
    squares = score[:, :, None] * score[:, None, :]
    off = (squares.mean(0) - exact).abs()
    assert (off <= 5 * squares.std(0) / 200 + rounding).all()


@pytest.mark.parametrize("name", CASES)
def test_scores_depend_on_nothing_but_their_generator(name):
    family, eta, _ = CASES[name]
    likelihood = family(eta.expand(20, len(eta)).clone() if len(eta) > 1 else eta.expand(20))
    before = torch.get_rng_state()
    for kind in ("sampled_score", "propagated_score"):
        one = getattr(likelihood, kind)(generator(7))
        assert torch.equal(one, getattr(likelihood, kind)(generator(7)))
    assert torch.equal(before, torch.get_rng_state())


def as_distribution(name, eta):
    return {
        "poisson": lambda: distributions.Poisson(eta.exp()),
        "normal": lambda: distributions.Normal(eta[:, 0], eta[:, 1].sqrt()),
        "laplace": lambda: distributions.Laplace(eta, 1.0),
    }[name]()


@pytest.mark.parametrize("name", ["poisson", "normal", "laplace"])
def test_kl_is_that_of_torch_distributions(name):
    eta, other = randn(20, 2, seed=1).exp(), randn(20, 2, seed=2).exp()
    if name != "normal":
        eta, other = eta[:, 0], other[:, 0]
    family = CASES[name][0]
    exact = distributions.kl_divergence(as_distribution(name, eta), as_distribution(name, other))
    torch.testing.assert_close(family(eta).kl(family(other)), exact)


@pytest.mark.parametrize("distance", [1e-3, 0.3, 2.0, 7.0])
@pytest.mark.parametrize("a", THRESHOLDS)
def test_kl_of_huber_densities_is_that_of_quadrature(a, distance):
    p = huber_density(GRID, a)
    shift = round(distance / 5e-4)
    rho = huber_rho(GRID, a)
    change = torch.trapezoid(p[shift:] * (rho[: len(rho) - shift] - rho[shift:]), GRID[shift:])
    ours = huber(a)(double(0.4)).kl(huber(a)(double(0.4 + distance)))
    assert float(ours) == pytest.approx(float(change), rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_kl_of_a_small_step_is_half_its_square_in_the_fisher_information(name):
    family, eta, exact = CASES[name]
    step = 1e-4 * randn(len(eta), seed=3)
    one, other = (family(t.unsqueeze(0) if len(eta) > 1 else t) for t in (eta, eta + step))
    assert float(one.kl(one)) == 0
    assert float(one.kl(other)) == pytest.approx(float(0.5 * step @ exact @ step), rel=1e-2)


@pytest.mark.parametrize("name", ["poisson", "normal", "laplace"])
def test_nll_differs_from_minus_log_p_by_what_no_prediction_changes(name):
    eta, other = randn(20, 2, seed=1).exp(), randn(20, 2, seed=2).exp()
    if name != "normal":
        eta, other = eta[:, 0], other[:, 0]
    family = CASES[name][0]
    y = torch.arange(20).double()
    ours = family(eta).nll(y) - family(other).nll(y)
    exact = as_distribution(name, other).log_prob(y) - as_distribution(name, eta).log_prob(y)
    torch.testing.assert_close(ours, exact)


def test_divergence_is_zero_where_the_prediction_meets_the_data():
    y = double(0.0, 1.0, 3.0)
    assert float(Poisson(double(-800.0, 0.0, math.log(3.0))).divergence(y).abs().max()) < 1e-12
    assert not Normal(torch.stack([y, y + 1], -1)).divergence(y).any()
    assert not Laplace(y).divergence(y).any()
    assert not huber(1.0)(y).divergence(y).any()
    wide = Normal(torch.stack([y, torch.full_like(y, 1e-9)], -1))
    assert (wide.divergence(y + 1) > 0).all()
    assert (wide.nll(y) < 0).all()


# -- readers ---------------------------------------------------------------------------------


def check(function, args, kwargs, *leaves):
    """Σ w nll has the objective's gradient in the leaves, whatever is done to the loss value."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def outer(value):
        return (value * (1 + randn(*value.shape, seed=9).abs())).sum() * 0.7

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = function(*args(*leaves), **kwargs)
        exact = torch.autograd.grad(outer(value), leaves, retain_graph=True)
        (gradient,) = torch.autograd.grad(outer(value), value)
    call = read_loss_call(function, args(*leaves), kwargs)
    weights = call.weights(gradient)
    assert weights.shape == (len(call.target),)
    assert call.divisor is None or call.divisor.dim() == 0
    family = call.family(call.natural(*call.predictions))
    objective = (weights * family.nll(call.target)).sum()
    ours = torch.autograd.grad(objective, leaves, retain_graph=True)
    torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-12)
    # Scores are carried back as the natural parameters depend on the predictions.
    score = randn(*family.natural.shape, seed=8)
    back = torch.autograd.grad(
        call.predictions, leaves, call.pull_back(score), allow_unused=True, retain_graph=True
    )
    again = call.natural(*call.predictions)
    torch.testing.assert_close(back, torch.autograd.grad(again, leaves, score))
    assert len(call.likelihood(tuple(p * 1 for p in call.predictions)).natural) == len(weights)
    return call, weights


OPTIONS = [*({"reduction": r} for r in REDUCTIONS), *LEGACY]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("log_input", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_poisson_losses_are_what_is_observed(log_input, full, options):
    y = torch.arange(6).reshape(2, 3)
    more = {"log_input": log_input, "full": full, "eps": 0.1, **options}
    z = randn(2, 3)
    call, _ = check(F.poisson_nll_loss, lambda z: (z if log_input else z.exp(), y), more, z)
    rate = z.exp() + (0.0 if log_input else 0.1)
    torch.testing.assert_close(call.likelihood().natural, rate.log().reshape(-1))
    check(F.poisson_nll_loss, lambda z: (z.exp(), y[:1]), more, z)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (4,), (1, 3)], ids=str)
def test_gaussian_losses_are_what_is_observed(shape, full, reduction):
    m, y = randn(4, 3), randn(4, 3, seed=1)
    options = {"full": full, "reduction": reduction}
    u = randn(*shape, seed=2)
    try:
        F.gaussian_nll_loss(m, y, u.exp())
    except ValueError as error:
        pytest.skip(f"this torch: {error}")
    u.view(-1)[0] = -30.0  # a variance below eps
    known = u.exp()
    check(F.gaussian_nll_loss, lambda m, u: (m, y, u.exp()), options, m, u)
    call, _ = check(F.gaussian_nll_loss, lambda m: (m, y, known), options, m)
    assert len(call.predictions) == 1
    v = known.unsqueeze(-1) if shape == (4,) else known
    exact = v.clamp_min(1e-6).expand(4, 3).reshape(-1)
    torch.testing.assert_close(call.likelihood().natural[:, 1], exact)
    check(F.gaussian_nll_loss, lambda u: (m, y, u.exp()), options, u)
    check(F.gaussian_nll_loss, lambda m, u: (y, m, u.exp()), options, m, u)
    check(F.gaussian_nll_loss, lambda m: (m, y, 0.4), options, m)
    check(F.gaussian_nll_loss, lambda a, b: (a, b, known), options, m, y)


@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"reduction": "batchmean"}, {**LEGACY[2], "reduction": "batchmean"}],
    ids=str,
)
@pytest.mark.parametrize("log_target", [True, False])
@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 3), 1), ((2, 3, 5), 1), ((2, 5, 3), -1), ((3,), 0)]
)
def test_divergences_from_soft_targets_are_what_is_observed(shape, dim, log_target, options):
    def args(z):
        q = randn(*shape, seed=1).softmax(dim)
        return z.log_softmax(dim), q.log() if log_target else q

    leaf = randn(*shape).requires_grad_()
    options = {"log_target": log_target, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = F.kl_div(*args(leaf), **options)
    (exact,) = torch.autograd.grad(value.sum(), leaf)
    call = read_loss_call(F.kl_div, args(leaf), options)
    weights = call.weights(torch.ones_like(value))
    family = call.family(call.natural(*call.predictions))
    objective = (weights * family.nll(call.target)).sum()
    torch.testing.assert_close(objective, value.sum())
    torch.testing.assert_close(torch.autograd.grad(objective, leaf)[0], exact)
    assert len(weights) == leaf.numel() // 3


def test_a_divergence_weighs_its_terms_by_what_was_done_to_their_classes():
    z, q = randn(4, 3, 2).requires_grad_(), randn(4, 3, 2, seed=1).softmax(1)
    g = randn(4, 3, 2, seed=2).abs()
    call = read_loss_call(F.kl_div, (z.log_softmax(1), q), {"reduction": "none"})
    torch.testing.assert_close(call.weights(g), (g * q).sum(1).reshape(-1))


def test_a_divergence_of_what_is_no_probability_says_nothing():
    q = randn(4, 3).softmax(1)
    assert read_loss_call(F.kl_div, (randn(4, 3).requires_grad_(), q), {}) is None
    assert read_loss_call(F.kl_div, (q.log(), q), {}) is None


def test_where_probabilities_add_up_over_two_dimensions_classes_are_the_last_or_the_second():
    twice = double(0.5, 0.3, 0.2, 0.2, 0.5, 0.3, 0.3, 0.2, 0.5).reshape(3, 3).log()
    for shape, dim in (((2, 3, 3, 2), 1), ((2, 2, 3, 3), 3), ((3, 3, 2, 2), 1)):
        places = [i for i, n in enumerate(shape) if n == 3]
        log_p = torch.empty(shape).double().movedim(places, (-2, -1)).copy_(twice)
        log_p = log_p.movedim((-2, -1), places)
        call = read_loss_call(F.kl_div, (log_p.requires_grad_(), log_p.exp()), {})
        expected = log_p.movedim(dim, -1).reshape(-1, 3)
        torch.testing.assert_close(call.likelihood().natural, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_soft_margins_are_what_is_observed(options):
    y = randn(4, 3, seed=1).sign()
    call, _ = check(F.soft_margin_loss, lambda z: (z, y), options, randn(4, 3))
    assert call.target.unique().tolist() == [0.0, 1.0]


def robust_losses():
    weight = randn(4, 3, seed=3).abs()
    for options in OPTIONS:
        yield F.l1_loss, options
        yield F.l1_loss, {**options, "weight": weight}
        yield F.smooth_l1_loss, {**options, "beta": 0.0}
        yield F.smooth_l1_loss, {**options, "beta": 0.3}
    for reduction in REDUCTIONS:
        yield F.huber_loss, {"reduction": reduction, "delta": 0.5}
        yield F.huber_loss, {"reduction": reduction, "delta": 0.5, "weight": weight}


def test_robust_losses_are_what_is_observed():
    m, y = randn(4, 3), randn(4, 3, seed=1)
    for function, options in robust_losses():
        check(function, lambda m: (m, y), options, m)
        check(function, lambda m: (y, m), options, m)
        check(function, lambda m, n: (m, n), options, m, y)
        if "weight" not in options:
            check(function, lambda m: (m, y[:1]), options, m)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_absolute_errors_have_the_scale_under_which_the_data_are_likeliest(size):
    m, y = (size * randn(4, 3)).requires_grad_(), torch.zeros(4, 3).double()
    b = float(m.abs().mean())
    call = read_loss_call(F.l1_loss, (m, y), {"reduction": "sum"})
    weights = call.weights(torch.ones(()).double())
    torch.testing.assert_close(weights, torch.full((12,), b).double())
    # The score's square in the prediction is 1/b², the information of a Laplace location.
    back = call.pull_back(call.likelihood().sampled_score(generator()))[0]
    torch.testing.assert_close(back.square(), torch.full((4, 3), b**-2).double())
    # In nats one term's divergence is its error in units of b, one on average.
    assert float(call.likelihood().divergence(call.target).mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("size", [1e-3, 0.5, 1.0, 30.0])
def test_huber_errors_have_the_scale_under_which_the_data_are_likeliest(size):
    m = (size * randn(50)).requires_grad_()
    y = torch.zeros(50).double()
    call = read_loss_call(F.huber_loss, (m, y), {"reduction": "sum"})
    s = call.weights(torch.ones(()).double()).unique().squeeze()
    rho = F.huber_loss(m, y, reduction="none").detach()

    def mean_nll(s):  # -log p of the density ∝ exp(-ρ/s)
        x = torch.linspace(-60 * size - 60, 60 * size + 60, 2_000_001).double()
        Z = torch.trapezoid((-F.huber_loss(x, x * 0, reduction="none") / s).exp(), x)
        return float(rho.mean() / s + Z.log())

    best = mean_nll(float(s))
    assert best <= mean_nll(float(s) * 1.01)
    assert best <= mean_nll(float(s) / 1.01)
    # Small errors: the variance of a Gaussian; large ones: δ times the scale of a Laplace.
    if size == 1e-3:
        assert float(s) == pytest.approx(float(m.square().mean()))
    if size == 30.0:
        assert float(s) == pytest.approx(float(rho.mean()), rel=0.05)


def test_a_target_that_is_no_number_and_masked_leaves_the_scale_alone():
    m, y = randn(4).requires_grad_(), double(0.1, math.nan, 0.3, 0.2)
    for function in (F.l1_loss, F.smooth_l1_loss, F.huber_loss):
        call = read_loss_call(function, (m, y), {"reduction": "none"})
        assert call.mass.isfinite().all()
        other = read_loss_call(function, (m[[0, 2, 3]], y[[0, 2, 3]]), {"reduction": "none"})
        torch.testing.assert_close(call.mass[:3], other.mass)


def test_errors_that_are_all_zero_leave_finite_numbers():
    m = randn(4).requires_grad_()
    for function in (F.l1_loss, F.smooth_l1_loss, F.huber_loss):
        call = read_loss_call(function, (m, m.detach()), {})
        assert call.weights(torch.tensor(1.0)).isfinite().all()
        assert call.pull_back(call.likelihood().sampled_score(generator()))[0].isfinite().all()


# -- training --------------------------------------------------------------------------------

X = randn(40, 3, seed=11)
SIGNAL = X @ randn(3, 2, seed=12)
COUNTS = torch.poisson(SIGNAL.clamp(-3, 2).exp(), generator=generator())
NOISY = SIGNAL + 0.3 * randn(40, 2, seed=13)
OBJECTIVES = {
    "poisson_nll_loss": lambda z: F.poisson_nll_loss(z, COUNTS),
    "poisson_nll_loss of rates": lambda z: F.poisson_nll_loss(F.softplus(z), COUNTS, False),
    "gaussian_nll_loss": lambda z: F.gaussian_nll_loss(
        z[:, :1], NOISY[:, :1], F.softplus(z[:, 1:])
    ),
    "kl_div": lambda z: F.kl_div(z.log_softmax(1), (3 * SIGNAL).softmax(1), reduction="batchmean"),
    "l1_loss": lambda z: F.l1_loss(z, NOISY),
    "smooth_l1_loss": lambda z: nn.SmoothL1Loss(beta=0.5)(z, NOISY),
    "huber_loss": lambda z: F.huber_loss(z, NOISY, delta=0.2),
    "soft_margin_loss": lambda z: F.soft_margin_loss(z, SIGNAL.sign()),
}


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_loss_and_measures_its_steps(name, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = NaturalGradientOptimizer(model.parameters(), fisher=kind)
    losses, measured = [], 0
    for _ in range(30):
        with optimizer.observe():
            loss = OBJECTIVES[name](model(X))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        kl = optimizer.report.kl
        measured += kl is not None and 0 < kl < 1
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0])
    assert measured >= 9
    assert name.split()[0] in RECOGNISED


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_is_recognised_as_one_loss(name):
    z = nn.Parameter(randn(40, 2))
    _, observation = observe([z], lambda: OBJECTIVES[name](z * 1))
    (scored,) = observation.scored
    assert scored.call.name == name.split()[0]
    (_, now), *_ = observation.replay()
    assert float(scored.kl(now)) == 0
    assert float(scored.reduction(now)) == 0
