"""Results of all trials as a table for docs/trials.md: `python -m experiments.trials.table`."""

from __future__ import annotations

import json
from typing import Any

from experiments.trials.trial import RESULTS, smoothed

HEAD = (
    "| project | task | loss: first | its own optimizer | with the callback | steps until its own "
    "end | seconds: own, with the callback | Fisher information of |"
)


def row(result: dict[str, Any]) -> str:
    """One trial; losses are means over the last tenth of the steps."""
    own, natural = result["own"], result["natural"]
    steps = len(own["losses"])
    options = "".join(f", `{name}={value}`" for name, value in result["options"].items())
    cells = [result["library"], f"{result['trial']}: {result['task']}{options}"]
    if natural["error"]:
        told = natural["error"].split(":")[0]
        cells += ["", "", told, "", "", ""]
        return f"| {' | '.join(cells)} |"
    ours, theirs = (smoothed(r["losses"], max(1, steps // 10)) for r in (natural, own))
    reached = next((str(i + 1) for i, loss in enumerate(ours) if loss <= theirs[-1]), "-")
    cells += [
        f"{natural['losses'][0]:.3g}",  # LBFGS tells that of its last evaluation in a step
        f"{theirs[-1]:.3g}",
        f"{ours[-1]:.3g}",
        f"{reached} of {steps}",
        f"{own['seconds'][-1]:.1f}, {natural['seconds'][-1]:.1f}",
        result["sources"].removeprefix("Fisher information of: "),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print it."""
    print(HEAD)
    print("|---" * (HEAD.count("|") - 1) + "|")
    for path in sorted(RESULTS.glob("*.json")):
        print(row(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
