"""The batch encoder: columns of instructions in, 32-bit words out, without a Python object per instruction.

Every instruction is one word, so its place in the stream is its address, and branches are resolved before anything is
encoded. A field costs a shift, a mask and an or, however many instructions a batch holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import InternalError
from .table import FIELDS, ROWS, Field

Ints = NDArray[np.int64]
Words = NDArray[np.uint32]
Value = int | NDArray[np.integer]  # one value for the whole batch, or one per instruction


@dataclass(frozen=True)
class Batch:
    """Instructions of one row of the table.

    Attributes:
        row: its name.
        place: (n,) word of the code that each occupies.
        fields: by the field's name: registers, immediates, distances of branches in bytes.
        label: (n,) for listings: the label that a branch or an address names.
    """

    row: str
    place: Ints
    fields: dict[str, Value]
    label: Ints | None = None


def encode(batches: list[Batch], size: int) -> Words:
    """The ``size`` words of the code.

    Raises:
        InternalError: an operand is missing, out of its field's range or no multiple of its unit; two instructions in
            one place, or a place without any.
    """
    code, taken = np.zeros(size, np.uint32), 0
    for batch in batches:
        code[batch.place] = encoded(batch)
        taken += batch.place.size
    if taken != size or not code.all():
        raise InternalError(f"{taken} instructions do not fill {size} places one by one")
    return code


def encoded(batch: Batch) -> Words | np.uint32:
    """The words of one batch; a single one where all its instructions are the same."""
    row, fixed, moving = ROWS[batch.row], ROWS[batch.row].base, None
    if len(batch.fields) != len(row.operands):
        raise InternalError(f"{batch.row} takes {[name for _, name in row.operands]}, not {list(batch.fields)}")
    for _, name in row.operands:
        field, value = FIELDS[name], batch.fields[name]
        if isinstance(value, int):
            _check(batch.row, name, field, value, value)
            fixed |= _place_one(field, value)
        elif value.size:
            _check(batch.row, name, field, int(value.min()), int(value.max()))
            bits = _place(batch.row, name, field, value)
            moving = bits if moving is None else moving | bits
    word = np.uint32(fixed)
    return word if moving is None else moving | word


def _check(row: str, name: str, field: Field, low: int, high: int) -> None:
    if low < field.least or high > field.most:
        raise InternalError(f"{row}: {low} to {high} is not within {field.least} to {field.most}", where=name)


def _place_one(field: Field, value: int) -> int:
    if value % field.scale:
        raise InternalError(f"{value} is no multiple of {field.scale}")
    value, bits = value // field.scale, 0
    for at, width in field.parts:
        bits |= (value & (1 << width) - 1) << at
        value >>= width
    return bits | (bits >> field.parts[0][0] << field.copy if field.copy else 0)


def _place(row: str, name: str, field: Field, value: NDArray[np.integer]) -> Words:
    if field.scale > 1:
        if (value & field.scale - 1).any():
            raise InternalError(f"{row}: not all of them are multiples of {field.scale}", where=name)
        value = value >> field.scale.bit_length() - 1
    word = value.astype(np.uint32)  # of a negative one, its low 32 bits
    if len(field.parts) == 1 and not field.signed:
        bits = word << np.uint32(field.parts[0][0])
    else:
        bits = np.zeros_like(word)
        for at, width in field.parts:
            bits |= (word & np.uint32((1 << width) - 1)) << np.uint32(at)
            word = word >> np.uint32(width)
    return bits | word << np.uint32(field.copy) if field.copy else bits
