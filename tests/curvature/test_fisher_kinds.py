"""Exact and empirical scores of every torch loss, against brute force over the output."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin import NaturalGradientOptimizer, OptionError
from ngplugin.curvature.likelihoods import read_loss_call
from tests.oracle import assert_mean_is, dense_average, double, generator, observe, randn

N, C = 6, 3
LABELS = torch.arange(N) % C
REAL = randn(N, C, seed=1)
# The loss of logits or locations z [N, C].
LOSSES = {
    "cross_entropy": (F.cross_entropy, lambda z: (z, LABELS)),
    "cross_entropy of soft labels": (F.cross_entropy, lambda z: (z, REAL.softmax(1))),
    "nll_loss": (F.nll_loss, lambda z: (z.log_softmax(1), LABELS)),
    "kl_div": (F.kl_div, lambda z: (z.log_softmax(1), REAL.softmax(1))),
    "binary_cross_entropy": (F.binary_cross_entropy, lambda z: (z.sigmoid(), REAL.sigmoid())),
    "with_logits": (F.binary_cross_entropy_with_logits, lambda z: (z, REAL.sigmoid())),
    "soft_margin_loss": (F.soft_margin_loss, lambda z: (z, REAL.sign())),
    "mse_loss": (F.mse_loss, lambda z: (z, REAL)),
    "poisson_nll_loss": (F.poisson_nll_loss, lambda z: (z, LABELS[:, None].expand(N, C))),
    "gaussian_nll_loss": (F.gaussian_nll_loss, lambda z: (z, REAL, (0.3 * z).exp())),
    "l1_loss": (F.l1_loss, lambda z: (z, REAL)),
    "smooth_l1_loss": (F.smooth_l1_loss, lambda z: (z, REAL)),
    "huber_loss": (F.huber_loss, lambda z: (z, REAL)),
}


def scores(name, kind, draws=1):
    """The call, its weights, its passes in z, `[passes, N, C]`, and their shares."""
    function, args = LOSSES[name]
    z = randn(N, C).requires_grad_()
    value = function(*args(z))
    call = read_loss_call(function, args(z), {})
    weights = call.weights(torch.ones_like(value))
    rows, shares = [], []
    for seeds, share in call.scores(kind, weights, draws, generator()):
        grads = torch.autograd.grad(call.predictions, z, seeds, retain_graph=True)
        rows.append(grads[0])
        shares.append(share)
    return call, weights, z, torch.stack(rows), torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_exact_scores_have_the_mean_square_of_many_sampled_ones(name):
    _, _, _, rows, shares = scores(name, "exact")
    exact = torch.einsum("p,pni,pnj->nij", shares, rows, rows)
    sampled = scores(name, "sampled", 400)[3]
    assert float(shares.sum()) == pytest.approx(1.0)
    assert_mean_is(sampled[..., :, None] * sampled[..., None, :], exact)


@pytest.mark.parametrize("name", LOSSES)
def test_empirical_scores_are_the_data_s_own(name):
    call, weights, z, rows, shares = scores(name, "empirical", 200)
    family = call.likelihood
    natural = call.natural(*call.predictions)
    nll = call.family(natural).nll(call.target)
    own = torch.stack(
        [torch.autograd.grad(v, z, retain_graph=True)[0] for v in weights.sqrt() * nll]
    )  # [terms, N, C]
    assert family().natural.shape == natural.shape
    found = rows[..., :, None] * rows[..., None, :]
    assert_mean_is(found, torch.einsum("tni,tnj->nij", own, own))
    assert float(shares.sum()) == pytest.approx(1.0)


def test_the_exact_fisher_of_a_linear_map_has_no_chance_in_it_and_the_others_meet_it_on_average():
    model, x = double(nn.Linear(4, C)), randn(N, 4, seed=2)

    def G(kind, seed, draws=1):
        fisher, _ = observe(
            [*model.parameters()], lambda: F.cross_entropy(model(x), LABELS), kind, draws, seed
        )
        return dense_average(fisher.blocks[0])

    exact = G("exact", 0)
    torch.testing.assert_close(exact, G("exact", 1), rtol=1e-12, atol=1e-14)
    p = model(x).detach().softmax(1)
    H = (p.diag_embed() - p[:, :, None] * p[:, None, :]).mean(0)
    rows = torch.cat([x, torch.ones(N, 1).double()], 1)
    A = rows.T @ rows / N
    order = [i * 5 + j for i in range(C) for j in range(4)] + [i * 5 + 4 for i in range(C)]
    torch.testing.assert_close(exact, torch.kron(H, A)[order][:, order])
    assert_mean_is(torch.stack([G("propagated", i) for i in range(200)]), exact)


def test_gradients_that_terms_share_have_an_exact_mean_square_on_average():
    m, w = nn.Parameter(randn(2)), randn(5, 2, seed=4)

    def diagonal(seed):
        fisher, _ = observe(
            [m], lambda: F.mse_loss(w * m, w * 0, reduction="sum"), "exact", 1, seed
        )
        return dense_average(fisher.blocks[0]).diagonal()

    exact = w.square().sum(0) / 10
    assert_mean_is(torch.stack([diagonal(i) for i in range(300)]), exact)


def test_an_exact_fisher_of_a_vocabulary_is_refused_with_what_to_do():
    z = nn.Parameter(randn(2, 2000))
    optimizer = NaturalGradientOptimizer([z], fisher="exact")
    with optimizer.observe():
        loss = F.cross_entropy(z * 1, torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"2,000 backward passes for one cross_entropy.*propagated"
    ):
        loss.backward()


def test_an_exact_fisher_takes_at_most_1_024_passes():
    for classes, refused in ((1024, False), (1025, True)):
        z = randn(1, classes).requires_grad_()
        call = read_loss_call(F.cross_entropy, (z, LABELS[:1]), {})
        passes = call.scores("exact", torch.ones(1).double(), 1, generator())
        with pytest.raises(ValueError, match="1,025") if refused else contextlib.nullcontext():
            next(passes)


def test_a_term_that_does_not_count_may_have_any_label():
    y = REAL.clone()
    y[0] = torch.nan
    mask = (torch.arange(N) > 0).double()[:, None]
    model, x = double(nn.Linear(4, C)), randn(N, 4, seed=2)

    def objective():
        loss = F.mse_loss(model(x), y, reduction="none")
        return torch.where(mask > 0, loss, 0.0).sum()

    fisher, _ = observe([*model.parameters()], objective, "empirical")
    assert all(dense_average(block).isfinite().all() for block in fisher.blocks)


def test_an_empirical_fisher_is_called_so_in_the_coverage():
    model, x = nn.Sequential(nn.Linear(4, C), nn.LayerNorm(C)), torch.randn(N, 4)
    optimizer = NaturalGradientOptimizer(model.parameters(), fisher="empirical")
    with optimizer.observe():
        loss = F.cross_entropy(model(x), LABELS)
    loss.backward()
    optimizer.step()
    blocks = [row.block for row in optimizer.coverage().rows]
    assert len(blocks) == 4
    assert all(block.startswith("empirical ") for block in blocks)


@pytest.mark.parametrize("structure", ["exact", "matrix-free"])
def test_an_empirical_fisher_is_not_made_of_jacobians(structure):
    parameter = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(OptionError, match="never sees the data's labels; use structure='auto'"):
        NaturalGradientOptimizer(parameter, fisher="empirical", structure=structure)


@pytest.mark.parametrize("fisher", ["empirical", "propagated"])
def test_a_small_model_has_an_exact_block_unless_it_is_to_be_empirical(fisher):
    model, x = nn.Linear(2, 1).double(), randn(256, 2, seed=3)
    optimizer = NaturalGradientOptimizer(model.parameters(), fisher=fisher)
    for _ in range(2):
        with optimizer.observe():
            loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    exact = ["exact" in row.block for row in optimizer.coverage().rows]
    assert exact == [fisher == "propagated"] * 2
