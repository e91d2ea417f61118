"""A long run in which much goes wrong, beside one in which nothing does: `make soak`.

The convolutional network on 5,000 digits for 20,000 steps: as it is; and with faults in every
tenth step, and its process ended 40 times. Then shorter ones with batches that mean nothing, beside
other optimizers. Writes `results/soak.json` and `docs/soak.md`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from experiments.soak.faults import FAULTS, NONSENSE
from experiments.soak.page import page
from experiments.soak.running import OPTIMIZERS, Plan, run

RESULTS = Path(__file__).parents[1] / "results" / "soak.json"
PAGE = Path(__file__).parents[2] / "docs" / "soak.md"
STEPS = 20_000
RUNS = {
    "clean": Plan(STEPS),
    "faulty": Plan(STEPS, kinds=FAULTS, endings=40),
    **{
        f"nonsense, {optimizer}": Plan(STEPS // 5, optimizer, NONSENSE, rate=0.025, renewed=True)
        for optimizer in OPTIMIZERS
    },
}


def main() -> None:
    """Run what the folder has not yet, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.soak", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"), help="of the runs")
    parser.add_argument("--only", choices=RUNS, help="one of the runs, and no page")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {}
    for name, plan in RUNS.items():
        if arguments.only in (None, name):
            done = arguments.folder / name / "run.json"
            if not done.exists():
                done.parent.mkdir(parents=True, exist_ok=True)
                done.write_text(json.dumps(run(done.parent, plan), indent=1))
            found[name] = json.loads(done.read_text())
            print(f"{name}: {done.read_text()}")
    if arguments.only is None:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
