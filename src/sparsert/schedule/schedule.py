"""How a task is computed. Any legal schedule gives the same bits: each row sums its products in one order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ScheduleError
from ..sparsity.reorder import ORDERS
from ..target import Target


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
        packed: x is copied into tile-major scratch first (row-major layout only; tile-major x needs none, transposed x
            always does).
        order: how rows are dealt to blocks: a name of :data:`sparsert.sparsity.reorder.ORDERS`.
        prefetch: code of the next block is prefetched into L2 while a block runs; passes are of one block then.
    """

    rows: int
    k_segment: int = 0
    tiles: int = 0
    blocks: int = 1
    packed: bool = False
    order: str = "natural"
    prefetch: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.order, str) or self.order not in ORDERS:
            raise ScheduleError(f"unknown row order {self.order!r}", where="order", hint=f"Known: {', '.join(ORDERS)}.")
        for name in ("rows", "k_segment", "tiles", "blocks"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < (name == "rows"):
                raise ScheduleError(
                    f"{name}={value!r} is not a {'positive' if name == 'rows' else 'non-negative'} integer", where=name
                )
        for name in ("packed", "prefetch"):
            if not isinstance(getattr(self, name), bool):
                raise ScheduleError(f"{name}={getattr(self, name)!r} is neither True nor False", where=name)
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

    def __str__(self) -> str:
        return (
            f"rows={self.rows} k_segment={self.k_segment or 'all'} tiles={self.tiles or 'all'} "
            f"blocks={self.blocks or 'all'} "
            f"x={'packed' if self.packed else 'direct'} order={self.order}{' prefetch' if self.prefetch else ''}"
        )


def most_rows(target: Target, spare: int) -> int:
    """The largest legal ``rows``."""
    return target.registers - spare
