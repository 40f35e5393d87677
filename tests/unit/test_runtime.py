"""Where code and data live, and what running code does to the process: threads, signals, fork, MXCSR, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, complaint, dense_matrix, expected, same_bits
from sparsert import errors
from sparsert.errors import ExecutableMemoryError, TargetUnavailableError, UnsupportedError, ValueRangeError
from sparsert.runtime import host
from sparsert.runtime.cpu import address_of
from sparsert.runtime.memory import ExecutableMemory, aligned_empty
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import NATIVE_ORDER, TARGETS

native = pytest.mark.isa("x86-avx2")
RETURN_7 = bytes.fromhex("f30f1efa b807000000 c3")  # endbr64; mov eax, 7; ret


def call(memory: ExecutableMemory) -> int:
    return ctypes.CFUNCTYPE(ctypes.c_int)(memory.address)()


def mapping(address: int) -> str:
    """The line of /proc/self/maps that ``address`` lies in; empty if none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return line
    return ""


# ---- memory ----------------------------------------------------------------------------------------------------------


@native
def test_code_is_never_writable_and_executable() -> None:
    def both() -> set[str]:  # other libraries of this process may do as they like
        return {line for line in Path("/proc/self/maps").read_text().splitlines() if "wx" in line.split()[1]}

    before = both()
    memory = ExecutableMemory(RETURN_7)
    assert call(memory) == 7
    assert mapping(memory.address).split()[1] == "r-xp"
    assert both() <= before


@native
def test_code_is_unmapped_with_its_object() -> None:
    memory = ExecutableMemory(RETURN_7)
    address = memory.address
    memory.close()
    memory.close()
    assert mapping(address) == ""
    memory = ExecutableMemory(RETURN_7)
    address = memory.address
    del memory
    assert mapping(address) == ""


@native
@pytest.mark.parametrize("size", [4096, 4097, (2 << 20) - 5, 2 << 20, (5 << 20) + 3])
def test_code_of_any_size(size: int) -> None:
    code = bytes.fromhex("90") * (size - len(RETURN_7)) + RETURN_7
    memory = ExecutableMemory(code)
    assert call(memory) == 7
    assert ctypes.string_at(memory.address, size) == code
    assert memory.size % 4096 == 0
    if size >= 2 << 20:  # so that huge pages fit
        assert memory.address % (2 << 20) == 0
    address, end = memory.address, memory.address + memory.size - 1
    memory.close()
    assert mapping(address) == ""
    assert mapping(end) == ""


def test_no_code_is_an_error() -> None:
    with pytest.raises(ExecutableMemoryError):
        ExecutableMemory(b"")


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 1001])
def test_aligned_vectors(count: int, dtype: Any) -> None:
    for alignment in (64, 4096):
        array = aligned_empty(count, dtype, alignment)
        assert (array.shape, array.dtype) == ((count,), np.dtype(dtype))
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array[...] = 3
        assert count == 0 or array.__array_interface__["data"][0] % alignment == 0


@pytest.mark.parametrize("count", [2**45, 2**61, 2**80])
def test_vectors_beyond_memory(count: int) -> None:
    with pytest.raises(ValueRangeError, match="cannot be allocated") as caught:
        aligned_empty(count)
    assert caught.value.hint


def test_addresses() -> None:
    base = np.zeros((4, 6), np.float32)
    for array in (
        base,
        base[1:, 2:],
        base[::-1],
        base.T,
        base[:0],
        np.broadcast_to(base[0], (3, 6)),
        np.zeros((), np.float32),
    ):
        assert address_of(array) == array.__array_interface__["data"][0]


# ---- host ------------------------------------------------------------------------------------------------------------


@native
def test_features_agree_with_the_kernel() -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    names = {"sse4.2": "sse4_2", "avx512vnni": "avx512_vnni", "avx512vbmi": "avx512vbmi", "avx512bf16": "avx512_bf16"}
    for feature in ("sse4.2", "fma", "avx", "f16c", "avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl", *names):
        assert (feature in host.cpu_features()) == (names.get(feature, feature) in flags), feature


def test_report() -> None:
    report = host.host_report()
    assert set(report["targets"]) == {"x86-avx512", "x86-avx2", "aarch64-neon", "reference"}
    assert report["targets"]["reference"] is None
    assert report["native"] is None or report["targets"][report["native"]] is None
    assert 1 <= report["threads"] <= (os.cpu_count() or 1)
    assert all(size > 0 for size in report["caches"].values())


def test_targets_by_name() -> None:
    for name in TARGETS:
        assert host.lookup(name).name == name
    with pytest.raises(UnsupportedError, match="unknown target 'x86-sse2'") as caught:
        host.lookup("x86-sse2")
    assert all(name in caught.value.hint for name in TARGETS)
    assert caught.value.where == "target"


@pytest.mark.parametrize(
    ("features", "found"), [({"avx2", "fma", "avx512f"}, "x86-avx2"), ({"avx2"}, None), (set(), None)]
)
def test_native_is_the_best_that_runs(features: set[str], found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "on_linux_x86", lambda: True)
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset(features))
    assert host.host_report()["native"] == found
    if found:
        assert host.resolve("native").name == found
        with pytest.raises(TargetUnavailableError, match="avx512bw, avx512dq, avx512vl") as caught:
            host.resolve("x86-avx512")
        assert caught.value.where == "target='x86-avx512'"
    else:
        with pytest.raises(TargetUnavailableError, match="lacks") as caught:
            host.resolve("native")
        assert all(name in str(caught.value) for name in NATIVE_ORDER)
    assert "reference" in caught.value.hint
    assert host.resolve("reference").isa == "reference"


def test_threads_obey_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert host.default_threads() == 1


# ---- threads, signals, fork ------------------------------------------------------------------------------------------


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("target", COMPILED)
def test_eight_threads_call_one_operator(target: str, rng: np.random.Generator) -> None:
    weight, bias = dense_matrix(rng, 70, 90, 0.2), rng.standard_normal(70).astype(np.float32)
    op = sparsert.compile_matmul(
        weight, bias, "silu", target=target, schedule=sparsert.Schedule(rows=4, k_segment=40, packing="beside")
    )
    xs = [rng.standard_normal((90, columns)).astype(np.float32) for columns in (3, 16, 40, 200)]
    wanted = [op(x) for x in xs]
    for x, y in zip(xs, wanted, strict=True):
        assert not complaint(y, expected(as_sparse(weight), x, bias, "silu"))
    ready = threading.Barrier(8)

    def work(first: int) -> int:
        ready.wait()
        return sum(not same_bits(op(xs[i % 4]), wanted[i % 4]) for i in range(first, first + 400))

    with switching_often(), ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


@pytest.mark.parametrize("target", COMPILED)
def test_refit_while_others_call(target: str, rng: np.random.Generator) -> None:
    weight = dense_matrix(rng, 60, 60, 0.3)
    op = sparsert.compile_matmul(weight, target=target)
    x = rng.standard_normal((60, 80)).astype(np.float32)
    allowed = [op(x)]
    op.refit(-3 * weight)
    allowed.append(op(x))
    stop = threading.Event()

    def work(_: int) -> int:
        wrong = 0
        while not stop.is_set():
            y = op(x)
            wrong += not any(same_bits(y, one) for one in allowed)
        return wrong

    with switching_often(), ThreadPoolExecutor(3) as pool:
        running = pool.map(work, range(3))
        try:
            for turn in range(300):
                op.refit(weight if turn % 2 else -3 * weight)
        finally:
            stop.set()
        assert sum(running) == 0


def in_child(body: str, *arguments: str) -> str:
    """What a Python process says that runs ``body`` after setting up a layer: op, x and its result y."""
    setup = """
        import os, signal, sys, threading
        import numpy as np
        import sparsert
        rng = np.random.default_rng(5)
        w = np.where(rng.random((200, 180)) < 0.2, rng.standard_normal((200, 180)), 0).astype(np.float32)
        x = rng.standard_normal((180, 72)).astype(np.float32)
        op = sparsert.compile_matmul(w, activation="gelu", target=sys.argv[1])
        y = op(x)
        assert np.abs(sparsert.compile_matmul(w, activation="gelu", target="reference")(x) - y).max() < 1e-4
    """
    program = textwrap.dedent(setup) + textwrap.dedent(body)
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsert.__file__).parents[1])}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.mark.parametrize("target", COMPILED)
def test_ten_thousand_signals(target: str) -> None:
    """The handler is native and counts only signals that interrupt the operator's code (rdx: the saved registers)."""
    said = in_child(
        """
        import ctypes, struct
        from sparsert.runtime import memory
        made, original = [], memory.ExecutableMemory.__init__
        def record(self, code):
            original(self, code)
            made.append(self)
        memory.ExecutableMemory.__init__ = record
        op = sparsert.compile_matmul(w, activation="gelu", target=sys.argv[1])
        inside = ctypes.c_uint64()
        handler = memory.ExecutableMemory(
            bytes.fromhex("f30f1efa 488b82a8000000")  # endbr64; mov rax, [rdx + 168]: the saved rip
            + bytes.fromhex("48b9") + struct.pack("<Q", made[-1].address)  # mov rcx, start of the code
            + bytes.fromhex("4829c8 483d") + struct.pack("<I", made[-1].size)  # sub rax, rcx; cmp rax, size
            + bytes.fromhex("730e 48b8") + struct.pack("<Q", ctypes.addressof(inside))  # jae to ret; mov rax, counter
            + bytes.fromhex("f048ff00 c3")  # lock inc qword [rax]; ret
        )
        ctypes.CDLL(None).signal(int(signal.SIGALRM), ctypes.c_void_p(handler.address))
        signal.setitimer(signal.ITIMER_REAL, 3e-5, 3e-5)
        wrong = 0
        while inside.value < 10_000:
            wrong += op(x).tobytes() != y.tobytes()
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(wrong, inside.value >= 10_000)
        """,
        target,
    )
    assert said == "0 True"


@pytest.mark.parametrize("target", COMPILED)
def test_signals_from_another_thread(target: str) -> None:
    said = in_child(
        """
        handled, wrong = 0, 0
        def handler(number, frame):
            global handled
            handled += 1
        signal.signal(signal.SIGUSR1, handler)
        main, done = threading.main_thread().ident, threading.Event()
        def send():
            for _ in range(10_000):
                signal.pthread_kill(main, signal.SIGUSR1)
            done.set()
        sender = threading.Thread(target=send)
        sender.start()
        while not done.is_set():
            wrong += op(x).tobytes() != y.tobytes()
        sender.join()
        print(wrong, handled > 0)
        """,
        target,
    )
    assert said == "0 True"


@pytest.mark.parametrize("target", COMPILED)
def test_fork_after_use(target: str) -> None:
    said = in_child(
        """
        child = os.fork()
        if not child:
            same = op(x).tobytes() == y.tobytes()
            again = sparsert.compile_matmul(w, activation="gelu", target=sys.argv[1])(x).tobytes() == y.tobytes()
            sys.exit(0 if same and again else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), op(x).tobytes() == y.tobytes())
        """,
        target,
    )
    assert said == "0 True"


# ---- state of the caller ---------------------------------------------------------------------------------------------

FLUSH, DENORMALS_ARE_ZERO, FLAGS = 1 << 15, 1 << 6, 0x3F


@contextmanager
def mxcsr() -> Iterator[tuple[Callable[[], int], Callable[[int], None]]]:
    """Functions that read and write this thread's SSE control register, which is restored afterwards."""
    store = ExecutableMemory(bytes.fromhex("f30f1efa 0fae1f c3"))  # stmxcsr [rdi]
    load = ExecutableMemory(bytes.fromhex("f30f1efa 0fae17 c3"))  # ldmxcsr [rdi]
    cell = ctypes.c_uint32()
    at = ctypes.c_void_p(ctypes.addressof(cell))

    def read() -> int:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(store.address)(at)
        return cell.value

    def write(value: int) -> None:
        cell.value = value
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(load.address)(at)

    before = read()
    try:
        yield read, write
    finally:
        write(before)


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_mxcsr_is_the_callers(target: str, activation: str | None, rng: np.random.Generator) -> None:
    op = sparsert.compile_matmul(np.full((1, 1), 0.5, np.float32), activation=activation, target=target)
    linear = sparsert.compile_linear(dense_matrix(rng, 9, 9, 0.5), activation=activation, target=target)
    x = np.full((1, 16), 1e-38, np.float32)
    out, other, y = np.empty_like(x), rng.standard_normal((20, 9)).astype(np.float32), np.empty((20, 9), np.float32)
    with mxcsr() as (read, write):
        usual = read()
        for control in (usual, usual | FLUSH, usual | FLUSH | DENORMALS_ARE_ZERO):
            write(control & ~FLAGS)
            op(x, out=out)
            linear(other, out=y)
            assert read() & ~FLAGS == control & ~FLAGS
            if activation is None:
                write(usual)  # comparing is arithmetic too
                assert np.all(out == 0) if control & FLUSH else np.all(out == np.float32(1e-38) * np.float32(0.5))


def used() -> tuple[int, int]:
    """Resident bytes and number of mappings of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(Path("/proc/self/maps").read_text().splitlines())


def cycles(count: int, target: str) -> None:
    rng = np.random.default_rng(1)
    weight, x = dense_matrix(rng, 40, 30, 0.3), rng.standard_normal((30, 48)).astype(np.float32)
    for turn in range(count):
        op = sparsert.compile_matmul(
            weight, activation="relu", target=target, schedule=sparsert.Schedule(4, k_segment=10, packing="beside")
        )
        op(x[:, : 16 + turn % 32])
        if turn % 8 == 0:
            op.refit(weight)
            op.listing()


def assert_nothing_stays(count: int, target: str) -> None:
    cycles(40, target)
    bytes_before, maps_before = used()
    cycles(count, target)
    bytes_after, maps_after = used()
    assert maps_after - maps_before < 20
    assert bytes_after - bytes_before < 24 << 20  # an operator of this test is 100 kB


@pytest.mark.parametrize("target", COMPILED)
def test_operators_leave_no_memory_behind(target: str) -> None:
    assert_nothing_stays(400, target)


@pytest.mark.full
@pytest.mark.parametrize("target", COMPILED)
def test_thousands_of_operators_leave_no_memory_behind(target: str) -> None:
    assert_nothing_stays(2500, target)


@native
def test_many_shapes_on_one_operator_leave_no_memory_behind() -> None:
    """Whatever an operator keeps per shape is bounded."""
    op = sparsert.compile_linear(np.eye(64, dtype=np.float32))
    wide = np.ones((4096, 64), np.float32)
    for columns in range(16, 416):
        op(wide[:columns])
    before, _ = used()
    for columns in range(1016, 2016):
        assert op(wide[:columns]).sum() == 64 * columns
    assert used()[0] - before < 64 << 20


# ---- errors ----------------------------------------------------------------------------------------------------------

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SparseRTError)]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(kind: type[errors.SparseRTError], protocol: int) -> None:
    error = kind("three words here", where="x", hint="Do that.")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert (again.what, again.where, again.hint, str(again), again.args) == (
        error.what,
        error.where,
        error.hint,
        str(error),
        error.args,
    )


def test_errors_have_codes_of_their_own() -> None:
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)
    for kind in CLASSES:
        assert str(kind("what", where="place", hint="Hint.")).startswith(f"[{kind.code}] place: what")
        assert str(kind("what")) == f"[{kind.code}] what"
