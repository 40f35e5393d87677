"""Products that loop over the pattern as data: few columns, or layers whose unrolled code would be too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..codegen.assemble import assemble, listing
from ..codegen.vector import Program
from ..kernels import lookup, looped
from ..kernels.compact import SLOTS, Slot
from ..kernels.lookup import Lookup
from ..kernels.looped import Looped
from ..kernels.plan import fold_width
from ..runtime.cpu import Executable, address_of
from ..runtime.memory import aligned_empty
from ..schedule import cost
from ..schedule.task import Task
from ..sparsity.pattern import Pattern
from ..sparsity.streams import Stream, lockstep, wide_bytes, windows
from ..target import TARGETS, Target
from .arrays import Array
from .locks import ChildLock
from .native import Binding, Framed, Loaded
from .team import Solo

_NOTHING = Pattern(0, 0, np.zeros(1, np.int64), np.zeros(0, np.int32))


class CompactProduct(Framed):
    """A pattern as data and the code that loops over it, which all layers with the same epilogue share.

    Args:
        task: of arrays with any strides; a tile-major task has whole tiles.
        lookup: by register lookups, for one or two columns.
    """

    def __init__(self, task: Task, target: Target, by_lookup: bool) -> None:
        self.task, self.target, self.by_lookup = task, target, by_lookup
        pattern = task.pattern
        self.narrowest, self.fold = 1, _fold(pattern)
        if by_lookup:
            self.window, unroll = cost.window(task, target)
            self.stream: Stream = windows(pattern, target.lanes, self.window, unroll, self.fold)
            self.form: Lookup | Looped = Lookup(1, self.window, unroll, self.stream.folds > 1)
        else:
            self.form = _looped(task, target)
            self.stream = lockstep(pattern, self.form.rows, self.fold)
        super().__init__(1, False)
        self.data, self.counts = aligned_empty(max(1, self.stream.data.size), np.uint8), self.stream.counts
        self.data[: self.stream.data.size] = self.stream.data

    @property
    def code_bytes(self) -> int:
        return len(_bytes(_stripped(self.task), self.target.name, self.form))

    def listing(self) -> str:
        """The code as text."""
        return listing(_program(_stripped(self.task), self.target, self.form), self.target.isa)

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        s = self.stream
        starts = s.bundles * s.lanes
        packed = aligned_empty(max(1, starts + s.source.size))
        # A sum without a bias begins with its first product: -0 added to that is the product itself.
        packed[:starts] = np.where(s.begins, np.float32(-0.0), np.float32(0))
        if bias is not None:
            packed[: s.order.size] = bias[s.order]
        packed[starts:] = np.append(values, np.float32(-0.0))[s.source]
        self.values[0] = Loaded({0: (packed,)}, {0: (address_of(packed),)})

    def unpack(self) -> Array:
        """The values of the pattern (CSR order) that :meth:`load` was given last."""
        s, packed = self.stream, self.values[0].packed[0][0]
        values = np.empty(self.task.pattern.nnz, np.float32)
        real = s.source >= 0
        values[s.source[real]] = packed[s.bundles * s.lanes :][: s.source.size][real]
        return values

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these, of (K, N) and (M, N) in any strides, or tiles."""
        key = (columns, *x.strides, *y.strides, *((0,) * y.ndim if r is None else r.strides))
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def _code(self, columns: int) -> Executable:
        form = replace(self.form, columns=columns) if isinstance(self.form, Lookup) else self.form
        return _executable(_stripped(self.task), self.target.name, form)

    def new_frame(self, key: tuple[int, ...], offset: int) -> Solo:
        """An argument block for arrays of these strides."""
        columns, strides = key[0], np.array(key[1:]).reshape(3, -1)
        k = np.arange(self.task.pattern.cols)
        if strides.shape[1] == 3:  # tiles
            tile, row, column = strides.T.tolist()
        else:
            row, column = (strides.T if self.task.layout != "transposed" else strides.T[::-1]).tolist()
            tile = [self.target.lanes * step for step in column]
        return self.frame_for(columns, k * row[0], row[1:], column, tile)

    def frame_for(
        self, columns: int, x_rows: NDArray[np.int64], rows: Sequence[int], column: Sequence[int], tile: Sequence[int]
    ) -> Solo:
        """An argument block: lists of where rows begin, and panels.

        Args:
            x_rows: (K,) bytes from x to its rows; ``rows``: from row to row of y and the residual; ``column`` and
                ``tile``: from column to column and tile to tile of x, y and the residual.
        """
        lanes, s = self.target.lanes, self.stream
        m, k = self.task.pattern.shape
        positions = s.bundles * s.lanes
        if self.by_lookup:
            pitch = -(-k // lanes) * lanes + self.window
            panel, y_panel = columns * pitch, columns * positions
            sums = columns * lanes if s.folds > 1 else 0
        else:
            pitch = 0
            panel, y_panel = (k + 1) * lanes, positions * lanes
            sums = s.lanes * lanes if s.folds > 1 else 0
        lists = [x_rows, s.order * rows[0], s.order * rows[1] if self.task.residual else s.order[:0]]
        sizes = [-(-n // 16) * 16 for n in (panel, y_panel, sums, *(2 * part.size for part in lists))]
        frame = Solo(SLOTS, sum(sizes))
        frame.call = self._code(columns).call
        frame.scratch[:] = 0
        starts = np.concatenate([[0], np.cumsum(sizes)])
        at = address_of(frame.scratch) + 4 * starts
        for part, start in zip(lists, starts[3:], strict=False):
            frame.scratch[start : start + 2 * part.size].view(np.int64)[:] = part
        whole = [lanes if step == 4 else -1 for step in column]
        slots = {
            Slot.VALUES: 4 * positions, Slot.STREAM: address_of(self.data), Slot.COUNTS: address_of(self.counts),
            Slot.BUNDLES: s.bundles, Slot.FOLDS: s.folds - 1, Slot.X_ENTRIES: k, Slot.X_OFFSETS: at[3],
            Slot.X_COLUMN: column[0], Slot.X_WHOLE: whole[0], Slot.Y_ENTRIES: m, Slot.Y_OFFSETS: at[4],
            Slot.Y_COLUMN: column[1], Slot.Y_WHOLE: whole[1], Slot.R_OFFSETS: at[5], Slot.R_COLUMN: column[2],
            Slot.R_WHOLE: whole[2], Slot.X_TILE: tile[0], Slot.Y_TILE: tile[1], Slot.R_TILE: tile[2],
            Slot.COLUMNS: columns, Slot.LANES: lanes, Slot.PANEL: at[0], Slot.PITCH: 4 * pitch,
            Slot.PITCH3: 12 * pitch, Slot.PITCH5: 20 * pitch, Slot.PITCH7: 28 * pitch, Slot.Y_PANEL: at[1],
            Slot.Y_PITCH: 4 * positions, Slot.SUMS: at[2],
        }  # fmt: skip
        for slot, value in slots.items():
            frame.slots[slot] = value
        return frame


class SmallProducts:
    """The products for few columns beside an operator's own, made when they are first needed."""

    def __init__(self, task: Task, target: Target, current: Callable[[], tuple[Array, Array | None]]) -> None:
        self.task, self.target, self._current = task, target, current
        self._made: dict[tuple[str, bool], CompactProduct] = {}
        self._lock = ChildLock()

    def of(self, columns: int) -> CompactProduct | None:
        """The product for so many columns, or None where the operator's own is best."""
        kind = cost.few_columns(self.task, self.target, columns)
        if kind is None:
            return None
        target = TARGETS[kind.target]
        key = kind.target, kind.by_lookup
        made = self._made.get(key)
        if made is None:
            with self._lock:
                made = self._made.get(key)
                if made is None:
                    made = CompactProduct(self.task, target, kind.by_lookup)
                    made.load(*self._current())
                    self._made[key] = made
        return made

    def reload(self, load: Callable[[], None]) -> None:
        """``load`` new values into the operator's own product, then into these."""
        with self._lock:
            load()
            for made in self._made.values():
                made.load(*self._current())


def _fold(pattern: Pattern) -> int:
    return fold_width(int(pattern.row_counts.max(initial=0)), pattern.cols)


def _looped(task: Task, target: Target) -> Looped:
    pattern = task.pattern
    return Looped(looped.rows_per_bundle(task, target), wide_bytes(pattern), _fold(pattern) > 0)


def _stripped(task: Task) -> Task:
    """The task as far as code depends on it: the epilogue. (A layer of few rows has smaller bundles, ``form`` says.)"""
    return Task(_NOTHING, False, task.activation, task.parameters, task.residual, "row_major")


def _program(task: Task, target: Target, form: Lookup | Looped) -> Program:
    return lookup.generate(task, target, form) if isinstance(form, Lookup) else looped.generate(task, target, form)


@lru_cache(128)
def _bytes(task: Task, target: str, form: Lookup | Looped) -> bytes:
    return assemble(_program(task, TARGETS[target], form), TARGETS[target].isa).code


@lru_cache(128)
def _executable(task: Task, target: str, form: Lookup | Looped) -> Executable:
    """Code is shared by all operators, and unmapped when it is in use nowhere and out of this cache."""
    return Executable(_bytes(task, target, form))
