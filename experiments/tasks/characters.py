"""Python's own help texts, 465,000 characters or so: they come with Python and change with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.tasks.splits import Batch, SplitData


class Windows(Dataset[Batch]):
    """Stretches of a text that follow each other, and the same ones a character later.

    Args:
        text: characters as numbers [length].
        context: characters in a stretch; what is left at the end is not used.
    """

    def __init__(self, text: Tensor, context: int) -> None:
        self.text = text
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Characters [batch, context] and those that follow each of them [batch, context]."""
        starts = torch.as_tensor(indices)[:, None] * self.context  # [batch, 1]
        places = starts + torch.arange(self.context)  # [batch, context]
        return self.text[places], self.text[places + 1]


class Characters(SplitData):
    """The topics of `pydoc_data` in alphabetical order; the last parts of the text are held out.

    Args:
        batch_size: stretches in a training step.
        context: characters in a stretch.
        val_share: of the text, held out of training to choose by.
        test_share: of the text, its end, held out of everything.
        seed: of the order in which training stretches are drawn.

    Raises:
        ValueError: a size or share is out of range.
    """

    evaluation_size = 256

    def __init__(
        self,
        batch_size: int = 32,
        context: int = 64,
        val_share: float = 0.05,
        test_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if context < 1 or not (val_share > 0 and test_share > 0 and val_share + test_share < 1):
            raise ValueError(
                f"context={context}, val_share={val_share}, test_share={test_share}: expected a "
                "number of characters, and shares above 0 that leave something to train on"
            )
        self.context = context
        self.val_share = val_share
        self.test_share = test_share
        self.text = "".join(topics[name] for name in sorted(topics))
        self.symbols = sorted(set(self.text))

    @property
    def dimensions(self) -> dict[str, Any]:
        """How many different characters there are, and how many are seen at once."""
        return {"symbols": len(self.symbols), "context": self.context}

    @property
    def facts(self) -> dict[str, str | int]:
        """Which text it was: numbers from different ones cannot be compared."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return {"characters": len(self.text), "sha256": digest}

    def make_splits(self) -> dict[str, Windows]:
        """Three stretches of the text, one after the other."""
        number = {symbol: i for i, symbol in enumerate(self.symbols)}
        text = torch.tensor([number[symbol] for symbol in self.text])
        test = round(len(text) * self.test_share)
        val = round(len(text) * self.val_share)
        parts = text.split([len(text) - val - test, val, test])
        splits = {
            name: Windows(part, self.context)
            for name, part in zip(("train", "val", "test"), parts, strict=True)
        }
        for name, split in splits.items():
            if not len(split):
                raise ValueError(
                    f"context={self.context}: the part to {name} on is shorter than that, "
                    f"expected less than {len(split.text)}"
                )
        return splits
