"""Weights in 16 bits: bfloat16, the upper half of a float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

_LOWER = np.uint32(0xFFFF)


def exact(values: Array) -> bool:
    """Whether every value is a bfloat16."""
    return not np.any(values.view(np.uint32) & _LOWER)


def rounded(values: Array) -> Array:
    """Finite values to the nearest bfloat16, ties to even; what is beyond the largest becomes infinite."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & ~_LOWER).view(np.float32)


def narrowed(values: Array) -> NDArray[np.uint16]:
    """Values that are exact, as their upper halves."""
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def widened(values: NDArray[np.uint16]) -> Array:
    """What :func:`narrowed` took apart."""
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
