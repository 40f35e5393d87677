"""What AArch64 asks of whoever generates code: finding features, and instruction caches that do not watch stores.

On macOS a page that may ever execute is mapped with MAP_JIT and is writable for one thread or executable for all. That
part follows Apple's documentation ("Porting just-in-time compilers to Apple silicon"); nobody has run it yet.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

_AT_HWCAP = 16
# Linux, arch/arm64/include/uapi/asm/hwcap.h
_BITS = {"asimd": 1, "fphp": 9, "asimdhp": 10, "asimddp": 20, "sve": 22}
_APPLE = frozenset({"asimd", "fphp", "asimdhp", "asimddp"})  # of every processor that macOS runs on


def features() -> frozenset[str]:
    """Names of the features above that this CPU has and this system reports, as in /proc/cpuinfo."""
    libc = ctypes.CDLL(None)
    if sys.platform == "darwin":
        return _APPLE if hasattr(libc, "pthread_jit_write_protect_np") else frozenset()
    libc.getauxval.restype, libc.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    word = int(libc.getauxval(_AT_HWCAP))
    return frozenset(name for name, bit in _BITS.items() if word >> bit & 1)


# x0: first byte, x1: behind the last. Clean the data cache line by line to where instruction fetches see it, drop the
# lines of the instruction cache, wait (Arm Architecture Reference Manual, B2.7.4). Line sizes come from CTR_EL0.
SYNCHRONISE = bytes.fromhex(
    "5f2403d5"  # bti c
    "22003bd5"  # mrs x2, ctr_el0
    "434c50d3"  # ubfx x3, x2, #16, #4
    "840080d2"  # mov x4, #4
    "8320c39a"  # lsl x3, x4, x3: bytes of a line of data
    "420c4092"  # and x2, x2, #15
    "8220c29a"  # lsl x2, x4, x2: and of instructions
    "650400d1"  # sub x5, x3, #1
    "0500258a"  # bic x5, x0, x5
    "257b0bd5"  # dc cvau, x5
    "a500038b"  # add x5, x5, x3
    "bf0001eb"  # cmp x5, x1
    "a3ffff54"  # b.lo -3
    "9f3b03d5"  # dsb ish
    "450400d1"  # sub x5, x2, #1
    "0500258a"  # bic x5, x0, x5
    "25750bd5"  # ic ivau, x5
    "a500028b"  # add x5, x5, x2
    "bf0001eb"  # cmp x5, x1
    "a3ffff54"  # b.lo -3
    "9f3b03d5"  # dsb ish
    "df3f03d5"  # isb
    "c0035fd6"  # ret
)


class MacOS:
    """Pages for generated code on macOS."""

    MAP_JIT, ANONYMOUS, PRIVATE = 0x800, 0x1000, 2

    def __init__(self) -> None:
        self.libc: Any = ctypes.CDLL(None, use_errno=True)
        self.libc.pthread_jit_write_protect_np.argtypes = [ctypes.c_int]
        self.libc.sys_icache_invalidate.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def write(self, address: int, code: bytes) -> None:
        """Code into a MAP_JIT page, writable for this thread meanwhile."""
        self.libc.pthread_jit_write_protect_np(0)
        try:
            ctypes.memmove(address, code, len(code))
        finally:
            self.libc.pthread_jit_write_protect_np(1)
        self.libc.sys_icache_invalidate(address, len(code))


@cache
def macos() -> MacOS:
    """The one instance."""
    return MacOS()
