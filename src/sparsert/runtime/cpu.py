"""Calling generated code on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import ExecutableMemory, aligned_empty


class Executable:
    """A code object in executable memory, callable with the address of an argument block. The call releases the GIL."""

    def __init__(self, code: bytes) -> None:
        self.memory = ExecutableMemory(code)
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.memory.address)


class Frame:
    """What one call needs to itself: the argument block, and scratch that grows on demand."""

    __slots__ = ("address", "scratch", "slots")

    def __init__(self, slots: int) -> None:
        self.slots: NDArray[np.int64] = aligned_empty(slots, np.int64)
        self.slots[:] = 0
        self.address = address_of(self.slots)
        self.scratch: NDArray[np.float32] = aligned_empty(0)

    def reserve(self, floats: int) -> int:
        """The address of scratch for ``floats`` floats, aligned to a cache line."""
        if self.scratch.size < floats:
            self.scratch = aligned_empty(floats)
        return address_of(self.scratch)


def address_of(array: NDArray[Any]) -> int:
    """Where an array's first element lies."""
    return int(array.__array_interface__["data"][0])
