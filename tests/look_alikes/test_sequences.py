"""Shaped like language models: hidden states that are kept, tokens in one row, attention."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.look_alikes.look_alike import look_alike, point
from tests.oracle import generator

VOCABULARY, CONTEXT = 11, 8
# Each symbol is followed by one of two others.
_CHOICE = torch.randint(2, (16, 65), generator=generator(1))


def _text() -> Tensor:
    text = torch.zeros(16, 65, dtype=torch.long)
    for i in range(64):
        text[:, i + 1] = (3 * text[:, i] + 1 + _CHOICE[:, i]) % VOCABULARY
    return text


TEXT = _text()
# Windows one after another, so that 16 of them go on where the last 16 ended.
INPUTS = TEXT[:, :-1].reshape(16, 8, CONTEXT).transpose(0, 1).reshape(-1, CONTEXT)
TARGETS = TEXT[:, 1:].reshape(16, 8, CONTEXT).transpose(0, 1).reshape(-1, CONTEXT)


def text() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=16)


class Recurrent(L.LightningModule):
    """Back-propagation through time that is cut between batches, the state being kept."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.cells = getattr(nn, kind)(12, 12, num_layers=2, dropout=0.1, batch_first=True)
        self.leave = nn.Linear(12, VOCABULARY)
        self.hidden: Any = None
        self.seen: list[Any] = []

    def on_train_epoch_end(self) -> None:
        self.hidden = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.hidden is not None:
            detached = [h.detach() for h in self.hidden]
            self.hidden = tuple(detached) if isinstance(self.hidden, tuple) else detached[0]
        if isinstance(self.hidden, Tensor):
            self.hidden = self.hidden.reshape(2, 16, 12)
        out, self.hidden = self.cells(self.embedding(x), self.hidden)
        scores = F.log_softmax(self.leave(out), dim=-1)
        return F.nll_loss(scores.view(-1, VOCABULARY), y.reshape(-1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=20.0)


@point(6, "truncated back-propagation through time, self.hidden kept and detached")
def test_a_recurrent_model_goes_on_from_its_own_hidden_state() -> None:
    class Checked(Recurrent):
        def on_before_backward(self, loss: Tensor) -> None:
            self.left = [h.detach().clone() for h in self.hidden]

        def on_train_batch_end(self, *_: Any) -> None:
            for left, kept in zip(self.left, self.hidden, strict=True):
                assert torch.equal(left, kept)

    run = look_alike(Checked, text(), 0.8, max_epochs=4)
    assert run.blocks()["cells.weight_hh_l1"] == "gradient-kronecker"
    assert run.coverage.losses == ("nll_loss",)


class Attention(nn.Module):
    """Written with einsum, and with a scale of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.leave = (nn.Linear(width, width) for _ in range(4))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.query, self.key, self.value))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.temperature
        scores = scores.masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -1e9)
        return self.leave(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(-2))


class LanguageModel(L.LightningModule):
    """Both kinds of attention, weight norm, and an output layer tied to the embedding."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.attention, self.norm = Attention(16), nn.LayerNorm(16)
        self.mixed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.leave = nn.Linear(16, VOCABULARY, bias=False)
        self.leave.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.block(self.embedding(x) + self.places, src_mask=mask, is_causal=True)
        return self.leave(self.mixed(h + self.attention(self.norm(h))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        if self.loss == "rows":
            return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
        if self.loss == "transposed":
            return F.cross_entropy(logits.transpose(1, 2), y)
        ignored = y.masked_fill(x == 0, -100)  # as padding is
        return nn.CrossEntropyLoss(label_smoothing=0.05)(logits.flatten(0, 1), ignored.flatten())

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=6e-4, total_steps=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@point(7, "attention packed and by einsum, weight norm, raw parameters, tied weights")
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param("rows", marks=point(11, "token losses (B*T, V)")),
        pytest.param("transposed", marks=point(11, "token losses (B, V, T)")),
        pytest.param("ignored", marks=point(11, "ignored tokens and label smoothing")),
    ],
)
def test_a_language_model_trains_however_its_tokens_are_scored(loss: str) -> None:
    run = look_alike(lambda: LanguageModel(loss), text(), 0.85, max_epochs=6)
    blocks = run.blocks()
    assert blocks["embedding.weight"] == "half-diagonal kronecker"
    for name in ("block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight"):
        assert blocks[name] == "kronecker"
    assert run.coverage.losses == ("cross_entropy",)
