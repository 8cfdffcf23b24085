"""Random state that never has to be saved: every seed is a function of the run's seed and the place in the work."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derive(domain: str, *key: int) -> int:
    """A 63-bit seed for one place of the work, e.g. ``derive("step", seed, step)``.

    The domain keeps places apart that happen to have the same numbers, such as a student's first weights and its
    teacher's.
    """
    entropy = [zlib.crc32(domain.encode()), len(key), *key]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_torch(device: torch.device, domain: str, *key: int) -> None:
    """Seed the generators of the CPU and of one device for one place of the work.

    ``torch.manual_seed`` would do it for every kind of device; where one is not initialised that formats a stack trace
    each time, a millisecond that every step would pay.
    """
    seed = derive(domain, *key)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
