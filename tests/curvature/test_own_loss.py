"""Losses written by hand: their curvature at the model's outputs, found and measured."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ngplugin
from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.likelihoods import OutputCurvature, OwnLoss
from ngplugin.curvature.objective import ObjectiveWeight
from ngplugin.curvature.observe import Observer
from tests.oracle import (
    assert_mean_is,
    dense_average,
    double,
    flat,
    generator,
    jacobian,
    moved,
    observe,
    randn,
)

X, T, Y = randn(6, 4, seed=1), randn(6, 3, seed=2), torch.arange(6) % 3
OWN, EMPIRICAL = (
    "the Gauss-Newton matrix of a loss of its own",
    "the empirical Fisher of a loss without curvature",
)


def network():
    return double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def cross_entropy(z):
    return -(z - z.logsumexp(-1, keepdim=True)).gather(-1, Y[:, None]).mean()


def evidential(z):
    mean, a, b = z[:, 0], F.softplus(z[:, 1]) + 1, F.softplus(z[:, 2])
    return (a * (T[:, 0] - mean).square() - a.log() + b.square() * mean.tanh()).sum()


def pinball(z):
    error, q = T - z, torch.tensor([0.1, 0.5, 0.9]).double()
    return torch.maximum(q * error, (q - 1) * error).mean()


LOSSES = {
    "squared error": lambda z: (z - T).square().sum(),
    "cross entropy": cross_entropy,
    "evidential": evidential,
    "student": lambda z: torch.log1p((z - T).square() / 0.1).mean(),  # has both signs
    "focal": lambda z: -((1 - z.softmax(-1)[:, 0]).square() * z.log_softmax(-1)[:, 0]).sum(),
    "root mean square": lambda z: (z - T).square().sum(1).sqrt().mean(),
}


def exact(loss, z):
    """|H| of every row, `[6, 3, 3]`."""
    H = torch.autograd.functional.hessian(loss, z)
    rows = torch.stack([H[i, :, i] for i in range(len(z))])
    values, vectors = torch.linalg.eigh(rows)
    return vectors @ torch.diag_embed(values.abs()) @ vectors.mT


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "root mean square"])
def test_the_curvature_is_the_hessian_with_positive_eigenvalues(name):
    z, loss = randn(6, 3, seed=3), LOSSES[name]
    curvature = OutputCurvature(lambda outputs: loss(outputs[0]), [z], generator())
    H = exact(loss, z)
    assert curvature.straight == 0
    for seed in range(4):
        v = randn(6, 3, seed=10 + seed)
        expected = torch.einsum("ni,nij,nj->", v, H, v)
        torch.testing.assert_close(curvature.squared_length([v]), expected)
    draws = torch.stack([curvature.root(generator(i))[0] for i in range(600)])
    assert_mean_is(draws, torch.zeros(6, 3).double())
    assert_mean_is(draws[:, :, :, None] * draws[:, :, None, :], H)
    torch.testing.assert_close(curvature.value, loss(z))


def test_outputs_of_the_same_rows_are_curved_together():
    mean, log_variance = randn(6, 2, seed=3), randn(6, 2, seed=4)

    def loss(z):
        m, s = z[..., :2], z[..., 2:]
        return ((m - T[:, :2]).square() * (-s).exp() + s).sum()

    joined = torch.cat([mean, log_variance], 1)
    curvature = OutputCurvature(lambda o: loss(torch.cat(o, 1)), [mean, log_variance], generator())
    H, v = exact(loss, joined), randn(6, 4, seed=5)
    found = curvature.squared_length([v[:, :2], v[:, 2:]])
    torch.testing.assert_close(found, torch.einsum("ni,nij,nj->", v, H, v))


def test_where_rows_meet_or_are_long_the_diagonal_is_estimated():
    z, W = randn(6, 3, seed=3), randn(18, 18, seed=4)
    meeting = OutputCurvature(lambda o: (W @ o[0].reshape(-1)).square().sum() / 2, [z], generator())
    diagonals = torch.stack(
        [
            OutputCurvature(
                lambda o: (W @ o[0].reshape(-1)).square().sum() / 2, [z], generator(seed)
            )
            ._groups[0]
            .values
            for seed in range(60)
        ]
    )
    assert meeting._groups[0].vectors is None
    # Its absolute value is what is used; a diagonal of a positive matrix is rarely negative.
    assert (diagonals.mean(0).reshape(-1) / W.square().sum(0)).sub(1).abs().max() < 0.6
    wide = randn(4, 200, seed=5)
    long = OutputCurvature(lambda o: o[0].logsumexp(1).sum(), [wide], generator())
    p = wide.softmax(1)
    assert (long._groups[0].values - (p - p * p)).abs().sum() < 0.5 * (p - p * p).sum()


def test_what_is_straight_gets_the_empirical_fisher():
    z = randn(6, 3, seed=3)
    curvature = OutputCurvature(lambda o: pinball(o[0]), [z], generator())
    assert curvature.straight == 1
    (g,) = curvature.slopes
    kappa = 18 / (2 * pinball(z))
    torch.testing.assert_close(curvature.root(generator())[0].square(), kappa * g.square())


def test_along_a_straight_slope_a_curved_row_gets_the_empirical_fisher_too():
    z, v = randn(6, 3, seed=3), randn(6, 3, seed=4)
    loss = LOSSES["root mean square"]  # of each row: straight towards the target, curved across
    curvature = OutputCurvature(lambda o: loss(o[0]), [z], generator())
    (g,) = curvature.slopes
    kappa = 6 / (2 * loss(z))
    across = torch.einsum("ni,nij,nj->", v, exact(loss, z), v)
    expected = across + kappa * (v * g).sum(1).square().sum()
    torch.testing.assert_close(curvature.squared_length([v]), expected)
    torch.testing.assert_close(curvature.decrement(), 2 * loss(z))
    assert curvature.straight == 1


def half_curved(z):
    """Flat where a row's element is negative."""
    return z.clamp_min(0).square().sum()


def test_rows_without_a_slope_take_nothing_from_the_others():
    z = torch.cat([T[:1], T[1:] + 1])
    curvature = OutputCurvature(lambda o: LOSSES["squared error"](o[0]), [z], generator())
    torch.testing.assert_close(curvature.decrement(), 2 * (z - T).square().sum())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_what_is_straight_is_so_on_any_scale(scale):
    curvature = OutputCurvature(lambda o: scale * pinball(o[0]), [randn(6, 3)], generator())
    assert curvature.straight == 1
    (group,) = curvature.groups()
    assert (group.values > 0).all()


@pytest.mark.parametrize("kind", ["propagated", "empirical"])
def test_the_shares_of_draws_add_up_to_one(kind):
    z = randn(6, 3, seed=3).requires_grad_() * 1
    curvature = OutputCurvature(lambda o: LOSSES["student"](o[0]), [z], generator())
    call = OwnLoss((z,), curvature, True)
    drawn = [*call.scores(kind, torch.ones(1).double(), 4, generator())]
    assert [share for _, share in drawn] == [0.25] * 4


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [(LOSSES["squared error"], 3), (cross_entropy, 2), (evidential, 3), (half_curved, 3)],
)
def test_a_root_has_the_columns_that_are_not_zero_and_the_slope_in_them(loss, outputs):
    z = (1.0 * randn(6, 3, seed=3)).requires_grad_() * 1
    curvature = OutputCurvature(lambda o: loss(o[0]), [z], generator())
    ((rows, weights),) = OwnLoss((z,), curvature, True).parts(torch.tensor([0.7]).double())
    root = rows.fisher_root(weights)
    assert rows.outputs() == len(root.columns) == len(root.residuals) == outputs
    B, rho = torch.stack(root.columns, -1), torch.stack(root.residuals, -1)
    torch.testing.assert_close(B @ B.mT, 0.7 * exact(loss, z.detach()))
    slope = (B @ rho[:, :, None])[:, :, 0]
    torch.testing.assert_close(slope, 0.7 * curvature.slopes[0])
    assert not rho[(B == 0).all(1)].any()
    torch.testing.assert_close(root.pull_back(slope), [slope])


def test_a_parameter_itself_is_no_part_of_a_prediction():
    z = randn(6, 3).requires_grad_()
    curvature = OutputCurvature(lambda o: half_curved(o[0]), [z], generator())
    assert OwnLoss((z,), curvature, True).parts(torch.ones(1)) == []


def test_a_slope_without_a_size_to_compare_it_with_has_no_curvature():
    zero = torch.zeros(6, 3).double()
    curvature = OutputCurvature(lambda o: o[0].sum(), [zero], generator())
    assert curvature.squared_length([randn(6, 3)]) == 0


def test_what_has_no_second_derivative_counts_as_straight():
    z, v, label = randn(4, 6, 3), randn(4, 6, 3, seed=4), torch.ones(6, 1).long()

    def loss(z):
        return F.ctc_loss(z.log_softmax(-1), label, torch.full((6,), 4), torch.ones(6).long())

    curvature = OutputCurvature(lambda o: loss(o[0]), [z], generator())
    (g,) = curvature.slopes
    kappa = g.numel() / (2 * torch.maximum(loss(z), 0.1 * (g * z).abs().sum()))
    assert curvature.straight == 1
    torch.testing.assert_close(curvature.squared_length([v]), kappa * (v * g).square().sum())


def test_empirical_scores_are_the_slopes_of_rows_with_a_sign_each():
    z, loss = randn(6, 3, seed=3), LOSSES["squared error"]
    curvature = OutputCurvature(lambda o: loss(o[0]), [z], generator())
    (g,) = curvature.slopes
    draws = torch.stack([curvature.slope_root(generator(i))[0] for i in range(200)])
    signs = draws / ((6 / (2 * loss(z))).sqrt() * g)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    torch.testing.assert_close(signs, signs[:, :, :1].expand_as(signs))
    assert_mean_is(signs[:, :, 0], torch.zeros(6).double())


@pytest.mark.parametrize(("power", "worth"), [(4.0, 4 / 3), (1.2, 2.0)])
def test_a_loss_alone_is_worth_its_newton_decrement_but_at_most_twice_its_value(power, worth):
    z = torch.where(randn(6, 3) > 0, 0.5, -0.5)
    curvature = OutputCurvature(lambda o: o[0].abs().pow(power).sum(), [z], generator())
    value, decrement = curvature.value, power / (power - 1) * curvature.value
    torch.testing.assert_close(OwnLoss((z,), curvature, True).nats(), worth * value)
    torch.testing.assert_close(OwnLoss((z,), curvature, False).nats(), decrement)


@pytest.mark.parametrize("name", ["squared error", "cross entropy", "evidential"])
def test_the_fisher_of_one_example_is_the_gauss_newton_matrix(name):
    model, loss = double(nn.Linear(4, 3)), LOSSES[name]
    one, parameters = X[:1], [*model.parameters()]

    def of_first(z):
        return loss(torch.cat([z, T[1:]]))

    samples = []
    for seed in range(40):
        fisher, _ = observe(parameters, lambda: of_first(model(one)), seed=seed)
        samples.append(dense_average(fisher.blocks[0]))
    z = model(one)
    J = jacobian(z, parameters)  # weight before bias, as the block has them
    H = exact(loss, torch.cat([z.detach(), T[1:]]))[0]
    GGN = J.T @ H @ J
    trace = torch.stack(samples).mean(0).trace()
    torch.testing.assert_close(trace, GGN.trace(), rtol=0.25, atol=0)


@pytest.mark.parametrize(
    ("by_hand", "recognised"),
    [
        (lambda z: (z - T).square().mean(), lambda z: F.mse_loss(z, T)),
        (lambda z: 0.5 * ((z - T) ** 2).sum() / 7, lambda z: F.mse_loss(z, T) * 18 / 14),
        (
            lambda z: -(T.sigmoid() * F.logsigmoid(z) + (1 - T.sigmoid()) * F.logsigmoid(-z)).sum(),
            lambda z: F.binary_cross_entropy_with_logits(z, T.sigmoid(), reduction="sum"),
        ),
    ],
    ids=["mean", "sum", "bernoulli"],
)
def test_a_loss_by_hand_has_the_fisher_of_its_twin(by_hand, recognised):
    found = []
    for loss in (by_hand, recognised):
        model, factors = network(), []
        for seed in range(40):
            fisher = Fisher()
            fisher.parameters = [*model.parameters()]
            observer = Observer(fisher.parameters, fisher, True, "propagated", 1, generator(seed))
            with observer:
                value = loss(model(X))
            value.backward()
            fisher.fold(1.0, 0.0)
            factors.append([block.average("G") for block in fisher.blocks])
        found.append([torch.stack(column).mean(0) for column in zip(*factors, strict=True)])
    # Elementwise losses have the same H; only the random signs differ.
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.diagonal(dim1=-2, dim2=-1), b.diagonal(dim1=-2, dim2=-1),
                                   rtol=0.4, atol=1e-6)  # fmt: skip


def scored(model, objective):
    _, observation = observe([*model.parameters()], objective)
    return observation


def test_the_prior_of_a_variational_autoencoder_is_seen_without_the_way_through_the_decoder():
    encoder, decoder = double(nn.Linear(4, 4)), double(nn.Linear(2, 4))
    model, noise, x = nn.ModuleList([encoder, decoder]), randn(6, 2, seed=7), X.sigmoid()
    kept = {}

    def objective():
        mean, log_variance = kept["mean"], kept["log"] = encoder(x).chunk(2, -1)
        z = mean + noise * (log_variance / 2).exp()
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 6
        return F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") / 6 + prior

    observation = scored(model, objective)
    assert [loss.call.name for loss in observation.scored] == [
        OWN,
        "binary_cross_entropy_with_logits",
    ]
    call = observation.scored[0].call
    (outputs,) = call.predictions
    assert outputs.shape == (6, 4)
    (group,) = call.curvature._groups
    H = torch.cat([torch.ones(6, 2).double(), 0.5 * kept["log"].exp()], 1).detach() / 6
    torch.testing.assert_close(group.values, H)


def test_a_posterior_of_two_heads_is_seen_past_the_broadcast_of_its_parameters():
    """`Normal` broadcasts its mean and scale, which gives them back where their shapes agree."""
    heads = double(nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]))
    names = []
    for posterior in (
        lambda mean, scale: torch.distributions.Normal(mean, scale),
        lambda mean, scale: torch.distributions.Normal(1.0 * mean, 1.0 * scale),
    ):

        def prior(posterior=posterior):
            q = posterior(heads[0](X), heads[1](X).exp())
            z = q.mean
            standard = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
            return torch.distributions.kl_divergence(q, standard).sum(1).mean()

        fisher, observation = observe([*heads.parameters()], prior)
        names.append([loss.call.name for loss in observation.scored])
        found = [dense_average(fisher.block(p)) for p in heads.parameters()]
        if len(names) == 1:
            first = found
    assert names[0] == names[1] == ["the Gauss-Newton matrix of a loss of its own"]
    for a, b in zip(first, found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_kl_of_cross_entropy_by_hand_is_that_of_the_categorical():
    model, step = network(), 0.3 * randn(43, seed=9)
    parameters = [*model.parameters()]
    own = scored(model, lambda: cross_entropy(model(X)))
    known = scored(model, lambda: F.cross_entropy(model(X), Y))
    with moved(parameters, step), torch.no_grad():
        ((loss, now),) = own.replay()
        ((twin, then),) = known.replay()
        bregman = loss.call.likelihood(now).nll(loss.call.target) - loss.likelihood.nll(None)
        slopes = sum(
            (g * (new - old)).sum()
            for g, new, old in zip(
                loss.call.curvature.slopes, now, loss.call.curvature.outputs, strict=True
            )
        )
        torch.testing.assert_close((bregman - slopes).sum(), twin.kl(then))
        assert loss.kl(now) >= twin.kl(then) * (1 - 1e-9)
        torch.testing.assert_close(loss.reduction(now), twin.reduction(then))


def test_squared_error_by_hand_is_worth_as_many_nats():
    # Errors of one size, so that none counts for more than a few medians.
    model = network()
    target = (model(X) + torch.where(randn(6, 3, seed=8) > 0, 0.5, -0.4)).detach()
    own = scored(model, lambda: (model(X) - target).square().mean())
    known = scored(model, lambda: F.mse_loss(model(X), target))
    ours, theirs = (ObjectiveWeight.of(o.scored, "auto") for o in (own, known))
    assert ours.nats == pytest.approx(theirs.nats)
    assert ours.nll == pytest.approx(theirs.nll)


@pytest.mark.parametrize(
    ("predict", "loss", "names"),
    [
        (lambda m, x: F.relu_(m(x)), LOSSES["squared error"], [OWN]),
        (lambda m, x: m(x), lambda z: F.mse_loss(z, T) + z.exp().mean(), [OWN, "mse_loss"]),
        (lambda m, x: m(x), pinball, [EMPIRICAL]),
        (lambda m, x: m(x), lambda z: (z - T)[:3].abs().sum() + (z - T)[3:].square().sum(), [OWN]),
        (lambda m, x: m(x), lambda z: F.mse_loss(z, T).log(), ["mse_loss"]),
        (lambda m, x: m(x), lambda z: F.cosine_embedding_loss(z, T, torch.ones(6)), [OWN]),
        (lambda m, x: m(x).unsqueeze(1).log_softmax(-1).expand(6, 4, 3).transpose(0, 1),
         lambda z: F.ctc_loss(z, Y[:, None] * 0 + 1, torch.full((6,), 4), torch.ones(6).long()),
         [EMPIRICAL]),
    ],
    ids=["in place", "beside a recognised one", "straight", "half straight", "of a recognised one",
         "cosine", "ctc"],
)  # fmt: skip
def test_what_an_objective_is_made_of_is_found(predict, loss, names):
    model = network()
    observation = scored(model, lambda: loss(predict(model, X)))
    assert [each.call.name for each in observation.scored] == names


def test_a_value_added_in_place_is_found():
    model = network()

    def objective():
        z = model(X)
        loss = F.mse_loss(z, T)
        loss += 0.1 * z.exp().mean()
        return loss

    observation = scored(model, objective)
    assert [each.call.name for each in observation.scored] == [OWN, "mse_loss"]
    (group,) = observation.scored[0].call.curvature._groups
    torch.testing.assert_close(group.values, 0.1 * model(X).detach().exp() / 18)


def test_a_learnt_variance_is_an_output_of_the_model():
    model, log_sigma = network(), nn.Parameter(torch.tensor(-0.3).double())

    def objective():
        return ((model(X) - T).square() / (2 * log_sigma.exp().square()) + log_sigma).sum()

    fisher, observation = observe([*model.parameters(), log_sigma], objective)
    ((call, _),) = [(loss.call, loss) for loss in observation.scored]
    assert {t.shape for t in call.predictions} == {torch.Size([6, 3]), torch.Size([])}
    error = (model(X) - T).detach()
    by_output = {g.members: g.values for g in call.curvature._groups}
    (of_sigma,) = [v for v in by_output.values() if v.numel() == 1]
    expected = 2 * error.square().sum() / (-0.6 * torch.ones(()).double()).exp()
    torch.testing.assert_close(of_sigma.reshape(()), expected)
    assert fisher.block(log_sigma) is not None


@pytest.mark.parametrize(
    ("loss", "names"), [(lambda z: F.mse_loss(z, T), ["mse_loss"]), (pinball, [EMPIRICAL])]
)
def test_a_penalty_on_the_weights_of_layers_is_no_prediction(loss, names):
    model = network()

    def objective():
        return loss(model(X)) + sum(p.square().sum() for p in model.parameters())

    observation = scored(model, objective)
    assert [each.call.name for each in observation.scored] == names
    assert all(t.shape == (6, 3) for each in observation.scored for t in each.call.predictions)


def test_two_objectives_of_a_step_are_both_seen_and_metrics_are_not():
    model = network()
    fisher = Fisher()
    fisher.parameters = [*model.parameters()]
    observer = Observer(fisher.parameters, fisher, True, "propagated", 1, generator())
    with observer:
        z = model(X)
        (z - T).abs().mean()  # a metric
        first, second = (z - T).square().sum(), 0.5 * z.square().sum()
        first.backward(retain_graph=True)
        (3 * second).backward()
    weights = [loss.weights.item() for loss in observer.observation.scored]
    assert weights == [1.0, 1.0]
    values = [loss.call.curvature._groups[0].values.mean() for loss in observer.observation.scored]
    torch.testing.assert_close(torch.stack(values), torch.tensor([2.0, 3.0]).double())


def test_a_residual_by_hand_has_the_fisher_of_mse_loss():
    def residual(model, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.sum(1) - x.detach()[:, 0]

    names, traces = [], []
    for loss in (lambda r: r.square().mean(), lambda r: F.mse_loss(r, torch.zeros_like(r))):
        model, found = network(), []
        for seed in range(30):
            fisher, observation = observe(
                [*model.parameters()], lambda m=model, f=loss: f(residual(m, X)), seed=seed
            )
            scale = ObjectiveWeight.of(observation.scored, 1.0).total
            blocks = [dense_average(b) * scale for b in fisher.blocks if b.ready]
            found.append(torch.stack([b.trace() for b in blocks]))
        names.append([each.call.name for each in observation.scored])
        traces.append(torch.stack(found))
    assert names == [[OWN], ["mse_loss"]]
    torch.testing.assert_close(traces[0].mean(0), traces[1].mean(0), rtol=0.35, atol=0)


def test_the_users_gradients_and_random_numbers_are_left_alone():
    ends = []
    for watched in (False, True):
        model = network()
        torch.manual_seed(3)
        fisher = Fisher()
        fisher.parameters = [*model.parameters()]
        observer = Observer(fisher.parameters, fisher, True, "propagated", 1, generator())
        with observer if watched else contextlib.nullcontext():
            loss = (F.dropout(model(X), 0.5) - T).pow(4).sum()
        loss.backward()
        ends.append(torch.cat([flat([p.grad for p in model.parameters()]), torch.rand(3)]))
    assert torch.equal(*ends)


def test_no_graph_outlives_a_step():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    kept = []
    for _ in range(3):
        with optimizer.observe():
            z = model(X)
            temperature = z.mean().exp()  # a scalar on the way: what comes of it is held by a layer
            loss = ((z * temperature) @ model[2].weight - X[:, :1]).square().mean()
        kept += [weakref.ref(z), weakref.ref(loss)]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    del z, loss, temperature
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_ggn_reads_recognised_losses_as_if_written_by_hand():
    model = network()
    _, observation = observe(
        [*model.parameters()], lambda: F.cross_entropy(model(X), Y), kind="ggn"
    )
    (loss,) = observation.scored
    assert loss.call.name == OWN
    z = model(X).detach()
    v = randn(6, 3, seed=4)
    H = exact(lambda z: F.cross_entropy(z, Y), z)
    torch.testing.assert_close(
        loss.call.curvature.squared_length([v]), torch.einsum("ni,nij,nj->", v, H, v)
    )


# -- declared by hand --------------------------------------------------------------------------


def test_a_declared_likelihood_overrides_all():
    model = network()

    def objective(weight):
        z = model(X)
        loss = F.cross_entropy(z, Y) + (z - T).abs().mean()
        ngplugin.declare(loss, torch.distributions.Normal(z, 0.5), T, weight)
        return 3 * loss

    (loss,) = scored(model, lambda: objective(None)).scored
    assert loss.call.name == "log_prob of Normal"
    torch.testing.assert_close(loss.weights, torch.full((18,), 3 / 18).double())
    weight = torch.arange(6.0)[:, None]
    (loss,) = scored(model, lambda: objective(weight)).scored
    torch.testing.assert_close(loss.weights, 3 * weight.expand(6, 3).reshape(-1).double())


def test_a_declaration_leaves_other_parts_of_the_objective_alone():
    model = network()

    def objective():
        z = model(X)
        first = (z - T).abs().mean()
        ngplugin.declare(first, torch.distributions.Normal(z, 0.5), T)
        return first + F.cross_entropy(z, Y) + z.exp().mean()

    names = [loss.call.name for loss in scored(model, objective).scored]
    assert sorted(names) == sorted(["log_prob of Normal", "cross_entropy", OWN])


def test_declaring_outside_of_an_observed_step_does_nothing():
    zero = torch.zeros(3)
    ngplugin.declare(zero.sum(), torch.distributions.Normal(zero, 1.0), zero)


def test_a_declaration_that_says_nothing_is_refused():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    with optimizer.observe():
        z = model(X)
        for loss, output in ((z.sum(), z.detach()), (z.sum().detach(), z)):
            with pytest.raises(ngplugin.LikelihoodError, match="detached"):
                ngplugin.declare(loss, torch.distributions.Normal(output, 1.0), T)


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LOSSES, "pinball"])
def test_training_on_a_loss_by_hand_gets_on(name):
    torch.manual_seed(0)
    model, loss = network(), {**LOSSES, "pinball": pinball}[name]
    optimizer = NaturalGradientOptimizer(model.parameters())
    values = []
    for _ in range(25):
        with optimizer.observe():
            value = loss(model(X))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert optimizer.report.kl is None or optimizer.report.kl >= 0
        values.append(value.item())
    assert values[-1] < min(values[:5])
    assert max(values) <= values[0] + 0.1 * abs(values[0])


def test_a_batch_that_is_not_finite_passes_and_training_goes_on():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    bad = X.clone()
    bad[2, 1] = torch.nan
    for step in range(12):
        with optimizer.observe():
            value = evidential(model(bad if step == 5 else X))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert optimizer.report.skipped == (step == 5)
    assert value.isfinite()


@pytest.mark.parametrize("name", ["cross entropy", "evidential", "squared error"])
def test_outputs_in_half_precision_are_curved_in_single(name):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = NaturalGradientOptimizer(model.parameters())
    values = []
    for _ in range(15):
        with optimizer.observe(), torch.autocast("cpu", torch.bfloat16):
            value = LOSSES[name](model(X.float()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert optimizer.coverage().losses == (OWN,)


def test_a_value_that_cannot_be_computed_again_is_left_to_the_empirical_fisher():
    model, fisher, target = network(), Fisher(), T.clone()
    fisher.parameters = [*model.parameters()]
    observer = Observer(fisher.parameters, fisher, True, "propagated", 1, generator())
    with observer:
        loss = (model(X) - target).square().sum()
        target.zero_()  # the next batch comes into the same memory
    loss.backward()
    assert observer.observation.scored == []
