"""AArch64 code without an AArch64 processor: Unicorn executes it on the memory of this process, where it lies.

Either the regions that a caller names may be accessed, to the byte, or whatever this process could access itself, guard
pages thus not. The calling convention is checked on the way.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from sparsert.codegen.parking import Job

MISSING = None if find_spec("unicorn") else "not installed: unicorn"
_CODE, _STACK, _RETURN = 1 << 40, 1 << 41, 1 << 42
_PAGE = mmap.PAGESIZE
MOST = 50_000_000  # instructions after which it counts as a runaway


class Fault(Exception):
    """What the code did wrong."""


def _pages(regions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of whole pages that hold ``regions`` (address, bytes)."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted((a // _PAGE * _PAGE, -(-(a + n) // _PAGE) * _PAGE) for a, n in regions if n):
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((start, end))
    return runs


def writable(address: int) -> bool:
    """Whether this process may read and write the page at ``address``."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        start, end = (int(word, 16) for word in span.split("-"))
        if start <= address < end:
            return rights.startswith("rw")
    return False


def emulate(
    code: bytes, argument: int, regions: list[tuple[int, int]] | None = None, seen: Callable[[int], None] | None = None
) -> None:
    """Call ``code`` with ``argument`` in x0.

    ``regions`` are the (address, bytes) of this process it may access; without, it may access any page that the process
    may, and ``seen`` is told the address of each before its first access.

    Raises:
        Fault: an access outside, an illegal instruction, no end, a register that callers rely on and find changed.
    """
    from unicorn import (
        UC_ARCH_ARM64,
        UC_HOOK_MEM_READ,
        UC_HOOK_MEM_UNMAPPED,
        UC_HOOK_MEM_WRITE,
        UC_MODE_ARM,
        Uc,
        UcError,
    )
    from unicorn import arm64_const as arm
    from unicorn.unicorn_const import UC_PROT_EXEC, UC_PROT_READ, UC_PROT_WRITE

    uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
    uc.mem_map(_CODE, -(-len(code) // _PAGE) * _PAGE)
    uc.mem_write(_CODE, code)
    uc.mem_protect(_CODE, -(-len(code) // _PAGE) * _PAGE, UC_PROT_READ | UC_PROT_EXEC)
    uc.mem_map(_STACK, _PAGE, UC_PROT_READ | UC_PROT_WRITE)
    for start, end in _pages(regions or ()):
        uc.mem_map_ptr(start, end - start, UC_PROT_READ | UC_PROT_WRITE, start)
    kept = [getattr(arm, f"UC_ARM64_REG_X{i}") for i in range(18, 30)]
    low = [getattr(arm, f"UC_ARM64_REG_D{i}") for i in range(8, 16)]
    vectors = [getattr(arm, f"UC_ARM64_REG_Q{i}") for i in range(32)]
    uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)
    for i, register in enumerate(vectors):  # nothing may depend on what is in them: NaN
        uc.reg_write(register, int.from_bytes(np.full(4, 0x7FC00000 + i, "<u4").tobytes(), "little"))
    for i, register in enumerate([*kept, *low]):
        uc.reg_write(register, 0x1234567800 + i)
    uc.reg_write(arm.UC_ARM64_REG_SP, _STACK + _PAGE)
    uc.reg_write(arm.UC_ARM64_REG_X30, _RETURN)
    uc.reg_write(arm.UC_ARM64_REG_X0, argument)
    outside: list[str] = []
    allowed = [*(regions or ()), (_CODE, len(code)), (_STACK, _PAGE)]

    def look(uc: Any, access: int, address: int, size: int, value: int, data: Any) -> None:
        if not any(start <= address and address + size <= start + length for start, length in allowed):
            outside.append(f"{size} bytes at {address:#x} at offset {uc.reg_read(arm.UC_ARM64_REG_PC) - _CODE:#x}")
            uc.emu_stop()

    def missing(uc: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        page = address // _PAGE * _PAGE
        if not writable(page):
            return False
        if seen is not None:
            seen(page)
        uc.mem_map_ptr(page, _PAGE, UC_PROT_READ | UC_PROT_WRITE, page)
        return True

    if regions is None:
        uc.hook_add(UC_HOOK_MEM_UNMAPPED, missing)
    else:
        uc.hook_add(UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, look)
    try:
        uc.emu_start(_CODE, _RETURN, count=MOST)
    except UcError as error:
        at = uc.reg_read(arm.UC_ARM64_REG_PC) - _CODE
        raise Fault(f"{error} at offset {at:#x}, word {code[at : at + 4][::-1].hex()}") from error
    if outside:
        raise Fault(f"outside of all regions: {outside[0]}")
    if uc.reg_read(arm.UC_ARM64_REG_PC) != _RETURN:
        raise Fault("no end")
    changed = [i for i, register in enumerate([*kept, *low]) if uc.reg_read(register) != 0x1234567800 + i]
    if changed or uc.reg_read(arm.UC_ARM64_REG_SP) != _STACK + _PAGE:
        raise Fault(f"the stack pointer, or callee-saved registers {changed} of x18 to x29, d8 to d15, are changed")


_BY_ADDRESS: WeakValueDictionary[int, Emulated] = WeakValueDictionary()


class OneAfterTheOther:
    """Stands where a pool of threads does; runs the emulated parts of a job, the last one first."""

    address, workers, trouble, drain = 0, 255, "", 0

    def ensure(self, workers: int) -> bool:
        return True

    def dispatch(self, address: int) -> None:
        parts = ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))[Job.PARTS]
        words = ctypes.cast(address + Job.CODE.byte, ctypes.POINTER(ctypes.c_int64))[: 2 * parts]
        for code, argument in reversed(list(zip(words[::2], words[1::2], strict=True))):
            _BY_ADDRESS[code].call(argument)


ENTRY = bytes.fromhex("5f2403d5")
"""``bti c``, with which AArch64 code begins, and no other."""


def routed(code: bytes) -> Any:
    """An Executable, or what stands in its place for AArch64 code."""
    from sparsert.runtime.cpu import Executable

    return Emulated(code) if code.startswith(ENTRY) else Executable(code)


@contextmanager
def every_form(monkeypatch: Any) -> Iterator[None]:
    """AArch64 code of products that share code objects goes to the emulator too (dense, depthwise, looped ones), and
    what is shared out to threads."""
    from sparsert import crew
    from sparsert.operators import compact, dense, depthwise

    shared = (compact._executable, dense.code_of, dense.transposer_of)
    for module in (crew, compact, dense, depthwise):
        monkeypatch.setattr(module, "Executable", routed)
    pool = crew.shared_pool
    monkeypatch.setattr(
        crew, "shared_pool", lambda target: OneAfterTheOther() if target.machine == "aarch64" else pool(target)
    )
    for cached in shared:
        cached.cache_clear()
    yield
    for cached in shared:
        cached.cache_clear()


class Emulated:
    """Stands where an Executable does.

    Attributes:
        address: by which a job names this code.
        before: of the last call, the pages it accessed as they were before, by address.
    """

    def __init__(self, code: bytes) -> None:
        self.code = code
        self._named = ctypes.create_string_buffer(1)
        self.address = ctypes.addressof(self._named)
        _BY_ADDRESS[self.address] = self
        self.before: dict[int, bytes] = {}
        self.memory = SimpleNamespace(size=len(code))

    def call(self, address: int) -> None:
        self.before.clear()
        emulate(self.code, address, seen=lambda page: self.before.update({page: ctypes.string_at(page, _PAGE)}))
