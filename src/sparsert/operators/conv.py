"""``CompiledConv``: what the convolution compilers return."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ShapeError
from ..kernels.activations import ACTIVATIONS
from ..runtime.cpu import address_of
from ..schedule.dense import DenseSchedule
from ..schedule.task import Task
from ..sparsity.geometry import Geometry, Padding
from ..sparsity.pattern import SparseMatrix, is_sparse, require_finite
from ..sparsity.taps import Window
from .arrays import Array, as_input, empty, overlaps, packed_columns, same_view
from .bands import column_phases, origin
from .images import ConvProduct
from .matmul import Compiled, _Operator, _Ready
from .planes import Planes


class CompiledConv(_Operator):
    """``y = act(conv(x, W) + b)`` for one sparse W, compiled.

    Args (of a call):
        x: float32 (B, C, H, W), any B, H and W that padding and kernel admit, or :class:`Planes`; rows whose elements
            lie back to back are read in place.
        out: float32 (B, O, H', W'), written and returned; a new array if None. It may be ``residual`` itself, but not
            overlap x. Of :class:`Planes` the images are written and returned.
        residual: float32 like ``out``, exactly if compiled with ``residual=``.
    """

    def __init__(self, compiled: Compiled, bias: Array | None, window: Window, padding: Padding, axes: int = 2) -> None:
        super().__init__(compiled, bias)
        self.window, self.padding, self.axes = window, padding, axes

    @property
    def channels(self) -> tuple[int, int]:
        """Of the output, and of the input."""
        return self._pattern.rows, self.window.channels(self._pattern.cols)

    def out_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """The shape of y for an x of ``shape``.

        Raises:
            ShapeError: the padded image is smaller than the kernel.
        """
        rows, columns = self._geometry(shape).out
        return shape[0], self._pattern.rows, rows, columns

    def refit(self, new_weight: Any) -> None:
        """New values for the compiled pattern, as (O, C / groups, kh, kw) or as the matrix."""
        super().refit(self._matrix(new_weight))

    def check(self, new_weight: Any) -> None:
        """Raise what :meth:`refit` would, and change nothing."""
        require_finite(self._pattern.values_of(self._matrix(new_weight), "new_weight"), "new_weight")

    def _matrix(self, new_weight: Any) -> Any:
        """The weight as a matrix; its kernel's axes may not be exchanged with others."""
        shape, kernel = getattr(new_weight, "shape", ()), self.window.kernel[2 - self.axes :]
        if len(shape) > 2 and tuple(shape[2:]) != kernel:
            raise ShapeError(
                f"shape {tuple(shape)} is not (O, C / groups, {', '.join(map(str, kernel))})",
                where="new_weight",
                hint="Compile a new operator for a new shape.",
            )
        return flat(new_weight)

    def _geometry(self, shape: tuple[int, ...]) -> Geometry:
        size = (shape[2], shape[3])
        return Geometry(self.window, size, self.padding.resolve(size, self.window))

    def _title(self) -> str:
        (o, c), (kh, kw) = self.channels, self.window.kernel
        extra = "".join(
            f", {name} {value}"
            for name, value, usual in (
                ("stride", self.window.stride, (1, 1)),
                ("dilation", self.window.dilation, (1, 1)),
                ("groups", self.window.groups, 1),
            )
            if value != usual
        )
        form = "dense" if isinstance(self.schedule, DenseSchedule) else "sparse"
        return f"{o}x{c}x{kh}x{kw} {form} convolution{extra}"

    def explain(self) -> str:
        """What was compiled and why so, in a few lines."""
        product = self._compiled.product
        sizes = product.tailored if isinstance(product, ConvProduct) else []
        more = [f"sizes     {len(sizes)} with code of their own, {sum(sizes)} bytes"] if sizes else []
        return "\n".join([super().explain(), *more])

    def _run(self, x: Any, out: Any, residual: Any) -> tuple[Array, _Ready | None]:
        room = x.room if isinstance(x, Planes) else 0
        x, out, residual = (a.images if isinstance(a, Planes) else a for a in (x, out, residual))
        x = as_input(x, "x")
        if x.ndim != 2 + self.axes or x.shape[1] != self.channels[1]:
            size = "H, W" if self.axes == 2 else "L"
            raise ShapeError(f"shape {x.shape} is not (B, C={self.channels[1]}, {size})", where="x")
        *outer, rows, columns = self.out_shape(as_images(x).shape)
        shape = (*outer, rows, columns) if self.axes == 2 else (*outer, columns)
        y = empty(shape) if out is None else self._output(out, shape, x)
        r = self._residual(residual, shape)
        if not y.size:
            return y, None
        return y, self._images(as_images(x), as_images(y), None if r is None else as_images(r), room)

    def _images(self, x: Array, y: Array, r: Array | None, room: int) -> _Ready | None:
        """Run, on copies where the kernel cannot take the arrays as they are; None if there were any.

        ``room``: floats of zeros around each channel of x.
        """
        given = x, r
        if r is not None and overlaps(r, y) and (self.window.masked or not same_view(r, y)):
            r = r.copy()  # tiles and bands that overlap would read what others have written
        x = x if packed_columns(x) else np.ascontiguousarray(x)
        r = r if r is None or packed_columns(r) else np.ascontiguousarray(r)
        target = y if packed_columns(y) else empty(y.shape)
        columns = x.shape[3]
        if self.window.stride[1] > 2 and self.schedule is not None:
            x = self._staged(x)
        uncopied = target is y and x is given[0] and r is given[1]
        product = self._compiled.product
        if room and uncopied and isinstance(product, ConvProduct) and product.tailors:
            binding = product.bind_planes(x, y, r, columns, room)
            binding.call(address_of(x), address_of(y), 0 if r is None else address_of(r))
            return _Ready(binding, x, y, r)
        ready = self._finish(x, target, r, columns, uncopied)
        if target is not y:
            y[...] = target
        return ready if uncopied else None

    def _staged(self, x: Array) -> Array:
        """(B, C, H, column phases, n): the columns of every phase back to back, for strides without a shuffle."""
        geometry, stride, phases = self._geometry(x.shape), self.window.stride[1], column_phases(self.window)
        width = -(-x.shape[3] // stride)
        staged = np.zeros((*x.shape[:3], len(phases), width), np.float32)
        for index, phase in enumerate(phases):
            part = x[..., origin(geometry, phase) :: stride]
            staged[..., index, : part.shape[-1]] = part
        return staged


def as_images(array: Array) -> Array:
    """(B, C, L) as (B, C, 1, L); images as they are."""
    return array if array.ndim == 4 else array[:, :, None, :]


def flat(weight: Any) -> Any:
    """A weight (O, C / groups, kh, kw) as a matrix; everything else as it is."""
    if isinstance(weight, (SparseMatrix, tuple)) or is_sparse(weight):
        return weight
    if not isinstance(weight, np.ndarray) and hasattr(weight, "__dlpack__"):
        weight = as_weight(weight)
    if isinstance(weight, np.ndarray) and weight.ndim >= 3:
        return weight.reshape(weight.shape[0], int(np.prod(weight.shape[1:])))
    return weight


def as_weight(weight: Any) -> Any:
    """A tensor as an array, whatever its element type."""
    try:
        return np.from_dlpack(weight)
    except (BufferError, RuntimeError, TypeError, ValueError):
        return weight  # what is wrong with it, the reader of weights says


class ReferenceConv:
    """The convolution in NumPy, accumulated in float64: the ``reference`` target."""

    narrowest = 0

    def __init__(self, task: Task, window: Window, padding: Padding) -> None:
        self.task, self.window, self.padding = task, window, padding
        self._loaded: tuple[Array, Array | None] = (np.zeros(0, np.float32), None)

    def load(self, values: Array, bias: Array | None) -> None:
        """New values; calls under way keep the ones they started with."""
        self._loaded = values, bias

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """There is nothing to prepare."""

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """Tap by tap over the stored entries; ``columns`` is the width of an image."""
        (values, bias), task, window = self._loaded, self.task, self.window
        height, (sh, sw) = x.shape[2], window.stride
        geometry = Geometry(window, (height, columns), self.padding.resolve((height, columns), window))
        (top, bottom), (left, right) = geometry.pads
        h, w = geometry.out
        pattern = task.pattern
        places = window.kernel[0] * window.kernel[1]
        channels = pattern.cols // max(places, 1)
        per_group = max(pattern.rows // window.groups, 1)
        with np.errstate(all="ignore"):
            for image in range(x.shape[0]):
                padded = np.pad(x[image].astype(np.float64), ((0, 0), (top, bottom), (left, right)))
                for o in range(pattern.rows):
                    total = np.full((h, w), 0.0 if bias is None else float(bias[o]))
                    for at in range(int(pattern.indptr[o]), int(pattern.indptr[o + 1])):
                        c, place = divmod(int(pattern.indices[at]), places)
                        ky, kx = divmod(place, window.kernel[1])
                        ky, kx = ky * window.dilation[0], kx * window.dilation[1]
                        plane = padded[o // per_group * channels + c]
                        total += (
                            float(values[at]) * plane[ky : ky + (h - 1) * sh + 1 : sh, kx : kx + (w - 1) * sw + 1 : sw]
                        )
                    if r is not None and task.residual == "before":
                        total += r[image, o]
                    if task.activation is not None:
                        total = ACTIVATIONS[task.activation].reference(total, *task.parameters)
                    if r is not None and task.residual == "after":
                        total = total + r[image, o]
                    y[image, o] = total
