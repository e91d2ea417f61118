"""Natural-gradient steps do not depend on how the model is parameterized, as long as λ is 0."""

import pytest
import torch
from torch import nn

from ngplugin import NaturalGradientOptimizer
from tests.oracle import FAMILIES, dense_fisher, double, flat, moved, randn

F = torch.nn.functional


def natural_step(predict, parameters, damping):
    """-(F + λI)⁻¹ g by brute force, for softmax regression terms of weight 1/N."""
    z = predict()
    y = torch.arange(len(z)) % z.shape[1]
    g = flat(torch.autograd.grad(F.cross_entropy(predict(), y), parameters))
    dense = dense_fisher(FAMILIES["categorical"], z, parameters, torch.ones(len(z)).double())
    return -torch.linalg.solve(dense + damping * torch.eye(len(g)), g)


def function_space_step(predict, parameters, delta, h=1e-6):
    """How the predictions move, to first order in `delta`."""
    with moved(parameters, h * delta):
        plus = predict().detach()
    with moved(parameters, -h * delta):
        minus = predict().detach()
    return (plus - minus) / (2 * h)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_dense_natural_gradient_moves_the_prediction_alike_in_other_coordinates(damping):
    # Few parameters for the many outputs, so that F is regular. θ = φ³ + Mφ is a smooth change of
    # coordinates.
    x = randn(12, 2, seed=1)
    M = randn(6, 6, seed=2) + 3 * torch.eye(6)
    phi = nn.Parameter(randn(6, seed=3))

    def to_theta(phi):
        return phi**3 + M @ phi

    theta = nn.Parameter(to_theta(phi).detach())

    def model(theta):
        hidden = (x @ theta[:4].reshape(2, 2)).tanh()
        z = torch.cat([hidden, hidden * theta[4:]], 1)
        return torch.stack([z[:, 0] + z[:, 2], z[:, 1] - z[:, 3], z[:, 0] * z[:, 1]], 1)

    def by_phi():
        return model(to_theta(phi))

    one = function_space_step(
        lambda: model(theta), [theta], natural_step(lambda: model(theta), [theta], damping)
    )
    other = function_space_step(by_phi, [phi], natural_step(by_phi, [phi], damping))
    same = torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert same == (damping == 0)


def stepped(transform, damping, family):
    """The predictions after three K-FAC steps with the layers' inputs mapped by `transform`.

    The layer sees x B + c in place of x, with weights that undo it.
    """
    B, c = transform
    layer = double(nn.Linear(3, 2))
    hidden = double(nn.Linear(3, 3), seed=5)
    x, fixed = randn(40, 3, seed=1), torch.arange(40) % 2
    with torch.no_grad():
        W, b = layer.weight.clone(), layer.bias.clone()
        layer.weight.copy_(W @ torch.linalg.inv(B).T)
        layer.bias.copy_(b - layer.weight @ c)
    optimizer = NaturalGradientOptimizer(
        layer.parameters(),
        momentum=0.9,
        damping=damping,
        sampling_damping=0.0,
        kl_radius=None,
        refresh_every=1,
        lr=0.1,
    )
    y = fixed if family == "categorical" else F.one_hot(fixed, 2).double()
    loss = {
        # Beside a logit of 0, since softmax does not feel a shift of all logits: G is regular.
        "categorical": lambda z, y: F.cross_entropy(F.pad(z, (0, 1)), y),
        "bernoulli": F.binary_cross_entropy_with_logits,
        "gaussian": F.mse_loss,
    }[family]
    inputs = hidden(x).tanh().detach() @ B + c

    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.observe():
            value = loss(layer(inputs), y)
        value.backward()
        optimizer.step()
    return layer(inputs).detach()


IDENTITY = (torch.eye(3).double(), torch.zeros(3).double())
AFFINE = (randn(3, 3, seed=11) + 2 * torch.eye(3).double(), randn(3, seed=12))


@pytest.mark.parametrize("family", FAMILIES)
def test_kronecker_steps_do_not_depend_on_an_affine_map_of_a_layer_s_input(family):
    torch.testing.assert_close(
        stepped(AFFINE, 0.0, family), stepped(IDENTITY, 0.0, family), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_damping_breaks_that_invariance(family):
    difference = stepped(AFFINE, 0.3, family) - stepped(IDENTITY, 0.3, family)
    assert float(difference.abs().max()) > 1e-3


def test_kronecker_steps_do_not_depend_on_a_linear_map_of_a_layer_s_output():
    # W' = R W behind which R⁻¹ stands: the same function, output scores mapped by R⁻ᵀ.
    def run(R):
        layer = double(nn.Linear(3, 2))
        with torch.no_grad():
            layer.weight.copy_(R @ layer.weight)
            layer.bias.copy_(R @ layer.bias)
        back = torch.linalg.inv(R).T
        x, y = randn(40, 3, seed=1), torch.arange(40) % 3
        head = randn(2, 3, seed=4)
        optimizer = NaturalGradientOptimizer(
            layer.parameters(), damping=0.0, sampling_damping=0.0, kl_radius=None, lr=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.observe():
                loss = F.cross_entropy(layer(x) @ back @ head, y)
            loss.backward()
            optimizer.step()
        return (layer(x) @ back).detach()

    R = randn(2, 2, seed=7) + 2 * torch.eye(2)
    torch.testing.assert_close(run(R), run(torch.eye(2).double()), rtol=1e-7, atol=1e-9)
