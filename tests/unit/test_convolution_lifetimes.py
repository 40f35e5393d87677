"""Convolutions of every kind: many callers at once, forks, and thousands of operators made and dropped."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, same_bits
from sparsert.operators import images
from sparsert.schedule import cost
from unit.test_convolution import pruned
from unit.test_runtime import used

KINDS = ("images", "depthwise", "transposed", "looped")


def operator(kind: str, rng: np.random.Generator, target: str, **options: Any) -> tuple[Any, Any]:
    """An operator and its weight."""
    settings: dict[str, Any] = {"target": target, **options}
    if kind == "depthwise":
        w = pruned(rng, (12, 1, 3, 3), 2.0)
        return sparsert.compile_conv2d(w, activation="silu", padding=1, groups=12, **settings), w
    if kind == "transposed":
        w = pruned(rng, (12, 10, 3, 3), 0.3)
        return sparsert.compile_conv_transpose2d(w, activation="silu", stride=2, **settings), w
    w = pruned(rng, (30, 12, 3, 3), 0.3)
    if kind == "looped":
        settings["max_code_bytes"] = 9500
    op = sparsert.compile_conv2d(w, activation="silu", padding=1, **settings)
    assert (op.schedule is None) == (kind == "looped")
    return op, w


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", COMPILED)
def test_eight_callers_of_one_operator(
    target: str, kind: str, threads: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images of several sizes, some for the first time, bound and unbound, while somebody refits."""
    monkeypatch.setattr(cost, "LEAST_SHARE", 1)
    monkeypatch.setattr(images, "_LEAST_COLUMNS", 16)
    op, w = operator(kind, rng, target, threads=threads)
    xs = [rng.standard_normal((2, 12, n, n + 3)).astype(np.float32) for n in (5, 9, 14, 17)]
    results: dict[int, list[Any]] = {}
    one = {"images": sparsert.compile_conv2d, "looped": sparsert.compile_conv2d, "depthwise": sparsert.compile_conv2d,
           "transposed": sparsert.compile_conv_transpose2d}[kind]  # fmt: skip
    options: dict[str, Any] = {
        "images": {"padding": 1}, "looped": {"padding": 1}, "depthwise": {"padding": 1, "groups": 12},
        "transposed": {"stride": 2},
    }[kind]  # fmt: skip
    for sign in (1, -1):
        single = one(sign * w, activation="silu", target=target, threads=1, **options)
        results[sign] = [single(x) for x in xs]

    def caller(number: int) -> int:
        wrong, at = 0, number % len(xs)
        bound = op.bind(xs[at]) if number % 2 else None
        out = np.empty_like(results[1][at])
        for turn in range(60):
            if number == 7 and turn % 5 == 0:
                op.refit(w if turn % 2 else -w)
                continue
            y = bound() if bound else op(xs[at], out=out)
            # A transposed convolution is refitted phase by phase: rows and columns of a phase are old or new.
            step = 2 if kind == "transposed" else 1
            for i in range(step):
                for j in range(step):
                    some = y[:, :, i::step, j::step]
                    wrong += not any(same_bits(some, results[s][at][:, :, i::step, j::step]) for s in results)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(caller, range(8))) == 0
    op.refit(w)
    assert all(same_bits(op(x), y) for x, y in zip(xs, results[1], strict=True))


def in_child(body: str) -> str:
    setup = """
        import os, signal, sys, threading, time
        import numpy as np
        import sparsert
        from sparsert.operators import images
        from sparsert.schedule import cost
        cost.LEAST_SHARE = 1
        images._LEAST_COLUMNS = 16
        rng = np.random.default_rng(5)
        def pruned(*shape): return np.where(rng.random(shape) < 0.3, rng.standard_normal(shape), 0).astype(np.float32)
        x = rng.standard_normal((2, 12, 14, 14)).astype(np.float32)
        weights = pruned(30, 12, 3, 3), rng.standard_normal((12, 1, 3, 3)).astype(np.float32), pruned(12, 10, 3, 3)
        def compiled(threads, **more):
            return [sparsert.compile_conv2d(weights[0], padding=1, threads=threads, **more),
                    sparsert.compile_conv2d(weights[1], padding=1, groups=12, threads=threads, **more),
                    sparsert.compile_conv_transpose2d(weights[2], stride=2, threads=threads, **more)]
        ops, want = compiled(3), [op(x).tobytes() for op in compiled(1)]
        def right(): return all(op(x).tobytes() == y for op, y in zip(ops, want))
        def ended(pid, seconds=60):
            for _ in range(100 * seconds):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done: return os.waitstatus_to_exitcode(status)
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        assert right()
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsert.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c",
                           textwrap.dedent(setup) + textwrap.dedent(body)],
                          capture_output=True, text=True, timeout=300, check=False, env=environment)  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.mark.isa("x86-avx2")
def test_fork_after_use() -> None:
    said = in_child(
        """
        codes = []
        for _ in range(5):
            pid = os.fork()
            if not pid:
                fresh = all(op(x).tobytes() == y for op, y in zip(compiled(2), want))
                for op, w in zip(ops, weights): op.refit(w)
                sys.exit(0 if right() and fresh else 3)
            codes.append(ended(pid))
            assert right()
        print(codes)
        """
    )
    assert said == str([0] * 5)


@pytest.mark.isa("x86-avx2")
def test_fork_while_another_thread_refits() -> None:
    """Whoever held a lock of an operator is not there in the child: it calls and refits nonetheless."""
    said = in_child(
        """
        matrix = np.where(rng.random((90, 80)) < 0.3, rng.standard_normal((90, 80)), 0).astype(np.float32)
        product = sparsert.compile_matmul(matrix, threads=3)
        columns = rng.standard_normal((80, 50)).astype(np.float32)
        product(columns[:, :1]), product(columns)
        stop = threading.Event()
        def loop():
            while not stop.is_set():
                for op, w in zip(ops, weights): op.refit(w)
                product.refit(matrix)
        refitters = [threading.Thread(target=loop) for _ in range(2)]
        for refitter in refitters: refitter.start()
        codes = []
        for _ in range(40):
            pid = os.fork()
            if not pid:
                good = right()
                for op, w in zip(ops, weights): op.refit(w)
                product.refit(matrix)
                product(columns[:, :2]), product(columns)
                shape = np.ones((1, 12, 7, 9), np.float32)
                for op in ops: op(shape)  # a depthwise one makes code for it
                os._exit(0 if good and right() else 3)
            codes.append(ended(pid))
        stop.set()
        for refitter in refitters: refitter.join()
        print(sorted(set(map(str, codes))))
        """
    )
    assert said == "['0']"


@pytest.mark.isa("x86-avx2")
def test_a_lock_held_at_a_fork_is_open_in_the_child() -> None:
    said = in_child(
        """
        held, release = threading.Event(), threading.Event()
        locks = [ops[0]._compiled.product._changing, ops[1]._compiled.product._changing,
                 *(part.op._compiled.product._changing for part in ops[2].parts)]
        product = sparsert.compile_matmul(np.eye(40, dtype=np.float32))
        locks += [product._compiled.small._lock]
        def hold():
            for lock in locks: lock.__enter__()
            held.set()
            release.wait()
            for lock in locks: lock.__exit__()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        pid = os.fork()
        if not pid:
            for op, w in zip(ops, weights): op.refit(w)
            product.refit(2 * np.eye(40, dtype=np.float32))
            product(np.ones((40, 1), np.float32))
            os._exit(0 if right() else 3)
        code = ended(pid, 20)
        release.set()
        holder.join()
        print(code, right())
        """
    )
    assert said == "0 True"


def cycles(count: int, target: str, rng: np.random.Generator) -> None:
    ws = pruned(rng, (9, 4, 3, 3), 0.4), pruned(rng, (4, 1, 3, 3), 2.0), pruned(rng, (4, 5, 2, 2), 0.5)
    x, y = np.ones((1, 4, 9, 9), np.float32), np.empty((1, 9, 9, 9), np.float32)
    for number in range(count):
        kind = number % 4
        if kind == 0:
            op: Any = sparsert.compile_conv2d(ws[0], padding=1, target=target)
            op(x, out=y)
        elif kind == 1:
            op = sparsert.compile_conv2d(ws[1], padding=1, groups=4, target=target, threads=2)
            op(x)
        elif kind == 2:
            op = sparsert.compile_conv_transpose2d(ws[2], stride=2, target=target)
        else:
            op = sparsert.compile_conv2d(np.tile(ws[0], (4, 1, 1, 1)), padding=1, target=target, max_code_bytes=9500)
        op.bind(x)()
        op.refit(op_weight(ws, kind))


def op_weight(ws: tuple[Any, ...], kind: int) -> Any:
    return (ws[0], ws[1], ws[2], np.tile(ws[0], (4, 1, 1, 1)))[kind]


def grows_not(count: int, target: str, rng: np.random.Generator) -> None:
    gc.collect()
    cycles(60, target, rng)
    gc.disable()  # nothing waits for the collector of cycles
    try:
        bytes_before, maps_before = used()
        cycles(count, target, rng)
        bytes_after, maps_after = used()
    finally:
        gc.enable()
    assert maps_after - maps_before < 20
    assert bytes_after - bytes_before < 8 << 20


@pytest.mark.parametrize("target", COMPILED)
def test_hundreds_of_operators_leave_nothing_behind(target: str, rng: np.random.Generator) -> None:
    grows_not(400, target, rng)


@pytest.mark.full
@pytest.mark.parametrize("target", COMPILED)
def test_thousands_of_operators_leave_nothing_behind(target: str, rng: np.random.Generator) -> None:
    grows_not(4000, target, rng)
