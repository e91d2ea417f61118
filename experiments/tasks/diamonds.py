"""The prices of 53,000 diamonds, inside plotnine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor

from experiments.tasks.splits import Examples, SplitData, shares

NUMBERS = ("carat", "depth", "table", "x", "y", "z")
GRADES = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": tuple("DEFGHIJ"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}


class Diamonds(SplitData):
    """What is known of a diamond [26], and the logarithm of its price [].

    The price is in units of the training diamonds' geometric mean. Over them, weight and sizes have
    mean 0 and variance 1; each grade of cut, colour and clarity is a number that is 0 or 1. Rows
    that stand twice are taken once, and those with a size that cannot be (0, or above 20 mm) not
    at all.

    Args:
        batch_size: diamonds in a training step.
        val_size: diamonds held out of training to choose by.
        test_size: diamonds held out of everything.
        split_seed: which diamonds these are. Part of the task, not of a run: keep it.
        seed: of the order in which training diamonds are drawn.

    Raises:
        ValueError: a size is not positive, or leaves nothing to train on.
    """

    evaluation_size = 100_000  # all of them

    def __init__(
        self,
        batch_size: int = 256,
        val_size: int = 5000,
        test_size: int = 5000,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed

    @property
    def dimensions(self) -> dict[str, Any]:
        """What is known; a mean and a variance to predict."""
        return {"inputs": len(NUMBERS) + sum(map(len, GRADES.values())), "outputs": 2}

    def make_splits(self) -> dict[str, Examples]:
        """Load, split and normalise."""
        numbers, grades, log_price = load()
        parts = shares(len(log_price), self.val_size, self.test_size, self.split_seed)
        train = numbers[parts["train"]]
        known = torch.cat([(numbers - train.mean(0)) / train.std(0), grades], dim=1)
        log_price = log_price - log_price[parts["train"]].mean()
        return {name: Examples(known[part], log_price[part]) for name, part in parts.items()}


def load() -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [n, 6], grades [n, 20] and the logarithm of the price in dollars [n].

    Raises:
        FileNotFoundError: plotnine is not installed.
    """
    package = find_spec("plotnine")  # not imported: a library for figures takes its time
    if package is None or package.origin is None:
        raise FileNotFoundError("the diamonds are inside plotnine; try: pip install plotnine")
    rows = pandas.read_csv(Path(package.origin).parent / "data" / "diamonds.csv").drop_duplicates()
    sizes = rows[["x", "y", "z"]]
    rows = rows[((sizes > 0) & (sizes <= 20)).all(axis=1)]
    numbers = torch.tensor(rows[list(NUMBERS)].to_numpy(float))
    grades = [
        torch.tensor(rows[name].to_numpy(str)[:, None] == levels) for name, levels in GRADES.items()
    ]
    price = torch.tensor(rows["price"].to_numpy(float))
    return numbers.float(), torch.cat(grades, dim=1).float(), price.log().float()
