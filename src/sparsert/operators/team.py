"""One call on one thread, or on several: what is prepared for arrays of one shape, and how a call is shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..runtime.cpu import Frame, address_of
from ..runtime.workers import Pool, job, queue
from ..schedule import cost

if TYPE_CHECKING:
    from .native import NativeProduct

Addresses = Mapping[int, tuple[int, ...]]
"""Of packed values: of the whole product under 0, of its parts under their number."""
MOST_PARTS = 256


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


class Crew(NamedTuple):
    """What an operator that may use several threads knows about them.

    Attributes:
        pool: asked for when a shape first has work for more than one.
        threads: how many are permitted.
        rows: products of so many ranges of rows, with the first row of each; none where there cannot be any.
    """

    pool: Callable[[], Pool]
    threads: int
    rows: Callable[[int], list[tuple[int, NativeProduct]]] = lambda parts: []

    def wanted(self, work: int, most: int = MOST_PARTS) -> int:
        """Parts for so many vector multiply-adds, ``most`` at most, after starting the threads that it takes."""
        parts = min(self.threads, work // cost.LEAST_SHARE, most)
        if parts < 2:
            return 1
        pool = self.pool()
        return parts if pool.ensure(parts - 1) else min(parts, pool.workers + 1)


class Solo(Frame):
    """On the caller alone."""

    __slots__ = ("call",)
    call: Callable[[int], None]

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None:
        self.point(xa, ya, ra, weights[0][0])


class Part(NamedTuple):
    """A piece of a call: ``shifts`` is how far its x, y and residual lie behind the caller's, ``weights`` the number of
    its values among those that the team's name stands for, ``behind`` how far into them it begins."""

    frame: Frame
    code: int
    shifts: tuple[int, int, int]
    weights: int = 0
    behind: int = 0


class Team:
    """On the caller and threads of the pool. Every part has an argument block and scratch of its own.

    Args:
        parts: as many as threads, or more: then they are taken one after the other by whoever is free.
        name: under which the parts' weights are found; 0 where all take those of the whole product.
    """

    __slots__ = ("_job", "_name", "_parts", "_pool", "_queue", "_workers", "address", "nbytes")

    def __init__(self, pool: Pool, parts: Sequence[Part], name: int, threads: int) -> None:
        self._pool, self._name, self._workers = pool, name, threads - 1
        self._parts = [(part.frame.point, part.shifts, part.weights, part.behind) for part in parts]
        entries = [(part.code, part.frame.address) for part in parts]
        self._queue = queue(entries, threads)
        if len(entries) > threads:
            entries = [(pool.drain, address_of(self._queue))] * threads
        self._job = job(pool.address, entries)
        self.address, self.nbytes = address_of(self._job), sum(part.frame.nbytes for part in parts)

    def call(self, address: int) -> None:
        if self._pool.workers < self._workers:  # the child of a fork has none yet
            self._pool.ensure(self._workers)
        self._pool.dispatch(address)

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None:
        own = weights[self._name]
        for point, (dx, dy, dr), number, behind in self._parts:
            point(xa + dx, ya + dy, ra + dr, own[number] + behind)


def pieces(low: int, high: int, group: int, least: int, allowed: range) -> list[int]:
    """Offsets that cut a thread's range of tiles: all groups but the last, two thirds of that one, and the rest.

    The last piece is what another thread may take over. Every piece but the first is a further pass over the code,
    which is fetched anew: pieces have ``least`` tiles or more, and groups stay whole but for the last. Cuts lie in
    ``allowed``.
    """
    last = low + (high - low - 1) // group * group
    rest = max(least, (high - last) // 3)
    cuts = [last, high - rest] if high - last >= 2 * least else []
    return [*dict.fromkeys([low, *(cut for cut in cuts if cut in allowed), high])]


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
