"""Which small changes of the core the tests notice: `python -m experiments.mutants`.

Each file of the core is changed in one place after the other, and the tests that run that place are
run until one fails. A change that none notices survives: a test is missing, or the code is of no
use, or it makes no difference that it is another; `explained.yaml` says of which ones, and why.

Results are kept in `build/mutants` as they come, and a second call goes on where the first one
stopped; survivors without an explanation are tried again, since tests may have been added. The
numbers are written to `experiments/results/mutants.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.mutants.mutations import mutants
from experiments.mutants.trial import Trials, in_order

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ngplugin"
TARGETS = ("trust_region.py", "damping.py", "curvature/factorization.py",
           "curvature/likelihoods/*.py", "curvature/blocks/*.py")  # fmt: skip
STEP = ("trust_region", "damping", "kl", "measured_kl", "step_sizes", "optimizer", "options",
        "nat_worth", "solver", "layer_balance", "scale")  # fmt: skip
#: Tests whose lines are asked for; those of trainers and programs take too long.
TESTS = ("tests/curvature", *(f"tests/test_{name}.py" for name in STEP))
#: Tests that hold a file, and come before others.
FIRST = {
    "trust_region": ("tests/test_trust_region.py",),
    "damping": ("tests/test_damping.py",),
    "own_loss": ("tests/curvature/test_own_loss.py",),
    "output_curvature": ("tests/curvature/test_own_loss.py",),
    "exact": ("tests/curvature/test_exact.py",),
    "eigen": ("tests/curvature/test_eigen.py",),
    "low_rank_factor": ("tests/curvature/test_low_rank.py",),
    "likelihoods": ("tests/curvature/test_likelihoods.py", "tests/curvature/test_loss_calls.py"),
    "blocks": ("tests/curvature/test_blocks.py",),  # the others of either
}
KEPT = ROOT / "build" / "mutants"
RESULTS = ROOT / "experiments" / "results" / "mutants.json"
PAGE = ROOT / "docs" / "inside.md"
COLUMNS = ("made", "tried", "killed", "timeouts", "survived", "explained")
EXPLAINED = Path(__file__).with_name("explained.yaml")


def sources(only: Sequence[str] = ()) -> list[Path]:
    """The files that are changed: all, or those whose names or folders are given."""
    found = [path for pattern in TARGETS for path in sorted(PACKAGE.glob(pattern))]
    chosen = [p for p in found if not only or {p.stem, p.parent.name} & {*only}]
    return [path for path in chosen if path.stem != "__init__"]


def short(path: Path) -> str:
    """Below the package."""
    return path.relative_to(PACKAGE).as_posix()


def digest(*paths: Path) -> str:
    """Of what is in files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def explanations(path: str) -> dict[str, str]:
    """Why the survivors of a file make no difference, by their names."""
    groups = yaml.safe_load(EXPLAINED.read_text(encoding="utf-8")).get(path, [])
    return {name: group["why"] for group in groups for name in group["mutants"]}


def kept(path: Path, key: str) -> dict[str, Any]:
    """What was found before of the same files."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["found"] if found.get("key") == key else {}


def keep(path: Path, key: str, found: dict[str, Any]) -> None:
    """For the next call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "found": found}, indent=0, ensure_ascii=False))


def lines_of_tests(trials: Trials, fresh: bool) -> dict[str, Any]:
    """Lines of the core that every test runs, by their text, and its seconds.

    They are found anew for files of tests that changed. To be known by their text leaves them as
    they are where only others were edited.
    """
    files = sorted({name.split("::")[0] for name in trials.items})
    keys = {file: digest(ROOT / file) for file in files}  # as they were collected
    texts = {str(path): path.read_text(encoding="utf-8").splitlines() for path in sources()}
    found = {}
    for file, key in keys.items():
        place = KEPT / "lines" / f"{Path(file).stem}.json"
        tests = {} if fresh else kept(place, key)
        if not tests:
            print("lines of", file, flush=True)
            own = [name for name in trials.items if name.startswith(file + "::")]
            for name, run in trials.lines([*texts], own).items():
                lines = {p: {texts[p][n - 1].strip() for n in ns} for p, ns in run["lines"].items()}
                by_file = {short(Path(path)): sorted(lines[path]) for path in lines}
                tests[name] = {"seconds": run["seconds"], "lines": by_file}
            keep(place, key, tests)
        found.update(tests)
    return found


def try_file(trials: Trials, path: Path, tests: dict[str, Any], options: Any) -> None:
    """Try all mutants of a file, or a sample, and write what became of them."""
    place = KEPT / f"{short(path).replace('/', '-')}.json"
    key = digest(path)
    outcomes = {} if options.fresh else kept(place, key)
    explained = explanations(short(path))
    all_of_it = [*mutants(path.read_text(encoding="utf-8"))]
    if options.sample:
        random.Random(options.seed).shuffle(all_of_it)
    running: dict[str, list[str]] = {}
    for name, run in tests.items():
        for line in run["lines"].get(short(path), ()):
            running.setdefault(line, []).append(name)
    text = path.read_text(encoding="utf-8").splitlines()
    first = FIRST.get(path.stem, FIRST.get(path.parent.name, ()))
    old_survivors = {name for name, killer in outcomes.items() if not killer}
    sample = {mutant.name for mutant in all_of_it[: options.sample]} | old_survivors
    for mutant in [mutant for mutant in all_of_it if mutant.name in sample]:
        outcome = outcomes.get(mutant.name)
        if outcome or (outcome == "" and mutant.name in explained and not options.again):
            continue
        lines = text[mutant.lines[0] - 1 : mutant.lines[1]]
        names = {name for line in lines for name in running.get(line.strip(), ())}
        # What runs when the file is imported, or is new, concerns every test of the file.
        names = names or {name for own in running.values() for name in own}
        seconds = {name: tests[name]["seconds"] for name in names}
        order = in_order(seconds, first, options.seconds)
        total = sum(seconds[name] for name in order)
        killer = trials.killer(str(path), mutant.code, order, total)
        outcomes[mutant.name] = killer or ""
        if not killer:
            print(f"{short(path)}:{mutant.lines[0]}: {mutant.name}", flush=True)
        keep(place, key, outcomes)
    names = {mutant.name for mutant in all_of_it}
    report(path, len(names), {name: outcomes[name] for name in names & outcomes.keys()}, explained)


def report(path: Path, made: int, outcomes: dict[str, str], explained: dict[str, str]) -> None:
    """Write the numbers of a file."""
    count = Counter(
        "survived" if not killer else "timeouts" if killer == "timeout" else "killed"
        for killer in outcomes.values()
    )
    survivors = {name: explained.get(name) for name, killer in outcomes.items() if not killer}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[short(path)] = {
        "made": made,
        "tried": len(outcomes),
        **{kind: count[kind] for kind in ("killed", "timeouts", "survived")},
        "explained": sum(why is not None for why in survivors.values()),
        "survivors": {name: survivors[name] for name in sorted(survivors)},
    }
    RESULTS.write_text(
        json.dumps(dict(sorted(results.items())), indent=1, ensure_ascii=False) + "\n"
    )
    for name in explained.keys() - survivors.keys():
        print(f"{short(path)}: explained, but no survivor: {name}")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\| file \|.*?\n\n", f"{table(results)}\n\n", page, flags=re.DOTALL))
    print(table({short(path): results[short(path)]}), flush=True)


def table(results: dict[str, Any]) -> str:
    """Markdown, a row for each file."""
    lines = [f"| file | {' | '.join(COLUMNS)} |", "|---|" + "--:|" * len(COLUMNS)]
    for path, found in results.items():
        lines.append(f"| `{path}` | {' | '.join(str(found[name]) for name in COLUMNS)} |")
    total = " | ".join(str(sum(found[name] for found in results.values())) for name in COLUMNS)
    return "\n".join([*lines, f"| together | {total} |"])


def collected(work: Callable[[Trials], None], *arguments: str) -> None:
    """Have pytest collect tests, of this checkout's package, and give them to `work`."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    calm = ["-qq", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--disable-warnings"]
    pytest.main([*calm, *arguments], plugins=[Trials(work)])


def main(arguments: list[str] | None = None) -> int:
    """Run; the number of survivors without an explanation decides the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mutants", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=(), help="files or folders: trust_region, blocks"
    )
    parser.add_argument("--sample", type=int, help="so many mutants of each file, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=20, help="most for the tests of a mutant")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--again", action="store_true", help="try explained survivors, too")
    options = parser.parse_args(arguments)

    def work(trials: Trials) -> None:
        tests = lines_of_tests(trials, options.fresh)
        print(f"{len(tests)} of {len(trials.items)} tests pass", flush=True)
        for path in sources(options.only):
            try_file(trials, path, tests, options)

    collected(work, *(str(ROOT / test) for test in TESTS))
    names = [short(path) for path in sources(options.only)]
    results = json.loads(RESULTS.read_text())
    return int(any(None in results[name]["survivors"].values() for name in names))


if __name__ == "__main__":
    sys.exit(main())
