"""Reproducible pixels."""

from __future__ import annotations

import numpy as np


def noise(*shape: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    """Uniform over the whole range of the type."""
    top = 1.0 if dtype == np.float32 else np.iinfo(dtype).max + 1
    return (np.random.default_rng(seed).random(shape) * top).astype(dtype)
