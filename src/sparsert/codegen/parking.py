"""Where the pool's threads and its callers find each other in memory: what generated code and the runtime agree on.

All words have 64 bits. A thread that waits for one of them to change spins first and then sleeps; whoever changes the
word by an exchange learns from the old value whether somebody has to be woken. A worker that finds ``GO`` begins by
replacing it by ``NOTHING``; a caller that is done with its own part takes back in the same way what nobody has begun.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import NamedTuple

from .slots import Slots

LINE = 128  # bytes that a party writes alone: two cache lines, since neighbours are prefetched in pairs


class Control(Slots):
    """Words of the pool's control block; the code addresses word ``n`` at byte ``8 * n``."""

    FUNCTION = 0  # sleeps and wakes, called (NUMBER, address, WAIT or WAKE, expected value or count, 0)
    NUMBER = auto()
    WAIT = auto()
    WAKE = auto()
    SPIN = auto()  # turns of a waiting loop before it sleeps, at least 1
    WORKERS = auto()  # threads that take work; 0 shuts the pool
    BUSY = LINE // 8  # 1 while a caller has the pool
    PENDING = 2 * LINE // 8  # parts that workers have not finished
    CALLER = 3 * LINE // 8  # a State: NOTHING, ASLEEP, or GO when no part is pending any more
    MAILBOXES = 4 * LINE // 8  # one per worker, LINE bytes each


class Mailbox(Slots):
    """Words of a worker's mailbox, whose address is what the thread starts with."""

    STATE = 0
    CODE = auto()  # what to call when the state is GO,
    ARGUMENT = auto()  # and with what
    CONTROL = auto()  # address of the control block


class Job(Slots):
    """Words of a job: any number of parts, the first of them the caller's own."""

    CONTROL = 0  # address of the control block
    PARTS = auto()  # at least 2
    CODE = auto()  # of the first part, then its argument; the other parts behind it
    ARGUMENT = auto()


class Queue(Slots):
    """Words of a queue: entries that threads take one after the other, each the code and the argument of a call."""

    NEXT = 0  # bytes of entries that are taken
    LEFT = auto()  # threads that found nothing more
    END = LINE // 8  # bytes of all entries
    LAST = auto()  # threads that share it, less one: whoever sees so many others leave puts the entries back
    CODE = auto()  # of the first entry, then its argument; the other entries behind it
    ARGUMENT = auto()


PART_BYTES = 16


class State(IntEnum):
    """What a worker, or a caller, is told."""

    NOTHING = 0
    GO = 1
    ASLEEP = 2  # written by whoever is about to sleep
    STOP = 3


class PoolCode(NamedTuple):
    """Machine code of a pool: a worker's life, handing out a job and awaiting it, taking the pool for good, and what a
    thread does with a queue."""

    worker: bytes
    dispatch: bytes
    claim: bytes
    drain: bytes
