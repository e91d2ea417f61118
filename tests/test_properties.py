"""What holds of any model with any loss under any options, and whatever one batch is like."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, Laplace, MultivariateNormal, Normal, StudentT

from ngplugin import (
    ExponentialDamping,
    LevenbergMarquardt,
    NaturalGradientOptimizer,
    OptionError,
)
from tests.oracle import flat

FEATURES, OUTPUTS, MOST = 12, 4, 24  # numbers of an example, of a prediction, and of examples
EXAMPLES = int(os.environ.get("NGPLUGIN_EXAMPLES", "30"))


class Recurrent(nn.Module):
    """Four steps of a GRU, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(FEATURES // 4, 6, batch_first=True)
        self.head = nn.Linear(6, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.unflatten(1, (4, -1)))[0][:, -1])


class ByHand(nn.Module):
    """Bare parameters: a matrix twice, once transposed, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(OUTPUTS, FEATURES))
        self.rho = nn.Parameter(torch.zeros(OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum("ni,oi->no", x, self.weight).tanh() @ self.weight
        return F.linear(z, self.weight) / F.softplus(self.rho)


class Tokens(nn.Module):
    """Signs of the numbers as tokens, one table for looking up and for putting out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(OUTPUTS, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x > 0).long() + 2 * (x.abs() > 1)
        return self.layer(self.table(tokens)).mean(1) @ self.table.weight.T


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, OUTPUTS, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, OUTPUTS)),
    "normalized": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, OUTPUTS)
    ),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.LazyLinear(OUTPUTS),
    ),
    "recurrent": Recurrent,
    "by hand": ByHand,
    "tokens": Tokens,
}  # fmt: skip


def half(z: Tensor) -> tuple[Tensor, Tensor]:
    """A place and a positive width."""
    return z[:, :2], F.softplus(z[:, 2:]) + 1e-3


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": lambda z, x: F.cross_entropy(z, x[:, :OUTPUTS].argmax(1)),
    "smoothed": lambda z, x: F.cross_entropy(z, x[:, :OUTPUTS].argmax(1), label_smoothing=0.1),
    "a sum": lambda z, x: F.cross_entropy(z, x[:, :OUTPUTS].argmax(1), reduction="sum"),
    "mse": lambda z, x: F.mse_loss(z, x[:, :OUTPUTS].sin()),
    "binary": lambda z, x: F.binary_cross_entropy_with_logits(z, (x[:, :OUTPUTS] > 0).float()),
    "poisson": lambda z, x: F.poisson_nll_loss(z, x[:, :OUTPUTS].abs().round()),
    "gaussian": lambda z, x: F.gaussian_nll_loss(half(z)[0], x[:, :2], half(z)[1]),
    "huber": lambda z, x: F.smooth_l1_loss(z, x[:, :OUTPUTS]),
    "l1": lambda z, x: F.l1_loss(z, x[:, :OUTPUTS]),
    "kl": lambda z, x: F.kl_div(z.log_softmax(1), x[:, :OUTPUTS].softmax(1), reduction="batchmean"),
    "normal": lambda z, x: -Normal(*half(z), validate_args=False).log_prob(x[:, :2]).mean(),
    "laplace": lambda z, x: -Laplace(*half(z), validate_args=False).log_prob(x[:, :2]).mean(),
    "student": lambda z, x: -StudentT(4.0, *half(z), validate_args=False).log_prob(x[:, :2]).sum(),
    "categorical": lambda z, x: (
        -Categorical(logits=z, validate_args=False).log_prob(x[:, :OUTPUTS].argmax(1)).mean()
    ),
    "multivariate": lambda z, x: (
        -MultivariateNormal(
            half(z)[0], scale_tril=torch.diag_embed(half(z)[1]), validate_args=False
        )
        .log_prob(x[:, :2])
        .mean()
    ),
    "of one's own": lambda z, x: (z - x[:, :OUTPUTS]).square().sum(1).log1p().mean(),
    "two": lambda z, x: (
        (F.cross_entropy(z, x[:, :OUTPUTS].argmax(1)) + 0.5 * F.mse_loss(z, x[:, :OUTPUTS])) / 4
    ),
}

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([1.0, 1e-3, 10.0]),
    "momentum": st.sampled_from([0.0, 0.9, 0.99]),
    "nesterov": st.booleans(),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "kl_radius": st.sampled_from([0.05, 1e-6, 0.5, 100.0, None]),
    "measure_every": st.sampled_from([1, 3, 100, None]),
    "step_size": st.sampled_from(["bounded", "line-search", "quadratic"]),
    "layer_balance": st.sampled_from(["natural", "orthogonal", "balanced", "equal"]),
    "damping": st.sampled_from(
        ["auto", 0.0, 1e-8, 10.0, ExponentialDamping(1.0, 1e-3, 5), LevenbergMarquardt()]
    ),
    "damping_mode": st.sampled_from(["relative", "absolute"]),
    "sampling_damping": st.sampled_from([0.0, 1.0]),
    "fisher": st.sampled_from(["sampled", "propagated", "exact", "empirical", "ggn"]),
    "draws": st.integers(1, 3),
    "structure": st.sampled_from(
        ["auto", "exact", "kronecker", "eigen", "diagonal", "identity", "matrix-free"]
    ),
    "weight_sharing": st.sampled_from(["expand", "reduce"]),
    "max_factor": st.sampled_from([5, 8192]),
    "overhead": st.sampled_from([0.0, 0.6, 1e9]),
    "cg_iterations": st.integers(1, 4),
    "decay": st.sampled_from([0.0, 0.95]),
    "statistics_every": st.integers(1, 3),
    "refresh_every": st.integers(1, 4),
    "burn_in": st.sampled_from([0, 2]),
    "noise_variance": st.sampled_from(["auto", "running", 0.3]),
    "spectrum_every": st.sampled_from([1, 100]),
}


@dataclass(frozen=True)
class Batch:
    """One batch: how many examples, how large, what is wrong with one of them."""

    examples: int
    scale: float = 1.0
    fault: float = 0.0  # what stands in place of an example
    weight: float = 1.0  # of the loss


BATCHES = st.builds(
    Batch,
    st.sampled_from([MOST, MOST, MOST, 1, 2, 7, 0]),
    st.sampled_from([1.0, 1.0, 1.0, 1e-20, 1e-4, 1e4, 1e15]),
    st.sampled_from([0.0, 0.0, 0.0, math.nan, math.inf, 1e30]),
    st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e-30, 1e6]),
)
GOOD, EMPTY = Batch(MOST), Batch(0)
BAD, HUGE = Batch(MOST, 1.0, 1e30), Batch(2, 1e15, 1e30, 1e6)


def found(model: str, loss: str, options: dict[str, Any], *batches: Batch) -> Any:
    """A case that failed once."""
    return example(model=model, loss=loss, options=options, batches=[*batches])


class Run:
    """A model, a loss and an optimizer."""

    def __init__(self, model: str, loss: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model, self.loss, self.options = MODELS[model](), LOSSES[loss], options
        self.model(torch.zeros(2, FEATURES))  # of lazy layers
        self.optimizer = NaturalGradientOptimizer(self.model.parameters(), **options)

    def step(self, batch: Batch, number: int) -> None:
        torch.manual_seed(number)
        x = batch.scale * torch.randn(MOST, FEATURES)
        if batch.fault:
            x[0] = batch.fault
        # Of no example at all torch has no log_prob of a MultivariateNormal.
        x = x[: batch.examples or int(self.loss is LOSSES["multivariate"])]
        if batch.examples <= 1:
            self.model.eval()  # a batch normalization refuses a single example by itself
        with self.optimizer.observe():
            value = batch.weight * self.loss(self.model(x), x)
        self.model.train()
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()

    def check(self) -> None:
        assert flat([*self.model.parameters()]).isfinite().all()
        report, options = self.optimizer.report, self.options
        if report is None:
            return
        assert 0 <= report.step_scale < math.inf
        if options.get("kl_radius", 0.05) is None:
            return
        bounded = report.kl_radius * (1 + 1e-4) + 1e-30
        assert report.kl is None or report.kl <= bounded
        # A line search goes by what is measured, whatever was predicted.
        searched = report.kl is not None and options.get("step_size") == "line-search"
        assert searched or report.kl_predicted <= bounded

    def saved(self) -> Any:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "opt": self.optimizer.state_dict()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


@settings(
    max_examples=EXAMPLES, derandomize=EXAMPLES <= 30, deadline=None,
    suppress_health_check=[*HealthCheck], print_blob=True,
)  # fmt: skip
@found("recurrent", "poisson", {"structure": "matrix-free"}, HUGE, BAD, BAD)  # order of sums
@found(  # saved after a step that led to no number, before it was taken back
    "convolutional",
    "poisson",
    {
        "kl_radius": 100.0,
        "measure_every": None,
        "layer_balance": "natural",
        "decay": 0.0,
        "draws": 2,
        "sampling_damping": 0.0,
        "statistics_every": 1,
    },
    Batch(2, 1e15),
    Batch(MOST, 1e4, 1e30, 1e6),
    Batch(7, 1e15, 0.0, 0.0),
    Batch(MOST, 1.0, math.nan, 0.0),
)
@found("by hand", "huber", {"fisher": "ggn"}, HUGE, Batch(MOST, 1e4), Batch(7, 1e-20))  # two tails
@found("tokens", "smoothed", {"step_size": "quadratic", "fisher": "ggn"}, EMPTY)
@found("tokens", "of one's own", {"weight_sharing": "reduce"}, EMPTY)
@found("convolutional", "smoothed", {"step_size": "quadratic", "kl_radius": None}, HUGE, BAD)
@found("mlp", "of one's own", {"statistics_every": 1}, GOOD, EMPTY)
@found("mlp", "normal", {}, Batch(MOST, 1.0, math.nan))  # whose sampler raises
@found("linear", "kl", {}, Batch(MOST, 1e-4), GOOD)  # a divergence below zero by rounding
@found(  # an average of no row at all
    "linear", "cross entropy", {"decay": 0.0, "structure": "eigen"}, GOOD, Batch(MOST, 1e15)
)
@found(  # growth beyond all numbers
    "recurrent",
    "cross entropy",
    {"momentum": 0.0, "refresh_every": 2, "statistics_every": 1, "decay": 0.0},
    Batch(MOST, 1e-20),
    GOOD,
)
@found(  # a factor that vanished beside a large one
    "linear",
    "of one's own",
    {
        "damping": 0.0,
        "damping_mode": "absolute",
        "decay": 0.0,
        "statistics_every": 1,
        "refresh_every": 1,
        "overhead": 0.0,
        "max_factor": 5,
        "burn_in": 0,
        "fisher": "sampled",
    },
    GOOD,
    Batch(MOST, 1e4, 0.0, 1e-30),
)
@found("mlp", "cross entropy", {"structure": "exact", "step_size": "quadratic"}, BAD, GOOD)
@given(
    model=st.sampled_from([*MODELS]),
    loss=st.sampled_from([*LOSSES]),
    options=st.fixed_dictionaries({}, optional=OPTIONS),
    batches=st.lists(BATCHES, min_size=2, max_size=6),
)
def test_parameters_stay_finite_within_the_bound_and_a_saved_run_goes_on_bit_for_bit(
    model: str, loss: str, options: dict[str, Any], batches: list[Batch]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = Run(model, loss, options)
        except OptionError:  # some options contradict each other, which a line says
            return
        for number, batch in enumerate([GOOD, *batches]):
            run.step(batch, number)
            run.check()
        saved, other = run.saved(), Run(model, loss, options)
        other.model.load_state_dict(saved["model"])
        other.optimizer.load_state_dict(saved["opt"])
        for number in (10, 11):
            for each in (run, other):
                each.step(GOOD, number)
                each.check()
    assert torch.equal(flat([*run.model.parameters()]), flat([*other.model.parameters()]))
