"""One call on one thread, or on several: what is prepared for arrays of one shape, and how a call is shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..runtime.cpu import Frame, address_of
from ..runtime.workers import Pool, job

Addresses = Mapping[int, tuple[int, ...]]
"""Of packed values: of the whole product under 0, of its parts under their number."""


Shift = tuple[int, int, int, int]
"""Bytes by which x, y, the residual and the weights of a part lie behind those of the whole."""


class Call(Protocol):
    """Prepared for arrays of one shape and pitch. One caller at a time has it to itself.

    Attributes:
        address, call: ``call(address)`` runs on what ``aim`` was told last.
        nbytes: scratch.
    """

    address: int
    nbytes: int

    @property
    def call(self) -> Callable[[int], None]: ...

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None: ...


class Solo(Frame):
    """On the caller alone."""

    __slots__ = ("call",)
    call: Callable[[int], None]

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None:
        self.point(xa, ya, ra, weights[0][0])


class Team:
    """On the caller and threads of the pool, each with an argument block and scratch of its own.

    Args:
        parts: of each its frame, the address of its code, and how far its x, y, residual and weights lie behind the
            caller's.
        name: under which the parts' weights are found, one address for each or one for all.
    """

    __slots__ = ("_job", "_name", "_parts", "_pool", "_workers", "address", "nbytes")

    def __init__(self, pool: Pool, parts: Sequence[tuple[Frame, int, Shift]], name: int) -> None:
        self._pool, self._name, self._workers = pool, name, len(parts) - 1
        self._parts = [(frame.point, shift) for frame, _, shift in parts]
        self._job = job(pool.address, [(code, frame.address) for frame, code, _ in parts])
        self.address, self.nbytes = address_of(self._job), sum(frame.nbytes for frame, _, _ in parts)

    def call(self, address: int) -> None:
        if self._pool.workers < self._workers:  # the child of a fork has none yet
            self._pool.ensure(self._workers)
        self._pool.dispatch(address)

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None:
        own = weights[self._name]
        if len(own) == 1:
            own *= len(self._parts)
        for (point, (dx, dy, dr, dw)), w in zip(self._parts, own, strict=True):
            point(xa + dx, ya + dy, ra + dr, w + dw)


def tile_cuts(tiles: int, parts: int, head: bool, tail: bool) -> NDArray[np.int64]:
    """Offsets that cut ``tiles`` column tiles into at most ``parts`` ranges of nearly equal length.

    ``head``: the first two tiles overlap; ``tail``: the last two do. Such pairs stay with one thread: two threads never
    write the same element.
    """
    cuts = tiles * np.arange(parts + 1) // parts
    low, high = 1 + head, tiles - 1 - tail
    inner = cuts[1:-1]
    inner = np.clip(inner, low, high) if low <= high else inner[:0]
    return np.unique(np.concatenate([[0], inner, [tiles]]))
