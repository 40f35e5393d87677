"""Programs to machine code, by the name of the instruction set."""

from __future__ import annotations

from types import ModuleType

from .arm64 import assemble as arm64
from .codeobject import CodeObject
from .vector import Program
from .x86 import assemble as x86

_BY_ISA: dict[str, ModuleType] = {"x86-avx512": x86, "x86-avx2": x86, "aarch64-neon": arm64}
ISAS = tuple(_BY_ISA)
_BY_ISA |= {"x86-avx512-256": x86}  # the same instructions on shorter vectors


def assemble(program: Program, isa: str) -> CodeObject:
    """The code object of ``program``."""
    made: CodeObject = _BY_ISA[isa].assemble(program, isa)
    return made


def listing(program: Program, isa: str) -> str:
    """The code as text for people: offset, bytes and instruction, a line each, with the kernel's remarks at labels."""
    text: str = _BY_ISA[isa].listing(program, isa)
    return text
