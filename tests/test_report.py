"""The coverage table's text."""

from ngplugin import Coverage
from ngplugin.report import CoverageRow

TABLE = Coverage(
    [
        CoverageRow("layer.weight", (3, 2), "kronecker", "weight of linear", 1234),
        CoverageRow("layer.bias", (3,), "kronecker", "bias of linear", 0),
        CoverageRow("scale", (), "diagonal", "no map", 2),
    ]
)


def test_cells_show_shapes_and_thousands():
    assert TABLE.cells()[0] == ("layer.weight", "3×2", "kronecker", "weight of linear", "1,234")
    assert TABLE.cells()[2][1] == "1"


def test_totals_count_numbers_and_tensors_by_block():
    assert TABLE.totals() == ("kronecker: 9 numbers in 2 tensors; diagonal: 1 numbers in 1 tensors")


def test_the_text_lines_columns_up():
    lines = str(TABLE).splitlines()
    assert len(lines) == 4
    third = ("block", "kronecker", "kronecker", "diagonal")
    assert {line.index(word) for line, word in zip(lines, third, strict=True)} == {21}
