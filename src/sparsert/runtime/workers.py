"""One pool of native threads for the process. They run generated code from birth to death and know nothing of Python.

A thread waits in the worker program (:mod:`sparsert.codegen.parking` says how), which was generated like any kernel and
is handed over by whoever compiles. A *job* names the code and the argument block of every part; ``Pool.dispatch``, a
native call without the GIL, gives the first part to the caller and the others to workers. One caller at a time has the
workers; whoever comes meanwhile runs all parts alone. The results are the same.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.parking import LINE, PART_BYTES, Control, Job, Mailbox, PoolCode, Queue, State
from .memory import ExecutableMemory, aligned_empty

MAX_WORKERS = 255
SPIN = 2000  # turns of a waiting loop, each some 20 to 40 ns, before a thread sleeps
_CLOSING_SECONDS = 5.0  # how long the end of the process waits for a call under way
_FUTEX_NUMBER = {"x86_64": 202, "AMD64": 202, "aarch64": 98}
_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129

Words = NDArray[np.int64]


class Pool:
    """Threads that wait for parts of jobs.

    Args:
        code: its programs, which are mapped when the first thread starts.
        spin: turns that a thread looks for work before it sleeps.

    Attributes:
        workers: threads that there are; a job of that many parts and the caller's own runs on all of them.
        trouble: why there are not more threads than ``workers``, if that is so.
        dispatch: runs the job at an address; on the caller alone where the threads are taken, or too few.
        drain: address of the code that takes entries from a queue until there are none.
    """

    def __init__(self, code: PoolCode, spin: int = SPIN) -> None:
        self._worker, self._dispatch, self._claim, self._drain = (ExecutableMemory(part) for part in code)
        self._control: Words = aligned_empty(int(Control.MAILBOXES) + MAX_WORKERS * LINE // 8, np.int64, LINE)
        self.address = int(self._control.__array_interface__["data"][0])
        self.spin = spin
        self.dispatch: Callable[[int], None] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._dispatch.address)
        self.drain = self._drain.address
        self._reset()

    def _reset(self) -> None:
        """No threads. The memory stays: jobs know its address, and threads of other processes have their own."""
        control = self._control
        control[:] = 0
        function, number = _sleeper()
        control[Control.FUNCTION], control[Control.NUMBER], control[Control.SPIN] = function, number, self.spin
        control[Control.WAIT], control[Control.WAKE] = _WAIT_PRIVATE, _WAKE_PRIVATE
        self._threads: list[int] = []
        self._lock = threading.Lock()
        self._open = True
        self.workers = 0
        self.trouble = ""

    def ensure(self, workers: int) -> bool:
        """Whether there are that many threads, after starting those that lack. Warns once where that fails."""
        if self.workers >= workers:
            return True
        with self._lock:
            while self._open and not self.trouble and self.workers < min(workers, MAX_WORKERS):
                self._start()
        return self.workers >= workers

    def _start(self) -> None:
        mailbox = int(Control.MAILBOXES) + self.workers * LINE // 8
        self._control[mailbox : mailbox + LINE // 8] = 0
        self._control[mailbox + Mailbox.CONTROL] = self.address
        code, thread = _create(self._worker.address, self.address + 8 * mailbox)
        if code:
            self.trouble = f"the system starts no more threads ({os.strerror(code)})"
            warnings.warn(f"sparsert: {self.trouble}; operators run on {self.workers + 1}", RuntimeWarning, 4)
            return
        self._threads.append(thread)
        self.workers += 1
        self._control[Control.WORKERS] = self.workers

    def stop(self, seconds: float = _CLOSING_SECONDS, forever: bool = False) -> bool:
        """Stop and join all threads, or, if a call is under way for longer than ``seconds``, leave them: False then.

        Calls from now on run on the caller alone, until ``ensure`` starts new threads, or ``forever``.
        """
        with self._lock:
            self._open = self._open and not forever
            self._control[Control.WORKERS] = 0  # whoever gets the pool now gives it back at once
            self.workers, workers = 0, self.workers
            if not workers:
                return True
            if not self._taken(seconds):
                self._open = False
                return False
            for i in range(workers):
                self._tell(i, State.STOP)
            for thread in self._threads:
                _libc().pthread_join(ctypes.c_ulong(thread), None)
            self._threads.clear()
            self._control[Control.BUSY] = 0
            return True

    def _taken(self, seconds: float) -> bool:
        request = job(self.address, [])
        claim = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._claim.address)
        deadline = time.monotonic() + seconds
        while True:
            claim(request.__array_interface__["data"][0])
            if not request[Job.PARTS]:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(1e-4)

    def _tell(self, worker: int, state: State) -> None:
        """Only while the pool is taken, so that nobody else does. A plain store will do: who sleeps is woken anyway."""
        mailbox = int(Control.MAILBOXES) + worker * LINE // 8
        c = self._control
        address = ctypes.c_void_p(self.address + 8 * (mailbox + Mailbox.STATE))
        c[mailbox + Mailbox.STATE] = state
        _libc().syscall(ctypes.c_long(int(c[Control.NUMBER])), address, ctypes.c_long(_WAKE_PRIVATE), ctypes.c_long(1))


def supported() -> bool:
    """Whether this system has what threads sleep on: Linux does."""
    return sys.platform.startswith("linux") and platform.machine() in _FUTEX_NUMBER


def job(control: int, parts: Sequence[tuple[int, int]]) -> Words:
    """A job of ``parts``, each the addresses of its code and of its argument block, for the pool at ``control``."""
    words: Words = aligned_empty(2 + PART_BYTES // 8 * len(parts), np.int64)
    words[Job.CONTROL], words[Job.PARTS] = control, len(parts)
    words[Job.CODE :] = [word for part in parts for word in part]
    return words


def queue(entries: Sequence[tuple[int, int]], threads: int) -> Words:
    """A queue of ``entries``, like the parts of a job, for exactly so many threads, each of which drains it."""
    words: Words = aligned_empty(int(Queue.CODE) + PART_BYTES // 8 * len(entries), np.int64, LINE)
    words[:] = 0
    words[Queue.END], words[Queue.LAST] = PART_BYTES * len(entries), threads - 1
    words[Queue.CODE :] = [word for entry in entries for word in entry]
    return words


_pool: Pool | None = None
_pool_lock = threading.Lock()


def shared(code: Callable[[], PoolCode]) -> Pool:
    """The pool of this process, made from ``code()`` when it is first asked for."""
    global _pool
    if _pool is None:
        with _pool_lock:
            if _pool is None:
                _pool = Pool(code())
                atexit.register(_pool.stop, forever=True)
    return _pool


def _forget() -> None:
    """In the child of a fork, where no other thread has survived."""
    global _pool_lock
    _pool_lock = threading.Lock()
    if _pool is not None:
        _pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def _sleeper() -> tuple[int, int]:
    """The address of a function that sleeps on a word of memory and wakes sleepers, and its first argument."""
    address = ctypes.cast(_libc().syscall, ctypes.c_void_p).value or 0
    return address, _FUTEX_NUMBER.get(platform.machine(), 0)


def _create(code: int, argument: int) -> tuple[int, int]:
    """A thread that runs ``code(argument)`` and takes no signals: an error number, 0 for none, and the thread."""
    thread = ctypes.c_ulong()
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a new thread inherits the mask
    try:
        error = _libc().pthread_create(ctypes.byref(thread), None, ctypes.c_void_p(code), ctypes.c_void_p(argument))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    return int(error), int(thread.value)
