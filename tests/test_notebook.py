"""The notebook of the documentation runs from top to bottom, and was committed with its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.environment import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "notebook.ipynb"
MOST_BYTES = 400_000


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[str]:
    """What a cell has put out: types of data, names of streams."""
    return [
        output.name if output.output_type == "stream" else "/".join(sorted(output.data))
        for output in cell.outputs
    ]


def table(notebook: Any) -> str:
    """Of parameters and blocks, as it was printed."""
    texts = [o.data["text/plain"] for c in code(notebook) for o in c.outputs if "data" in o]
    (found,) = (text for text in texts if "net.0.weight" in text)
    return str(found)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    folder = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def test_it_puts_out_what_it_was_committed_with(executed: Any) -> None:
    committed = nbformat.read(NOTEBOOK, as_version=4)
    for old, new in zip(code(committed), code(executed), strict=True):
        assert kinds(old) == kinds(new), new.source
    assert table(committed) == table(executed)


def test_it_was_committed_after_one_run_and_is_small() -> None:
    committed = code(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in committed] == [*range(1, len(committed) + 1)]
    assert not any("stderr" in kinds(cell) for cell in committed)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")
