"""One seed for all random number generators in use."""

import random
import sys

import numpy as np


def seed_everything(seed: int) -> np.random.Generator:
    """Seed `random`, numpy's global state and a loaded torch with 0 <= seed < 2**32; return a numpy generator of it."""
    np.random.seed(seed)
    random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)
    return np.random.default_rng(seed)
