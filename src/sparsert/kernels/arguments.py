"""The argument block of a call: 64-bit slots, filled by the caller in one go, some of them the kernel's own variables."""

from __future__ import annotations

from enum import IntEnum, auto


class Arg(IntEnum):
    """Slot numbers; the kernel addresses slot ``n`` at byte ``8 * n``. The caller fills those before ``LEFT``."""

    X = 0  # input
    Y = auto()  # output
    R = auto()  # residual
    W = auto()  # packed values
    X_LAST = auto()  # the last tile's pointers: it overlaps the one before where N is no multiple of 16
    Y_LAST = auto()
    R_LAST = auto()
    X_PITCH = auto()  # pitches in bytes, and their multiples
    X_PITCH3 = auto()
    X_PITCH5 = auto()
    X_PITCH7 = auto()
    Y_PITCH = auto()
    Y_PITCH3 = auto()
    Y_PITCH5 = auto()
    Y_PITCH7 = auto()
    R_PITCH = auto()
    R_PITCH3 = auto()
    R_PITCH5 = auto()
    R_PITCH7 = auto()
    X_TILE = auto()  # bytes from tile to tile of the caller's arrays
    Y_TILE = auto()
    R_TILE = auto()
    X_GROUP = auto()  # and from group to group
    Y_GROUP = auto()
    R_GROUP = auto()
    TILES = auto()  # column tiles
    GROUP = auto()  # of which so many a group
    PANEL = auto()  # scratch: packed x, residual and output of a group, partial sums of a group
    R_PANEL = auto()
    Y_PANEL = auto()
    PARTIAL = auto()
    LEFT = auto()  # from here on: variables of the kernel
    COUNT = auto()
    X_NEXT = auto()  # the group's first pointers in the caller's arrays
    Y_NEXT = auto()
    R_NEXT = auto()
    XT = auto()  # pointers of the current tile
    YT = auto()
    RT = auto()
    PT = auto()

    @property
    def byte(self) -> int:
        return 8 * int(self)


FILLED = int(Arg.LEFT)
SLOTS = len(Arg)
