"""The argument block of a call: 64-bit slots, filled by the caller, the last of them the kernel's own variables."""

from __future__ import annotations

from enum import IntEnum, auto


class Arg(IntEnum):
    """Slot numbers; the kernel addresses slot ``n`` at byte ``8 * n``. All offsets and pitches are bytes."""

    X = 0  # addresses, which differ from call to call: input,
    Y = auto()  # output,
    R = auto()  # residual,
    W = auto()  # packed values
    ZERO = auto()  # from here on: what shapes and pitches decide. Always 0, also the smallest offset of a tile
    X_LAST = (
        auto()
    )  # offset of the last tile, which overlaps the one before where the columns are no multiple of a tile
    Y_LAST = auto()
    R_LAST = auto()
    X_PITCH = auto()  # pitches and their multiples
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
    X_TILE = auto()  # from tile to tile of the caller's arrays
    Y_TILE = auto()
    R_TILE = auto()
    X_GROUP = auto()  # and from group to group
    Y_GROUP = auto()
    R_GROUP = auto()
    START = (
        auto()
    )  # offset of the first tile, at or below 0: a negative one is raised to 0, and the tiles behind it are aligned
    TILES = auto()  # column tiles
    GROUP = auto()  # of which so many a group
    PANEL = auto()  # scratch: packed x, residual and output of a group, partial sums of a group
    R_PANEL = auto()
    Y_PANEL = auto()
    PARTIAL = auto()
    DISCARD = auto()  # and scratch that nobody reads
    LEFT = auto()  # from here on: variables of the kernel. Tiles left, tiles of this group
    COUNT = auto()
    X_NEXT = auto()  # offsets of the group's first tile
    Y_NEXT = auto()
    R_NEXT = auto()
    XT = auto()  # offsets of the current tile
    PANEL_T = auto()
    YT = auto()
    RT = auto()
    PT = auto()
    BEHIND = auto()  # address and pitch of results that wait in the accumulators
    BEHIND_PITCH = auto()

    @property
    def byte(self) -> int:
        return 8 * int(self)


SLOTS = len(Arg)
