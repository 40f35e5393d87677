"""AArch64 code without an AArch64 processor: Unicorn executes it on the memory of this process, where it lies.

Only what a caller names is mapped; anything else is an error. The calling convention is checked on the way.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np

from fuzz import guard

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


def emulate(code: bytes, argument: int, regions: list[tuple[int, int]], exact: bool) -> None:
    """Call ``code`` with ``argument`` in x0; ``regions`` are the (address, bytes) of this process it may access.

    With ``exact`` every access is checked byte by byte, otherwise page by page.

    Raises:
        Fault: an access outside, an illegal instruction, no end, a register that callers rely on and find changed.
    """
    from unicorn import UC_ARCH_ARM64, UC_HOOK_MEM_READ, UC_HOOK_MEM_WRITE, UC_MODE_ARM, UC_PROT_ALL, Uc, UcError
    from unicorn import arm64_const as arm
    from unicorn.unicorn_const import UC_PROT_EXEC, UC_PROT_READ, UC_PROT_WRITE

    uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
    uc.mem_map(_CODE, -(-len(code) // _PAGE) * _PAGE, UC_PROT_ALL)
    uc.mem_write(_CODE, code)
    uc.mem_protect(_CODE, -(-len(code) // _PAGE) * _PAGE, UC_PROT_READ | UC_PROT_EXEC)
    uc.mem_map(_STACK, _PAGE, UC_PROT_READ | UC_PROT_WRITE)
    for start, end in _pages(regions):
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
    allowed = [*regions, (_CODE, len(code)), (_STACK, _PAGE)]

    def look(uc: Any, access: int, address: int, size: int, value: int, data: Any) -> None:
        if not any(start <= address and address + size <= start + length for start, length in allowed):
            outside.append(f"{size} bytes at {address:#x} at offset {uc.reg_read(arm.UC_ARM64_REG_PC) - _CODE:#x}")
            uc.emu_stop()

    if exact:
        uc.hook_add(UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, look)
    try:
        uc.emu_start(_CODE, _RETURN, count=MOST if exact else 0)
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


class Emulated:
    """Stands where an Executable does; may access what :func:`fuzz.guard.guarded` has handed out, page by page."""

    def __init__(self, code: bytes) -> None:
        self.code = code

    def call(self, address: int) -> None:
        regions = guard.active().memory()
        emulate(self.code, address, regions, exact=False)
