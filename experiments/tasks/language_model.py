"""A transformer that predicts the next character."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.tasks.splits import Batch
from experiments.tasks.task import Task


class Transformer(nn.Module):
    """Characters [batch, time] -> logits [batch, time, symbols] of those that follow.

    Each place sees itself and what comes before. LayerNorm before each part (Xiong et al. 2020,
    arXiv:2002.04745), learned positions.

    Args:
        symbols: how many different characters there are.
        context: characters that are seen at most.
        width: numbers that describe a place.
        heads: of attention in each layer.
        layers: of attention and a perceptron each.
        dropout: share of numbers left out in training, in [0, 1).

    Raises:
        ValueError: a size is not positive, `heads` does not divide `width`, or `dropout` is out of
            range.
    """

    def __init__(
        self,
        symbols: int,
        context: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(width, heads, layers) < 1 or width % heads or not 0 <= dropout < 1:
            raise ValueError(
                f"width={width}, heads={heads}, layers={layers}, dropout={dropout}: expected "
                "positive whole numbers, a width that heads divides, and a share in [0, 1)"
            )
        self.symbol = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        for table in (self.symbol, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of the next character at each place."""
        places = torch.arange(characters.shape[1], device=characters.device)
        x = self.symbol(characters) + self.position(places)  # [batch, time, width]
        return self.out(self.norm(self.layers(x)))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self._attend(self.norm_attention(x)))
        return x + self._drop(self.perceptron(x))

    def _attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.queries_keys_values(x).reshape(batch, time, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, width / heads]
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.projection(seen.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class LanguageModel(Task):
    """Minimises the cross entropy of the next character; measures `loss` (nats) and `bits`."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy, nats per character."""
        characters, following = batch
        logits = self(characters)  # [batch, time, symbols]
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """The same in nats and in bits per character."""
        loss = self.loss(batch)
        return {"loss": loss, "bits": loss / math.log(2)}
