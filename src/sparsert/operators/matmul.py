"""``CompiledMatmul`` and ``CompiledLinear``: what ``compile_matmul`` and ``compile_linear`` return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from ..errors import AliasError, ShapeError, UnsupportedError
from ..runtime.cpu import address_of
from ..schedule.cost import few_columns_reason
from ..schedule.dense import DenseSchedule
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..target import Target
from .arrays import (
    F32,
    Array,
    as_input,
    as_output,
    empty,
    overlaps,
    packed_columns,
    reach,
    require_shape,
    same_view,
)  # fmt: skip
from .bf16 import rounded
from .compact import CompactProduct, SmallProducts

_SIGNATURES = 64
_Signature = tuple[tuple[int, ...], ...]


class Binding(Protocol):
    """A product for arrays of one shape and pitch, called with the addresses of x, y and the residual (0: none)."""

    def call(self, xa: int, ya: int, ra: int) -> None: ...

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]: ...


class _Ready(NamedTuple):
    """A call that needs no copies: what to call, and the arrays whose addresses it gets."""

    binding: Binding
    x: Array
    y: Array
    r: Array | None

    def fixed(self) -> Callable[[], None]:
        return self.binding.fixed(*(0 if array is None else address_of(array) for array in (self.x, self.y, self.r)))


class _Passed(NamedTuple):
    """What is known of arrays that passed all checks and need no copies: the call, and how far each array reaches."""

    binding: Binding
    x: tuple[int, int]
    y: tuple[int, int]
    r: tuple[int, int]


class Product(Protocol):
    """The computation behind an operator; ``narrowest`` is the least number of columns that it takes."""

    @property
    def narrowest(self) -> int: ...

    def load(self, values: Array, bias: Array | None) -> None: ...

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None: ...

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding | None: ...


@dataclass(frozen=True)
class Stats:
    """Facts about a compiled operator.

    ``bytes_per_nonzero`` counts code and values, ``fmas_per_load`` the multiply-adds that use each loaded vector of x.
    ``code_bytes`` and what derives from it are 0 on the reference target.
    """

    nnz: int
    density: float
    code_bytes: int
    value_bytes: int
    bytes_per_nonzero: float
    fmas_per_load: float
    instructions: int
    compile_seconds: float


@dataclass(frozen=True)
class Compiled:
    """What the compiler hands to an operator: the task, how it was compiled, and the words about it."""

    task: Task
    target: Target
    product: Product
    stats: Stats
    schedule: Schedule | DenseSchedule | None
    reason: str
    threads: int
    list_code: Callable[[], str]
    threads_note: Callable[[], str]
    small: SmallProducts | None = None
    storage: str | None = None


def stored(values: Array, storage: str | None) -> Array:
    """Weights as an operator with this ``storage`` takes them."""
    return rounded(values) if storage == "bf16" else values


class Uncopied:
    """What holds machine code, and is neither copied nor pickled."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a compiled operator holds machine code of this process and cannot be copied or pickled",
            where=type(self).__name__,
            hint="Keep the weights and compile again: it takes milliseconds.",
        )


class Bound(Uncopied):
    """An operator tied to its arrays: a call computes ``out`` from what the inputs hold then, and returns it."""

    __slots__ = ("_kept", "_run", "out")

    def __init__(self, run: Callable[[], object], out: Array, kept: tuple[Any, ...]) -> None:
        self._run, self.out, self._kept = run, out, kept  # what ``run`` knows by its address stays alive

    def __call__(self) -> Array:
        self._run()
        return self.out


class _Operator(Uncopied, ABC):
    """Everything that does not depend on how x lies in memory."""

    def __init__(self, compiled: Compiled, bias: Array | None) -> None:
        self._compiled = compiled
        self._bias = bias
        self._pattern = compiled.task.pattern
        # By shapes and strides of x, out and the residual: checking again would take longer than a small product.
        self._passed: dict[_Signature, _Passed] = {}

    def __call__(self, x: Any, out: Any = None, residual: Any = None) -> Array:
        """Compute the product; the class says what x, out and residual are.

        Raises:
            ShapeError, DTypeError, AliasError, UnsupportedError: see :mod:`sparsert.errors`; nothing is written then.
        """
        if self._again(x, out, residual):
            return out  # type: ignore[no-any-return]
        return self._run(x, out, residual)[0]

    @property
    def stats(self) -> Stats:
        """Nonzeros, code bytes, bytes per nonzero, multiply-adds per load."""
        return self._compiled.stats

    @property
    def schedule(self) -> Schedule | DenseSchedule | None:
        """How the product is blocked, in its sparse or dense form; None on the reference target and where it is looped
        over the pattern."""
        return self._compiled.schedule

    @property
    def target(self) -> str:
        """Name of the target this was compiled for."""
        return self._compiled.target.name

    @property
    def tile(self) -> int:
        """Columns of a tile: the lanes of the target's vectors (16 with AVX-512, 8 with AVX2)."""
        return self._compiled.target.lanes

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the weight."""
        return self._pattern.shape

    def refit(self, new_weight: Any) -> None:
        """New values for the compiled pattern; no new code. Calls under way finish with the old ones.

        Args:
            new_weight: (M, K), in any form that the compile functions take.

        Raises:
            PatternMismatchError: a nonzero lies outside the pattern; the operator is unchanged.
            ValueRangeError: a value is not finite (rounded, with ``storage``).
            ShapeError, DTypeError, FormatError: as at compile time.
        """
        from ..sparsity.pattern import require_finite

        values = stored(self._pattern.values_of(new_weight, "new_weight"), self._compiled.storage)
        require_finite(values, "new_weight")
        product, small = self._compiled.product, self._compiled.small
        if small is None:
            product.load(values, self._bias)
        else:
            small.reload(lambda: product.load(values, self._bias))

    def listing(self) -> str:
        """The machine code as text: offset, bytes, instruction; generated anew from pattern and schedule."""
        return self._compiled.list_code()

    def explain(self) -> str:
        """What was compiled and why so, in a few lines."""
        c, s = self._compiled, self._compiled.stats
        t, p = c.task, self._pattern.stats()
        tail = "".join((" + bias" if t.bias else "", " + residual" if t.residual == "before" else "",
                        f" > {t.activation}{t.parameters or ''}" if t.activation else "",
                        " + residual" if t.residual == "after" else ""))  # fmt: skip
        sparse = f"{100 * (1 - p.density):.1f} % sparse"
        per_row = f"{p.row_min}..{p.row_max} per row, {p.empty_rows} empty rows"
        lines = [
            f"{self._title()}{tail}, x {'images' if t.window else t.layout}, target {c.target.name}",
            f"pattern   {p.nnz} nonzeros ({sparse}), {per_row}",
        ]
        if c.schedule is not None:
            size = f"with values {s.bytes_per_nonzero:.1f} bytes per nonzero"
            lines += [
                f"schedule  {c.schedule}",
                f"because   {c.reason}",
                f"code      {s.code_bytes} bytes, {s.instructions} instructions; {size}",
                f"reuse     {s.fmas_per_load:.2f} multiply-adds per loaded vector of x",
            ]
        elif c.reason:
            lines += [f"looped    {c.reason}", f"code      {s.code_bytes} bytes, for all layers with this epilogue"]
        if c.small is not None and (few := few_columns_reason(t, c.target)):
            size = "16 bits, all are exact in bf16" if c.small.bf16 else "32 bits"
            lines.append(f"few       {few}; values in {size}")
        if c.storage:
            lines.append(f"storage   weights are rounded to {c.storage}, for any number of columns")
        lines += [f"threads   {c.threads_note()}", f"compiled  in {1e3 * s.compile_seconds:.1f} ms"]
        return "\n".join(lines)

    def _title(self) -> str:
        form = "dense" if isinstance(self.schedule, DenseSchedule) else "sparse"
        return f"{self.shape[0]}x{self.shape[1]} {form} product"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape[0]}x{self.shape[1]} nnz={self.stats.nnz} target={self.target}>"

    def bind(self, x: Any, out: Any = None, residual: Any = None) -> Bound:
        """The operator tied to arrays, for loops: what is left of a call is the native one, some 0.4 us of Python.

        Arguments and errors are those of the operator itself, which is called once: nothing is checked later on. Arrays
        that need copies are copied at every call. Any number of threads may call; scratch is kept while the result is.
        """
        y, ready = self._run(x, out, residual)
        if ready is None:
            return Bound(lambda: self(x, y, residual), y, ())
        return Bound(ready.fixed(), y, (ready, x, residual))

    @abstractmethod
    def _run(self, x: Any, out: Any, residual: Any) -> tuple[Array, _Ready | None]:
        """One call with every check: the output, and how to repeat the call if it took no copies."""

    def _again(self, x: Any, out: Any, r: Any) -> bool:
        """Run at once if the arrays are like those of an earlier call."""
        if type(x) is not np.ndarray or type(out) is not np.ndarray or x.dtype is not F32 or out.dtype is not F32:
            return False
        if r is None:
            passed = self._passed.get((x.shape, x.strides, out.shape, out.strides))
        elif type(r) is np.ndarray and r.dtype is F32:
            passed = self._passed.get((x.shape, x.strides, out.shape, out.strides, r.shape, r.strides))
        else:
            return False
        if passed is None or not out.flags.writeable:
            return False
        binding, (x_low, x_high), (y_low, y_high), (r_low, r_high) = passed
        xa, ya = address_of(x), address_of(out)
        if xa + x_low < ya + y_high and ya + y_low < xa + x_high:
            return False
        ra = 0
        if r is not None:
            ra = address_of(r)
            if ra + r_low < ya + y_high and ya + y_low < ra + r_high:
                return False
        binding.call(xa, ya, ra)
        return True

    def _finish(
        self, x: Array, y: Array, r: Array | None, columns: int, remember: bool, product: Product | None = None
    ) -> _Ready | None:
        """Run on arrays that the kernel can take, and say how to repeat that; if wanted, ``_again`` knows them now.

        ``product``: the operator's own unless given.
        """
        product = product or self._compiled.product
        binding = product.bind(x, y, r, columns)
        if binding is None:
            product.run(x, y, r, columns)
            return None
        binding.call(address_of(x), address_of(y), 0 if r is None else address_of(r))
        if remember and len(self._passed) < _SIGNATURES:
            arrays = (x, y) if r is None else (x, y, r)
            signature = tuple(part for array in arrays for part in (array.shape, array.strides))
            self._passed[signature] = _Passed(binding, reach(x), reach(y), (0, 0) if r is None else reach(r))
        return _Ready(binding, x, y, r)

    def _output(self, out: Any, shape: tuple[int, ...], x: Array) -> Array:
        y = as_output(out, shape)
        if y.size and overlaps(x, y):
            raise AliasError(
                "out overlaps x, which is still read while out is written", where="out", hint="Pass another array."
            )
        return y

    def _residual(self, residual: Any, shape: tuple[int, ...]) -> Array | None:
        compiled_so = self._compiled.task.residual
        if (residual is None) != (compiled_so is None):
            problem = "is missing" if residual is None else "was given"
            raise UnsupportedError(
                f"a residual {problem}, but the operator was compiled with residual={compiled_so!r}",
                where="residual",
                hint="Compile with residual='before' or 'after' to add one.",
            )
        if residual is None:
            return None
        array = as_input(residual, "residual")
        require_shape(array, shape, "residual")
        return array

    def _product(
        self, x: Array, y: Array, r: Array | None, columns: int, axis: int, as_given: bool = True
    ) -> _Ready | None:
        """Run on arrays whose ``axis`` holds the columns; copies where the kernel cannot take them as they are.

        Unless ``as_given``, they are transposes of the caller's. None if there were copies.
        """
        if y.size == 0:
            return None
        given = x, r
        compact = self._compact(columns)
        if compact is not None:  # takes any strides
            if r is not None and overlaps(r, y) and not same_view(r, y):
                r = r.copy()
            ready = self._finish(x, y, r, columns, as_given and r is given[1], compact)
            return ready if r is given[1] else None
        if r is not None and overlaps(r, y) and (columns % self.tile or not same_view(r, y)):
            r = r.copy()  # the last tile overlaps the one before and would read what that one wrote
        x = x if packed_columns(x) else np.ascontiguousarray(x)
        r = r if r is None or packed_columns(r) else np.ascontiguousarray(r)
        target = y if packed_columns(y) else empty(y.shape)
        if columns < self._compiled.product.narrowest:
            tile = self.tile
            xp, rp = _padded(x, axis, tile), None if r is None else _padded(r, axis, tile)
            yp = empty((y.shape[0], tile) if axis == 1 else (tile, y.shape[1]))
            self._compiled.product.run(xp, yp, rp, tile)
            y[...] = yp[:, :columns] if axis == 1 else yp[:columns]
            return None
        uncopied = target is y and x is given[0] and r is given[1]
        ready = self._finish(x, target, r, columns, uncopied and as_given)
        if target is not y:
            y[...] = target
        return ready if uncopied else None

    def _compact(self, columns: int) -> Product | None:
        """The product that loops over the pattern as data, where that is best for so many columns."""
        c = self._compiled
        small = c.small.of(columns) if c.small is not None else None
        return c.product if small is None and isinstance(c.product, CompactProduct) else small


def _padded(array: Array, axis: int, tile: int) -> Array:
    """At least one tile of columns, zeros behind the real ones."""
    padded = np.zeros((array.shape[0], tile) if axis == 1 else (tile, array.shape[1]), np.float32)
    (padded[:, : array.shape[1]] if axis == 1 else padded[: array.shape[0]])[...] = array
    return padded


class CompiledMatmul(_Operator):
    """``y = act(W @ x + b)`` for one sparse W, compiled.

    Args (of a call):
        x: float32 (K, N), any N and any strides; rows whose elements lie back to back are read in place. Tile-major
            operators take (T, K, tile), C-contiguous: column ``tile * t + i`` of row ``k`` at ``[t, k, i]``.
        out: float32 (M, N), or (T, M, tile), written and returned; a new array if None. It may be ``residual``
            itself, but not overlap x.
        residual: float32 like ``out``, exactly if compiled with ``residual=``.
    """

    def _run(self, x: Any, out: Any, residual: Any) -> tuple[Array, _Ready | None]:
        x = as_input(x, "x")
        m, k = self._pattern.shape
        if self._compiled.task.layout == "tile_major":
            return self._tiles(x, out, residual)
        if x.ndim != 2 or x.shape[0] != k:
            raise ShapeError(f"shape {x.shape} is not (K={k}, N)", where="x", hint=_transpose_hint(x, k))
        shape = (m, x.shape[1])
        y = empty(shape) if out is None else self._output(out, shape, x)
        return y, self._product(x, y, self._residual(residual, shape), x.shape[1], axis=1)

    def _tiles(self, x: Array, out: Any, residual: Any) -> tuple[Array, _Ready | None]:
        m, k = self._pattern.shape
        if x.ndim != 3 or x.shape[1:] != (k, self.tile):
            raise ShapeError(
                f"shape {x.shape} is not (T, K={k}, {self.tile})",
                where="x",
                hint="Compile with layout='row_major' for (K, N).",
            )
        shape = (x.shape[0], m, self.tile)
        y = empty(shape) if out is None else self._output(out, shape, x)
        r = self._residual(residual, shape)
        for name, array in (("x", x), ("out", y), ("residual", r)):
            if array is not None and not array.flags.c_contiguous:
                raise ShapeError("tile-major arrays are C-contiguous", where=name, hint="Use np.ascontiguousarray.")
        if not y.size:
            return y, None
        given = r
        if r is not None and overlaps(r, y) and not same_view(r, y):
            r = r.copy()
        ready = self._finish(x, y, r, x.shape[0] * self.tile, r is given)
        return y, ready if r is given else None


class CompiledLinear(_Operator):
    """``y = act(x @ W.T + b)`` for one sparse W, as ``torch.nn.Linear``, compiled.

    Args (of a call):
        x: float32 (..., K). Leading axes that can be merged are read in place.
        out: float32 (..., M), written and returned; a new array if None.
        residual: float32 (..., M), exactly if compiled with ``residual=``.
    """

    def _run(self, x: Any, out: Any, residual: Any) -> tuple[Array, _Ready | None]:
        x = as_input(x, "x")
        m, k = self._pattern.shape
        if x.ndim < 1 or x.shape[-1] != k:
            raise ShapeError(
                f"shape {x.shape} is not (..., K={k})", where="x", hint=_transpose_hint(x.T, k) if x.ndim == 2 else ""
            )
        shape = (*x.shape[:-1], m)
        y = empty(shape) if out is None else self._output(out, shape, x)
        r = self._residual(residual, shape)
        rows = y.size // m if m else 0
        if not rows:
            return y, None
        x2, y2 = _forward(x.reshape(rows, k)), y.reshape(rows, m)
        r2 = None if r is None else _forward(r.reshape(rows, m))
        target = y2 if np.may_share_memory(y2, y) and _forward(y2) is y2 else empty((rows, m))
        if self._compiled.task.layout == "transposed":
            ready = self._product(x2, target, r2, rows, axis=0)
        else:  # fewer than four rows or columns: too narrow to transpose four at a time
            ready = self._product(x2.T, target.T, None if r2 is None else r2.T, rows, axis=1, as_given=False)
        if target is not y2 or not np.may_share_memory(y2, y):
            y[...] = target.reshape(shape)
            return y, None
        views = np.may_share_memory(x2, x) and (r2 is None or r is None or np.may_share_memory(r2, r))
        return y, ready if views else None


def _forward(array: Array) -> Array:
    """Rows that follow each other upwards in memory, or a copy: the kernel compares row addresses."""
    return array if array.strides[0] >= 0 or array.shape[0] <= 1 else np.ascontiguousarray(array)


def _transpose_hint(x: Array, k: int) -> str:
    return "It looks transposed: pass x.T." if x.ndim == 2 and x.shape[-1] == k else ""
