"""One seed for all random number generators in use."""

from __future__ import annotations

import random
import sys

import numpy as np


def seed_everything(seed: int) -> np.random.Generator:
    """Seed `random`, numpy's global state and, if it is loaded, torch.

    Args:
        seed: 0 <= seed < 2**32.

    Returns:
        A numpy generator of the same seed, to be handed on.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
    return np.random.default_rng(seed)
