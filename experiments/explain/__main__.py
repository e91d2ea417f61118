"""The command line: `python -m experiments.explain`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.explain import balls, divergences, gaussians, labels, paths
from experiments.scaling.page import rewritten

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "natural-gradient.md"
PICTURES = {p.name: p for p in (m.PICTURE for m in (gaussians, balls, paths, labels, divergences))}


class Caption(str):
    """Stands below a picture."""

    def markdown(self) -> str:
        """As it is."""
        return str(self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute and draw the pictures, and write their captions into the page."""
    parser = argparse.ArgumentParser("python -m experiments.explain", description=main.__doc__)
    parser.add_argument("picture", nargs="*", metavar="PICTURE", help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.picture if name not in PICTURES]:
        parser.error(f"{unknown[0]}: expected one of {', '.join(PICTURES)}")
    torch.set_num_threads(1)
    for name in options.picture or PICTURES:
        picture = PICTURES[name]
        found = picture.measure()
        picture.draw(found).savefig(options.results / f"{name}.png", dpi=130)
        caption = Caption(picture.caption(found))
        options.page.write_text(rewritten(options.page.read_text(), {name: caption}))
        print(f"{name}: {caption}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
