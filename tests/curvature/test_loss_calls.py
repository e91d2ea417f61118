"""What a loss call says about a prediction, against autograd on the loss itself.

Σ w·nll(likelihood, target) must be the objective up to a constant: then its gradient and Hessian in
the natural parameters are the objective's own.
"""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.likelihoods import read_loss_call
from ngplugin.curvature.likelihoods.loss_calls import _READERS
from tests.oracle import assert_mean_is, generator, observe, output_fisher, randn

REDUCTIONS = ["none", "mean", "sum"]
LEGACY = [
    {"size_average": a, "reduce": r}
    for a in (None, True, False)
    for r in (None, True, False)
    if (a, r) != (None, None)
]


def check(function, args, kwargs, leaf, outer=lambda value: value.sum()):
    """The observed Σ w nll is the objective in gradient and Hessian at `leaf`, the model's logits.

    Args:
        args: of the function, computed from `leaf` by a callable.
        outer: what the user does with the loss value.
    """
    leaf = leaf.detach().requires_grad_()

    def objective(z):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return outer(function(*args(z), **kwargs))

    value = function(*args(leaf), **kwargs)
    (gradient,) = torch.autograd.grad(outer(value), value)
    call = read_loss_call(function, args(leaf), kwargs)
    weights = call.weights(gradient)
    assert weights.dim() == 1
    assert len(weights) == len(call.target) == len(call.likelihood().natural)

    def observed(z):
        again = read_loss_call(function, args(z), kwargs)
        family = again.family(again.natural(*again.predictions))
        return (weights * family.nll(call.target)).sum()

    exact = torch.autograd.grad(objective(leaf), leaf)[0]
    ours = torch.autograd.grad(observed(leaf), leaf)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)
    hessian = torch.autograd.functional.hessian
    curvature = hessian(objective, leaf)
    torch.testing.assert_close(hessian(observed, leaf), curvature, rtol=1e-8, atol=1e-11)
    # And that Hessian is Σ w H, carried back as scores are.
    natural = call.likelihood().natural

    def natural_of(z):
        again = read_loss_call(function, args(z), kwargs)
        return again.natural(*again.predictions).reshape(len(weights), -1)

    J = torch.autograd.functional.jacobian(natural_of, leaf)
    J = J.reshape(len(weights), -1, leaf.numel())  # [terms, η, leaf]
    H = torch.stack([output_fisher(call.family, eta) for eta in natural])
    fisher = torch.einsum("t,tip,tij,tjq->pq", weights, J, H, J)
    torch.testing.assert_close(fisher, curvature.reshape(fisher.shape), rtol=1e-8, atol=1e-11)
    score = randn(*natural.shape, seed=8)
    back = torch.autograd.grad(call.predictions, leaf, call.pull_back(score))[0]
    carried = torch.einsum("ti,tip->p", score.reshape(len(score), -1), J)
    torch.testing.assert_close(back.reshape(-1), carried)
    return call, weights


CLASSES = 3
LOGIT_SHAPES = [(CLASSES,), (1, CLASSES), (4, CLASSES), (2, CLASSES, 2)]


def class_losses(shape):
    """Every combination of function, kind of target and options: (function, target, options)."""
    indices = torch.randint(CLASSES, shape[:1] + shape[2:] if len(shape) > 1 else ())
    padded = indices.clone()
    padded.view(-1)[0] = -1
    targets = [("indices", indices, {})]
    if indices.numel() > 1:  # a mean over nothing is not a number
        targets.append(("padded", padded, {"ignore_index": -1}))
        if (indices != indices.view(-1)[0]).any():
            targets.append(("class", indices, {"ignore_index": int(indices.view(-1)[0])}))
    soft = randn(*shape, seed=3).softmax(min(1, len(shape) - 1))
    class_weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    for kind, target, ignored in [*targets, ("soft", soft, {})]:
        for weight in ({}, {"weight": class_weight}):
            for smoothing in (0.0, 0.1, 1.0):
                options = {**ignored, **weight, "label_smoothing": smoothing}
                yield F.cross_entropy, target, options
            if kind != "soft":
                yield F.nll_loss, target, {**ignored, **weight}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", LOGIT_SHAPES, ids=str)
def test_class_losses_with_any_options_are_what_is_observed(shape, reduction):
    def outer(value):
        return (value * (1 + randn(*value.shape, seed=9).abs())).sum() * 0.7

    torch.manual_seed(0)
    for function, target, options in class_losses(shape):

        def args(z, function=function, target=target):
            return (
                z if function is F.cross_entropy else z.log_softmax(min(1, z.dim() - 1)),
                target,
            )

        check(function, args, {**options, "reduction": reduction}, randn(*shape, seed=2), outer)


@pytest.mark.parametrize("legacy", LEGACY, ids=str)
@pytest.mark.parametrize("function", [F.cross_entropy, F.mse_loss, F.binary_cross_entropy])
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_the_deprecated_reduction_arguments_mean_what_torch_makes_of_them(function, legacy):
    z = randn(4, CLASSES)
    y = {
        F.cross_entropy: torch.tensor([0, 2, 1, 1]),
        F.mse_loss: randn(4, CLASSES, seed=1),
        F.binary_cross_entropy: randn(4, CLASSES, seed=1).sigmoid(),
    }[function]
    sigmoid = function is F.binary_cross_entropy
    check(function, lambda z: (z.sigmoid() if sigmoid else z, y), legacy, z)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (4, 2), (2, 2, 2)], ids=str)
def test_binary_losses_with_any_options_are_what_is_observed(shape, hard, reduction):
    y = randn(*shape, seed=1).sigmoid()
    y = y.round() if hard else y
    weights = [None, *(0.2 + randn(*part, seed=3).abs() for part in (shape, shape[-1:], ()))]

    def outer(value):
        return (value * (1 + randn(*value.shape, seed=9).abs())).sum()

    for weight in weights:
        options = {"reduction": reduction, "weight": weight}
        z = randn(*shape, seed=2)
        check(F.binary_cross_entropy, lambda z: (z.sigmoid(), y), options, z, outer)
        for pos_weight in weights:
            check(
                F.binary_cross_entropy_with_logits,
                lambda z: (z, y),
                {**options, "pos_weight": pos_weight},
                z,
                outer,
            )


def test_a_positive_class_that_weighs_nothing_leaves_finite_numbers():
    z, y = randn(4), torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    options = {"pos_weight": torch.tensor(0.0, dtype=torch.float64)}
    call, weights = check(F.binary_cross_entropy_with_logits, lambda z: (z, y), options, z)
    assert weights.tolist() == [0.0, 0.25, 0.0, 0.25]
    assert call.likelihood().nll(call.target).isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_squared_error_is_observed_from_either_side(swapped, weighted, reduction):
    z, y = randn(3, 2), randn(3, 2, seed=1)
    options = {"reduction": reduction}
    if weighted:
        options["weight"] = randn(3, 2, seed=2).abs()
    call, weights = check(F.mse_loss, lambda z: (y, z) if swapped else (z, y), options, z)
    if not weighted:
        assert weights.unique().tolist() == [2.0 / (6 if reduction == "mean" else 1)]
    torch.testing.assert_close(call.target, y.reshape(-1))


def test_squared_error_between_two_predictions_scores_their_difference():
    z = randn(2, 3)
    call, _ = check(F.mse_loss, lambda z: (z[0], z[1] ** 1), {"reduction": "mean"}, z)
    torch.testing.assert_close(call.likelihood().natural, z[0] - z[1])
    assert not call.target.any()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("shapes", [((3, 1), (3, 4)), ((3, 4), (4,)), ((3, 1), (4,))], ids=str)
def test_squared_error_broadcasts_as_torch_does(shapes):
    z, y = randn(*shapes[0]), randn(*shapes[1], seed=1)
    _, weights = check(F.mse_loss, lambda z: (z, y), {}, z)
    assert len(weights) == 12


def test_dense_targets_over_many_dimensions_are_read_term_by_term():
    z, y = randn(2, 3, 2, 2), torch.randint(3, (2, 2, 2), generator=generator())
    call, weights = check(F.cross_entropy, lambda z: (z, y), {"reduction": "sum"}, z)
    assert len(weights) == 8
    torch.testing.assert_close(call.target, y.reshape(-1))
    torch.testing.assert_close(call.likelihood().natural[1], z[0, :, 0, 1])


def test_many_classes_in_single_precision_add_up_to_one_but_for_rounding():
    log_p = torch.randn(64, 1000, generator=generator()).log_softmax(1).requires_grad_()
    assert log_p.logsumexp(1).abs().max() > torch.finfo(log_p.dtype).eps
    call = read_loss_call(F.kl_div, (log_p, log_p.detach().exp()), {"reduction": "batchmean"})
    assert call is not None
    assert call.likelihood().natural.shape == (64, 1000)


@pytest.mark.parametrize("function", _READERS, ids=lambda function: function.__name__)
def test_arguments_have_the_names_the_order_and_the_defaults_of_torch(function):
    wanted, ours = (
        {name: p.default for name, p in inspect.signature(f).parameters.items()}
        for f in (function, _READERS[function])
    )
    ours.pop("name", None)  # what the loss is called here
    shared = {name: ours[name] for name in wanted}  # `weight` is younger than torch 2.6
    assert [*shared.items()] == [*wanted.items()]
    assert [name for name in ours if name in wanted] == [*wanted]


def test_a_poisson_rate_of_zero_has_the_logarithm_that_torch_gives_it():
    rate = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    call = read_loss_call(F.poisson_nll_loss, (rate, torch.ones(3)), {"log_input": False})
    loss = F.poisson_nll_loss(rate, torch.ones(3), log_input=False)
    torch.testing.assert_close(-call.likelihood().natural.mean(), loss.detach())


def test_arguments_may_be_named():
    z, y = randn(3, 2).requires_grad_(), randn(3, 2, seed=1)
    call = read_loss_call(F.mse_loss, (), {"target": y, "input": z, "reduction": "sum"})
    assert call.predictions[0] is z


def test_a_loss_of_nothing_that_requires_grad_says_nothing():
    for function in (F.mse_loss, F.binary_cross_entropy_with_logits):
        assert read_loss_call(function, (randn(3), randn(3)), {}) is None
    y = torch.zeros(3, dtype=torch.long)
    assert read_loss_call(F.cross_entropy, (randn(3, 2), y), {}) is None
    assert read_loss_call(torch.add, (randn(3).requires_grad_(), 1), {}) is None


def test_a_subtracted_loss_still_weighs_positively():
    call = read_loss_call(F.mse_loss, (randn(3).requires_grad_(), randn(3)), {})
    assert (call.weights(torch.tensor(-1.0)) > 0).all()


def test_what_was_predicted_stays_though_a_step_writes_to_the_parameter_that_it_was():
    parameter = nn.Parameter(torch.zeros(8)[4:])  # in the middle of some memory
    call = read_loss_call(F.mse_loss, (parameter, torch.ones(4)), {})
    before = call.likelihood().natural
    with torch.no_grad():
        parameter.add_(1.0)
    assert not before.any()


def test_a_saturated_prediction_has_nothing_to_solve_for():
    z = torch.tensor([800.0, 0.3]).double().requires_grad_()
    call = read_loss_call(F.binary_cross_entropy_with_logits, (z, torch.zeros(2).double()), {})
    root = call.fisher_root(torch.ones(2).double())
    assert root.columns[0][0] == root.residuals[0][0] == 0
    torch.testing.assert_close((root.columns[0] * root.residuals[0])[1], z[1].sigmoid().detach())


def test_half_precision_predictions_are_read_in_float32():
    z = randn(3, 4).bfloat16().requires_grad_()
    call = read_loss_call(F.cross_entropy, (z, torch.tensor([0, 1, 2])), {})
    assert call.likelihood().natural.dtype == torch.float32
    assert call.weights(torch.tensor(1.0)).dtype == torch.float32
    assert call.pull_back(torch.ones(3, 4))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_probability_that_has_rounded_to_a_bound_pulls_back_finite_numbers(probability):
    p = torch.full((2,), probability, requires_grad=True)
    call = read_loss_call(F.binary_cross_entropy, (p, torch.tensor([0.0, 1.0])), {})
    likelihood = call.likelihood()
    for score in (likelihood.sampled_score(generator()), likelihood.propagated_score(generator())):
        assert call.pull_back(score)[0].isfinite().all()
    assert likelihood.nll(call.target).isfinite().all()


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
def test_scores_carried_to_the_logits_have_the_covariance_of_the_weighted_hessian(kind):
    z = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64).requires_grad_()
    log_p = z.log_softmax(-1).expand(20_000, 3)
    y = torch.zeros(20_000, dtype=torch.long)
    call = read_loss_call(F.nll_loss, (log_p, y), {"reduction": "sum"})
    likelihood = call.likelihood()
    score = getattr(likelihood, f"{kind}_score")(generator(3))
    (at_log_p,) = call.pull_back(score)
    p = z.detach().softmax(-1)
    at_logits = at_log_p - p * at_log_p.sum(-1, keepdim=True)  # log_softmax's own derivative
    H = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y[0]), z.detach())
    assert_mean_is(at_logits[:, :, None] * at_logits[:, None, :], H)


# -- through the observer, as users call them ----------------------------------------------------

saved_reference = F.cross_entropy


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        saved_reference,
        nn.CrossEntropyLoss(),
        lambda z, y: F.cross_entropy(target=y, input=z),
        lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
        lambda z, y: nn.NLLLoss()(nn.LogSoftmax(1)(z), y),
    ],
    ids=["function", "reference", "module", "keywords", "nll", "nll module"],
)
def test_a_loss_is_recognised_however_it_is_called(loss):
    z, y = nn.Parameter(randn(4, 3)), torch.tensor([0, 1, 2, 1])
    _, observation = observe([z], lambda: loss(z * 1, y))
    (scored,) = observation.scored
    assert scored.weights.tolist() == pytest.approx([0.25] * 4)


def test_several_losses_weigh_what_they_count_in_the_objective():
    z, y = nn.Parameter(randn(4, 3)), torch.tensor([0, 1, 2, 1])

    def objective():
        ce = F.cross_entropy(z * 1, y)
        mse = F.mse_loss(z * 1, torch.zeros_like(z))
        F.cross_entropy(z * 1, y)  # a metric, no part of the objective
        with torch.no_grad():
            F.cross_entropy(z * 1, y)
        return (ce + 0.5 * mse) / 4

    _, observation = observe([z], objective)
    assert observation.recognised == 3
    found = {loss.call.name: loss.weights for loss in observation.scored}
    assert len(observation.scored) == 2
    assert found["cross_entropy"].tolist() == pytest.approx([0.25 / 4] * 4)
    assert found["mse_loss"].tolist() == pytest.approx([2 * 0.125 / 12] * 12)


def test_unreduced_losses_weigh_each_term_by_what_was_done_to_it():
    z, y = nn.Parameter(randn(4, 3)), torch.tensor([0, 1, 2, 1])
    w = torch.tensor([0.0, 1.0, 3.0, 0.5], dtype=torch.float64)

    def objective():
        return (F.cross_entropy(z * 1, y, reduction="none") * w).sum() / w.sum()

    _, observation = observe([z], objective)
    torch.testing.assert_close(observation.scored[0].weights, w / w.sum())


def test_a_loss_used_twice_counts_twice_and_one_whose_square_is_minimised_by_its_slope():
    z = nn.Parameter(randn(4))
    _, observation = observe([z], lambda: sum([F.mse_loss(z * 1, z.detach() + 1)] * 2))
    assert float(observation.scored[0].weights.sum()) == pytest.approx(4.0)
    _, observation = observe([z], lambda: F.mse_loss(z * 1, z.detach() + 1) ** 2)
    assert float(observation.scored[0].weights.sum()) == pytest.approx(2 * 2.0)


def test_a_derivative_taken_inside_the_objective_is_not_the_training_step_s_own():
    z = nn.Parameter(randn(4))

    def objective():
        x = z * 1
        inner = F.mse_loss(x, torch.zeros_like(x))
        (g,) = torch.autograd.grad(inner, x, create_graph=True)
        return F.mse_loss(g, torch.ones_like(g))

    _, observation = observe([z], objective)
    assert len(observation.scored) == 1
