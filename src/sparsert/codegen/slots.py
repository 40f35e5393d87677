"""Numbers of the 64-bit words of a block in memory that generated code and its caller share."""

from __future__ import annotations

from enum import IntEnum


class Slots(IntEnum):
    """What the words of a block are, by number; each block is an enumeration of its own."""

    @property
    def byte(self) -> int:
        """Where in the block the word lies."""
        return 8 * int(self)
