"""One seed for all random number generators in use."""

import random
import sys

import numpy as np


def seed_everything(seed: int) -> np.random.Generator:
    """Seed `random`, numpy's global state and, if it is loaded, torch; return a numpy generator of the same seed.

    Raises:
        ValueError: Unless 0 <= seed < 2**32.
    """
    np.random.seed(seed)
    random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)
    return np.random.default_rng(seed)
