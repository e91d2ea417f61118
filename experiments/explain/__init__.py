"""The pictures of `docs/natural-gradient.md`: computed, not sketched."""
