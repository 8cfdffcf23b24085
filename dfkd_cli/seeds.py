"""Random state that never has to be saved: every seed is a function of the run's seed and the place in the work."""

from __future__ import annotations

import numpy as np
import torch


def derive(*key: int) -> int:
    """A 63-bit seed for one place of the work, e.g. ``derive(seed, step)``."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_torch(device: torch.device, *key: int) -> None:
    """Seed the generators of the CPU and of one device for one place of the work.

    ``torch.manual_seed`` would do it for every kind of device; where one is not initialised that formats a stack trace
    each time, a millisecond that every step would pay.
    """
    seed = derive(*key)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
