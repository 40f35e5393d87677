"""The constant pool behind the code: each constant fills a whole vector, whatever the instruction set takes of it."""

from __future__ import annotations

import numpy as np

from .vector import POOL_BYTES, POOL_LANES, Program


def pool(program: Program) -> bytes:
    """Its bytes, which start a cache line."""
    return np.repeat(np.array(program.constants, "<u4"), POOL_LANES).tobytes()


def listed(program: Program, at: int) -> list[str]:
    """Its lines in a listing of code that ends at ``at``."""
    lines = [f"L{program.labels}:  ; constants"] if program.constants else []
    for k, bits in enumerate(program.constants):
        value = float(np.array(bits, np.uint32).view(np.float32))
        lines.append(f"{at + k * POOL_BYTES:8x}  {bits:08x} x {POOL_LANES:<12} ; {value:.9g}")
    return lines
