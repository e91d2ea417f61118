"""Changes to the whole process that several threads may need at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class ProcessWide:
    """A change that the first thread to need it makes, and the last one takes back.

    Contexts that put back what was there before have to be left in the reverse of the order in
    which they were entered. Threads keep no order: the first to come would put things right while
    another still needs the change, and the other would then put the change back for good.

    Args:
        change: makes a context that changes something, and takes it back.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._needed = 0  # by how many
        self._made: AbstractContextManager[object] | None = None

    @contextmanager
    def made(self) -> Iterator[None]:
        """A context in which the change is made; may be entered by any thread, and again."""
        with self._lock:
            if not self._needed:
                self._made = self._change()
                self._made.__enter__()
            self._needed += 1
        try:
            yield
        finally:
            with self._lock:
                self._needed -= 1
                if not self._needed and self._made is not None:
                    self._made.__exit__(None, None, None)
                    self._made = None
