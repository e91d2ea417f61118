"""The page of what is supported says what the tests say."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PAGE, REPOSITORY, cells, page

CODE = "from tests.support import *; print(page(collected()), end='')"


def test_the_page_is_what_the_tests_markers_make_it(request: pytest.FixtureRequest) -> None:
    if whole(request.session):
        text = page(cells(request.session.items))
    else:  # all tests have to be found first, which takes a while
        command = [sys.executable, "-c", CODE]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        text = done.stdout
    assert text == PAGE.read_text(encoding="utf-8"), "run `make support`"


def whole(session: pytest.Session) -> bool:
    """Whether all tests are being run."""
    chosen = session.config.getoption("keyword") or session.config.getoption("markexpr")
    files = {path.relative_to(REPOSITORY) for path in REPOSITORY.glob("tests/**/test_*.py")}
    return not chosen and files == {Path(item.location[0]) for item in session.items}


def test_a_cell_stands_under_its_area_with_its_files() -> None:
    text = page(
        {
            ("Precision", "64", True): {"tests/b.py", "tests/a.py"},
            ("Precision", "8", False): {"tests/a.py"},
        }
    )
    assert text.endswith(
        "## Precision\n\n| | | tests |\n|---|---|---|\n"
        "| 64 | works | [a](../tests/a.py), [b](../tests/b.py) |\n"
        "| 8 | refused | [a](../tests/a.py) |\n"
    )
