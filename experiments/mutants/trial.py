"""Mutants tried by the tests that run their lines, each in a process of its own.

All happens within one run of pytest, in place of its loop over tests: it has imported and collected
everything, so that a mutant costs a fork and the tests, which stop at the first failure. The change
is made in place: functions get other code and other defaults, whoever holds them already.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest

_PLAIN = (bool, int, float, tuple)  # what constants are
_PATIENCE = 3  # times what the tests took before, and
_GRACE = 20  # seconds
_WAIT = 20  # times as long by the clock
_CALLS = 20  # of a function in one test, after which its lines are no longer looked at


class Trials:
    """A plugin of pytest that runs `work` on the collected tests instead of these.

    Args:
        work: what to do, given this.
    """

    def __init__(self, work: Callable[[Trials], None]) -> None:
        self._work = work
        self.items: dict[str, pytest.Item] = {}
        self._functions: list[FunctionType] = []
        self._failed = ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running the tests."""
        self.items = {item.nodeid: item for item in session.items}
        self._functions = [f for f in gc.get_objects() if type(f) is FunctionType]
        gc.freeze()  # so that a child's collector finds what is new alone, and copies no memory
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what failed."""
        if report.failed:
            self._failed = report.nodeid

    def lines(self, files: Sequence[str], tests: Sequence[str]) -> dict[str, Any]:
        """Which lines of files each test runs, and its seconds; none of a test that fails."""
        return self._apart(lambda: self._traced({*files}, tests), 3600) or {}

    def killer(
        self, path: str, code: Callable[[str], CodeType], tests: Sequence[str], seconds: float
    ) -> str | None:
        """The first test that fails with a changed file; None if none does.

        Or "import", if it can not even be imported, and "timeout", if tests do not come to an end.

        Args:
            path: of the file.
            code: compiles all of it, changed.
            tests: to run.
            seconds: that they took without the change.
        """
        limit = int(_PATIENCE * seconds + _GRACE)
        return self._apart(lambda: self._first_failure(path, code, tests), limit)

    def _apart(self, work: Callable[[], Any], limit: int) -> Any:
        """Done in a process of its own; "timeout" after `limit` seconds."""
        inlet, outlet = os.pipe()
        child = os.fork()
        if not child:
            # Of the processor, which others may use; or of the clock, where it only waits.
            signal.setitimer(signal.ITIMER_PROF, limit)
            signal.alarm(_WAIT * limit)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1), os.dup2(silence, 2)
            try:
                answer = {"answer": work()}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(outlet, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(outlet)
        with os.fdopen(inlet) as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
        if not text:
            late = os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
            return "timeout" if late else "the process ended"
        answer = json.loads(text)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def _run(self, tests: Sequence[str]) -> Iterator[str]:
        """Run one after the other, each time yielding its name."""
        items = [self.items[name] for name in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            self._failed = ""
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            yield item.nodeid

    def _first_failure(
        self, path: str, code: Callable[[str], CodeType], tests: Sequence[str]
    ) -> str | None:
        if not transplant(path, code(path), self._functions):
            return "import"
        return next((name for name in self._run(tests) if self._failed), None)

    def _traced(self, files: set[str], tests: Sequence[str]) -> dict[str, Any]:
        seen: set[tuple[str, int]] = set()
        calls: Counter[CodeType] = Counter()

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if frame.f_code.co_filename not in files:
                return None
            if event == "call":
                calls[frame.f_code] += 1
                if calls[frame.f_code] > _CALLS:
                    return None
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            return trace

        found: dict[str, Any] = {}
        start = time.process_time()
        sys.settrace(trace)
        for name in self._run(tests):
            sys.settrace(None)
            if not self._failed:
                lines: dict[str, list[int]] = {}
                for file, line in sorted(seen):
                    lines.setdefault(file, []).append(line)
                found[name] = {"seconds": time.process_time() - start, "lines": lines}
            seen.clear()
            calls.clear()
            start = time.process_time()
            sys.settrace(trace)
        sys.settrace(None)
        return found


def in_order(tests: dict[str, float], first: Sequence[str], most: float) -> list[str]:
    """Those of the files `first`, then those of others, as long as they take `most` seconds in all.

    Of each function of tests one comes before its other parameters, and fast ones first.
    """
    seen: Counter[str] = Counter()
    places = {}
    for name in sorted(tests, key=tests.__getitem__):
        function = name.split("[")[0]
        places[name] = (not name.startswith(tuple(first)), seen[function], tests[name])
        seen[function] += 1
    chosen, total = [], 0.0
    for name in sorted(places, key=places.__getitem__):
        total += tests[name]
        if total <= most or not chosen:
            chosen.append(name)
    return chosen


def transplant(path: str, code: CodeType, functions: Sequence[FunctionType]) -> bool:
    """Put the code of a file in the place of what was imported from it; False if it raises.

    Args:
        path: of the file.
        code: of all of it, changed.
        functions: that there are; all that are known to the garbage collector are new ones.
    """
    module = next(m for m in [*sys.modules.values()] if getattr(m, "__file__", None) == path)
    new = ModuleType(module.__name__)
    vars(new).update(__file__=path, __package__=module.__package__)
    try:
        exec(code, vars(new))
    except Exception:
        return False
    made = [f for f in gc.get_objects() if type(f) is FunctionType]
    changed = {f.__qualname__: f for f in made if f.__globals__ is vars(new)}
    for function in [f for f in functions if f.__globals__ is vars(module)]:
        other = changed.get(function.__qualname__)
        if other is not None:
            own = other.__code__
            if not own.co_freevars:  # with `super()` left out there is none any more
                own = own.replace(co_freevars=function.__code__.co_freevars)
            function.__code__ = own
            function.__defaults__ = other.__defaults__
            function.__kwdefaults__ = other.__kwdefaults__
    names = {name for name, value in vars(new).items() if isinstance(value, _PLAIN)}
    for user in [m for m in sys.modules.values() if isinstance(m, ModuleType)]:
        for name in names & vars(user).keys():
            if vars(user)[name] is vars(module)[name] and user is not module:
                setattr(user, name, vars(new)[name])
    for name in names:
        setattr(module, name, vars(new)[name])
    for name, kind in vars(new).items():
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            own = getattr(module, name)
            if isinstance(vars(kind).get("__init__"), FunctionType):  # maybe a dataclass's
                vars(own)["__init__"].__defaults__ = vars(kind)["__init__"].__defaults__
            for attribute, value in vars(kind).items():
                plain = isinstance(value, _PLAIN) and not attribute.startswith("__")
                if plain and value != vars(own)[attribute]:
                    setattr(own, attribute, value)
    return True
