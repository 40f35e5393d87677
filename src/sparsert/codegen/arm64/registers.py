"""Which general register holds what (AAPCS64: x0 to x17 are the callee's to overwrite, x18 is the platform's)."""

from __future__ import annotations

from ..vector import S

GPR = dict(zip(S, (*range(14), *range(19, 27)), strict=False))
FAR = {S.X: 14, S.W: 15, S.Y: 16}
"""Where the address of an operand that its pointer does not reach is kept, for the next one near it."""
MASK = (27, 28)
"""A mask: a vector whose sign bits count, two lanes each."""
_USED = [r for r in (*GPR.values(), *MASK) if r >= 19]
CALLEE_SAVED = (*_USED, *_USED[-1:] * (len(_USED) % 2))  # in pairs
