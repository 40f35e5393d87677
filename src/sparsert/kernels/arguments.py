"""The argument block of a call: 64-bit slots, filled by the caller, the last of them the kernel's own variables."""

from __future__ import annotations

from enum import IntEnum, auto

from ..codegen.slots import Slots


class Arg(Slots):
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
    X_PLANES = auto()  # convolutions: scratch planes of x, residual and y,
    R_PLANES = auto()
    Y_PLANES = auto()
    X_PLANE = auto()  # bytes from plane to plane of x,
    MORE = auto()  # whether another band of rows follows, with an argument block of its own behind this one,
    BACK = auto()  # bytes from the last band's block to the first,
    IMAGES = auto()  # how many images,
    X_IMAGE = auto()  # and bytes from image to image
    Y_IMAGE = auto()
    R_IMAGE = auto()
    MASKS = auto()  # a table of masks by tile
    Y_DIRECT = auto()  # whether results go to the image itself, or to planes first
    R_DIRECT = auto()
    Y_START = auto()  # the offset of the band's first row in the image, or the address of the planes
    R_START = auto()
    IMAGES_LEFT = auto()  # variables again: images left, addresses of the current one
    X_HERE = auto()
    Y_HERE = auto()
    R_HERE = auto()
    W_HERE = auto()
    TAIL_AT = auto()  # offset of a tile that y ends in the midst of, -1 if there is none,
    TAIL = auto()  # and scratch for its results
    X_DIRECT = auto()  # whether planes of x are the caller's; their offset in the image, or their address
    X_START = auto()


SLOTS = len(Arg)


class Move(IntEnum):
    """Slots of one copy between rows of an image and rows of a plane; a convolution has several, behind ``Arg``'s."""

    FROM = 0  # offset of the first row of the image,
    CHANNEL = auto()  # bytes from channel to channel of the image,
    ROW = auto()  # and from row to row
    AT = auto()  # address of the first plane,
    SKIP = auto()  # offset of the first row in it,
    PLANE = auto()  # bytes from plane to plane,
    PITCH = auto()  # and from row to row
    ROWS = auto()
    VECTORS = auto()  # whole vectors of a row, in front of the last one, which the mask cuts
    MASK = auto()  # address of the mask
    ABOVE = auto()  # vectors of zeros at the top of a plane
    BELOW = auto()  # and behind the last row

    def byte(self, copy: int) -> int:
        return 8 * (SLOTS + copy * len(Move) + int(self))
