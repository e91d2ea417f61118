"""The global random state of the CPU and of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The state of the CPU's generator, and of the device's if it has one of its own."""
    cpu = torch.get_rng_state()
    if device.type in ("cuda", "xpu"):
        return cpu, getattr(torch, device.type).get_rng_state(device)
    return (cpu,)


def set_random_state(device: torch.device, states: tuple[Tensor, ...]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        getattr(torch, device.type).set_rng_state(states[1], device)
