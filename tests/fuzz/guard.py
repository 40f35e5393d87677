"""Arrays against inaccessible pages: one byte read or written too far ends the process, and canaries see the rest.

A :class:`Region` is a few pages with an inaccessible one on either side. An array is laid so that its first or its last
byte touches such a page; every byte of the region that belongs to no element is a canary. A fault kills the process, so
use this in a child.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import mmap
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsert.runtime.host import host_report

CANARY = 0xF7  # as a float32 -1e34: read by mistake, it spoils any sum
_PAGE = mmap.PAGESIZE


def _protect(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


class Region:
    """Readable bytes between two inaccessible pages, and one array in them.

    Args:
        span: bytes from the array's lowest to its highest address.
        at_end: lay it against the page behind, else against the page in front.
        alignment: the array starts at a multiple of this, if need be a little before the end.
    """

    def __init__(self, span: int, *, at_end: bool, alignment: int = 1) -> None:
        inner = max(-(-span // _PAGE), 1) * _PAGE
        self._map = mmap.mmap(-1, inner + 2 * _PAGE)
        everything = np.frombuffer(self._map, np.uint8)
        address = everything.__array_interface__["data"][0]
        _protect(address, _PAGE)
        _protect(address + _PAGE + inner, _PAGE)
        self.bytes: NDArray[np.uint8] = everything[_PAGE : _PAGE + inner]
        self.bytes[...] = CANARY
        self.start = (inner - span) // alignment * alignment if at_end else 0
        self.owned = np.zeros(inner, bool)

    def array(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        """The array of these (also negative) strides whose lowest byte is the region's start."""
        if 0 in shape:
            return np.ndarray(shape, dtype, self.bytes, self.start)
        first = self.start - sum(step * (n - 1) for n, step in zip(shape, strides, strict=True) if step < 0)
        every = first + sum(np.arange(n).reshape([-1 if i == axis else 1 for i in range(len(shape))]) * step
                            for axis, (n, step) in enumerate(zip(shape, strides, strict=True)))  # fmt: skip
        for byte in range(np.dtype(dtype).itemsize):
            self.owned[every + byte] = True
        return np.ndarray(shape, dtype, self.bytes, first, strides)

    def stray(self) -> NDArray[np.intp]:
        """Offsets, relative to the array's lowest byte, of canaries that were overwritten."""
        return np.flatnonzero(~self.owned & (self.bytes != CANARY)) - self.start


def span_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int = 4) -> int:
    """Bytes from the lowest to the highest address of such an array."""
    return 0 if 0 in shape else itemsize + sum(abs(step) * (n - 1) for n, step in zip(shape, strides, strict=True))


class Buffers:
    """The guarded arrays of one case: those a test asks for, and those that the package allocates meanwhile."""

    def __init__(self) -> None:
        self._regions: list[tuple[str, Region]] = []

    def array(
        self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], *, at_end: bool
    ) -> NDArray[np.float32]:
        region = Region(span_of(shape, strides), at_end=at_end)
        self._regions.append((name, region))
        return region.array(shape, strides)

    def aligned_empty(self, count: int, dtype: Any = np.float32, alignment: int = 64) -> NDArray[Any]:
        """In the place of :func:`sparsert.runtime.memory.aligned_empty`: ends at the guard page or near it."""
        item = np.dtype(dtype).itemsize
        region = Region(count * item, at_end=True, alignment=alignment)
        self._regions.append((f"internal buffer of {count} {np.dtype(dtype)}", region))
        return region.array((count,), (item,), dtype)

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """In the place of :func:`sparsert.operators.arrays.empty`."""
        strides = tuple(4 * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        return self.array(f"internal array {shape}", shape, strides, at_end=True)

    def complaints(self) -> list[str]:
        """Which canaries died, in words."""
        strays = [(name, region.stray()) for name, region in self._regions]
        return [f"{name}: {s.size} bytes outside were written, from offset {s[0]} on" for name, s in strays if s.size]

    def internal(self) -> int:
        """How many buffers of the package's own are guarded."""
        return sum(name.startswith("internal") for name, _ in self._regions)


@contextmanager
def guarded(buffers: Buffers) -> Iterator[None]:
    """What the package allocates for a kernel comes from ``buffers``, wherever the allocators were imported to."""
    from sparsert.operators import arrays
    from sparsert.runtime import memory

    replaced: list[tuple[types.ModuleType, str, Any]] = []
    for original, substitute in ((memory.aligned_empty, buffers.aligned_empty), (arrays.empty, buffers.empty)):
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "sparsert":
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        replaced.append((module, attribute, original))
                        setattr(module, attribute, substitute)
    try:
        yield
    finally:
        for module, attribute, original in replaced:
            setattr(module, attribute, original)


class Outcome(NamedTuple):
    """What went wrong with a case, in sentences, and under which names to count it."""

    problems: list[str]
    name: str
    counted: list[str]


def campaign(run: Callable[[int, int, list[str], Callable[[Any], None]], Outcome]) -> int:
    """The command of a fuzzer: ``run(seed, number, targets, note)`` until one goes wrong; ``note`` logs a case."""
    parser = argparse.ArgumentParser(description="run guarded cases; stops at the first that goes wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--log", type=Path, help="where each case is written before it runs")
    args = parser.parse_args()
    faulthandler.enable()
    targets = [name for name, reason in host_report()["targets"].items() if reason is None and name != "reference"]
    seen: Counter[str] = Counter()
    with (args.log or Path("/dev/null")).open("w") as log:

        def note(what: Any) -> None:
            print(json.dumps(what), file=log, flush=True)

        for number in range(args.first, args.first + args.count):
            outcome = run(args.seed, number, targets, note)
            if outcome.problems:
                print(f"{outcome.name}:\n  " + "\n  ".join(outcome.problems))
                return 1
            seen.update(outcome.counted)
    print(f"{args.count} cases: " + ", ".join(f"{count} {name}" for name, count in sorted(seen.items())))
    return 0
