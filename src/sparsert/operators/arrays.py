"""The arrays of a call: uncopied where strides allow, refused with a sentence where they cannot be meant."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AliasError, DTypeError, ShapeError, ValueRangeError
from ..runtime.cpu import address_of

Array = NDArray[np.float32]
F32 = np.dtype(np.float32)


def as_input(value: Any, where: str) -> Array:
    """A float32 array; DLPack tensors on the CPU are viewed, not copied.

    Raises:
        DTypeError: not native-endian float32, or not an array at all.
    """
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "__dlpack__"):
            raise DTypeError(
                f"{type(value).__name__} is not an array", where=where, hint="Pass a NumPy array or a DLPack tensor."
            )
        try:
            value = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise DTypeError(f"this tensor cannot be viewed as a CPU array: {error}", where=where,
                             hint="Detach it and move it to the CPU.") from error  # fmt: skip
    if value.dtype is not F32 and value.dtype != F32:
        raise DTypeError(f"{value.dtype} is not float32", where=where, hint="Convert with .astype('float32').")
    return value if type(value) is np.ndarray else np.asarray(value)


def as_output(value: Any, shape: tuple[int, ...]) -> Array:
    """``out=``: a writable float32 array of exactly ``shape``."""
    array = as_input(value, "out")
    require_shape(array, shape, "out")
    if not array.flags.writeable:
        raise AliasError("the array is read-only", where="out", hint="Pass a writable array, or none.")
    return array


def require_shape(array: Array, shape: tuple[int, ...], where: str) -> None:
    """Raise ShapeError unless ``array`` has ``shape``."""
    if array.shape != shape:
        raise ShapeError(f"shape {array.shape} is not the {shape} of this operator and input", where=where)


def empty(shape: tuple[int, ...]) -> Array:
    """An uninitialised array.

    Raises:
        ValueRangeError: it would not fit the address space or memory.
    """
    try:
        return np.empty(shape, np.float32)
    except (MemoryError, ValueError) as error:
        raise ValueRangeError(
            f"an output of shape {shape} cannot be allocated: {error}", where="x", hint="Use fewer columns."
        ) from error


def packed_columns(array: Array) -> bool:
    """Whether the innermost elements lie back to back, as the kernels need."""
    return array.shape[-1] <= 1 or array.strides[-1] == 4


def overlaps(a: Array, b: Array) -> bool:
    """Whether the byte ranges of two arrays meet (interleaved but disjoint views count as meeting)."""
    return bool(np.may_share_memory(a, b))


def same_view(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return address_of(a) == address_of(b) and a.shape == b.shape and a.strides == b.strides


def reach(array: Array) -> tuple[int, int]:
    """The bytes of an array relative to the address of its first element: from the lowest to behind the highest."""
    steps = [(extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True)]
    return sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps) + array.itemsize
