"""Calling generated code on the CPU."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import ExecutableMemory, aligned_empty


class Executable:
    """A code object in executable memory, callable with the address of an argument block. The call releases the GIL."""

    def __init__(self, code: bytes) -> None:
        self.memory = ExecutableMemory(code)
        self.address = self.memory.address
        call: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.memory.address)
        call.memory = self.memory  # frames keep the function alone
        self.call: Callable[[int], None] = call


class Frame:
    """What one call needs to itself: its argument block and its scratch, both starting cache lines."""

    __slots__ = ("_block", "address", "kept", "nbytes", "scratch", "slots")

    def __init__(self, slots: int, scratch_floats: int) -> None:
        self.slots: NDArray[np.int64] = aligned_empty(slots, np.int64)
        self.slots[:] = 0
        self._block = self.slots.data.cast("B")
        self.address = address_of(self.slots)
        self.scratch: NDArray[np.float32] = aligned_empty(scratch_floats)
        self.nbytes = self.scratch.nbytes
        self.kept: object = None  # what else its slots point to

    def point(self, *addresses: int) -> None:
        """Write the first four slots: what differs from call to call."""
        _FOUR(self._block, 0, *addresses)


_FOUR = struct.Struct("<4q").pack_into


def _slow_address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _fast_address(array: NDArray[Any]) -> int:
    return _pointer(id(array) + _HEAD).value or 0


# NumPy builds a dictionary to tell an address, which takes longer than a small product. Its C interface
# (``PyArray_DATA``, inlined into every extension module) has the pointer right behind the object header; where that is
# not so, the dictionary it is.
_pointer, _HEAD = ctypes.c_void_p.from_address, object.__basicsize__


def _trusted() -> bool:
    if sys.implementation.name != "cpython":
        return False
    base = np.arange(12.0).reshape(3, 4)
    return all(_fast_address(a) == _slow_address(a) for a in (base, base[1:, 2:], base[::-1], base.T))


address_of = _fast_address if _trusted() else _slow_address
"""Where an array's first element lies."""
