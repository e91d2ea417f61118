"""Networks of which parts are computed again in the backward pass, by either kind of checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import CheckpointFunction, checkpoint, checkpoint_sequential

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.activation_checkpointing import reentrant_checkpoints_opened
from tests.small_fits import Points, X, Y, blocks, fit

Checkpoint = Callable[[nn.Sequential, Tensor], Tensor]


def none(part: nn.Sequential, x: Tensor) -> Tensor:
    return part(x)


def non_reentrant(part: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=False)


def reentrant(part: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=True)


def nested(part: nn.Sequential, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(part[3:], checkpoint(part[:3], x, use_reentrant=True), use_reentrant=True)

    return checkpoint(inner, x, use_reentrant=True)


def in_segments(part: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint_sequential(part, 2, x, use_reentrant=True)


def with_a_tuple(part: nn.Sequential, x: Tensor) -> Tensor:
    def both(x: Tensor, share: float, unused: None) -> tuple[Tensor, Tensor]:
        return part(x), share * x

    a, b = checkpoint(both, x, 0.0, None, use_reentrant=True, preserve_rng_state=True)
    return a + b


KINDS = [non_reentrant, reentrant, nested, in_segments, with_a_tuple]
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.supports(
                "Activation checkpointing", f"use_reentrant={kind is not non_reentrant}"
            ),
        )
        for kind in KINDS
    ],
)


class Network(nn.Module):
    """A part with batch normalization, dropout and an activation in place, between two layers."""

    def __init__(self, kind: Checkpoint, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.middle = nn.Sequential(
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(8, 8),
            nn.ReLU(inplace=True),
        )
        self.last = nn.Linear(8, 2)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.kind(self.middle, self.first(x)))


def trained(
    model: nn.Module, by_closure: bool = False, steps: int = 12, **options: Any
) -> tuple[list[float], NaturalGradientOptimizer]:
    torch.manual_seed(1)
    optimizer = NaturalGradientOptimizer(model.parameters(), **options)
    losses = []

    def evaluate() -> Tensor:
        loss = F.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        return loss

    for _ in range(steps):
        if by_closure:
            loss = optimizer.step(evaluate)
        else:
            with optimizer.observe():
                loss = F.cross_entropy(model(X), Y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


@every_kind
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the nested one
@pytest.mark.parametrize("by_closure", [False, True], ids=["loop", "closure"])
def test_a_checkpointed_network_makes_the_steps_of_one_that_is_not(
    kind: Checkpoint, by_closure: bool
) -> None:
    plain, other = trained(Network(none), by_closure)
    losses, optimizer = trained(Network(kind), by_closure)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert optimizer.coverage() == other.coverage()
    assert optimizer.report.kl_predicted == pytest.approx(other.report.kl_predicted, rel=1e-3)
    for one, two in zip(optimizer._engine.fisher.blocks, other._engine.fisher.blocks, strict=True):
        torch.testing.assert_close(one.mean_eigenvalue(), two.mean_eigenvalue(), rtol=1e-3, atol=0)


@every_kind
def test_its_kl_is_measured(kind: Checkpoint) -> None:
    _, optimizer = trained(Network(kind), steps=1)
    _, other = trained(Network(none), steps=1)
    assert optimizer.report.kl == pytest.approx(other.report.kl, rel=1e-4)


@pytest.mark.parametrize("kind", [non_reentrant, reentrant])
def test_an_exact_block_reads_what_a_checkpointed_graph_saves(kind: Checkpoint) -> None:
    class Scaled(nn.Module):
        """Small enough for an exact block; two parameters meet in one node."""

        def __init__(self, kind: Checkpoint) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 4).double(), nn.Linear(4, 2).double()
            self.scale = nn.Parameter(torch.ones(4).double())
            self.width = nn.Parameter(2.0 * torch.ones(4).double())
            self.kind = kind

        def forward(self, x: Tensor) -> Tensor:
            def inner(x: Tensor) -> Tensor:
                return self.last(torch.tanh(self.first(x) * (self.scale / self.width)))

            x = x.double().repeat(5, 1).requires_grad_()
            return self.kind(inner, x)

    def train(kind: Checkpoint) -> tuple[Tensor, NaturalGradientOptimizer]:
        model = Scaled(kind)
        optimizer = NaturalGradientOptimizer(model.parameters())
        for _ in range(6):
            with optimizer.observe():
                loss = F.cross_entropy(model(X), Y.repeat(5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.detach(), optimizer

    (plain, other), (loss, optimizer) = train(none), train(kind)
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=0)
    kinds = [row.block for row in optimizer.coverage().rows]
    assert kinds == ["diagonal", "diagonal", "exact", "exact", "exact", "exact"]
    assert optimizer.coverage() == other.coverage()


def test_an_observed_step_leaves_buffers_and_gradients_as_the_user_s_checkpoint_does() -> None:
    one, other = Network(non_reentrant), Network(non_reentrant)
    torch.manual_seed(1)
    F.cross_entropy(one(X), Y).backward()
    after = torch.rand(3)
    torch.manual_seed(1)
    optimizer = NaturalGradientOptimizer(other.parameters())
    with optimizer.observe():
        loss = F.cross_entropy(other(X), Y)
    loss.backward()
    assert torch.equal(after, torch.rand(3))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    optimizer.step()
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(one.middle[1], name), getattr(other.middle[1], name))


def test_a_reentrant_checkpoint_of_data_alone_trains_nothing_inside_as_without_us() -> None:
    def run(observed: bool) -> tuple[Tensor | None, list[str]]:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = NaturalGradientOptimizer(model.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hidden = checkpoint(model[:2], X, use_reentrant=True)
            if observed:
                with optimizer.observe():
                    hidden = checkpoint(model[:2], X, use_reentrant=True)
                    loss = F.cross_entropy(model[2](hidden), Y)
            else:
                loss = F.cross_entropy(model[2](hidden), Y)
            loss.backward()
        return model[0].weight.grad, [str(w.message)[:40] for w in caught]

    for observed in (False, True):
        gradient, messages = run(observed)
        assert gradient is None
        assert messages == ["None of the inputs have requires_grad=Tr"] * (1 + observed)


def test_the_opened_checkpoint_is_closed_again_whatever_happens() -> None:
    apply = CheckpointFunction.apply

    def interrupted() -> None:
        with reentrant_checkpoints_opened():
            with reentrant_checkpoints_opened():
                pass
            assert "apply" in vars(CheckpointFunction)
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        interrupted()
    assert CheckpointFunction.apply == apply
    assert "apply" not in vars(CheckpointFunction)


class Checkpointed(Points):
    kind: Checkpoint

    def build(self) -> nn.Module:
        return Network(type(self).kind)

    def on_after_backward(self) -> None:
        assert _len_torch_function_stack() == 0
        assert "apply" not in vars(CheckpointFunction)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [non_reentrant, reentrant])
def test_a_trainer_s_fit_is_that_of_the_network_without(
    kind: Checkpoint, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for each in (none, kind):
        monkeypatch.setattr(Checkpointed, "kind", staticmethod(each), raising=False)
        module = Checkpointed()
        callback = fit(module, steps=20, precision=precision)
        losses.append(module.losses)
        assert blocks(callback) == {"kronecker", "unit-wise"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "32-true" else 1e-2)


# -- checkpoints of others -------------------------------------------------------------------------


class OwnCheckpoint(torch.autograd.Function):
    """Computes a part again and goes back through it, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, part: Any, refuses: bool, x: Tensor) -> Tensor:
        ctx.part, ctx.refuses = part, refuses
        ctx.save_for_backward(x)
        with torch.no_grad():
            return part(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.refuses and not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("not compatible with .grad()")
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.part(x)
        torch.autograd.backward(y, gradient)
        return None, None, x.grad


def reversible(part: nn.Sequential, x: Tensor) -> Tensor:
    return OwnCheckpoint.apply(part, False, x)


def of_a_library(part: nn.Sequential, x: Tensor) -> Tensor:
    return OwnCheckpoint.apply(part, True, x)


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        pytest.param(
            reversible,
            "empirical diagonal",
            "kronecker",
            marks=pytest.mark.supports(
                "Activation checkpointing",
                "reversible layers by a custom autograd.Function: an empirical diagonal inside",
            ),
        ),
        pytest.param(
            of_a_library,
            "empirical diagonal",
            "empirical diagonal",
            marks=[
                pytest.mark.supports(
                    "Activation checkpointing",
                    "a library's own checkpoint (DeepSpeed, fairscale): an empirical diagonal",
                ),
                pytest.mark.filterwarnings("ignore:ngplugin. the derivative:UserWarning"),
            ],
        ),
    ],
)
def test_another_checkpoint_keeps_its_gradients_and_gets_the_empirical_fisher(
    kind: Checkpoint, inside: str, outside: str
) -> None:
    def gradients(observed: bool) -> list[Tensor]:
        model = Network(kind, dropout=0.0)
        optimizer = NaturalGradientOptimizer(model.parameters())
        for _ in range(2):  # which add up
            if observed:
                with optimizer.observe():
                    loss = F.cross_entropy(model(X), Y)
            else:
                loss = F.cross_entropy(model(X), Y)
            loss.backward()
        return [p.grad for p in model.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)
    losses, optimizer = trained(Network(kind, dropout=0.0))
    assert losses[-1] < 0.8 * losses[0]
    found = [row.block for row in optimizer.coverage().rows]
    assert found == [outside] * 2 + [inside] * 6 + [outside] * 2


def test_a_checkpoint_that_refuses_is_named_in_a_warning() -> None:
    model = Network(of_a_library)
    optimizer = NaturalGradientOptimizer(model.parameters())
    with optimizer.observe():
        loss = F.cross_entropy(model(X), Y)
    with pytest.warns(UserWarning, match=r"torch.utils.checkpoint is seen.*compatible with .grad"):
        loss.backward()
