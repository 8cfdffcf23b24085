"""Random state that never has to be saved: every seed is a function of the run's seed and the place in the work."""

from __future__ import annotations

import numpy as np


def derive(*key: int) -> int:
    """A 63-bit seed for one place of the work, e.g. ``derive(seed, step)``."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
