"""Locks of operators, which the child of a fork finds open."""

from __future__ import annotations

import os
import threading
import weakref


class ChildLock:
    """A reentrant lock. Another thread of the parent may hold it at a fork, and nobody would give it back there: what
    it guards is therefore changed by single assignments, each of which leaves a whole."""

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _ALL.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def open(self) -> None:
        """Forget who holds it."""
        self._lock = threading.RLock()


_ALL: weakref.WeakSet[ChildLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_ALL):
        lock.open()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
