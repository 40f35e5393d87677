"""One call of a product that loops over its pattern, on the caller alone or in ranges of bundles on several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..kernels.compact import SLOTS, Slot
from ..runtime.cpu import Executable, address_of
from ..runtime.workers import Pool, job
from .team import Addresses, Solo

STORAGE = 1  # the key, beside the addresses of packed values, of whether they are stored in 16 bits


class CompactFrame(Solo):
    """A range of bundles. Its code goes with how values are stored, which a refit may change.

    Args:
        make: the code for values in 32 bits or in 16.
        shift: how far behind the packed values those of these bundles begin: first what sums begin with,
        values: and how far behind that, in either storage, the values themselves.
    """

    __slots__ = ("_make", "_shift", "_values", "code", "storage")

    def __init__(
        self, scratch_floats: int, make: Callable[[bool], Executable], shift: int, values: tuple[int, int]
    ) -> None:
        super().__init__(SLOTS, scratch_floats)
        self._make, self._shift, self._values, self.storage = make, shift, values, -1

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None:
        storage = weights[STORAGE][0]
        if storage != self.storage:
            self.storage, self.code = storage, self._make(bool(storage))
            self.call = self.code.call
            self.slots[Slot.VALUES] = self._values[storage]
        self.point(xa, ya, ra, weights[0][0] + self._shift)


class CompactTeam:
    """Ranges of bundles, with an argument block and scratch each: every thread copies all of x for itself."""

    __slots__ = ("_job", "_parts", "_pool", "address", "nbytes")

    def __init__(self, pool: Pool, parts: Sequence[CompactFrame]) -> None:
        self._pool, self._parts, self.address = pool, parts, 0
        self.nbytes = sum(frame.nbytes for frame in parts)

    def call(self, address: int) -> None:
        if self._pool.workers < len(self._parts) - 1:  # the child of a fork has none yet
            self._pool.ensure(len(self._parts) - 1)
        self._pool.dispatch(address)

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None:
        changed = self._parts[0].storage != weights[STORAGE][0]
        for frame in self._parts:
            frame.aim(xa, ya, ra, weights)
        if changed:
            self._job = job(self._pool.address, [(frame.code.address, frame.address) for frame in self._parts])
            self.address = address_of(self._job)
