"""What a code generator returns: bytes ready to be mapped, and where to enter them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodeObject:
    """Position-independent machine code followed by its constant pool, at ``constants``; entered at offset 0."""

    isa: str
    code: bytes
    constants: int
    instructions: int
