"""What was counted in the optimizer's code and measured on one machine, as stored in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.scaling.counting import ADAMW, Traffic

MEASURED = Path(__file__).parents[1] / "results" / "scaling-measured.json"


@dataclass(frozen=True)
class Host:
    """Seconds that Python and torch's dispatch take for each block, however small it is.

    A device computes meanwhile what was given to it, so only the longer of the two counts.

    Attributes:
        update: every step.
        curved: where F d is formed.
        statistics: of a statistic.
        refresh: of a refresh.
        measured: to measure the KL.
    """

    update: float = 0.0
    curved: float = 0.0
    statistics: float = 0.0
    refresh: float = 0.0
    measured: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """By structure."""

    traffic: dict[str, Traffic]
    host: dict[str, Host]

    @staticmethod
    def of(record: dict[str, Any]) -> Calibration:
        """From what was stored."""
        traffic = {name: Traffic(**numbers) for name, numbers in record["traffic"].items()}
        host = {name: Host(**numbers) for name, numbers in record["host"].items()}
        return Calibration({"adamw": ADAMW, **traffic}, {"adamw": Host(), **host})


def stored() -> dict[str, Any]:
    """The file's contents."""
    return json.loads(MEASURED.read_text())  # type: ignore[no-any-return]
