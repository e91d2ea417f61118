"""The soak's page of the documentation, from its results."""

from __future__ import annotations

from typing import Any


def page(results: dict[str, Any]) -> str:
    """docs/soak.md."""
    return str(results)
