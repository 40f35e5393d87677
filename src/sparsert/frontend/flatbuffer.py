"""A reader of FlatBuffers that trusts nothing: every offset and length is checked against the file before use.

The format (https://flatbuffers.dev/internals) is small enough to read directly, which keeps hostile files away from
code that assumes a verified buffer.  All numbers are little-endian; a *table* starts with a signed offset back to its
*vtable*, which lists where each field lies (0 = absent); strings, vectors and sub-tables are reached through unsigned
forward offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import FormatError

MAX_TEXT = 4096  # bytes of a name that are kept: names are for people


class Table:
    """One table of a FlatBuffer. Fields are named by their id in the schema."""

    __slots__ = ("_vtable", "_vtable_size", "data", "position", "where")

    def __init__(self, data: bytes, position: int, where: str) -> None:
        self.data, self.where = data, where
        self.position = position
        self._vtable = position - int(self._read("<i", position))
        self._vtable_size = int(self._read("<H", self._vtable))
        if self._vtable_size < 4:
            raise self._broken(f"the field table at byte {self._vtable} has {self._vtable_size} bytes")

    @classmethod
    def root(cls, data: bytes, where: str) -> Table:
        """The root table of a whole buffer."""
        if len(data) < 8:
            raise FormatError(f"{len(data)} bytes are too few for a FlatBuffer", where=where)
        return cls(data, struct.unpack_from("<I", data, 0)[0], where)

    def scalar(self, field: int, code: str, default: int = 0) -> int:
        """A number stored inline; ``code`` is its :mod:`struct` letter."""
        at = self._field(field)
        return int(self._read("<" + code, at)) if at else default

    def table(self, field: int) -> Table | None:
        at = self._field(field)
        return self.open(at) if at else None

    def tables(self, field: int) -> Tables:
        """A vector of tables; each is opened, and checked, when it is asked for."""
        at = self._field(field)
        start, count = self._extent(at, 4) if at else (0, 0)
        return Tables(self, start, count)

    def array(self, field: int, dtype: DTypeLike) -> NDArray[Any]:
        """A vector of numbers, as a view of the file (empty when absent)."""
        kind = np.dtype(dtype)
        at = self._field(field)
        if not at:
            return np.empty(0, kind)
        start, count = self._extent(at, kind.itemsize)
        return np.frombuffer(self.data, kind, count, start)

    def text(self, field: int) -> str:
        at = self._field(field)
        if not at:
            return ""
        start, count = self._extent(at, 1)
        return self.data[start : start + min(count, MAX_TEXT)].decode("utf-8", "replace")

    def _field(self, field: int) -> int:
        """Where a field lies in the file, 0 when it is absent."""
        slot = 4 + 2 * field
        if slot + 2 > self._vtable_size:
            return 0
        offset = int(self._read("<H", self._vtable + slot))
        return self.position + offset if offset else 0

    def _follow(self, at: int) -> int:
        return at + int(self._read("<I", at))

    def _extent(self, at: int, itemsize: int) -> tuple[int, int]:
        """Start and element count of the vector that the offset at ``at`` points to."""
        place = self._follow(at)
        count = int(self._read("<I", place))
        if place + 4 + count * itemsize > len(self.data):
            raise self._broken(f"a vector at byte {place} claims {count} entries of {itemsize} bytes")
        return place + 4, count

    def open(self, at: int) -> Table:
        """The table that the offset at byte ``at`` points to."""
        return Table(self.data, self._follow(at), self.where)

    def _read(self, code: str, at: int) -> Any:
        # unpack_from counts a negative position from the end: such a table would silently read other bytes.
        if at < 0 or at + struct.calcsize(code) > len(self.data):
            raise self._broken(f"an offset points to byte {at}")
        return struct.unpack_from(code, self.data, at)[0]

    def _broken(self, what: str) -> FormatError:
        return FormatError(f"{what}; the file has {len(self.data)} bytes", where=self.where,
                           hint="The file is truncated or damaged.")  # fmt: skip


class Tables:
    """A vector of tables."""

    __slots__ = ("_count", "_owner", "_start")

    def __init__(self, owner: Table, start: int, count: int) -> None:
        self._owner, self._start, self._count = owner, start, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Table]:
        return (self[index] for index in range(self._count))

    def __getitem__(self, index: int) -> Table:
        if not 0 <= index < self._count:
            raise FormatError(f"entry {index} of a list of {self._count} is referred to", where=self._owner.where,
                              hint="The file is truncated or damaged.")  # fmt: skip
        return self._owner.open(self._start + 4 * index)
