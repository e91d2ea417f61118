"""A long run in which much goes wrong, beside one in which nothing does: `make soak`.

The convolutional network on 5,000 digits for 20,000 steps: as it is; and with faults in every tenth
step, and its process ended 40 times. Writes `results/soak.json` and `docs/soak.md`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from experiments.soak.page import page
from experiments.soak.running import run

RESULTS = Path(__file__).parents[1] / "results" / "soak.json"
PAGE = Path(__file__).parents[2] / "docs" / "soak.md"
RUNS = {"clean": False, "faulty": True}


def main() -> None:
    """Run what the folder has not yet, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.soak", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"), help="of the runs")
    parser.add_argument("--steps", type=int, default=20_000, help="of each run")
    parser.add_argument("--only", choices=RUNS, help="one of the runs, and no page")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, faulty in RUNS.items():
        if arguments.only in (None, name):
            folder = arguments.folder / name
            done = folder / "run.json"
            if not done.exists():
                found = run(folder, 0, arguments.steps, faulty)
                done.write_text(json.dumps(found, indent=1))
            print(f"{name}: {done.read_text()}")
    if arguments.only is None:
        folders = [arguments.folder / name for name in RUNS]
        found = [json.loads((folder / "run.json").read_text()) for folder in folders]
        text = json.dumps(dict(zip(RUNS, found, strict=True)), indent=1)
        RESULTS.write_text(text + "\n")
        PAGE.write_text(page(json.loads(text)))


if __name__ == "__main__":
    main()
