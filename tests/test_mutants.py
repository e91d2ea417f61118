"""Small changes of the source: which are made, and that tests notice those that matter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.mutants.__main__ import RESULTS, explanations, short, sources
from experiments.mutants.mutations import mutants
from experiments.mutants.trial import in_order
from tests.environment import REPOSITORY

SOURCE = '''
"""A module."""

LIMIT = 3


class Ball:
    """With a name."""

    @property
    def size(self) -> float:
        """How large."""
        if self.radius > LIMIT and not self.flat:
            raise ValueError(f"radius={self.radius + 1}: at most 3")
        self.seen = min(self.radius, 2.0)
        return -self.radius.abs()
'''


def changes(source):
    return [mutant.name for mutant in mutants(source)]


def test_what_is_changed_is_what_decides_and_computes_and_no_message_or_annotation():
    assert changes(SOURCE) == [
        "module: LIMIT = [3⇒4]",
        "Ball.size: if self.radius > LIMIT [and (not self.flat)⇒or not self.flat]:",
        "Ball.size: if self.radius >[⇒=] LIMIT and (not self.flat):",
        "Ball.size: if self.radius [>⇒<=] LIMIT and (not self.flat):",
        "Ball.size: if self.radius > LIMIT and [(not self.flat)⇒self.flat]:",
        "Ball.size: [raise ValueError(f'radius={self.radius + 1}: at most 3')⇒pass]",
        "Ball.size: [self.seen = min(self.radius, 2.0)⇒pass]",
        "Ball.size: self.seen = m[in⇒ax](self.radius, 2.0)",
        "Ball.size: self.seen = min(self.radius, [2⇒4].0)",
        "Ball.size: return [-self.radius.abs()⇒None]",
        "Ball.size: return [-⇒]self.radius.abs()",
        "Ball.size: return -self.radius[.abs()⇒]",
    ]


@pytest.mark.parametrize("path", sources(["trust_region", "categorical", "block"]), ids=short)
def test_every_mutant_of_the_core_compiles_and_has_a_name_of_its_own(path):
    source = path.read_text(encoding="utf-8")
    made = [*mutants(source)]
    assert len({mutant.name for mutant in made}) == len(made)
    for mutant in made[:: max(1, len(made) // 5)]:
        mutant.code(str(path))
        first, last = mutant.lines
        assert 1 <= first <= last <= source.count("\n")


def test_one_of_each_function_of_tests_comes_first_and_others_have_a_limit():
    seconds = {"a::f[1]": 1.0, "a::f[2]": 0.5, "a::g": 3.0, "b::h": 0.1, "b::i[1]": 9.0}
    order = ["a::f[2]", "a::g", "a::f[1]", "b::h", "b::i[1]"]
    assert in_order(seconds, ["a"], 20.0) == order
    assert in_order(seconds, ["a"], 10.0) == order[:-1]
    assert in_order(seconds, ["a"], 4.0) == order[:2]
    assert in_order(seconds, ["a"], 0.0) == order[:1]


PROGRAM = """
import json
import sys
from experiments.mutants.__main__ import PACKAGE, collected
from experiments.mutants.mutations import mutants

path = PACKAGE / "trust_region.py"
test = "tests/test_trust_region.py::test_the_radius_follows_the_schedule_squared"
found, wanted = {}, json.loads(sys.argv[1])

def work(trials):
    lines = trials.lines([str(path)], [*trials.items])
    found["lines"] = lines[test]["lines"][str(path)]
    for mutant in mutants(path.read_text()):
        if mutant.name in wanted:
            found[mutant.name] = trials.killer(str(path), mutant.code, [*trials.items], 1.0)

collected(work, "tests/test_trust_region.py", "-k", "radius_follows or two_thirds or no_trust")
print(json.dumps(found))
"""


SQUARED = "tests/test_trust_region.py::test_the_radius_follows_the_schedule_squared"
CUT = (
    "tests/test_trust_region.py::"
    "test_a_measurement_within_the_radius_passes_and_beyond_is_cut_to_two_thirds_of_it"
)
KILLERS = {
    "TrustRegion.radius: return float(self._kl_radius * schedule ** [2⇒3])": SQUARED,
    "TrustRegion.room: return math.sqrt(_AIM * self.radius(schedule) [/⇒*] measured)": CUT,
    "TrustRegion.ratio: return [1⇒2].0 if self._log_ratio is None else max(1…": None,
    "module: _AIM = [2⇒3] / 3": CUT,
    "module: _LARGE = 0.[05⇒1]": None,  # these tests have no such radius
}


def test_mutants_of_functions_and_of_constants_are_killed_by_the_tests_of_them():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*KILLERS])],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    source = Path(REPOSITORY, "src/ngplugin/trust_region.py").read_text().splitlines()
    ran = [source[line - 1].strip() for line in found.pop("lines")]
    assert "return float(self._kl_radius * schedule**2)" in ran
    assert "return 1.0 if expected <= aim else math.sqrt(aim / expected)" not in ran
    assert found == KILLERS


def test_what_is_explained_is_among_the_survivors_and_numbers_add_up():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for path, found in results.items():
        assert found["tried"] == found["killed"] + found["timeouts"] + found["survived"], path
        assert found["tried"] <= found["made"], path
        assert len(found["survivors"]) == found["survived"], path
        explained = {name: why for name, why in found["survivors"].items() if why}
        assert explained == explanations(path), path
        assert found["explained"] == len(explained)
