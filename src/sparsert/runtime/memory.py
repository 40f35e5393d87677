"""Executable memory without a moment in which a page is writable and executable, and aligned buffers for data."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import weakref
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExecutableMemoryError, ValueRangeError
from . import arm64

_READ, _WRITE, _EXEC = 1, 2, 4
_SHARED, _PRIVATE, _ANONYMOUS, _POPULATE = 1, 2, 0x20, 0x8000
_MADV_HUGEPAGE = 14
_HUGE = 2 << 20
_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class ExecutableMemory:
    """A read-and-execute copy of ``code``, unmapped with the object.

    First choice: an anonymous mapping, written, then turned executable. Where policy forbids that (SELinux
    ``execmem``), the same bytes through a memfd: one writable view, closed before the executable view is opened. On
    macOS, whose rules are others, a MAP_JIT page. AArch64's instruction caches are told of the new code.

    Raises:
        ExecutableMemoryError: both ways are refused; the message names the policy.
    """

    def __init__(self, code: bytes) -> None:
        if not code:
            raise ExecutableMemoryError("there is no code to map")
        self.size = -(-len(code) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self.address = self._macos(code) if sys.platform == "darwin" else self._anonymous(code)
        except OSError as first:
            try:
                self.address = self._memfd(code)
            except (OSError, AttributeError) as second:  # no memfd: an old C library
                reason = getattr(second, "strerror", second)
                raise ExecutableMemoryError(
                    f"the system refuses executable memory (mprotect: {first.strerror}; memfd: {reason})",
                    hint="A policy such as SELinux execmem, PaX MPROTECT, systemd MemoryDenyWriteExecute or a "
                    "container's seccomp profile forbids generated code. Permit it for this process, or use "
                    "target='reference'.",
                ) from second
        if code is not arm64.SYNCHRONISE and sys.platform != "darwin" and platform.machine() == "aarch64":
            _synchroniser()(self.address, self.address + self.size)
        self._finalizer = weakref.finalize(self, _unmap, self.address, self.size)
        self._finalizer.atexit = False  # daemon threads may still be inside; the system takes the pages back anyway

    def _anonymous(self, code: bytes) -> int:
        huge = len(code) >= _HUGE  # so much code runs through the entries of the instruction TLB quickly
        span = self.size + (_HUGE if huge else 0)
        base = _map(span, _READ | _WRITE, _PRIVATE | _ANONYMOUS | (0 if huge else _POPULATE), -1)
        address = base
        if huge:  # a huge page wants an aligned address: give back what lies around it
            address = -(-base // _HUGE) * _HUGE
            if address > base:
                _libc().munmap(base, address - base)
            if base + span > address + self.size:
                _libc().munmap(address + self.size, base + span - address - self.size)
            _libc().madvise(address, self.size, _MADV_HUGEPAGE)
        try:
            ctypes.memmove(address, code, len(code))
            if _libc().mprotect(address, self.size, _READ | _EXEC):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        except OSError:
            _unmap(address, self.size)
            raise
        return int(address)

    def _macos(self, code: bytes) -> int:
        flags = arm64.MacOS.PRIVATE | arm64.MacOS.ANONYMOUS | arm64.MacOS.MAP_JIT
        address = _map(self.size, _READ | _WRITE | _EXEC, flags, -1)
        arm64.macos().write(address, code)
        return address

    def _memfd(self, code: bytes) -> int:
        handle = os.memfd_create("sparsert", os.MFD_CLOEXEC)
        try:
            os.ftruncate(handle, self.size)
            with mmap.mmap(handle, self.size) as view:
                view[: len(code)] = code
            return _map(self.size, _READ | _EXEC, _SHARED, handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Unmap now. No call may be under way."""
        self._finalizer()


def _map(size: int, protection: int, flags: int, handle: int) -> int:
    address = _libc().mmap(None, size, protection, flags, handle, 0)
    if address is None or address == _FAILED:
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code))
    return int(address)


@cache
def _synchroniser() -> Any:
    """The routine that makes code between two addresses visible to instruction fetches.

    Its own page needs none: the kernel sees to a page that becomes executable for the first time.
    """
    memory = ExecutableMemory(arm64.SYNCHRONISE)
    call: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(memory.address)
    call.memory = memory  # as long-lived as the function
    return call


def _unmap(address: int, size: int) -> None:
    _libc().munmap(address, size)


def aligned_empty(count: int, dtype: Any = np.float32, alignment: int = 64) -> NDArray[Any]:
    """An uninitialised vector whose first element starts a cache line.

    Raises:
        ValueRangeError: the size overflows or memory is exhausted.
    """
    item = np.dtype(dtype).itemsize
    try:
        raw = np.empty(count * item + alignment, np.uint8)
    except (MemoryError, ValueError) as error:
        raise ValueRangeError(
            f"a buffer of {count} elements cannot be allocated: {error}", hint="Use smaller inputs."
        ) from error
    start = -raw.__array_interface__["data"][0] % alignment
    return raw[start : start + count * item].view(dtype)
