"""The page of what is supported says what the tests say, in a fresh interpreter."""

import subprocess
import sys

from tests.support import PAGE, REPOSITORY, page

CODE = "from tests.support import *; print(page(collected()), end='')"


def test_the_page_is_what_the_tests_markers_make_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == PAGE.read_text(encoding="utf-8"), "run `make support`"


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
