"""A replay against a fresh forward pass of the changed model, bit for bit."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.observe import Observer
from ngplugin.curvature.recorded_call import RecordedCall
from tests.oracle import double, generator, randn

X = randn(6, 4, seed=1)
IMAGES = randn(6, 2, 5, 5, seed=2)
SEQUENCES = randn(6, 3, 4, seed=3)


def of_module(model, x=X, predict=None):
    model = double(model)
    return model, (lambda: predict(model, x)) if predict else (lambda: model(x))


def written_in_place(model, x):
    z = model(x)
    z.relu_().add_(0.5)
    z[:, 0] = 2 * z[:, 1]
    z[1:3] *= 3
    z.view(-1)[5].mul_(2)
    return z


def written_into_a_buffer(model, x):
    out = torch.zeros(len(x), 3, dtype=x.dtype)
    for i, row in enumerate(x):
        out[i] = model(row)
    out[0].add_(1)
    return out


def views(model, x):
    a, b = model(x).chunk(2, dim=1)
    a, b = a.T.contiguous(), b.transpose(0, 1)
    return (a.reshape(-1, 1) * b.flatten().unsqueeze(1)).view(-1, 2)


def read_before_written(model, x):
    z = model(x)
    kept = z.clone()
    z.zero_()
    return kept + z


def pinn(model, x):
    x = x.clone().requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return u + first.sum(1, keepdim=True) * second[:, :1]


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x.float())
    return z.float() + model[0](x.float()).sum(1, keepdim=True)


def loop(model, x):
    h = x
    for i in range(4):
        h = model(h).tanh() + i * h
    return h


def attention(model, x):
    return model(x, x, x, need_weights=False)[0]


def packed(model, x):
    lengths = torch.tensor([3, 3, 2, 2, 1, 1])
    out, _ = model(rnn.pack_padded_sequence(x, lengths, batch_first=True))
    return rnn.pad_packed_sequence(out, batch_first=True)[0]


def noisy(model, x):
    mean, log_std = model(x).chunk(2, 1)
    z = torch.distributions.Normal(mean, log_std.exp()).rsample()
    return z + torch.rand_like(mean) * torch.randn(mean.shape, dtype=mean.dtype)


def chosen(model, x):
    z = model(x)
    best = z.max(dim=1)
    order = torch.sort(z, dim=1).values
    return (
        torch.where(z > 0.1, z, order) + best.values[:, None] + z[torch.tensor([1, 0, 3, 2, 5, 4])]
    )


def functional(model, x):
    parameters = {name: 2 * p for name, p in model.named_parameters()}
    return torch.func.functional_call(model, parameters, (x,))


def through_data(model, x):
    return model(x) * model.weight.detach().norm() + model.bias.data.sum()


def under_no_grad(model, x):
    with torch.no_grad():
        frozen = model(x)
    return model(x) - 0.5 * frozen


CASES = {
    "sequential": of_module(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))),
    "dropout": of_module(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))),
    "two dropouts": of_module(
        nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 4), nn.Dropout(0.5), nn.AlphaDropout(0.2))
    ),
    "batch norm": of_module(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))),
    "batch norm twice": of_module(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), predict=lambda m, x: m(m(x))
    ),
    "batch norm in eval": of_module(
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    ),
    "batch norm 2d": of_module(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)), IMAGES
    ),
    "instance norm": of_module(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, True, track_running_stats=True)),
        IMAGES,
    ),
    "in-place": of_module(nn.Linear(4, 3), predict=written_in_place),
    "in-place activations": of_module(
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(True), nn.Linear(5, 5), nn.SiLU(True))
    ),
    "written into a buffer": of_module(nn.Linear(4, 3), predict=written_into_a_buffer),
    "views": of_module(nn.Linear(4, 4), predict=views),
    "read before it is overwritten": of_module(nn.Linear(4, 3), predict=read_before_written),
    "lstm": of_module(nn.LSTM(4, 3, 2, batch_first=True), SEQUENCES, lambda m, x: m(x)[0]),
    "lstm with dropout": of_module(nn.LSTM(4, 3, 2, dropout=0.4), SEQUENCES, lambda m, x: m(x)[0]),
    "gru": of_module(nn.GRU(4, 3, bidirectional=True), SEQUENCES, lambda m, x: m(x)[0]),
    "packed lstm": of_module(nn.LSTM(4, 3, batch_first=True), SEQUENCES, packed),
    "lstm cell": of_module(nn.LSTMCell(4, 4), predict=lambda m, x: m(x, m(x))[0]),
    "attention": of_module(nn.MultiheadAttention(4, 2, dropout=0.3), SEQUENCES, attention),
    "transformer layer": of_module(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True), SEQUENCES
    ),
    "embedding": of_module(
        nn.Embedding(5, 3), torch.tensor([0, 3, 1]), lambda m, i: m(i) @ m.weight.T
    ),
    "derivatives of the network": of_module(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), predict=pinn
    ),
    "loop": of_module(nn.Linear(4, 4), predict=loop),
    "tied weights": of_module(
        nn.Linear(4, 4), predict=lambda m, x: F.linear(m(x).tanh(), m.weight.t())
    ),
    "checkpoint": of_module(
        nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)),
        predict=lambda m, x: checkpoint(m, x, use_reentrant=False),
    ),
    "sampling": of_module(nn.Linear(4, 4), predict=noisy),
    "named results": of_module(nn.Linear(4, 3), predict=chosen),
    "functional call": of_module(nn.Linear(4, 3), predict=functional),
    "detached parameters": of_module(nn.Linear(4, 3), predict=through_data),
    "no grad inside": of_module(nn.Linear(4, 3), predict=under_no_grad),
    "weight norm": of_module(parametrizations.weight_norm(nn.Linear(4, 3))),
    "out argument": of_module(
        nn.Linear(4, 4),
        predict=lambda m, x: (
            x @ torch.mul(m.weight.detach(), 2.0, out=torch.empty(4, 4, dtype=x.dtype))
        ),
    ),
    "convolution": of_module(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.MaxPool2d(2), nn.Flatten()), IMAGES
    ),
    "einsum": of_module(
        nn.Linear(4, 4), predict=lambda m, x: torch.einsum("ni,oi,no->no", x, m.weight, m(x))
    ),
}
_mixed = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
CASES["autocast"] = (_mixed, lambda: autocast(_mixed, X))


def record(model, predict, seed=5):
    observer = Observer([*model.parameters()], None, True, "propagated", 1, generator())
    torch.manual_seed(seed)
    with observer:
        z = predict()
        mark = observer.observation.tape.mark([z])
    return observer.observation.tape, mark, z.detach().clone()


def perturb(model):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.3 * randn(*p.shape, seed=70 + i).to(p))


@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_a_fresh_forward_pass_of_the_changed_model(name):
    model, predict = CASES[name]
    tape, mark, recorded = record(model, predict)
    assert tape.obstacle is None
    buffers = [b.clone() for b in model.buffers()]
    random = torch.get_rng_state()
    ((again,),) = tape.replay([mark])
    assert torch.equal(again, recorded)

    perturb(model)
    ((replayed,),) = tape.replay([mark])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(b, old) for b, old in zip(model.buffers(), buffers, strict=True))
    assert not replayed.requires_grad
    assert replayed.dtype == recorded.dtype

    torch.manual_seed(5)
    fresh = predict().detach()
    assert not torch.equal(fresh, recorded)
    assert torch.equal(replayed, fresh)


def test_recording_changes_nothing_about_the_forward_pass():
    for name, (model, predict) in CASES.items():
        if any(True for _ in model.buffers()):
            continue  # whose state moves on from one pass to the next
        _, _, recorded = record(model, predict)
        torch.manual_seed(5)
        assert torch.equal(recorded, predict().detach()), name


def test_a_tensor_that_a_call_hands_on_as_it_was_is_none_that_it_made():
    layer = double(nn.Linear(4, 3))
    constant = torch.zeros(6, 3).double()
    observer = Observer([*layer.parameters()], None, True, "propagated", 1, generator())
    with observer:
        tape = observer.observation.tape
        z = layer(X)
        calls = len(tape.calls)
        same, scale = torch.broadcast_tensors(z, z.contiguous())
        assert same is scale is z
        assert len(tape.calls) == calls
        same, zeros, row = torch.broadcast_tensors(z, constant, z[0].exp())
        assert (same is z, zeros is constant) == (True, True)
        mark = tape.mark([same * row + zeros])
    assert tape.calls[-3].outputs[:2] == (None, None)
    perturb(layer)
    ((replayed,),) = tape.replay([mark])
    fresh = layer(X).detach()
    assert torch.equal(replayed, fresh * fresh[0].exp())


def test_several_marks_are_given_back_as_they_were_when_they_were_marked():
    layer = double(nn.Linear(4, 3))
    observer = Observer([*layer.parameters()], None, True, "propagated", 1, generator())
    with observer:
        tape = observer.observation.tape
        z = layer(X)
        first = tape.mark([z])
        z.mul_(2)
        second = tape.mark([z, X])
        other = layer(z[:, :1].expand(-1, 4))
        third = tape.mark([other])
    perturb(layer)
    (a,), (b, x), (c,) = tape.replay([first, second, third])
    fresh = layer(X).detach()
    assert torch.equal(a, fresh)
    assert torch.equal(b, 2 * fresh)
    assert torch.equal(x, X)
    assert torch.equal(c, layer(2 * fresh[:, :1].expand(-1, 4)).detach())


def test_calls_that_the_prediction_does_not_depend_on_are_not_run_again(monkeypatch):
    layer, runs = double(nn.Linear(4, 3)), []

    class Counted(nn.Module):
        def forward(self, x):
            return layer(x)

    model = Counted()
    observer = Observer([*layer.parameters()], None, True, "propagated", 1, generator())
    with observer:
        z = model(X)
        mark = observer.observation.tape.mark([z])
        model(X).square().mean()
        z.exp()
    tape = observer.observation.tape
    original = RecordedCall.run_again
    monkeypatch.setattr(
        RecordedCall,
        "run_again",
        lambda call, *rest: (runs.append(call.function), original(call, *rest)),
    )
    tape.replay([mark])
    assert runs == [F.linear]


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.filterwarnings("ignore:.*jit.script. is deprecated")
@pytest.mark.parametrize("after", [lambda z: z, lambda z: 2 * z], ids=["at once", "after a call"])
@pytest.mark.parametrize("hidden", ["numpy", "before", "before, in place", "script"])
def test_what_no_observer_can_see_is_an_obstacle_and_says_so(hidden, after):
    layer = double(nn.Linear(4, 3))
    if hidden == "script":
        layer = torch.jit.script(layer)
    early, other = layer(X), randn(6, 3).requires_grad_()
    predict = {
        "numpy": lambda: ByNumpy.apply(layer(X)),
        "before": lambda: early,
        "before, in place": lambda: (2 * other).add_(early),
        "script": lambda: layer(X),
    }[hidden]
    tape, mark, _ = record(layer, lambda: after(predict()))
    assert "made by no torch function that can be observed" in tape.obstacle
    with pytest.raises(RuntimeError, match="cannot be computed again"):
        tape.replay([mark])


def test_a_graph_from_before_that_no_prediction_uses_is_no_obstacle():
    layer = double(nn.Linear(4, 3))
    early = layer(X).sum()

    def predict():
        z = layer(X)
        assert (early * 2).item() == 2 * early.item()
        return z

    tape, mark, recorded = record(layer, predict)
    assert tape.obstacle is None
    assert torch.equal(tape.replay([mark])[0][0], recorded)


def test_a_custom_function_made_of_torch_calls_is_replayed():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    layer = double(nn.Linear(4, 3))
    tape, mark, _ = record(layer, lambda: Doubled.apply(layer(X)))
    perturb(layer)
    assert torch.equal(tape.replay([mark])[0][0], 2 * layer(X).detach())


def test_a_parameter_changed_in_the_forward_pass_is_an_obstacle():
    layer = double(nn.Linear(4, 3))

    def predict():
        with torch.no_grad():
            layer.weight.clamp_(-1, 1)
        return layer(X)

    tape, _, _ = record(layer, predict)
    assert "clamp_" in tape.obstacle


def test_a_prediction_of_no_parameter_is_given_back_as_it_was():
    layer = double(nn.Linear(4, 3))
    leaf = randn(2).requires_grad_()
    tape, mark, _ = record(layer, lambda: (layer(X), leaf * 2)[1])
    perturb(layer)
    assert torch.equal(tape.replay([mark])[0][0], 2 * leaf.detach())


def test_a_tape_that_let_go_keeps_no_activation_alive():
    model = double(nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 50), nn.Linear(50, 3)))
    made = []
    hooks = [m.register_forward_hook(lambda m, i, o: made.append(weakref.ref(o))) for m in model]
    tape, mark, _ = record(model, lambda: model(X))
    for hook in hooks:
        hook.remove()
    tape.release()
    gc.collect()
    assert len(made) == 4
    assert all(ref() is None for ref in made)
    perturb(model)
    assert torch.equal(tape.replay([mark])[0][0], model(X).detach())


def test_a_replay_frees_each_value_after_its_last_use(monkeypatch):
    model = double(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))))
    tape, mark, _ = record(model, lambda: model(X))
    most = 0
    original = RecordedCall.run_again

    def counted(call, device, values, replaced):
        nonlocal most
        original(call, device, values, replaced)
        most = max(most, len(values))

    monkeypatch.setattr(RecordedCall, "run_again", counted)
    tape.replay([mark])
    assert most <= 2


def test_gradients_of_parameters_are_left_alone_by_a_replay():
    model, predict = CASES["derivatives of the network"]
    tape, mark, _ = record(model, predict)
    tape.replay([mark])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("error")
def test_coordinates_may_be_computed_before_they_enter_the_network():
    model = double(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
    optimizer = NaturalGradientOptimizer(model.parameters(), measure_every=1)
    x = randn(6, 3, seed=1).requires_grad_()
    for _ in range(2):
        with optimizer.observe():
            scaled = (x * torch.tensor([1.0, 2.0, 3.0]).double())[:, [0, 2]]  # keeps its factors
            (du,) = torch.autograd.grad(model(scaled).sum(), x, create_graph=True)
            loss = F.mse_loss(du, torch.ones_like(du))
        loss.backward()  # and lets them go
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.report.kl is not None
