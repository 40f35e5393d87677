"""What a peer is: forms of one product that it may use, each bound to buffers and checked before it is timed.

Layouts of activations: "kn" is x (K, N) row-major, "nk" its transpose (N, K), "tiles" is (ceil(N/tile), K, tile).
A 1x1 convolution reads "kn" as NCHW and "nk" as NHWC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..sparsity.pattern import SparseMatrix
from .problems import Problem

Array = NDArray[np.float32]
Layout = Literal["kn", "nk", "tiles"]
Role = Literal["dense", "extra", "sparse", "ours"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One product to be bound: W in both forms, and the buffers to read and to write, in the form's layout."""

    sparse: SparseMatrix
    dense: Array
    columns: int
    x: Array
    y: Array


@dataclass(frozen=True, eq=False)
class Bound:
    """A product ready to run: ``call`` writes ``layer.y`` or returns a new array; ``facts`` go to the JSON."""

    call: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Form:
    """A way to compute the product.

    Attributes:
        name: such as "W@X".
        layout: of both activations.
        bind: prepares everything that is constant (packing, compiling) and returns the call.
        role: "dense" forms compete for best dense, "extra" ones never do.
        tolerance: |y - ref| <= tolerance * (|W| @ |x|).
        aligned: 64-byte aligned buffers; False for plain NumPy memory, as a user has it.
        kinds: the kinds of problem it suits.
        tile: columns of a tile, where the layout is "tiles".
    """

    name: str
    layout: Layout
    bind: Callable[[Layer], Bound]
    role: Role = "dense"
    tolerance: float = 1e-5
    aligned: bool = True
    kinds: tuple[str, ...] = ("matmul", "linear")
    tile: int = 16


@dataclass(frozen=True, eq=False)
class Candidate:
    """A form bound to a problem; ``call`` runs all its layers once, on ``buffers``, which are kept alive here."""

    baseline: str
    form: str
    role: Role
    call: Callable[[], object]
    facts: dict[str, Any]
    buffers: tuple[Array, ...]

    @property
    def key(self) -> str:
        return f"{self.baseline} {self.form}".strip()


@dataclass(frozen=True, eq=False)
class Reference:
    """The float64 product of one layer and the magnitude |W| @ |x| that its error is measured against."""

    value: NDArray[np.float64]
    magnitude: NDArray[np.float64]

    def error(self, y: NDArray[Any]) -> float:
        """The largest |y - ref| / (|W| @ |x|); infinite where y is not finite or is nonzero against nothing."""
        if y.shape != self.value.shape:
            return math.inf
        difference = np.abs(y.astype(np.float64) - self.value)
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.where(difference == 0, 0.0, difference / self.magnitude)
        return float(np.nan_to_num(relative, nan=np.inf).max(initial=0.0))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A problem with all that its candidates share: x, dense weights, references."""

    problem: Problem
    x: Array
    dense: tuple[Array, ...]
    references: tuple[Reference, ...]

    @classmethod
    def of(cls, problem: Problem) -> Prepared:
        x = problem.input()
        dense = tuple(layer.to_dense() for layer in problem.layers)
        wide = x.astype(np.float64)
        references = tuple(
            Reference(w.astype(np.float64) @ wide, np.abs(w.astype(np.float64)) @ np.abs(wide)) for w in dense
        )
        return cls(problem, x, dense, references)


class WrongResultError(Exception):
    """A candidate's result is not the product; it is dropped and the report says so."""


def bind(form: Form, baseline: str, prepared: Prepared) -> Candidate:
    """Bind ``form`` to every layer of the problem and check each against the float64 product.

    The first layer of a chain reads x, which stays as it is: fed with its own results, a chain would drift towards
    infinity or subnormals over the repetitions.  The others alternate between two buffers, each reading what the one
    before has written.

    Raises:
        WrongResultError: a result is off by more than the form's tolerance.
    """
    problem = prepared.problem
    rows, inputs, columns = problem.shape
    x = allocate(inputs, columns, form)
    buffers = [allocate(rows, columns, form) for _ in problem.layers[:2]]
    source, steps = x, list[Callable[[], object]]()
    facts: dict[str, Any] = {}
    worst = 0.0
    for index, (sparse, dense) in enumerate(zip(problem.layers, prepared.dense, strict=True)):
        target = buffers[index % 2]
        fill(source, prepared.x, form.layout)
        fill(target, np.full((rows, columns), np.nan, np.float32), form.layout)
        bound = form.bind(Layer(sparse, dense, columns, source, target))
        result = bound.call()
        y = unfold(target if result is None else as_numpy(result), form.layout, rows, columns)
        error = prepared.references[index].error(y)
        if error > form.tolerance:
            raise WrongResultError(f"relative error {error:.2g} exceeds {form.tolerance:.0e}")
        steps.append(bound.call)
        facts, worst = facts or bound.facts, max(worst, error)
        source = target
    for buffer in buffers[: len(steps) - 1]:
        fill(buffer, prepared.x, form.layout)  # for forms that return new arrays and never write it: finite, not zero
    call = steps[0] if len(steps) == 1 else _in_turn(steps)
    return Candidate(baseline, form.name, form.role, call, facts | {"relative_error": worst}, (x, *buffers))


def _in_turn(steps: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def call() -> None:
        for step in steps:
            step()

    return call


def as_numpy(result: Any) -> NDArray[Any]:
    """A peer's result (array, torch tensor) as an array without copying."""
    return np.asarray(result.numpy() if hasattr(result, "numpy") else result)


def shape_of(layout: Layout, rows: int, columns: int, tile: int = 16) -> tuple[int, ...]:
    if layout == "kn":
        return rows, columns
    return (columns, rows) if layout == "nk" else (-(-columns // tile), rows, tile)


def allocate(rows: int, columns: int, form: Form) -> Array:
    """A buffer of ``rows`` channels; aligned to 64 bytes where the form asks for it."""
    shape = shape_of(form.layout, rows, columns, form.tile)
    if not form.aligned:
        return np.zeros(shape, np.float32)
    size = math.prod(shape) * 4
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)


def fill(buffer: Array, x: Array, layout: Layout) -> None:
    """Write x (K, N) into a buffer of the given layout; the padding of the last tile becomes zero."""
    rows, columns = x.shape
    if layout == "kn":
        buffer[:] = x
    elif layout == "nk":
        buffer[:] = x.T
    else:
        tile = buffer.shape[2]
        padded = np.zeros((rows, buffer.shape[0] * tile), np.float32)
        padded[:, :columns] = x
        buffer[:] = padded.reshape(rows, -1, tile).transpose(1, 0, 2)


def unfold(buffer: NDArray[Any], layout: Layout, rows: int, columns: int) -> NDArray[Any]:
    """The (rows, columns) matrix that a buffer holds; batch and image axes are flattened."""
    if layout == "kn":
        return buffer.reshape(rows, columns)
    if layout == "nk":
        return buffer.reshape(columns, rows).T
    return buffer.transpose(1, 0, 2).reshape(rows, -1)[:, :columns]


def image(columns: int) -> tuple[int, int]:
    """Height and width of the most nearly square image of ``columns`` points, for peers' 1x1 convolutions."""
    height = next((h for h in range(math.isqrt(max(columns, 1)), 0, -1) if columns % h == 0), 1)
    return height, columns // height
