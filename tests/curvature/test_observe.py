"""What the observer sees of a training step, and what it must leave alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.observation import why_no_fisher
from ngplugin.curvature.observe import Observer
from tests.oracle import dense_average, double, flat, generator, observe, randn

X, Y = randn(6, 4, seed=1), torch.arange(6) % 3


def network():
    return double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def averages(model, predict, **options):
    fisher, observation = observe(
        [*model.parameters()], lambda: F.cross_entropy(predict(X), Y), **options
    )
    found = [dense_average(fisher.block(p)) for p in model.parameters()]
    return found, observation


def test_gradients_are_those_of_an_unobserved_step():
    one, other = network(), network()
    F.cross_entropy(one(X), Y).backward()
    fisher = Fisher()
    fisher.parameters = [*other.parameters()]
    observer = Observer(fisher.parameters, fisher, True, "sampled", 3, generator())
    with observer:
        loss = F.cross_entropy(other(X), Y)
    loss.backward()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_backward_pass_may_come_inside_or_after_the_context():
    ends = []
    for inside in (False, True):
        model, fisher = network(), Fisher()
        fisher.parameters = [*model.parameters()]
        observer = Observer(fisher.parameters, fisher, False, "propagated", 1, generator())
        with observer:
            loss = F.cross_entropy(model(X), Y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        fisher.fold(1.0, 0.0)
        ends.append(flat([dense_average(block) for block in fisher.blocks]))
        assert len(observer.observation.maps) == 2
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "predict",
    [
        lambda m, x: F.linear(F.linear(x, m[0].weight, m[0].bias).tanh(), m[2].weight, m[2].bias),
        lambda m, x: m[2](m[0](x).tanh_()),
        lambda m, x: checkpoint(m, x, use_reentrant=False),
        lambda m, x: torch.stack([m(row) for row in x]),
        lambda m, x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
        lambda m, x: m(x.reshape(2, 3, 4)).reshape(6, 3),
    ],
    ids=["functional", "in-place", "checkpoint", "row by row", "functional call", "tokens"],
)
def test_the_fisher_does_not_depend_on_how_the_same_model_is_written(predict):
    model = network()
    plain, _ = averages(model, model)
    other, _ = averages(model, lambda x: predict(model, x))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("equation", ["ni,oi->no", "...ki,koi->...ko", "ni,ohi->hno"])
def test_a_view_that_a_map_returns_may_be_written_to(equation):
    sizes = {"o": 3, "i": 4, "k": 1, "h": 2}
    weight = nn.Parameter(randn(*(sizes[c] for c in equation.split("->")[0].split(",")[1])))
    x = randn(6, 1, 4) if "k" in equation else randn(6, 4)

    def average(written):
        fisher = Fisher()
        fisher.parameters = [weight]

        def predict(x):
            z = torch.einsum(equation, x, weight)
            z = z.mul_(2.0) if written else 2.0 * z
            return z.reshape(-1, 3)

        with Observer([weight], fisher, False, "propagated", 1, generator()) as _:
            z = predict(x)
            loss = F.mse_loss(z, torch.zeros_like(z))
        loss.backward()
        fisher.fold(1.0, 0.0)
        return dense_average(fisher.block(weight))

    torch.testing.assert_close(average(True), average(False))


def test_accumulated_observations_add_up():
    model, fisher = network(), Fisher()
    parameters = [*model.parameters()]
    fisher.parameters = parameters
    for i in range(2):
        observer = Observer(parameters, fisher, False, "propagated", 1, generator(i))
        with observer:
            loss = F.cross_entropy(model(X[3 * i : 3 * i + 3]), Y[3 * i : 3 * i + 3]) / 2
        loss.backward()
    fisher.fold(1.0, 0.0)
    A = fisher.block(parameters[0]).averaged_factors()[0][0]
    inputs = torch.cat([X, torch.ones(6, 1).double()], 1)
    torch.testing.assert_close(A, inputs.T @ inputs / 6)
    assert float(fisher.block(parameters[0]).average("rows")) == 6


def test_only_watched_parameters_have_maps():
    model = network()
    fisher, observation = observe([*model[2].parameters()], lambda: F.cross_entropy(model(X), Y))
    assert [call.weight is model[2].weight for call, _ in observation.maps] == [True]
    assert len(fisher.blocks) == 1


def test_two_losses_of_one_model_add_their_fishers():
    layer = double(nn.Linear(4, 1))
    y = randn(6, 1)
    parameters = [*layer.parameters()]

    def term(weight):
        return lambda: weight * F.mse_loss(layer(X), y)

    def both():
        return term(1.0)() + term(3.0)()

    fisher, observation = observe(parameters, both)
    one, _ = observe(parameters, term(4.0))
    assert len(observation.scored) == 2
    torch.testing.assert_close(dense_average(fisher.blocks[0]), dense_average(one.blocks[0]))


def test_a_loss_that_enters_the_objective_in_a_second_backward_pass_is_scored_too():
    model = network()
    parameters = [*model.parameters()]
    fisher = Fisher()
    fisher.parameters = parameters
    observer = Observer(parameters, fisher, False, "propagated", 1, generator())
    with observer:
        z = model(X)
        a, b = F.cross_entropy(z, Y), F.mse_loss(z, torch.zeros_like(z))
    a.backward(retain_graph=True)
    b.backward()
    assert [loss.call.name for loss in observer.observation.scored] == ["cross_entropy", "mse_loss"]


def test_a_scored_loss_keeps_no_graph():
    model = network()
    _, observation = averages(model, model)
    (scored,) = observation.scored
    assert all(t.grad_fn is None for t in scored.call.predictions)
    assert scored.likelihood.natural.grad_fn is None


def test_calls_made_while_paused_are_not_seen():
    model = network()
    observer = Observer([*model.parameters()], Fisher(), True, "propagated", 1, generator())
    with observer:
        with observer.paused():
            F.cross_entropy(model(X), Y)
        assert not observer.observation.maps
        F.cross_entropy(model(X), Y)
    assert observer.observation.recognised == 1


def test_a_restart_begins_an_empty_observation():
    model = network()
    observer = Observer([*model.parameters()], Fisher(), True, "propagated", 1, generator())
    with observer:
        F.cross_entropy(model(X), Y)
        old = observer.observation
        new = observer.restart(Fisher(), True)
        assert observer.observation is new
        assert (new.recognised, new.maps, old.recognised) == (0, [], 1)


def test_why_there_is_no_fisher_names_the_cause():
    model = network()
    assert "before any observed training step" in why_no_fisher([])
    observer = Observer([*model.parameters()], Fisher(), False, "propagated", 1, generator())
    with observer:
        F.cross_entropy(model(X), Y)
    assert "what backward() was called on" in why_no_fisher([observer.observation])
    _, observation = averages(model, model)
    assert "weigh nothing or are not finite" in why_no_fisher([observation])
