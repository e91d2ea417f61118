"""A table that goes to a terminal and to a page."""

from __future__ import annotations

from dataclasses import dataclass, field

import rich.table


@dataclass
class Table:
    """Rows of text under a head; the first column is left, the others right.

    Attributes:
        title: for the terminal; the page says it in its own words.
        head: a name for each column.
        rows: of as many cells.
        left: columns of words, from the left too.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    left: frozenset[int] = frozenset({0})

    def add(self, *cells: str) -> None:
        """One more row."""
        assert len(cells) == len(self.head), f"{len(cells)} cells for {len(self.head)} columns"
        self.rows.append(cells)

    def markdown(self) -> str:
        """For a page."""
        aligned = (":--" if i in self.left else "--:" for i in range(len(self.head)))
        lines = [self.head, tuple(aligned), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def for_terminal(self) -> rich.table.Table:
        """For rich's console."""
        result = rich.table.Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.head):
            result.add_column(name, justify="left" if i in self.left else "right")
        for cells in self.rows:
            result.add_row(*cells)
        return result
