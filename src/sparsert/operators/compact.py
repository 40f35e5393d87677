"""Products that loop over the pattern as data: few columns, or layers whose unrolled code would be too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..codegen.assemble import assemble, listing
from ..codegen.vector import Program
from ..kernels import lookup, looped
from ..kernels.compact import Slot
from ..kernels.lookup import Lookup
from ..kernels.looped import Looped
from ..kernels.plan import fold_width
from ..runtime.cpu import Executable, address_of
from ..runtime.memory import aligned_empty
from ..schedule import cost
from ..schedule.task import Task
from ..sparsity.partition import balanced
from ..sparsity.pattern import Pattern
from ..sparsity.streams import Stream, lockstep, wide_bytes, windows
from ..target import Target, named
from .arrays import Array
from .bf16 import exact, narrowed, widened
from .compact_call import STORAGE, CompactFrame, CompactTeam
from .locks import ChildLock
from .native import Binding, Framed, Loaded
from .team import Call, Crew

_NOTHING = Pattern(0, 0, np.zeros(1, np.int64), np.zeros(0, np.int32))


class CompactProduct(Framed):
    """A pattern as data and the code that loops over it, which all layers with the same epilogue share.

    Values that are all exact in bf16 are stored so, in half of the bytes; results are the same.

    Args:
        task: of arrays with any strides; a tile-major task has whole tiles.
        by_lookup: by register lookups, for one or two columns.
        width: columns of a tile otherwise, 4 or the target's lanes, which it is if 0.
    """

    def __init__(self, task: Task, target: Target, by_lookup: bool, width: int = 0) -> None:
        self.task, self.target, self.by_lookup = task, target, by_lookup
        self.width = width or target.lanes
        pattern = task.pattern
        self.narrowest, self.fold = 1, _fold(pattern)
        self.crew: Crew | None = None
        if by_lookup:
            self.window, unroll = cost.window(task, target)
            self.stream: Stream = windows(pattern, target.lanes, self.window, unroll, self.fold)
            self.form: Lookup | Looped = Lookup(1, self.window, unroll, self.stream.folds > 1)
        else:
            self.form = _looped(task, target, self.width)
            self.stream = lockstep(pattern, self.form.rows, self.fold, looped.index_unit(target, self.width))
        super().__init__(1, False)
        self.data, self.counts = aligned_empty(max(1, self.stream.data.size), np.uint8), self.stream.counts
        self.data[: self.stream.data.size] = self.stream.data

    @property
    def code_bytes(self) -> int:
        return len(_bytes(_stripped(self.task), self.target.name, self.form_of(1, self.bf16)))

    @property
    def bf16(self) -> bool:
        """Whether the values loaded last are stored in 16 bits."""
        return bool(self.values[0].addresses.get(STORAGE, (0,))[0])

    def form_of(self, columns: int, bf16: bool) -> Lookup | Looped:
        """The form that a call takes."""
        if isinstance(self.form, Lookup):
            return replace(self.form, columns=columns, bf16=bf16)
        return replace(self.form, bf16=bf16)

    def listing(self) -> str:
        """The code as text."""
        return listing(_program(_stripped(self.task), self.target, self.form_of(1, self.bf16)), self.target.isa)

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        s, positions = self.stream, self.stream.bundles * self.stream.lanes
        # A sum without a bias begins with its first product: -0 added to that is the product itself.
        starts = np.where(s.begins, np.float32(-0.0), np.float32(0))
        if bias is not None:
            starts[: s.order.size] = bias[s.order]
        bf16 = stored_as_bf16(self.target, values)
        size, place = self._places(bf16)
        packed = aligned_empty(positions + (-(-size // 2) if bf16 else size))
        packed[positions:] = 0
        if isinstance(self.form, Looped):
            starts = starts.reshape(-1, s.lanes)[:, np.argsort(looped.value_places(self.target, self.form)[0])]
        packed[:positions] = starts.reshape(-1)
        taken = np.append(values, np.float32(-0.0))[s.source]
        if bf16:
            packed[positions:].view(np.uint16)[place] = narrowed(taken)
        else:
            packed[positions:][place] = taken
        self.values[0] = Loaded({0: (packed,)}, {0: (address_of(packed),), STORAGE: (int(bf16),)})

    def _places(self, bf16: bool) -> tuple[int, NDArray[np.int64]]:
        """How many elements the packed values have, and where the one of each place of the stream stands."""
        n = self.stream.source.size
        if not isinstance(self.form, Looped):
            return n + (lookup.OVER_READ // 2 if bf16 else 0), np.arange(n)
        places, size = looped.value_places(self.target, replace(self.form, bf16=bf16))
        steps = n // self.form.rows
        return steps * size, (np.arange(steps)[:, None] * size + places).reshape(-1)

    def unpack(self) -> Array:
        """The values of the pattern (CSR order) that :meth:`load` was given last."""
        s, packed, bf16 = self.stream, self.values[0].packed[0][0], self.bf16
        values = np.empty(self.task.pattern.nnz, np.float32)
        stored, real = packed[s.bundles * s.lanes :], s.source >= 0
        place = self._places(bf16)[1][real]
        values[s.source[real]] = widened(stored.view(np.uint16)[place]) if bf16 else stored[place]
        return values

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these, of (K, N) and (M, N) in any strides, or tiles."""
        key = (columns, *x.strides, *y.strides, *((0,) * y.ndim if r is None else r.strides))
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def _code(self, columns: int) -> Callable[[bool], Executable]:
        """What makes the code for values in 32 bits or in 16; frames keep it, and no product by it."""
        stripped, name = _stripped(self.task), self.target.name
        forms = [self.form_of(columns, bf16) for bf16 in (False, True)]
        return lambda bf16: _executable(stripped, name, forms[bf16])

    def new_frame(self, key: tuple[int, ...], offset: int) -> Call:
        """An argument block for arrays of these strides: lists of where their rows begin, and panels; or several."""
        cuts = self._cuts(key[0])
        frames = [self._frame(key, first, last) for first, last in pairwise(cuts)]
        return frames[0] if self.crew is None or len(frames) < 2 else CompactTeam(self.crew.pool(), frames)

    def _cuts(self, columns: int) -> list[int]:
        """Offsets that cut the bundles into ranges of nearly equal work, one per thread that there is enough for."""
        s, parts = self.stream, 1
        if self.crew is not None and s.bundles:
            work = self.task.pattern.nnz * -(-columns // self.width)
            parts = self.crew.wanted(work, s.bundles)
        return np.unique(balanced(self._trips, parts)).tolist() if parts > 1 else [0, s.bundles]

    @property
    def _trips(self) -> NDArray[np.int64]:
        """Of each bundle."""
        trips: NDArray[np.int64] = self.stream.counts.reshape(-1, self.stream.folds).sum(axis=1, dtype=np.int64)
        return trips

    def _frame(self, key: tuple[int, ...], first: int, last: int) -> CompactFrame:
        """An argument block for bundles ``first`` to ``last`` of arrays of these strides."""
        columns, strides = key[0], np.array(key[1:]).reshape(3, -1)
        k = np.arange(self.task.pattern.cols)
        if strides.shape[1] == 3:  # tiles
            tile, row, column = strides.T.tolist()
        else:
            row, column = (strides.T if self.task.layout != "transposed" else strides.T[::-1]).tolist()
            tile = [self.width * step for step in column]
        return self.frame_for(columns, k * row[0], row[1:], column, tile, first, last)

    def frame_for(
        self, columns: int, x_rows: NDArray[np.int64], rows: Sequence[int], column: Sequence[int], tile: Sequence[int],
        first: int, last: int,
    ) -> CompactFrame:  # fmt: skip
        """An argument block for bundles ``first`` to ``last``: lists of where rows begin, and panels.

        Args:
            x_rows: (K,) bytes from x to its rows; ``rows``: from row to row of y and the residual; ``column`` and
                ``tile``: from column to column and tile to tile of x, y and the residual.
        """
        lanes, width, s = self.target.lanes, self.width, self.stream
        k = self.task.pattern.cols
        positions, before = (last - first) * s.lanes, first * s.lanes
        order = s.order[before : before + positions]
        if self.by_lookup:
            pitch = -(-k // lanes) * lanes + self.window
            panel, y_panel = columns * pitch, columns * positions
            sums = columns * lanes if s.folds > 1 else 0
        else:
            pitch = 0
            panel, y_panel = (k + 1) * width, positions * width
            sums = s.lanes * width if s.folds > 1 else 0
        lists = [x_rows, order * rows[0], order * rows[1] if self.task.residual else order[:0]]
        sizes = [-(-n // 16) * 16 for n in (panel, y_panel, sums, *(2 * part.size for part in lists))]
        trips = int(self._trips[:first].sum())
        behind = 4 * (s.bundles * s.lanes - before)
        values = behind + self._values_before(first, trips, False), behind + self._values_before(first, trips, True)
        frame = CompactFrame(sum(sizes), self._code(columns), 4 * before, values)
        frame.scratch[:] = 0
        starts = np.concatenate([[0], np.cumsum(sizes)])
        at = address_of(frame.scratch) + 4 * starts
        for part, start in zip(lists, starts[3:], strict=False):
            frame.scratch[start : start + 2 * part.size].view(np.int64)[:] = part
        whole = [width if step == 4 else -1 for step in column]
        trip_bytes = self.stream.data.size // max(1, int(self._trips.sum()))
        slots = {
            Slot.VALUES: values[self.bf16], Slot.STREAM: address_of(self.data) + trips * trip_bytes,
            Slot.COUNTS: address_of(self.counts) + 4 * first * s.folds, Slot.BUNDLES: last - first,
            Slot.FOLDS: s.folds - 1, Slot.X_ENTRIES: k, Slot.X_OFFSETS: at[3],
            Slot.X_COLUMN: column[0], Slot.X_WHOLE: whole[0], Slot.Y_ENTRIES: order.size, Slot.Y_OFFSETS: at[4],
            Slot.Y_COLUMN: column[1], Slot.Y_WHOLE: whole[1], Slot.R_OFFSETS: at[5], Slot.R_COLUMN: column[2],
            Slot.R_WHOLE: whole[2], Slot.X_TILE: tile[0], Slot.Y_TILE: tile[1], Slot.R_TILE: tile[2],
            Slot.COLUMNS: columns, Slot.LANES: width, Slot.PANEL: at[0], Slot.PITCH: 4 * pitch,
            Slot.PITCH3: 12 * pitch, Slot.PITCH5: 20 * pitch, Slot.PITCH7: 28 * pitch, Slot.Y_PANEL: at[1],
            Slot.Y_PITCH: 4 * positions, Slot.SUMS: at[2],
        }  # fmt: skip
        for slot, value in slots.items():
            frame.slots[slot] = value
        return frame

    def _values_before(self, bundle: int, trips: int, bf16: bool) -> int:
        """Bytes of packed values of the bundles, and their trips, before ``bundle``."""
        size = 2 if bf16 else 4
        if isinstance(self.form, Looped):
            return size * trips * looped.value_places(self.target, replace(self.form, bf16=bf16))[1]
        return size * int(self.task.pattern.row_counts[self.stream.order[: bundle * self.stream.lanes]].sum())

    def threads_note(self) -> str:
        """How many threads calls may use, in words."""
        if self.crew is None:
            return "1, as asked for, or all that this system has"
        return f"up to {self.crew.threads}, in ranges of rows with equal work"


class SmallProducts:
    """The products for few columns beside an operator's own, made when they are first needed."""

    def __init__(
        self, task: Task, target: Target, current: Callable[[], tuple[Array, Array | None]], crew: Crew | None = None
    ) -> None:
        self.task, self.target, self._current, self._crew = task, target, current, crew
        self._made: dict[cost.FewColumns, CompactProduct] = {}
        self._lock = ChildLock()

    def of(self, columns: int) -> CompactProduct | None:
        """The product for so many columns, or None where the operator's own is best."""
        kind = cost.few_columns(self.task, self.target, columns)
        if kind is None:
            return None
        made = self._made.get(kind)
        if made is None:
            with self._lock:
                made = self._made.get(kind)
                if made is None:
                    made = CompactProduct(self.task, named(kind.target), kind.by_lookup, kind.width)
                    made.load(*self._current())
                    made.crew = self._crew
                    self._made[kind] = made
        return made

    @property
    def bf16(self) -> bool:
        """Whether values are stored in 16 bits."""
        return stored_as_bf16(self.target, self._current()[0])

    def reload(self, load: Callable[[], None]) -> None:
        """``load`` new values into the operator's own product, then into these."""
        with self._lock:
            load()
            for made in self._made.values():
                made.load(*self._current())


def stored_as_bf16(target: Target, values: Array) -> bool:
    """Whether these products keep ``values`` in 16 bits: where no bit is lost."""
    return target.indexed and exact(values)


def _fold(pattern: Pattern) -> int:
    return fold_width(int(pattern.row_counts.max(initial=0)), pattern.cols)


def _looped(task: Task, target: Target, width: int) -> Looped:
    pattern = task.pattern
    index_bytes = wide_bytes(pattern, looped.index_unit(target, width))
    return Looped(looped.rows_per_bundle(task, target, width), index_bytes, _fold(pattern) > 0, width)


def _stripped(task: Task) -> Task:
    """The task as far as code depends on it: the epilogue. (A layer of few rows has smaller bundles, ``form`` says.)"""
    return Task(_NOTHING, False, task.activation, task.parameters, task.residual, "row_major")


def _program(task: Task, target: Target, form: Lookup | Looped) -> Program:
    return lookup.generate(task, target, form) if isinstance(form, Lookup) else looped.generate(task, target, form)


@lru_cache(128)
def _bytes(task: Task, target: str, form: Lookup | Looped) -> bytes:
    return assemble(_program(task, named(target), form), named(target).isa).code


@lru_cache(128)
def _executable(task: Task, target: str, form: Lookup | Looped) -> Executable:
    """Code is shared by all operators, and unmapped when it is in use nowhere and out of this cache."""
    return Executable(_bytes(task, target, form))
