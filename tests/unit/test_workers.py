"""The pool: its operations beside the processor, its programs in the interpreter, its threads in this process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emulator
import sparsert
from oracle import COMPILED
from sparsert.codegen.assemble import assemble
from sparsert.codegen.interpreter import region, run
from sparsert.codegen.parking import LINE, Control, Job, Mailbox, PoolCode, State
from sparsert.codegen.vector import PRESERVED, Builder, Program, S, check
from sparsert.errors import InternalError
from sparsert.kernels import worker
from sparsert.runtime import workers
from sparsert.runtime.cpu import address_of
from sparsert.runtime.host import unavailable
from sparsert.runtime.memory import ExecutableMemory
from sparsert.runtime.workers import Pool, job
from sparsert.target import TARGETS

native = pytest.mark.isa("x86-avx2")
ISAS_HERE = [name for name in TARGETS if TARGETS[name].isa != "reference" and unavailable(name) is None]
EXECUTED = [*COMPILED, pytest.param("aarch64-neon", marks=pytest.mark.skipif(bool(
    emulator.MISSING and "aarch64-neon" not in ISAS_HERE), reason=str(emulator.MISSING)))]  # fmt: skip
Called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
WORDS = [0, 1, -1, 5, 2**31, 2**63 - 1, -(2**63)]
PROGRAMS = (worker.worker, worker.dispatch, worker.claim)
COUNT = bytes.fromhex("f30f1efa 48ff07 c3")  # endbr64; inc qword [rdi]; ret


# ---- operations ------------------------------------------------------------------------------------------------------

MEMORY: list[tuple[str, dict[str, int]]] = [
    ("s_load", {}), ("s_store", {"a": S.K}), ("s_exchange", {}), ("s_fetch_add", {}), ("s_replace", {"b": S.Y}),
]  # fmt: skip
JUMPS = ("jump_equal", "jump_differs", "jump_less")


def shared() -> Program:
    """Slots 0 and 1 are operands, 2 leads to words; then what each operation leaves of d, and which jumps are taken."""
    b = Builder()
    b.emit("enter")
    b.emit("s_arg", d=S.PX7, disp=16)
    for i, (name, columns) in enumerate(MEMORY):
        b.emit("s_arg", d=S.T, disp=0)
        b.emit("s_arg", d=S.K, disp=8)
        b.emit("s_set", d=S.Y, disp=-77)
        b.emit(name, d=S.T, ptr=S.PX7, disp=8 * i, **columns)
        b.emit("s_put", a=S.T, disp=24 + 8 * i)
    b.emit("s_set", d=S.PY, disp=0)
    for bit, name in enumerate(JUMPS):
        over = b.label()
        b.emit("s_pause")
        b.emit("s_arg", d=S.T, disp=0)
        b.emit("s_arg", d=S.K, disp=8)
        b.emit(name, a=S.T, b=S.K, disp=over)
        b.emit("s_addi", d=S.PY, disp=1 << bit)
        b.place(over)
    b.emit("s_put", a=S.PY, disp=24 + 8 * len(MEMORY))
    b.emit("leave")
    made = b.finish()
    check(made)
    return made


def executes(program: Program, target: str, args: np.ndarray, function: bytes = b"") -> None:
    """Machine code of ``program``, called with ``args``; ``function`` lies behind it, and slot 0 is its address."""
    code = assemble(program, target).code
    if target in ISAS_HERE:
        memory = ExecutableMemory(code + function)
        args[0] = memory.address + len(code) if function else args[0]
        Called(memory.address)(address_of(args))
    else:
        args[0] = emulator._CODE + len(code) if function else args[0]
        emulator.emulate(code + function, address_of(args))


@pytest.mark.parametrize("target", EXECUTED)
def test_shared_words_mean_what_the_processor_does(target: str) -> None:
    for first, second in product(WORDS, repeat=2):
        words = np.array([[second, first, second, first, second if first > 0 else first]] * 2, np.int64)
        want, got = (np.zeros(4 + len(MEMORY), np.int64) for _ in range(2))
        for args, memory in ((want, words[0]), (got, words[1])):
            args[:3] = first, second, address_of(memory)
        run(shared(), 4, want, {"words": region(address_of(words[0]), words[0])})
        executes(shared(), target, got)
        assert got[3:].tolist() == want[3:].tolist()
        assert words[1].tolist() == words[0].tolist()
        old = np.array([second, first, second, first, second if first > 0 else first])
        replaced = -77 if old[4] == first else int(old[4])
        with np.errstate(over="ignore"):
            assert words[0].tolist() == [second, second, first, int(old[3] + np.int64(first)), replaced]
        assert want[3:8].tolist() == [second, first, second, first, old[4]]
        assert want[8] == (first != second) + 2 * (first == second) + 4 * (first >= second)


def invoking(slots: tuple[S, ...]) -> Program:
    """Call the function in slot 0 with 1 to 6; then what the registers hold that must survive."""
    b = Builder()
    b.emit("enter")
    b.emit("s_arg", d=S.K, disp=0)
    for i, register in enumerate(slots):
        b.emit("s_set", d=register, disp=100 + i)
    b.emit("s_mov", d=S.X, a=S.ARGS)
    b.emit("s_mov", d=S.PX7, a=S.X)
    for i, register in enumerate((S.ARGS, S.PANEL, S.W, S.Y, S.CONST, S.PX)):
        b.emit("s_set", d=register, disp=i + 1)
    b.emit("invoke", a=S.K)
    b.emit("s_mov", d=S.ARGS, a=S.PX7)
    for i, register in enumerate(slots):
        b.emit("s_put", a=register, disp=8 + 8 * i)
    b.emit("leave")
    return b.finish()


def spy(target: str, cells: int) -> bytes:
    """A function that writes its six arguments and its stack pointer to ``cells``, and spoils what it may."""
    if target == "aarch64-neon":
        words = [
            0xD503245F,
            *(0xD2800010 | i << 21 | (cells >> 16 * i & 0xFFFF) << 5 | (i > 0) << 29 for i in range(4)),
        ]
        words += [0xF9000200 | i << 10 | i for i in range(6)]  # bti c; x16 = cells; str xi, [x16, 8 i]
        words += [0x910003F1, 0xF9001A11]  # mov x17, sp; str x17, [x16, 48]
        words += [0xAA1003E0 | i for i in range(18)]  # mov xi, x16
        return np.array([*words, 0xD65F03C0], "<u4").tobytes()
    # endbr64; mov rax, cells; rdi, rsi, rdx, rcx, r8, r9 and rsp to there; spoil all that callers save; ret
    return (bytes.fromhex("f30f1efa 48b8") + cells.to_bytes(8, "little")
            + bytes.fromhex("488938 48897008 48895010 48894818 4c894020 4c894828 48896030")
            + bytes.fromhex("31c9 31d2 31f6 31ff 4d31c0 4d31c9 4d31d2 4d31db 31c0 c3"))  # fmt: skip


@pytest.mark.parametrize("target", EXECUTED)
def test_native_functions_get_their_arguments_and_an_aligned_stack(target: str) -> None:
    kept, cells = tuple(r for r in PRESERVED if r != S.PX7), np.zeros(8, np.int64)
    want, got = np.zeros(5, np.int64), np.zeros(5, np.int64)
    want[0] = 1 << 30
    seen: list[Any] = []
    run(invoking(kept), 4, want, {}, functions={1 << 30: lambda *args: seen.append(args)})
    executes(invoking(kept), target, got, spy(target, address_of(cells)))
    assert got[1:].tolist() == want[1:].tolist() == [100, 101, 102, 103]
    assert cells[:6].tolist() == list(seen[0]) == [1, 2, 3, 4, 5, 6]
    assert cells[6] % 16 == (0 if target == "aarch64-neon" else 8), "sixteen, before a return address is pushed"


def test_the_interpreter_refuses_what_invoke_spoils() -> None:
    with pytest.raises(InternalError, match="CONST is read before"):
        run(invoking((S.CONST,)), 4, np.array([64, 0], np.int64), {}, functions={64: lambda *_: None})
    with pytest.raises(InternalError, match="native function"):
        run(invoking((S.T,)), 4, np.array([64, 0], np.int64), {}, functions={})


# ---- the programs, interpreted: every party's memory is a region, and other threads are what functions do ------------

POOL, JOB, WORK, SLEEP = 1 << 20, 1 << 21, 1 << 22, 1 << 23
MAILBOX = int(Control.MAILBOXES)


def pool_memory(spin: int = 3) -> np.ndarray:
    control = np.zeros(MAILBOX + 3 * LINE // 8, np.int64)
    control[:6] = SLEEP, 202, 128, 129, spin, 3
    return control


def test_a_worker_sleeps_works_tells_and_stops() -> None:
    control, done, slept = pool_memory(), [], []
    control[MAILBOX + Mailbox.CONTROL] = POOL
    control[Control.PENDING], control[Control.CALLER] = 2, State.ASLEEP

    def system(number: int, address: int, what: int, value: int, *_: int) -> None:
        assert number == 202
        slept.append((address - POOL, what, value))
        if what == 128 and len(slept) == 1:
            return  # woken for nothing
        if what == 128 and not done:
            control[MAILBOX : MAILBOX + 3] = State.GO, WORK, 11
        elif what == 128:
            control[MAILBOX + Mailbox.STATE] = State.STOP

    def work(argument: int, *_: Any) -> None:
        done.append(argument)
        assert control[MAILBOX + Mailbox.STATE] == State.NOTHING
        if len(done) == 1:  # the next part comes before the worker sleeps again
            control[MAILBOX : MAILBOX + 3] = State.GO, WORK, 22

    run(worker.worker(), 4, np.zeros(1, np.int64), {"pool": region(POOL, control)},
        functions={SLEEP: system, WORK: work}, here=POOL + 8 * MAILBOX)  # fmt: skip
    assert done == [11, 22]
    assert control[Control.PENDING] == 0
    assert control[Control.CALLER] == State.GO
    assert slept == [(8 * MAILBOX, 128, 2)] * 2 + [(Control.CALLER.byte, 129, 1), (8 * MAILBOX, 128, 2)]


@pytest.mark.parametrize("case", ["all work", "nobody begins", "taken", "too few"])
def test_a_dispatch_runs_every_part_once(case: str) -> None:
    control, words, by = pool_memory(), job(POOL, [(WORK, i) for i in range(4)]), []
    boxes = [MAILBOX + i * LINE // 8 for i in range(3)]
    control[[b + Mailbox.STATE for b in boxes]] = State.ASLEEP, State.NOTHING, State.ASLEEP
    control[Control.BUSY] = case == "taken"
    control[Control.WORKERS] = 2 if case == "too few" else 3
    woken = []

    def system(number: int, address: int, what: int, value: int, *_: int) -> None:
        if what == 129:
            woken.append((address - POOL) // 8)
        else:
            assert (address - POOL, value) == (Control.CALLER.byte, State.ASLEEP)
            control[Control.PENDING], control[Control.CALLER] = 0, State.GO

    def work(argument: int, *_: Any) -> None:
        by.append(argument)
        if case == "all work" and argument == 0:
            for box in boxes:
                assert control[box + Mailbox.STATE] == State.GO
                assert control[box + Mailbox.CODE] == WORK
                by.append(int(control[box + Mailbox.ARGUMENT]))
                control[box + Mailbox.STATE] = State.NOTHING

    memory = {"pool": region(POOL, control), "job": region(JOB, words)}
    run(worker.dispatch(), 4, words, memory, functions={SLEEP: system, WORK: work}, here=JOB)
    assert sorted(by) == [0, 1, 2, 3]
    assert control[Control.BUSY] == (case == "taken")
    assert control[Control.CALLER] == State.NOTHING
    assert woken == ([boxes[0], boxes[2]] if case in ("all work", "nobody begins") else [])
    assert control[Control.PENDING] == 0
    if case == "nobody begins":
        assert by == [0, 3, 2, 1]
        assert all(control[box + Mailbox.STATE] == State.NOTHING for box in boxes)


def test_a_claim_says_whether_it_was_the_first() -> None:
    control = pool_memory()
    for expected in (0, 1):
        words = job(POOL, [])
        run(worker.claim(), 4, words, {"pool": region(POOL, control), "job": region(JOB, words)}, here=JOB)
        assert words[Job.PARTS] == expected
        assert control[Control.BUSY] == 1


# ---- threads ---------------------------------------------------------------------------------------------------------


def pool_code() -> PoolCode:
    return PoolCode(*(assemble(make(), "x86-avx2").code for make in PROGRAMS))


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(pool_code(), getattr(request, "param", 50))
    yield made
    assert made.stop(60.0)


class Counting:
    """A job of parts that each count their runs in a word of their own."""

    def __init__(self, pool: Pool, parts: int) -> None:
        self.code = ExecutableMemory(COUNT)
        self.cells = np.zeros((parts, 32), np.int64)
        self.job = job(pool.address, [(self.code.address, address_of(self.cells[i])) for i in range(parts)])
        self.address = address_of(self.job)

    @property
    def counts(self) -> list[int]:
        return self.cells[:, 0].tolist()


def threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


@native
@pytest.mark.parametrize("pool", [1, 50, 2000], indirect=True)
def test_every_part_runs_once_a_dispatch(pool: Pool) -> None:
    before = threads_of_process()
    jobs = {parts: Counting(pool, parts) for parts in (2, 3, 8)}
    assert pool.ensure(7)
    assert threads_of_process() == before + 7
    for turn in range(600):
        for parts in (2, 3, 8):
            pool.dispatch(jobs[parts].address)
        if turn % 100 == 0:
            time.sleep(0.003)  # long enough to fall asleep
    assert all(one.counts == [600] * parts for parts, one in jobs.items())
    assert pool.stop()
    assert threads_of_process() == before


@native
def test_callers_that_meet_do_all_their_parts(pool: Pool) -> None:
    assert pool.ensure(2)
    jobs = [Counting(pool, 3) for _ in range(8)]
    ready = threading.Barrier(8)

    def call(one: Counting) -> None:
        ready.wait()
        for _ in range(2000):
            pool.dispatch(one.address)

    callers = [threading.Thread(target=call, args=(one,)) for one in jobs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(one.counts == [2000] * 3 for one in jobs)


@native
def test_the_pool_stops_grows_and_starts_again_under_calls(pool: Pool) -> None:
    one, stop = Counting(pool, 4), threading.Event()
    calls = [0]

    def call() -> None:
        while not stop.is_set():
            pool.dispatch(one.address)
            calls[0] += 1

    caller = threading.Thread(target=call)
    caller.start()
    before = threads_of_process()
    for turn in range(60):
        size = 1 + turn % 5
        assert pool.ensure(size)
        assert pool.workers == size
        time.sleep(0.002)
        assert pool.stop()
        assert pool.workers == 0
        assert threads_of_process() == before
    stop.set()
    caller.join()
    assert one.counts == [calls[0]] * 4


@native
def test_forever_is_forever(pool: Pool) -> None:
    assert pool.ensure(1)
    assert pool.stop(forever=True)
    assert not pool.ensure(1)
    one = Counting(pool, 2)
    pool.dispatch(one.address)
    assert one.counts == [1, 1]


@native
def test_no_more_threads_is_said_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    create: Callable[..., tuple[int, int]] = workers._create
    monkeypatch.setattr(workers, "_create", lambda *a: create(*a) if pool.workers < 2 else (11, 0))
    with pytest.warns(RuntimeWarning, match="starts no more threads.*operators run on 3"):
        assert not pool.ensure(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not pool.ensure(5)
    assert pool.ensure(2)
    one = Counting(pool, 3)
    pool.dispatch(one.address)
    six = Counting(pool, 6)
    pool.dispatch(six.address)
    assert one.counts + six.counts == [1] * 9


@native
def test_workers_take_no_signals(pool: Pool) -> None:
    others = set(os.listdir("/proc/self/task"))
    assert pool.ensure(2)
    mine = set(os.listdir("/proc/self/task")) - others
    assert len(mine) == 2
    for thread in mine:
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        for number in range(1, 65):
            if number not in (9, 19, 32, 33):  # kill and stop; two that the C library keeps to itself
                assert blocked >> number - 1 & 1, number


@native
def test_sleeping_workers_use_no_time(pool: Pool) -> None:
    others = set(os.listdir("/proc/self/task"))
    assert pool.ensure(3)
    mine = set(os.listdir("/proc/self/task")) - others
    deadline = time.monotonic() + 60

    def states() -> list[str]:
        return [Path(f"/proc/self/task/{t}/stat").read_text().rsplit(")", 1)[1].split()[0] for t in mine]

    while states() != ["S"] * 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_child(body: str) -> str:
    setup = """
        import os, signal, sys, threading, time
        import numpy as np
        import sparsert
        from sparsert.crew import shared_pool
        from sparsert.runtime import host
        rng = np.random.default_rng(5)
        w = np.where(rng.random((300, 280)) < 0.2, rng.standard_normal((300, 280)), 0).astype(np.float32)
        x = rng.standard_normal((280, 400)).astype(np.float32)
        y = sparsert.compile_matmul(w, activation="gelu", threads=1)(x)
        op = sparsert.compile_matmul(w, activation="gelu", threads=3)
        def right(): return op(x).tobytes() == y.tobytes()
        def threads(): return len(os.listdir("/proc/self/task"))
        assert right()
        pool = shared_pool(host.resolve("native"))
        assert pool.workers == 2, op.explain()
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsert.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c",
                           textwrap.dedent(setup) + textwrap.dedent(body)],
                          capture_output=True, text=True, timeout=300, check=False, env=environment)  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    assert done.stderr == ""
    return done.stdout.strip()


@native
def test_fork_after_use() -> None:
    said = in_child(
        """
        def child():
            before = pool.workers, threads()
            good = right() and right() and pool.workers == 2 and before == (0, 1) and threads() == 3
            if good:  # and once more: a grandchild
                grandchild = os.fork()
                if not grandchild:
                    os._exit(0 if right() and threads() == 3 else 4)
                good = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
            return good
        codes = []
        for _ in range(10):
            pid = os.fork()
            if not pid:
                sys.exit(0 if child() else 3)  # the orderly way, with the exit handlers
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            assert right() and threads() == 3
        print(codes)
        """
    )
    assert said == str([0] * 10)


@native
def test_fork_while_others_compute() -> None:
    said = in_child(
        """
        stop, wrong = threading.Event(), [0]
        def loop():
            while not stop.is_set():
                wrong[0] += not right()
        callers = [threading.Thread(target=loop) for _ in range(3)]
        for caller in callers: caller.start()
        codes = []
        for _ in range(20):
            pid = os.fork()
            if not pid:
                os._exit(0 if right() and pool.workers == 2 else 3)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        stop.set()
        for caller in callers: caller.join()
        print(sum(codes), wrong[0])
        """
    )
    assert said == "0 0"


@native
@pytest.mark.parametrize("asleep", [True, False])
def test_exit_with_parked_workers(asleep: bool) -> None:
    body = "import atexit\natexit.register(lambda: print('threads', threads()))\n"  # runs before the pool is stopped
    order = "time.sleep(0.1)\n" if asleep else "right()\n"
    assert in_child(body + order) == "threads 3"


@native
def test_exit_stops_the_workers_first() -> None:
    """What was registered before the pool runs behind it."""
    said = in_child(
        """
        import atexit
        atexit.unregister(pool.stop)
        atexit.register(lambda: print(threads(), right(), pool.workers))
        atexit.register(pool.stop, forever=True)
        """
    )
    assert said == "1 True 0"


@native
def test_exit_while_daemon_threads_compute() -> None:
    for _ in range(3):
        in_child(
            """
            def loop():
                out = np.empty_like(y)
                while True:
                    op(x, out=out)
            for _ in range(3):
                threading.Thread(target=loop, daemon=True).start()
            time.sleep(0.1)
            """
        )


@native
def test_thousands_of_signals() -> None:
    said = in_child(
        """
        handled = [0]
        def handler(number, frame): handled[0] += 1
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        wrong = calls = 0
        while handled[0] < 4000:
            wrong += not right()
            calls += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(wrong, threads())
        """
    )
    assert said == "0 3"


@native
def test_thousands_of_calls_leave_nothing_behind() -> None:
    said = in_child(
        """
        def used(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        def cycle(n):
            for turn in range(n):
                one = sparsert.compile_matmul(w[:100], threads=2 + turn % 4)
                assert one(x).shape == (100, 400)
                for _ in range(20): op(x)
        cycle(40)
        before, many = used(), threads()
        cycle(150)
        print(threads() == many, used() - before < 24 << 20)
        """
    )
    assert said == "True True"
