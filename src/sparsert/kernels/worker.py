"""The programs of the thread pool: a worker's life, a job handed out and awaited, the pool taken out of use.

Threads meet in the words of :mod:`sparsert.codegen.parking`. They wait by spinning for a bounded number of turns, then
by sleeping in a function that the runtime provides. Who is about to sleep replaces ``NOTHING`` by ``ASLEEP``; whoever
exchanges that for something else has to wake it. Whichever comes second sees the other, so no wake-up is lost and none
is paid for that nobody waits for.

A part that no worker has begun when the caller is through with its own is the caller's: a thread that sleeps, or that
the system lets wait, holds nobody up. For the same reason there may be more entries of work than threads: then every
part drains one queue, and a thread whose core is slower than another takes less from it.
"""

from __future__ import annotations

from ..codegen.parking import LINE, PART_BYTES, Control, Job, Mailbox, Queue, State
from ..codegen.vector import Builder, Program, S, check

_POOL, _OWN = S.PX7, S.PX5  # the control block; a worker's mailbox, or a caller's job
_TURNS, _PART, _BOX = S.T, S.PY, S.TMP  # all of them survive ``invoke``
_SEEN, _OTHER = S.Y, S.K


def worker() -> Program:
    """Started with the address of a mailbox: wait for work, do it, tell the caller; until told to stop."""
    b = Builder()
    wait, got, out = b.label("wait for work"), b.label("work"), b.label("stop")
    b.emit("enter")
    b.emit("s_mov", d=_OWN, a=S.ARGS)
    b.emit("s_load", d=_POOL, ptr=_OWN, disp=Mailbox.CONTROL.byte)
    b.place(wait)
    _await(b, _OWN, Mailbox.STATE.byte, got)
    b.place(got)
    _compare(b, "jump_equal", State.STOP, out)
    _begin(b, _OWN, wait)
    b.emit("s_load", d=S.ARGS, ptr=_OWN, disp=Mailbox.ARGUMENT.byte)
    b.emit("s_load", d=_OTHER, ptr=_OWN, disp=Mailbox.CODE.byte)
    b.emit("invoke", a=_OTHER)
    _finish(b)
    _compare(b, "jump_differs", 1, wait)
    _tell(b, _POOL, Control.CALLER.byte, wait)
    b.emit("jump", disp=wait)
    b.place(out)
    b.emit("leave")
    return _finished(b)


def dispatch() -> Program:
    """Called with a job: its parts on as many threads, all at once; one by one where the pool is taken or too small."""
    b = Builder()
    mine, small, each = b.label("the pool is ours"), b.label("too few workers"), b.label("one by one")
    post, posted, again, begun = b.label("hand out"), b.label(), b.label("parts that nobody began"), b.label()
    done, free, out = b.label("all done"), b.label("give back"), b.label()
    b.emit("enter")
    b.emit("s_mov", d=_OWN, a=S.ARGS)
    b.emit("s_load", d=_POOL, ptr=_OWN, disp=Job.CONTROL.byte)
    b.emit("s_mov", d=_PART, a=_OWN)
    b.emit("s_load", d=_TURNS, ptr=_OWN, disp=Job.PARTS.byte)
    _take(b)
    b.emit("jump_zero", a=_SEEN, disp=mine)
    b.place(each)
    _run(b, _PART)
    b.emit("s_addi", d=_PART, disp=PART_BYTES)
    b.emit("loop", a=_TURNS, disp=each)
    b.emit("jump", disp=out)
    b.place(small)
    b.emit("s_set", d=_SEEN, disp=0)
    b.emit("s_store", a=_SEEN, ptr=_POOL, disp=Control.BUSY.byte)
    b.emit("jump", disp=each)
    b.place(mine)
    b.emit("s_load", d=_OTHER, ptr=_POOL, disp=Control.WORKERS.byte)
    b.emit("s_addi", d=_OTHER, disp=1)
    b.emit("jump_less", a=_OTHER, b=_TURNS, disp=small)
    b.emit("s_addi", d=_TURNS, disp=-1)
    b.emit("s_store", a=_TURNS, ptr=_POOL, disp=Control.PENDING.byte)
    b.emit("s_mov", d=_BOX, a=_POOL)
    b.emit("s_addi", d=_BOX, disp=Control.MAILBOXES.byte)
    b.place(post)
    b.emit("s_addi", d=_PART, disp=PART_BYTES)
    for source, slot in ((Job.CODE, Mailbox.CODE), (Job.ARGUMENT, Mailbox.ARGUMENT)):
        b.emit("s_load", d=_OTHER, ptr=_PART, disp=source.byte)
        b.emit("s_store", a=_OTHER, ptr=_BOX, disp=slot.byte)
    _tell(b, _BOX, Mailbox.STATE.byte, posted)
    b.place(posted)
    b.emit("s_addi", d=_BOX, disp=LINE)
    b.emit("loop", a=_TURNS, disp=post)
    _run(b, _OWN)
    b.emit("s_load", d=_TURNS, ptr=_OWN, disp=Job.PARTS.byte)
    b.emit("s_addi", d=_TURNS, disp=-1)
    b.place(again)  # from the last worker, which was told last
    b.emit("s_addi", d=_BOX, disp=-LINE)
    _begin(b, _BOX, begun)
    _run(b, _PART)
    _finish(b)
    _compare(b, "jump_equal", 1, free)
    b.place(begun)
    b.emit("s_addi", d=_PART, disp=-PART_BYTES)
    b.emit("loop", a=_TURNS, disp=again)
    _await(b, _POOL, Control.CALLER.byte, done)
    b.place(done)
    b.emit("s_set", d=_SEEN, disp=State.NOTHING)
    b.emit("s_store", a=_SEEN, ptr=_POOL, disp=Control.CALLER.byte)
    b.place(free)
    b.emit("s_set", d=_SEEN, disp=0)
    b.emit("s_store", a=_SEEN, ptr=_POOL, disp=Control.BUSY.byte)
    b.place(out)
    b.emit("leave")
    return _finished(b)


def claim() -> Program:
    """Called with a job without parts: PARTS becomes 0 if the pool is now the caller's, else 1."""
    b = Builder()
    b.emit("enter")
    b.emit("s_load", d=_POOL, ptr=S.ARGS, disp=Job.CONTROL.byte)
    _take(b)
    b.emit("s_store", a=_SEEN, ptr=S.ARGS, disp=Job.PARTS.byte)
    b.emit("leave")
    return _finished(b)


def drain() -> Program:
    """Called with a queue, by each of the threads that share it: take entries and run them until there are none."""
    b = Builder()
    again, work, out = b.label("the next entry"), b.label("work"), b.label()
    b.emit("enter")
    b.emit("s_mov", d=_OWN, a=S.ARGS)
    b.place(again)
    b.emit("s_set", d=_SEEN, disp=PART_BYTES)
    b.emit("s_fetch_add", d=_SEEN, ptr=_OWN, disp=Queue.NEXT.byte)
    b.emit("s_load", d=_OTHER, ptr=_OWN, disp=Queue.END.byte)
    b.emit("jump_less", a=_SEEN, b=_OTHER, disp=work)
    b.emit("s_set", d=_SEEN, disp=1)
    b.emit("s_fetch_add", d=_SEEN, ptr=_OWN, disp=Queue.LEFT.byte)
    b.emit("s_load", d=_OTHER, ptr=_OWN, disp=Queue.LAST.byte)
    b.emit("jump_differs", a=_SEEN, b=_OTHER, disp=out)
    b.emit("s_set", d=_SEEN, disp=0)
    b.emit("s_store", a=_SEEN, ptr=_OWN, disp=Queue.NEXT.byte)
    b.emit("s_store", a=_SEEN, ptr=_OWN, disp=Queue.LEFT.byte)
    b.emit("jump", disp=out)
    b.place(work)
    b.emit("s_mov", d=_PART, a=_OWN)
    b.emit("s_add", d=_PART, a=_SEEN)
    b.emit("s_load", d=S.ARGS, ptr=_PART, disp=Queue.ARGUMENT.byte)
    b.emit("s_load", d=_OTHER, ptr=_PART, disp=Queue.CODE.byte)
    b.emit("invoke", a=_OTHER)
    b.emit("jump", disp=again)
    b.place(out)
    b.emit("leave")
    return _finished(b)


def _take(b: Builder) -> None:
    b.emit("s_set", d=_SEEN, disp=1)
    b.emit("s_exchange", d=_SEEN, ptr=_POOL, disp=Control.BUSY.byte)


def _begin(b: Builder, mailbox: S, taken: int) -> None:
    """Take the part in a mailbox, unless somebody has: on to label ``taken`` then."""
    b.emit("s_set", d=_SEEN, disp=State.GO)
    b.emit("s_set", d=_OTHER, disp=State.NOTHING)
    b.emit("s_replace", d=_SEEN, b=_OTHER, ptr=mailbox, disp=Mailbox.STATE.byte)
    _compare(b, "jump_differs", State.GO, taken)


def _finish(b: Builder) -> None:
    """One part less is pending; how many there were before is seen."""
    b.emit("s_set", d=_SEEN, disp=-1)
    b.emit("s_fetch_add", d=_SEEN, ptr=_POOL, disp=Control.PENDING.byte)


def _run(b: Builder, part: S) -> None:
    b.emit("s_load", d=S.ARGS, ptr=part, disp=Job.ARGUMENT.byte)
    b.emit("s_load", d=_OTHER, ptr=part, disp=Job.CODE.byte)
    b.emit("invoke", a=_OTHER)


def _compare(b: Builder, jump: str, value: int, label: int) -> None:
    b.emit("s_set", d=_OTHER, disp=value)
    b.emit(jump, a=_SEEN, b=_OTHER, disp=label)


def _await(b: Builder, ptr: S, byte: int, there: int) -> None:
    """Until the word holds something, which is then seen: on to label ``there``."""
    spin, idle, sleep = b.label("spin"), b.label(), b.label("sleep")
    b.emit("s_load", d=_TURNS, ptr=_POOL, disp=Control.SPIN.byte)
    b.place(spin)
    b.emit("s_load", d=_SEEN, ptr=ptr, disp=byte)
    b.emit("jump_zero", a=_SEEN, disp=idle)
    b.emit("jump", disp=there)
    b.place(idle)
    b.emit("s_pause")
    b.emit("loop", a=_TURNS, disp=spin)
    b.emit("s_set", d=_SEEN, disp=State.NOTHING)
    b.emit("s_set", d=_OTHER, disp=State.ASLEEP)
    b.emit("s_replace", d=_SEEN, b=_OTHER, ptr=ptr, disp=byte)
    _compare(b, "jump_differs", State.NOTHING, there)
    b.place(sleep)
    _system(b, Control.WAIT, ptr, byte, State.ASLEEP)
    b.emit("s_load", d=_SEEN, ptr=ptr, disp=byte)
    _compare(b, "jump_equal", State.ASLEEP, sleep)
    b.emit("jump", disp=there)


def _tell(b: Builder, ptr: S, byte: int, silent: int) -> None:
    """The word becomes GO; its owner is woken if it sleeps, else on to label ``silent``."""
    b.emit("s_set", d=_SEEN, disp=State.GO)
    b.emit("s_exchange", d=_SEEN, ptr=ptr, disp=byte)
    _compare(b, "jump_differs", State.ASLEEP, silent)
    _system(b, Control.WAKE, ptr, byte, 1)


def _system(b: Builder, what: Control, ptr: S, byte: int, value: int) -> None:
    """Sleep while the word is ``value``, or wake so many who sleep on it. Both may return early, or for nothing."""
    b.emit("s_load", d=S.ARGS, ptr=_POOL, disp=Control.NUMBER.byte)
    b.emit("s_mov", d=S.PANEL, a=ptr)
    b.emit("s_addi", d=S.PANEL, disp=byte)
    b.emit("s_load", d=S.W, ptr=_POOL, disp=what.byte)
    b.emit("s_load", d=_OTHER, ptr=_POOL, disp=Control.FUNCTION.byte)
    b.emit("s_set", d=S.Y, disp=value)
    b.emit("s_set", d=S.CONST, disp=0)
    b.emit("invoke", a=_OTHER)


def _finished(b: Builder) -> Program:
    program = b.finish()
    check(program)
    return program


PROGRAMS = (worker, dispatch, claim, drain)
"""In the order of :class:`~sparsert.codegen.parking.PoolCode`."""
