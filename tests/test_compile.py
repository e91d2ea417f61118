"""Compiled models: observed steps see through the compiler, all others run what it made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional as F
from torch.overrides import _len_torch_function_stack

from ngplugin import NaturalGradientOptimizer
from tests.small_fits import Points, X, Y, fit

STEPS = 25

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
backends = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)]
)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts the calls of what another one made."""

    def __init__(self, backend: str) -> None:
        self.calls = 0
        self._compile = lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        compiled = self._compile(graph, inputs)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return counted


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh())
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


class Watched(Points):
    """Notes at each step whether it was observed, and how often compiled code has run by then."""

    counting: Counting | None = None

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[bool] = []
        self.compiled = [0]

    def build(self) -> nn.Module:
        return Network()

    @torch.compiler.disable
    def note(self, loss: Tensor) -> None:
        super().note(loss)
        self.observed.append(_len_torch_function_stack() > 0)
        if self.counting is not None:
            self.compiled.append(self.counting.calls)


def submodule(module: Watched, counting: Counting) -> Any:
    module.net.first = torch.compile(module.net.first, backend=counting)
    return module


def network(module: Watched, counting: Counting) -> Any:
    module.net = torch.compile(module.net, backend=counting)
    return module


def network_in_place(module: Watched, counting: Counting) -> Any:
    module.net.compile(backend=counting)
    return module


def whole_module(module: Watched, counting: Counting) -> Any:
    return torch.compile(module, backend=counting)


@pytest.fixture(scope="module", name="uncompiled")
def losses_of_the_uncompiled_run() -> list[float]:
    module = Watched()
    fit(module, steps=STEPS)
    return module.losses


@backends
@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(way, marks=pytest.mark.supports("Compilers", what), id=way.__name__)
        for way, what in (
            (submodule, "torch.compile of a submodule"),
            (network, "torch.compile of the network"),
            (network_in_place, "nn.Module.compile() of the network"),
            (whole_module, "trainer.fit(torch.compile(module))"),
        )
    ],
)
def test_a_compiled_run_is_the_uncompiled_one_and_compiled_where_nothing_is_observed(
    compiled: Callable[[Watched, Counting], Any], backend: str, uncompiled: list[float]
) -> None:
    module = Watched()
    module.counting = Counting(backend)
    callback = fit(compiled(module, module.counting), steps=STEPS)
    assert module.losses == pytest.approx(uncompiled, rel=1e-3)
    assert {row.block for row in callback.coverage().rows} == {"kronecker", "unit-wise"}
    ran = [b - a for a, b in zip(module.compiled, module.compiled[1:], strict=False)]
    # A whole module is compiled step and all, and the note is inside of it.
    assert [count > 0 for count in ran] == [not seen for seen in module.observed]
    assert 5 < sum(module.observed) < STEPS - 5


@pytest.mark.supports("Compilers", "a compiled function that computes the loss, fullgraph=True")
def test_a_compiled_loss_of_a_plain_loop_is_seen_through() -> None:
    def run(wrap: Callable[[Any], Any]) -> tuple[list[float], NaturalGradientOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
        loss_of = wrap(lambda x, y: F.cross_entropy(model(x), y))
        optimizer = NaturalGradientOptimizer(model.parameters())
        losses = []
        for _ in range(STEPS):
            with optimizer.observe():
                loss = loss_of(X, Y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, optimizer

    counting = Counting("aot_eager")
    plain, _ = run(lambda f: f)
    losses, optimizer = run(lambda f: torch.compile(f, backend=counting, fullgraph=True))
    assert losses == pytest.approx(plain, rel=1e-3)
    assert {row.block for row in optimizer.coverage().rows} == {"kronecker"}
    assert 5 < counting.calls < STEPS - 5


@pytest.mark.supports("Compilers", "torch.jit.trace: blocks from sampled gradients, KL predicted")
@pytest.mark.filterwarnings("ignore:ngplugin. the KL of a step is predicted:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_the_gradients_of_a_traced_network_make_its_blocks() -> None:
    class Traced(Points):
        def build(self) -> nn.Module:
            return torch.jit.trace(super().build(), X[:2])

    module = Traced()
    callback = fit(module, steps=STEPS)
    assert module.losses[-1] < 0.7 * module.losses[0]
    kinds = [row.block for row in callback.coverage().rows]
    assert kinds == ["gradient-kronecker", "diagonal", "gradient-kronecker", "diagonal"]
