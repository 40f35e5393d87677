"""How a task is computed. Any legal schedule gives the same bits: each row sums its products in one order."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..errors import ScheduleError
from ..sparsity.reorder import ORDERS
from ..target import Target

FORMAT = 1
"""Of the line that ``str`` makes of a schedule; rises when a field changes its meaning, not when one is added."""
PACKING = {
    "none": "x is read where the caller has it",
    "beside": "the first block of every segment stores what it loads there, beside its multiply-adds",
    "ahead": "a pass of its own copies the rows of a segment first",
}


@dataclass(frozen=True)
class Schedule:
    """Nested loops: groups of column tiles > segments of K > passes of row blocks > tiles of the group > blocks.

    Attributes:
        rows: output rows per block, each an accumulator register for a tile of columns.
        k_segment: input rows per segment, 0 for all. Accumulators are carried from segment to segment through memory.
        tiles: column tiles per group, 0 for all.
        blocks: row blocks per pass over the tiles of a group, 0 for all. 1 is the *code-stationary* order (a block of
            code stays in the instruction cache while all tiles pass), all the *input-stationary* one (a tile of x
            stays in L1 while all code passes).
        packing: how row-major x gets into tile-major scratch: a name of :data:`PACKING`. Tile-major x needs none,
            transposed x is always copied.
        order: how rows are dealt to blocks: a name of :data:`sparsert.sparsity.reorder.ORDERS`.
        prefetch: code of the next block is prefetched into L2 while a block runs; passes are of one block then.
    """

    rows: int
    k_segment: int = 0
    tiles: int = 0
    blocks: int = 1
    packing: str = "none"
    order: str = "natural"
    prefetch: bool = False

    def __post_init__(self) -> None:
        for name, known in (("order", ORDERS), ("packing", PACKING)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ScheduleError(f"{name}={value!r} is unknown", where=name, hint=f"Known: {', '.join(known)}.")
        for name in ("rows", "k_segment", "tiles", "blocks"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < (name == "rows"):
                raise ScheduleError(
                    f"{name}={value!r} is not a {'positive' if name == 'rows' else 'non-negative'} integer", where=name
                )
        if not isinstance(self.prefetch, bool):
            raise ScheduleError(f"prefetch={self.prefetch!r} is neither True nor False", where="prefetch")
        if self.prefetch and self.blocks != 1:
            raise ScheduleError("prefetch goes with passes of one block", where="blocks", hint="Use blocks=1.")

    def check(self, target: Target, spare: int) -> None:
        """Refuse more rows than the register file holds beside ``spare`` registers of the kernel's own.

        Raises:
            ScheduleError: with the largest legal number.
        """
        most = most_rows(target, spare)
        if self.rows > most:
            raise ScheduleError(
                f"{self.rows} rows need as many accumulators; {target.name} has room for {most} beside {spare} other "
                f"registers",
                where="rows",
                hint=f"Use rows <= {most}.",
            )

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule of a line that ``str`` made; fields that it lacks have their defaults.

        Raises:
            ScheduleError: it is none.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        found: dict[str, Any] = {}
        for word in text.split():
            name, given, value = word.partition("=")
            if name not in kinds or name in found or (kinds[name] == "bool") == bool(given):
                raise ScheduleError(f"{word!r} is no field of a schedule", where="schedule")
            if kinds[name] == "int":
                if value != "all" and not (value.isascii() and value.isdigit() and len(value) < 10):
                    raise ScheduleError(f"{word!r} is no number", where=name)
                found[name] = 0 if value == "all" else int(value)
            else:
                found[name] = value if given else True
        if "rows" not in found:
            raise ScheduleError(f"{text!r} names no rows", where="rows")
        return cls(**found)

    def __str__(self) -> str:
        return (
            f"rows={self.rows} k_segment={self.k_segment or 'all'} tiles={self.tiles or 'all'} "
            f"blocks={self.blocks or 'all'} "
            f"packing={self.packing} order={self.order}{' prefetch' if self.prefetch else ''}"
        )


def most_rows(target: Target, spare: int) -> int:
    """The largest legal ``rows``."""
    return target.registers - spare
