"""Instructions gathered batch by batch, in any order of batches, and laid out behind each other by program row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoder import Batch, Ints, Value
from .table import BRANCHES, ROWS

TEMP = 17
"""The general register that any instruction sequence may overwrite: addresses and large immediates pass through it."""
CONDITIONAL_REACH = 1 << 18  # words: 19 signed bits
_INVERSE = {"b_ne": "b_eq", "b_eq": "b_ne", "cbz": "cbnz", "cbnz": "cbz"}
_Part = tuple[str, Ints, Ints, dict[str, Value], Ints | None]


@dataclass(frozen=True)
class Laid:
    """Instructions with their places, how many words they fill, and in front of which word each label stands."""

    batches: list[Batch]
    size: int
    labels: Ints


class Stream:
    """What each of ``rows`` program rows becomes: instructions in the order in which they were put there."""

    def __init__(self, rows: int) -> None:
        self.used = np.zeros(rows, np.int64)
        self._parts: list[_Part] = []

    def put(self, name: str, rows: Ints, *operands: Value, label: Ints | None = None) -> None:
        """The next instruction of ``rows``: operands in the order of the text, less the distance that ``label`` is.

        A conditional branch is the last instruction of its row.
        """
        if rows.size:
            slot = self.used[rows]
            self.used[rows] = slot + 1
            names = [field for _, field in ROWS[name].operands]
            self._parts.append((name, rows, slot, dict(zip(names, operands, strict=label is None)), label))

    def number(self, rows: Ints, d: Value, value: Ints) -> None:
        """Any 64-bit numbers to general registers ``d``, 16 bits at a time from the lowest up."""
        negative = value < 0
        for name, some in (("movz", ~negative), ("movn", negative)):
            word = np.where(negative, ~value, value)[some] & 0xFFFF
            self.put(name, rows[some], _of(d, some), word, 0)
        for at in (16, 32, 48):
            piece = value >> at & 0xFFFF
            some = piece != np.where(negative, 0xFFFF, 0)
            self.put("movk", rows[some], _of(d, some), piece[some], at)

    def sum(self, rows: Ints, d: Value, n: Value, value: Ints) -> None:
        """d = n + value: one instruction up to 12 bits or for multiples of 4,096, two up to 24 bits, else by way of
        TEMP."""
        size, less = np.abs(value), value < 0
        low, top, far = size & 0xFFF, size >> 12, size >= 1 << 24
        for minus in (False, True):
            prefix, near = "sub" if minus else "add", (less == minus) & ~far
            some = near & (top != 0)
            self.put(f"{prefix}_top", rows[some], _of(d, some), _of(n, some), top[some])
            both = near & (top != 0) & (low != 0)
            self.put(f"{prefix}_imm", rows[both], _of(d, both), _of(d, both), low[both])
            some = near & (top == 0)
            self.put(f"{prefix}_imm", rows[some], _of(d, some), _of(n, some), low[some])
        if far.any():
            self.number(rows[far], TEMP, value[far])
            self.put("add", rows[far], _of(d, far), _of(n, far), TEMP, 0)

    def finish(self, labels: Ints, aligned: Ints, units: Ints, count: int) -> Laid:
        """Everything in its place.

        Args:
            labels: (n, 2) rows and the numbers of the labels that stand in front of them.
            aligned: rows that stand at multiples of ``units`` words, filled up with no-ops.
            count: how many labels there are; one more is the end of the code, padded to a cache line.
        """
        conditional = [part for part in self._parts if part[4] is not None and part[0] in _INVERSE]
        start = self._start(aligned, units)
        far: Any = np.zeros(0, np.int64)
        if start[-1] > CONDITIONAL_REACH // 2:  # most programs are shorter than any branch reaches
            where = self._places(labels, start, count)
            margin = sum(part[1].size for part in conditional) + int(units.sum())
            far = np.concatenate([far, *(
                rows[np.abs(where[label] - start[rows] - slot) >= CONDITIONAL_REACH - margin]
                for _, rows, slot, _, label in conditional if label is not None)])  # fmt: skip
            self.used[far] += 1
            start = self._start(aligned, units)
        where = self._places(labels, start, count)
        pads = np.diff(start)[aligned]
        fill = np.repeat(start[aligned] - np.cumsum(pads) + pads, pads) + np.arange(int(pads.sum()))
        batches = [Batch("nop", fill, {})] if fill.size else []
        for name, rows, slot, fields, label in self._parts:
            place = start[rows] + slot
            if label is None:
                batches.append(Batch(name, place, fields))
                continue
            jump = np.isin(rows, far) if name in _INVERSE and far.size else np.zeros(rows.size, bool)
            for some, of in ((~jump, name), (jump, _INVERSE.get(name, name))):
                if not some.any():
                    continue
                own = {key: _of(value, some) for key, value in fields.items()}
                if of is name:
                    batches.append(_resolved(of, place[some], own, where, label[some]))
                else:  # the inverse condition over a branch that reaches everywhere
                    batches.append(Batch(of, place[some], own | {"to19": 8}))
                    batches.append(_resolved("b", place[some] + 1, {}, where, label[some]))
        return Laid(batches, int(start[-1]), where)

    def _start(self, aligned: Ints, units: Ints) -> Ints:
        start = np.zeros(self.used.size + 1, np.int64)
        np.cumsum(self.used, out=start[1:])
        if aligned.size:
            pads, padding = np.zeros(self.used.size + 1, np.int64), 0
            for row, before, unit in zip(aligned.tolist(), start[aligned].tolist(), units.tolist(), strict=True):
                pads[row + 1] = -(before + padding) % unit
                padding += int(pads[row + 1])
            start += np.cumsum(pads)
        return start

    @staticmethod
    def _places(labels: Ints, start: Ints, count: int) -> Ints:
        where = np.full(count + 1, -1, np.int64)
        where[labels[:, 1]] = start[labels[:, 0]]
        where[count] = -(-start[-1] // 16) * 16
        return where


def _resolved(name: str, place: Ints, fields: dict[str, Value], where: Ints, label: Ints) -> Batch:
    """With what the label says filled in: a distance, a page, or the offset in it."""
    target, missing = 4 * where[label], next(n for _, n in ROWS[name].operands if n not in fields)
    if missing in BRANCHES:
        value = target - 4 * place
    elif missing == "page":
        value = (target & -4096) - (4 * place & -4096)
    else:
        value = target & 4095
    return Batch(name, place, fields | {missing: value}, label)


def _of(value: Value, some: NDArray[np.bool_]) -> Value:
    return value if isinstance(value, int) else value[some]
