"""A dictionary by tensors that go as they would without it, and in silence."""

from __future__ import annotations

import sys

import pytest
import torch

from ngplugin.curvature.weak_tensors import WeakTensors


def test_tensors_are_known_by_identity_while_they_are_there():
    a, b = torch.zeros(2), torch.zeros(2)
    found: WeakTensors[int] = WeakTensors()
    found.update([(a, 1), (b, 2)])
    assert (found[a], found.get(b), found.setdefault(a, 5)) == (1, 2, 1)
    assert torch.zeros(2) not in found
    assert found.get(torch.zeros(2)) is None
    with pytest.raises(KeyError):
        found[torch.zeros(2)]
    del a
    assert [t is b for t in found] == [True]
    found.forget_gone()
    assert len(found._entries) == 1


def test_memory_that_is_used_again_is_another_tensor():
    found: WeakTensors[int] = WeakTensors()
    places = set()
    for _ in range(100):
        t = torch.zeros(1)
        assert t not in found
        found[t] = 1
        places.add(id(t))
        del t
    assert len(places) < 100


def test_no_python_code_runs_as_a_tensor_goes():
    """Else an exception that is raised there, such as a Ctrl-C, would be ignored."""
    called: list[str] = []
    found: WeakTensors[int] = WeakTensors()
    t = torch.zeros(3)
    found[t] = 1
    sys.setprofile(lambda frame, event, _: called.append(event))
    del t
    sys.setprofile(None)
    assert "call" not in called
