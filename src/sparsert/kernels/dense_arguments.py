"""What a dense product is (its form), and the argument block of a call."""

from __future__ import annotations

from dataclasses import dataclass
from enum import auto

from ..codegen.slots import Slots
from ..errors import UnsupportedError


@dataclass(frozen=True)
class Form:
    """What one code object computes; extents, pitches and batch are arguments.

    Attributes:
        a: "rows" (M, K), elements of a row back to back, "columns" (K, M), or "image": rows are the positions of a
            convolution's output, columns its taps (:mod:`~.dense_image`).
        b: "rows" (K, N) or packed panels (panels, K, width), "transposed" (N, K), or "image": rows of K are taps of a
            convolution, each somewhere in an image, columns are the positions of its output
            (:mod:`~.dense_image`).
        bias: None, "rows" (one per row of C) or "columns".
        activation, parameters: a row of the activation table.
        scale: results are multiplied by the single float at BIAS before anything else.
        residual: None, "before" or "after" the activation.
        scatter: C is written transposed, (N, M): its rows are then columns of the caller's array.
        step: of an image that is staged, from column to column: 1 or 2.
    """

    a: str = "rows"
    b: str = "rows"
    bias: str | None = None
    activation: str | None = None
    parameters: tuple[float, ...] = ()
    residual: str | None = None
    scale: bool = False
    scatter: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        known = {"a": ("rows", "columns", "image"), "b": ("rows", "transposed", "image"),
                 "bias": (None, "rows", "columns"), "residual": (None, "before", "after"), "step": (1, 2)}  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UnsupportedError(f"{name}={getattr(self, name)!r}", where=name, hint=f"Known: {values}.")


class Slot(Slots):
    """The argument block of a call; addresses, pitches and steps are bytes."""

    A = 0
    B = auto()
    C = auto()
    R = auto()  # residual
    BIAS = auto()
    A_PITCH = auto()  # from row to row of A, or from k to k where A is given by columns; with multiples
    A_PITCH3 = auto()
    A_PITCH5 = auto()
    A_PITCH7 = auto()
    B_PITCH = auto()  # from k to k; from column to column where B is transposed
    C_PITCH = auto()
    R_PITCH = auto()
    A_BATCH = auto()  # from matrix to matrix of the batch
    B_BATCH = auto()
    C_BATCH = auto()
    R_BATCH = auto()
    BIAS_BATCH = auto()
    A_K = auto()  # from block to block of K
    B_K = auto()
    B_PANEL = auto()  # from panel to panel of columns
    C_PANEL = auto()
    R_PANEL = auto()
    BIAS_PANEL = auto()
    B_GROUP = auto()  # from group to group of panels
    C_GROUP = auto()
    R_GROUP = auto()
    BIAS_GROUP = auto()
    B_TAIL = auto()  # from the first panel to the last one, if that is narrower
    C_TAIL = auto()
    R_TAIL = auto()
    BIAS_TAIL = auto()
    A_LARGE = auto()  # from block to block of rows: the larger blocks come first, the others have a row less
    C_LARGE = auto()
    R_LARGE = auto()
    BIAS_LARGE = auto()
    A_SMALL = auto()
    C_SMALL = auto()
    R_SMALL = auto()
    BIAS_SMALL = auto()
    BATCH = auto()  # how many matrices,
    K_BLOCKS = auto()  # blocks of K but the last,
    GROUPS = auto()  # groups of whole panels,
    GROUP = auto()  # panels in each, and in the last
    LAST_GROUP = auto()
    ONE_PANEL = auto()
    LARGE = auto()  # blocks of rows of either size
    SMALL = auto()
    SKIP_LARGE = auto()  # how many rows they have less than the largest micro-kernel
    SKIP_SMALL = auto()
    TAIL = auto()  # vectors of the last panel, 0 if there is none
    TURNS = auto()  # of the inner loop in a block of K, and steps of k left over;
    REST = auto()
    LAST_TURNS = auto()  # the same in the last block
    LAST_REST = auto()
    NEXT = auto()  # how blocks of K after the first begin: 1 with the sums of C, 2 anew, to be added to those
    PACK = auto()  # whether whole panels are packed, and the last one
    PACK_TAIL = auto()
    PANEL = auto()  # scratch for the panels of a group, and from one to the next
    PANEL_STEP = auto()
    COPY_A = auto()  # rows of A that are copied to scratch first, 0 for none; how; the vectors of k to copy
    A_SOURCE = auto()  # pitch there
    A_COPY = auto()  # scratch; A_PITCH is its pitch then
    MASK = auto()  # address of a mask: the columns of the last vector
    K_GROUPS = auto()  # packing of a transposed B: whole vectors of k in a block, and how many steps are left over
    LAST_K_GROUPS = auto()
    K_TAIL = auto()
    LAST_K_TAIL = auto()
    K_MASK = auto()  # address of a mask: those left over
    LAST_K_MASK = auto()
    QUADS = auto()  # fours of columns in the last panel; how far one more must go back to reach its last column
    OVERLAP = auto()
    OVERLAP_PITCH = auto()
    QUAD_PITCH = auto()
    SIXTEEN = auto()
    LINES = auto()  # images: a line per block of K (:class:`Line`),
    TAPS = auto()  # a line per tap (:class:`Tap`),
    VIEWS = auto()  # and for each panel the address of its masks
    VIEWS_PANEL = auto()
    VIEWS_GROUP = auto()
    VIEWS_TAIL = auto()
    LINES_K = auto()  # from block to block of K
    STAGES = auto()  # copies that make planes of an image, 0 where it is read as it is; a line for each (:class:`Copy`)
    COPIES = auto()
    PLANES = auto()
    CHANNELS = auto()
    AHEADS = auto()  # second operands by rows: for each block of rows, bytes to what it prefetches of the next panel
    ZERO = auto()
    ONE = auto()
    MATRICES_LEFT = auto()  # from here on: variables of the kernel
    K_LEFT = auto()
    GROUPS_LEFT = auto()
    PANELS_NOW = auto()
    PANELS_LEFT = auto()
    ROWS_LEFT = auto()
    A_MATRIX = auto()  # where the current matrix begins,
    B_MATRIX = auto()
    C_MATRIX = auto()
    R_MATRIX = auto()
    BIAS_MATRIX = auto()
    A_BLOCK = auto()  # its current block of K,
    B_BLOCK = auto()
    B_HERE = auto()  # the panel,
    C_HERE = auto()
    R_HERE = auto()
    BIAS_HERE = auto()
    A_FROM = auto()  # the block of rows
    C_ROWS = auto()
    R_ROWS = auto()
    BIAS_ROWS = auto()
    A_AT = auto()  # and what the micro-kernel works on
    B_AT = auto()
    C_AT = auto()
    R_AT = auto()
    BIAS_AT = auto()
    B_STEP = auto()
    B_NEXT = auto()
    B_ACROSS = auto()
    PANEL_AT = auto()
    IN_TAIL = auto()
    NOW_TURNS = auto()
    NOW_REST = auto()
    NOW_GROUPS = auto()
    NOW_K_TAIL = auto()
    NOW_K_MASK = auto()
    START = auto()  # 0: with the bias or a product, 1: with C, 2: anew
    FINAL = auto()  # this is the last block of K
    PACKING = auto()
    LINE = auto()  # images: of the next block of K, or of rows, its first tap, the masks of the panel,
    LINE_ROWS = auto()
    AHEAD = auto()  # what is prefetched, and by how much that moves on in a turn
    AHEAD_STEP = auto()
    AHEAD_FROM = auto()
    AHEAD_LINE = auto()
    TAPS_AT = auto()
    TAPS_K = auto()
    VIEWS_HERE = auto()
    VIEWS_AT = auto()
    COPIES_LEFT = auto()  # the copy


class Line(Slots):
    """What differs between blocks of K where the second operand is an image."""

    TURNS = 0
    REST = auto()
    A = auto()  # bytes of the block in A, and in the table of taps
    TAPS = auto()


class RowsLine(Slots):
    """What differs between blocks of rows, by block of K, where the first operand is an image."""

    TURNS = 0
    REST = auto()
    TAPS = auto()  # address of the first tap
    BIAS = auto()  # bytes from the bias to that of these rows
    AHEAD = auto()  # and from the panel to what is prefetched meanwhile; by how much that moves on in a turn
    AHEAD_STEP = auto()


class Tap(Slots):
    """Bytes from where a panel or a block of rows begins to what a tap reads; and the place of the rest.

    That is its masks, from those of the panel on, or its row of the other operand, from the start of a packed panel.
    """

    PLACE = 0
    OTHER = auto()


class Copy(Slots):
    """A copy of rows of an image to a plane, channel after channel; bytes, counts, and the address of its masks."""

    FROM = 0
    TO = auto()
    ROWS = auto()
    FROM_ROW = auto()
    TO_ROW = auto()
    FROM_CHANNEL = auto()
    TO_CHANNEL = auto()
    VECTORS = auto()  # whole ones, before the last
    MASKS = auto()  # of the last one: as it is loaded, twice where every other column is wanted, and as it is stored
