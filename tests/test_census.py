"""A census of architectures: each trains with the defaults, and every parameter has its block.

The table below says which blocks; what a model's parameters are, the name of the model says.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer

Loss = Callable[[], Tensor]
CENSUS: dict[str, tuple[Callable[[], tuple[nn.Module, Loss]], dict[str, int]]] = {}


def census(**expected: int):
    """Enter a function that builds a model and its loss, with the number of tensors a kind."""
    counts = {kind.replace("__", "-").replace("_", " "): n for kind, n in expected.items()}

    def enter(build):
        CENSUS[build.__name__] = build, counts
        return build

    return enter


def points(n: int = 48, d: int = 4) -> Tensor:
    return torch.randn(n, d)


def classes(x: Tensor, k: int = 3) -> Tensor:
    """Labels that depend on the data smoothly enough to be learnt."""
    return (x.flatten(1) @ torch.randn(x[0].numel(), k)).argmax(1)


def images(n: int = 16, c: int = 2, size: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, c, size, size)
    return x, classes(x)


def sequences(n: int = 16, length: int = 6, vocabulary: int = 7) -> Tensor:
    """Each token follows from the one before."""
    start = torch.randint(vocabulary, (n, 1))
    return (start + 2 * torch.arange(length)) % vocabulary


def classifying(model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Loss]:
    return model, lambda: F.cross_entropy(model(x), y)


def fitting(model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Loss]:
    return model, lambda: F.mse_loss(model(x), y)


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Lambda(nn.Module):
    """Any function of parameters and modules that it is given by name."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(self, *x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.prod(shape[:-1]) ** 0.5)


# -- feed-forward and convolutional ----------------------------------------------------------------


@census(kronecker=4)
def perceptron():
    x = points()
    return classifying(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), x, classes(x))


@census(kronecker=4, unit__wise=2)
def convolutional():
    return classifying(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=True),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        *images(),
    )


@census(kronecker=5, unit__wise=4)
def residual():
    return classifying(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            Residual(
                *(nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1, bias=0)),
                *(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1, bias=False)),
            ),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        ),
        *images(),
    )


@census(kronecker=6)
def depthwise_separable():
    return classifying(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.Conv2d(4, 6, 1), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(384, 3)),
        ),
        *images(),
    )


@census(kronecker=7, diagonal=1)
def u_net():
    x, _ = images()

    def forward(m, x):
        a = m.down(x).relu()
        return m.out(torch.cat([x, m.up(m.deep(a).relu())], 1))

    return fitting(
        Lambda(
            forward,
            down=nn.Conv2d(2, 4, 3, stride=2, padding=1),
            deep=nn.Conv2d(4, 4, 3, padding=1),
            up=nn.ConvTranspose2d(4, 2, 2, stride=2),
            out=nn.Conv2d(4, 1, 1),
        ),
        x,
        F.avg_pool2d(x, 3, 1, 1).sum(1, keepdim=True),
    )


@census(kronecker=4)
def convolutional_in_three_dimensions():
    x = torch.randn(12, 1, 4, 4, 4)
    return classifying(
        nn.Sequential(nn.Conv3d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)), x, classes(x)
    )


@census(kronecker=6)
def temporal_convolutional():
    x = torch.randn(12, 2, 10)

    def forward(m, x):
        x = m.a(F.pad(x, (2, 0))).relu()
        return m.head(m.b(F.pad(x, (4, 0))).relu()[..., -1])

    return fitting(
        Lambda(
            forward, a=nn.Conv1d(2, 4, 3), b=nn.Conv1d(4, 4, 3, dilation=2), head=nn.Linear(4, 1)
        ),
        x,
        x[:, :1, -3:].mean(-1),
    )


@census(kronecker=8)
def squeeze_and_excite():
    def forward(m, x):
        h = m.conv(x).relu()
        gate = m.excite(m.squeeze(h.mean((2, 3))).relu()).sigmoid()
        return m.head((h * gate[..., None, None]).mean((2, 3)))

    return classifying(
        Lambda(
            forward,
            conv=nn.Conv2d(2, 6, 3),
            squeeze=nn.Linear(6, 2),
            excite=nn.Linear(2, 6),
            head=nn.Linear(6, 3),
        ),
        *images(32),
    )


# -- attention -------------------------------------------------------------------------------------


@census(kronecker=12, unit__wise=4, gradient__kronecker=1, diagonal=1)
def vision_transformer():
    def forward(m, x):
        tokens = m.patches(x).flatten(2).mT
        tokens = torch.cat([m.token.expand(len(x), -1, -1), tokens], 1) + m.position
        return m.head(m.block(tokens)[:, 0])

    return classifying(
        Lambda(
            forward,
            patches=nn.Conv2d(2, 8, 4, stride=4),
            token=nn.Parameter(torch.zeros(1, 1, 8)),
            position=nn.Parameter(0.02 * torch.randn(1, 5, 8)),
            block=nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True),
            head=nn.Linear(8, 3),
        ),
        *images(),
    )


@census(kronecker=22, unit__wise=14, half__diagonal_kronecker=1)
def encoder_decoder_transformer():
    source = sequences()
    target = source.flip(1)

    def forward(m, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return m.head(m.body(m.table(source), m.table(target), tgt_mask=mask))

    model = Lambda(
        forward,
        table=nn.Embedding(7, 8),
        body=nn.Transformer(8, 2, 1, 1, 16, 0.1, batch_first=True),
        head=nn.Linear(8, 7),
    )
    return model, lambda: F.cross_entropy(
        model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten()
    )


@census(half__diagonal_kronecker=2, kronecker=8, unit__wise=4)
def tied_language_model():
    tokens = sequences(24)

    def forward(m, tokens):
        x = m.table(tokens) + m.positions(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return F.linear(m.block(x, src_mask=mask, is_causal=True), m.table.weight)

    model = Lambda(
        forward,
        table=nn.Embedding(7, 8),
        positions=nn.Embedding(6, 8),
        block=nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    )
    return model, lambda: F.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )


@census(half__diagonal_kronecker=1, kronecker=8, diagonal=2)
def gated_language_model():
    """The block of LLaMA: RMSNorm, rotary attention, SwiGLU, no biases."""
    tokens = sequences(24)

    def rotated(x):
        angle = torch.arange(x.shape[-2])[:, None] / 10.0
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(m, tokens):
        x = m.table(tokens)
        h = m.norm1(x)
        q, k, v = (f(h).unflatten(-1, (2, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + m.o(mixed.transpose(1, 2).flatten(2))
        h = m.norm2(x)
        return m.head(x + m.down(F.silu(m.gate(h)) * m.up(h)))

    model = Lambda(
        forward,
        table=nn.Embedding(7, 8),
        norm1=nn.RMSNorm(8),
        norm2=nn.RMSNorm(8),
        **{name: nn.Linear(8, 8, bias=False) for name in "qkvo"},
        gate=nn.Linear(8, 12, bias=False),
        up=nn.Linear(8, 12, bias=False),
        down=nn.Linear(12, 8, bias=False),
        head=nn.Linear(8, 7, bias=False),
    )
    return model, lambda: F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])


@census(kronecker=5)
def linear_attention():
    x = torch.randn(12, 6, 4)

    def forward(m, x):
        q, k, v = (torch.einsum("bnd,hde->bhne", x, w) for w in (m.queries, m.keys, m.values))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        summary = torch.einsum("bhne,bhnf->bhef", k, v)
        total = torch.einsum("bhne,bhe->bhn", q, k.sum(2))
        heads = torch.einsum("bhne,bhef->bhnf", q, summary) / total[..., None]
        return m.head(torch.einsum("bhne,hed->bnd", heads, m.joined).mean(1))

    return fitting(
        Lambda(
            forward,
            **{name: weight(2, 4, 3) for name in ("queries", "keys", "values")},
            joined=weight(2, 3, 4),
            head=nn.Linear(4, 1, bias=False),
        ),
        x,
        x.mean((1, 2))[:, None],
    )


@census(kronecker=4)
def mixture_of_experts():
    x = points()

    def forward(m, x):
        gates = m.router(x).softmax(-1)
        hidden = torch.einsum("bd,edh->beh", x, m.first).relu()
        return torch.einsum("be,beo->bo", gates, torch.einsum("beh,eho->beo", hidden, m.second))

    return classifying(
        Lambda(forward, router=nn.Linear(4, 3), first=weight(3, 4, 8), second=weight(3, 8, 3)),
        x,
        classes(x),
    )


@census(kronecker=4)
def mixture_of_routed_experts():
    """Each row goes to one expert, by index; some experts may have no rows."""
    x = points()

    def forward(m, x):
        gates, chosen = m.router(x).softmax(-1).max(-1)
        rows = torch.zeros(len(x), 3)
        for e in range(4):
            mine = chosen == e
            rows = rows.index_put((mine,), F.linear(x[mine], m.weight[e], m.bias[e]))
        return rows * gates[:, None]

    return classifying(
        Lambda(
            forward,
            router=nn.Linear(4, 4),
            weight=weight(4, 3, 4),
            bias=nn.Parameter(torch.zeros(4, 3)),
        ),
        x,
        classes(x),
    )


# -- recurrent and graph ---------------------------------------------------------------------------


@census(half__diagonal_kronecker=1, gradient__kronecker=2, diagonal=2, kronecker=2)
def lstm_classifier():
    tokens = sequences(24)
    return classifying(
        Lambda(
            lambda m, t: m.head(m.body(m.table(t))[0][:, -1]),
            table=nn.Embedding(7, 4),
            body=nn.LSTM(4, 6, batch_first=True),
            head=nn.Linear(6, 3),
        ),
        tokens,
        tokens[:, 0] % 3,
    )


@census(half__diagonal_kronecker=1, gradient__kronecker=4, diagonal=4, kronecker=2)
def gru_sequence_to_sequence():
    source = sequences()
    target = source.flip(1)

    def forward(m, source, target):
        _, state = m.encoder(m.table(source))
        return m.head(m.decoder(m.table(target), state)[0])

    model = Lambda(
        forward,
        table=nn.Embedding(7, 4),
        encoder=nn.GRU(4, 6, batch_first=True),
        decoder=nn.GRU(4, 6, batch_first=True),
        head=nn.Linear(6, 7),
    )
    return model, lambda: F.cross_entropy(model(source, target[:, :-1]).mT, target[:, 1:])


@census(gradient__kronecker=4, diagonal=4, kronecker=2)
def bidirectional_recurrent():
    x = torch.randn(12, 5, 3)
    return fitting(
        Lambda(
            lambda m, x: m.head(m.body(x)[0]),
            body=nn.RNN(3, 4, batch_first=True, bidirectional=True),
            head=nn.Linear(8, 1),
        ),
        x,
        x.cumsum(1)[..., :1].tanh(),
    )


@census(kronecker=6)
def recurrent_cell_applied_many_times():
    """The Euler steps of an ordinary differential equation, all of one field."""
    x = points()

    def forward(m, x):
        for _ in range(4):
            x = x + 0.25 * m.out(m.field(x).tanh())
        return m.head(x)

    return fitting(
        Lambda(forward, field=nn.Linear(4, 8), out=nn.Linear(8, 4), head=nn.Linear(4, 1)),
        x,
        x[:, :1] * x[:, 1:2],
    )


@census(kronecker=6)
def message_passing():
    nodes, edges = points(20), torch.randint(20, (2, 60))

    def forward(m, nodes):
        source, target = edges
        messages = m.message(torch.cat([nodes[source], nodes[target]], 1)).relu()
        received = torch.zeros(len(nodes), 6).index_add(0, target, messages)
        return m.head(m.update(torch.cat([nodes, received], 1)).relu())

    return classifying(
        Lambda(forward, message=nn.Linear(8, 6), update=nn.Linear(10, 8), head=nn.Linear(8, 3)),
        nodes,
        classes(nodes),
    )


# -- losses of many kinds --------------------------------------------------------------------------


@census(kronecker=2)
def mixture_density_network():
    x = points(64, 2)
    y = x[:, 0].sin() + 0.1 * torch.randn(64)
    model = nn.Linear(2, 9)

    def loss():
        logits, mean, log_scale = model(x).chunk(3, -1)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=logits),
            torch.distributions.Normal(mean, log_scale.exp()),
        )
        return -mixture.log_prob(y).mean()

    return model, loss


@census(kronecker=4)
def mean_and_variance():
    x = points(64, 2)
    y = x[:, :1] + x[:, 1:].exp() * 0.1 * torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def loss():
        mean, raw = model(x).chunk(2, -1)
        return F.gaussian_nll_loss(mean, y, F.softplus(raw) + 1e-3)

    return model, loss


@census(kronecker=2)
def poisson_regression():
    x = points(64)
    model = nn.Linear(4, 1)
    y = torch.poisson((x[:, :1] * 0.5).exp())
    return model, lambda: F.poisson_nll_loss(model(x), y)


@census(kronecker=4)
def binary_classifier():
    x = points()
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    y = (x[:, :1] * x[:, 1:2] > 0).float()
    return model, lambda: F.binary_cross_entropy(model(x).sigmoid(), y)


@census(kronecker=6)
def robust_regression():
    x = points()
    y = x[:, :1] + torch.randn(48, 1).pow(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, lambda: F.smooth_l1_loss(model(x), y)


@census(kronecker=6)
def physics_informed():
    """u'' = -π² sin πx, u = 0 at the ends: derivatives inside the objective."""
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.linspace(0, 1, 24)[:, None].requires_grad_()
    ends = torch.tensor([[0.0], [1.0]])

    def loss():
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        force = -(math.pi**2) * (math.pi * x.detach()).sin()
        return F.mse_loss(ddu, force) + F.mse_loss(model(ends), torch.zeros(2, 1))

    return model, loss


@census(kronecker=6)
def contrastive():
    """Two views of an example have to find each other."""
    x = points(24, 6)
    views = x + 0.1 * torch.randn(24, 6), x + 0.1 * torch.randn(24, 6)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

    def loss():
        a, b = (F.normalize(model(view), dim=1) for view in views)
        return F.cross_entropy(5 * a @ b.T, torch.arange(24))

    return model, loss


# -- losses written by hand -----------------------------------------------------------------------


@census(kronecker=10)
def variational_autoencoder():
    x = (points(32, 6) > 0).float()
    model = nn.ModuleDict(
        {
            "hidden": nn.Linear(6, 8),
            "mean": nn.Linear(8, 2),
            "log_variance": nn.Linear(8, 2),
            "decode": nn.Linear(2, 8),
            "out": nn.Linear(8, 6),
        }
    )
    noise = torch.randn(32, 2)

    def loss():
        h = model["hidden"](x).tanh()
        mean, log_variance = model["mean"](h), model["log_variance"](h)
        logits = model["out"](model["decode"](mean + noise * (0.5 * log_variance).exp()).tanh())
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / 32 + kl

    return model, loss


@census(kronecker=4)
def focal_loss():
    x = points()
    y = classes(x)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def loss():
        log_p = model(x).log_softmax(1).gather(1, y[:, None])
        return -((1 - log_p.exp()).square() * log_p).mean()

    return model, loss


@census(kronecker=4)
def quantile_regression():
    x = points()
    y = x[:, :1] + torch.randn(48, 1)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    levels = torch.tensor([0.1, 0.5, 0.9])

    def loss():
        error = y - model(x)
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    return model, loss


@census(exact=2)
def mixture_density_network_by_hand():
    x = points(64, 2)
    y = x[:, :1].sin() + 0.1 * torch.randn(64, 1)
    model = nn.Linear(2, 9)

    def loss():
        logits, mean, log_scale = model(x).chunk(3, -1)
        each = -0.5 * ((y - mean) * (-log_scale).exp()).square() - log_scale
        return -(logits.log_softmax(-1) + each).logsumexp(-1).mean()

    return model, loss


@census(kronecker=4)
def evidential_classifier():
    x = points()
    y = F.one_hot(classes(x), 3)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def loss():
        evidence = F.softplus(model(x)) + 1
        total = evidence.sum(1, keepdim=True)
        return (y * (total.digamma() - evidence.digamma())).sum(1).mean()

    return model, loss


# -- parameters of other kinds ---------------------------------------------------------------------


@census(kronecker=6)
def sinusoidal_representation():
    x = torch.rand(64, 2)

    def forward(m, x):
        return m.out((10 * m.b((10 * m.a(x)).sin())).sin())

    model = Lambda(forward, a=nn.Linear(2, 16), b=nn.Linear(16, 16), out=nn.Linear(16, 1))
    with torch.no_grad():
        model.b.weight.div_(4)
    return fitting(model, x, (6 * x.sum(1, keepdim=True)).sin())


@census(kronecker=8, diagonal=1)
def operator_network():
    """DeepONet: a product of features of the function and features of the place."""
    functions, places = points(12, 5), torch.rand(9, 1)

    def forward(m, functions):
        return m.branch(functions) @ m.trunk(places).T + m.offset

    return fitting(
        Lambda(
            forward,
            branch=nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)),
            trunk=nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4)),
            offset=nn.Parameter(torch.zeros(1)),
        ),
        functions,
        functions[:, :1] * places.T + functions[:, 1:2],
    )


@census(kronecker=2, gradient__kronecker=1, diagonal=2)
def weight_normed():
    x = points()
    return classifying(
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)),
        x,
        classes(x),
    )


@census(kronecker=2, gradient__kronecker=1, diagonal=1)
def spectral_normed():
    x = points()
    return classifying(
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)),
        x,
        classes(x),
    )


@census(kronecker=3, none=2)
def low_rank_adapter():
    x = points()
    base = nn.Linear(4, 8).requires_grad_(False)

    def forward(m, x):
        return (m.base(x) + x @ m.a.T @ m.b.T).relu() @ m.head

    return classifying(
        Lambda(
            forward,
            base=base,
            a=weight(2, 4),
            b=nn.Parameter(torch.zeros(8, 2)),
            head=weight(8, 3),
        ),
        x,
        classes(x),
    )


@census(kronecker=6)
def feature_wise_modulation():
    """FiLM: one network makes scale and offset of the other's features."""
    x, condition = points(), points(48, 2)

    def forward(m, x):
        scale, offset = m.modulate(condition).chunk(2, -1)
        return m.head((m.body(x) * (1 + scale) + offset).relu())

    return fitting(
        Lambda(forward, modulate=nn.Linear(2, 16), body=nn.Linear(4, 8), head=nn.Linear(8, 1)),
        x,
        x[:, :1] * condition[:, :1],
    )


@census(kronecker=4)
def hypernetwork():
    """One network makes the other's weights, for each example its own."""
    x, condition = points(), points(48, 2)

    def forward(m, x):
        weights = m.make(m.hidden(condition).tanh()).unflatten(-1, (1, 4))
        return torch.bmm(weights, x[..., None])[..., 0]

    return fitting(
        Lambda(forward, hidden=nn.Linear(2, 6), make=nn.Linear(6, 4)),
        x,
        x[:, :1] * condition[:, :1],
    )


@census(kronecker=2, half__diagonal_kronecker=1, diagonal=1)
def factorization_machine():
    users = torch.randint(6, (64, 3))
    y = ((users[:, 0] + users[:, 1]) % 2)[:, None].float()
    dense = torch.randn(64, 4)

    def forward(m, users):
        v = m.table(users)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True)
        return pairs + (dense @ m.linear)[:, None] + m.mix(dense, dense) + m.offset

    model = Lambda(
        forward,
        table=nn.Embedding(6, 4),
        linear=weight(4),
        mix=nn.Bilinear(4, 4, 1, bias=False),
        offset=nn.Parameter(torch.zeros(1)),
    )
    return model, lambda: F.binary_cross_entropy_with_logits(model(users), y)


@census(gradient__kronecker=1, diagonal=1, kronecker=2)
def radial_basis():
    x = points(64, 2)

    def forward(m, x):
        squared = (x[:, None] - m.centres).square().sum(-1)
        return m.out((-squared * m.widths.exp()).exp())

    return fitting(
        Lambda(
            forward,
            centres=nn.Parameter(torch.randn(10, 2)),
            widths=nn.Parameter(torch.zeros(10)),
            out=nn.Linear(10, 1),
        ),
        x,
        x[:, :1].sin() * x[:, 1:],
    )


@census(kronecker=1)
def kolmogorov_arnold():
    """A sum of learnt functions of one input each, in Chebyshev polynomials."""
    x = points(64, 2)

    def forward(m, x):
        basis = (torch.arange(5) * x.tanh().clamp(-0.99, 0.99).acos()[..., None]).cos()
        return torch.einsum("bik,iok->bo", basis, m.coefficients)

    return fitting(Lambda(forward, coefficients=weight(2, 1, 5)), x, x[:, :1].sin() + x[:, 1:])


# -- the census ------------------------------------------------------------------------------------


def check(name: str, counts: Counter[str], losses: list[Tensor]) -> None:
    assert counts == CENSUS[name][1]
    values = torch.stack(losses)
    assert values.isfinite().all()
    assert values[-3:].mean() < values[0]


@pytest.mark.parametrize("name", CENSUS)
def test_every_architecture_is_covered_and_its_loss_falls(name):
    torch.manual_seed(0)
    model, objective = CENSUS[name][0]()
    optimizer = NaturalGradientOptimizer.wrap(torch.optim.AdamW(model.parameters()))
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            with optimizer.observe():
                loss = objective()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert optimizer.report.skipped + optimizer.report.failed_factorizations == 0
            losses.append(loss.detach())
    rows = optimizer.coverage({id(p): n for n, p in model.named_parameters()}).rows
    for row, p in zip(rows, model.parameters(), strict=True):
        assert (row.block == "none") == (p.grad is None), row
    check(name, Counter(row.block for row in rows), losses)


class Module(L.LightningModule):
    """Any of the above, as a project of Lightning has it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.objective = CENSUS[name][0]()
        self.losses: list[Tensor] = []

    def training_step(self, batch, _):
        loss = self.objective()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize(
    "name", ["residual", "tied_language_model", "mixture_of_routed_experts", "physics_informed"]
)
def test_a_trainer_s_census_is_the_same(name):
    torch.manual_seed(0)
    module, callback = Module(name), NaturalGradient(show_coverage=False)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(12, 1))))
    check(name, Counter(row.block for row in callback.coverage().rows), module.losses)


def test_an_adversarial_pair_has_two_optimizers_that_each_see_their_own_parameters():
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    judge = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    making, judging = (
        NaturalGradientOptimizer.wrap(torch.optim.Adam(m.parameters())) for m in (maker, judge)
    )
    real, noise, ones = 1 + 0.2 * points(32, 2), points(32, 2), torch.ones(32, 1)
    mistaken = []
    for _ in range(10):
        with judging.observe():
            mistake = F.binary_cross_entropy_with_logits(judge(real), ones)
            fakes = judge(maker(noise).detach())
            mistake = mistake + F.binary_cross_entropy_with_logits(fakes, 0 * ones)
        judging.zero_grad()
        mistake.backward()
        judging.step()
        mistaken.append(mistake.detach())
        with making.observe():
            caught = F.binary_cross_entropy_with_logits(judge(maker(noise)), ones)
        making.zero_grad()
        caught.backward()
        making.step()
    for optimizer in (making, judging):
        assert [row.block for row in optimizer.coverage().rows] == 4 * ["kronecker"]
    assert torch.stack(mistaken).isfinite().all()
    assert min(mistaken[1:]) < mistaken[0]
