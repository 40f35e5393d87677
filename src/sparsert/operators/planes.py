"""``Planes``: images in the form that convolutions read without copying them first."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ShapeError, ValueRangeError
from ..runtime.memory import aligned_empty
from ..sparsity.geometry import MAX_PADDING
from .arrays import Array, as_input

_LINE = 16  # floats of a cache line
BEYOND = 3  # cache lines that the last tile of a channel may read behind its zeros


class Planes:
    """Images (B, C, H, W) with zeros around every channel, for chains of convolutions.

    Layers write and read them like other arrays, and a convolution of stride 1 whose padding lies within ``border`` and
    whose output is as large as its input need not copy them into scratch first.

    The rows of a channel lie back to back and begin a cache line; in front of them and behind are ``border`` rows and
    elements of zeros, and channels are an odd number of cache lines apart, so that they do not fall into the same sets
    of a cache.

    Args:
        shape: (B, C, H, W).
        border: the padding that is there already; 1 suits a 3x3 convolution, 2 a 5x5 one.

    Attributes:
        images: (B, C, H, W) float32, to be filled and read; zeros at first. The zeros around them are not part of it.

    Raises:
        ShapeError: ``shape`` is not four sizes. ValueRangeError: ``border`` is no small non-negative integer, or memory
            does not suffice.
    """

    __slots__ = ("_floats", "border", "images", "room")

    def __init__(self, shape: tuple[int, int, int, int], border: int = 1) -> None:
        if len(shape) != 4 or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in shape):
            raise ShapeError(f"{shape} is not (B, C, H, W)", where="shape")
        if not isinstance(border, (int, np.integer)) or isinstance(border, bool) or not 0 <= border <= MAX_PADDING:
            raise ValueRangeError(f"{border!r} is not between 0 and {MAX_PADDING}", where="border")
        b, c, h, w = (int(n) for n in shape)
        self.border = int(border)
        self.room = -(-self.border * (w + 1) // _LINE) * _LINE  # floats of zeros on either side
        channel = (-(-(2 * self.room + h * w) // _LINE) + BEYOND | 1) * _LINE
        try:
            self._floats: Array = aligned_empty(b * c * channel)
            self._floats[:] = 0
        except (MemoryError, ValueError, OverflowError) as error:
            raise ValueRangeError(f"images of {shape} cannot be allocated: {error}", where="shape") from error
        inner = self._floats.reshape(b, c, channel)[:, :, self.room : self.room + h * w]
        self.images: Array = inner.reshape(b, c, h, w)  # a view

    @classmethod
    def of(cls, images: Any, border: int = 1) -> Planes:
        """A copy of ``images`` (B, C, H, W), float32.

        Raises:
            DTypeError: no such array; and the errors of the class.
        """
        given = as_input(images, "images")
        made = cls(given.shape, border)
        made.images[...] = given
        return made

    @property
    def columns(self) -> Array:
        """(B, C, H * W): the same memory, each of whose matrices is an x or out of a product, or of a 1x1 layer."""
        b, c, h, w = self.images.shape
        return self.images.reshape(b, c, h * w)

    def __repr__(self) -> str:
        return f"<Planes {'x'.join(map(str, self.images.shape))}, border {self.border}>"
