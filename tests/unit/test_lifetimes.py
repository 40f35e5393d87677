"""What an operator keeps, what it lets go of, and what becomes of calls that are under way."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, dense_matrix
from sparsert.errors import (
    FormatError,
    InternalError,
    PatternMismatchError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
)
from sparsert.runtime import host
from sparsert.sparsity.pattern import as_sparse, from_csr


@pytest.mark.isa("x86-avx2")
def test_the_process_may_end_while_daemon_threads_compute() -> None:
    script = """
        import threading, time
        import numpy as np
        import sparsert
        rng = np.random.default_rng(0)
        w = (rng.standard_normal((256, 256)) * (rng.random((256, 256)) < 0.1)).astype(np.float32)
        op = sparsert.compile_matmul(w)
        def loop():
            x, y = np.ones((256, 4096), np.float32), np.empty((256, 4096), np.float32)
            while True:
                op(x, out=y)
        for _ in range(3):
            threading.Thread(target=loop, daemon=True).start()
        time.sleep(0.2)
    """
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", [*COMPILED, "reference"])
def test_weights_changed_after_compilation_do_not_matter(target: str, rng: np.random.Generator) -> None:
    matrix = as_sparse(dense_matrix(rng, 20, 30, 0.3))
    data = matrix.values.copy()
    op = sparsert.compile_matmul((data, matrix.pattern.indices, matrix.pattern.indptr, (20, 30)), target=target)
    x = rng.standard_normal((30, 17)).astype(np.float32)
    before = op(x)
    data[:] = 0
    assert np.array_equal(op(x), before)
    fresh = 2 * matrix.values
    op.refit((fresh, matrix.pattern.indices, matrix.pattern.indptr, (20, 30)))
    fresh[:] = 0
    assert np.allclose(op(x), 2 * before, rtol=1e-5, atol=1e-5)


def test_a_sparse_refit_takes_no_dense_detour() -> None:
    n = 1 << 20  # a dense float32 matrix of this size would take 4 TiB
    rows = np.array([0, 5, n - 1])
    indptr = np.searchsorted(rows, np.arange(n + 1))
    pattern = from_csr(np.ones(3, np.float32), np.array([7, 0, n - 1]), indptr, (n, n)).pattern
    some = from_csr(np.array([4.0], np.float32), np.array([0]), np.searchsorted([5], np.arange(n + 1)), (n, n))
    assert pattern.values_of(some).tolist() == [0.0, 4.0, 0.0]
    other = from_csr(np.array([4.0], np.float32), np.array([1]), np.searchsorted([5], np.arange(n + 1)), (n, n))
    with pytest.raises(PatternMismatchError):
        pattern.values_of(other)
    with pytest.raises(ShapeError):
        pattern.values_of(from_csr(np.zeros(0, np.float32), np.zeros(0, int), np.zeros(n, int), (n - 1, n)))


@pytest.mark.parametrize("target", COMPILED)
def test_frames_of_many_shapes_do_not_pile_up(target: str, rng: np.random.Generator) -> None:
    op = sparsert.compile_linear(dense_matrix(rng, 64, 20_000, 0.01), target=target)
    product: Any = op._compiled.product
    for rows in range(16, 80):
        op(np.ones((rows, 20_000), np.float32))
    frames = [f for binding in product._bindings.values() for free in binding.free.values() for f in free]
    kept = sum(frame.nbytes for frame in frames)
    assert 0 < kept <= 64 << 20


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_operator_cannot_be_copied(copying: Any) -> None:
    with pytest.raises(UnsupportedError, match="compile again"):
        copying(sparsert.compile_matmul(np.eye(4, dtype=np.float32), target="reference"))


@pytest.mark.parametrize("target", COMPILED)
def test_the_fast_path_of_linear_gives_the_same_bits(target: str, rng: np.random.Generator) -> None:
    for m in (3, 6, 8):  # 3 is computed as a row-major product, whose shapes must not be mistaken for these
        op = sparsert.compile_linear(dense_matrix(rng, m, m, 0.5), target=target)
        x = rng.standard_normal((m, m)).astype(np.float32)
        first, again = np.empty((m, m), np.float32), np.empty((m, m), np.float32)
        op(x, out=first)
        assert np.array_equal(op(x, out=again), first)
        turned = np.asfortranarray(x)
        assert np.array_equal(op(turned, out=np.empty((m, m), np.float32)), op(turned))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: from_csr(np.ones(1, np.float32), [0], [0, 1], "ab"), ShapeError),
        (lambda: from_csr(np.ones(1, np.float32), [0], [0, 1], None), ShapeError),
        (lambda: from_csr(np.ones(1, np.float32), [0], [0, 1], (1.0, 1.0)), ShapeError),
        (lambda: from_csr([[1.0], [2.0, 3.0]], [0], [0, 1], (1, 1)), FormatError),
        (lambda: host.lookup(["native"]), UnsupportedError),  # type: ignore[arg-type]
        (lambda: sparsert.compile_matmul(np.eye(4, dtype="f"), layout=np.zeros(2)), UnsupportedError),  # type: ignore[arg-type]
        (lambda: sparsert.compile_matmul(np.eye(4, dtype="f"), precision=np.zeros(2)), UnsupportedError),  # type: ignore[arg-type]
        (lambda: sparsert.Schedule(4, order=[]), ScheduleError),  # type: ignore[arg-type]
        (lambda: sparsert.Schedule(4, packing="no"), ScheduleError),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_mistakes_are_named(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


def test_an_immediate_that_does_not_fit_is_a_bug_of_ours() -> None:
    from sparsert.codegen.x86.encoder import LEGACY, Batch, encode
    from sparsert.codegen.x86.table import ROW

    for name, value in (("add_imm", (1 << 40) + 5), ("add_imm8", 300)):
        with pytest.raises(InternalError):
            encode([Batch(ROW[name], LEGACY, np.arange(1), {"rm": 0, "imm": value})], 0)


@pytest.mark.isa("x86-avx2")
def test_shared_code_is_mapped_while_a_call_may_come() -> None:
    script = """
        import numpy as np
        import sparsert
        from sparsert.operators import compact, dense
        rng = np.random.default_rng(0)
        w = (rng.standard_normal((96, 96)) * (rng.random((96, 96)) < 0.2)).astype(np.float32)
        few, looped = sparsert.compile_matmul(w), sparsert.compile_matmul(w, max_code_bytes=9000)
        full = sparsert.compile_matmul(rng.standard_normal((96, 96), np.float32), form="dense")
        for op, columns in ((few, 1), (few, 3), (looped, 40), (full, 1), (full, 3), (full, 40)):
            x = rng.standard_normal((96, columns), np.float32)
            first, out = op(x), np.empty((96, columns), np.float32)
            op(x, out=out)
            bound = op.bind(x)
            for cache in (compact._executable, dense.code_of, dense.transposer_of):
                cache.cache_clear()
            assert np.array_equal(op(x), first)
            assert np.array_equal(op(x, out=out), first)
            assert np.array_equal(bound(), first)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_that_holds_machine_code_is_copied_or_pickled(rng: np.random.Generator) -> None:
    w = rng.standard_normal((6, 6, 3, 3)).astype(np.float32)
    x = rng.standard_normal((1, 6, 9, 9)).astype(np.float32)
    conv, transposed, product = (
        sparsert.compile_conv2d(w), sparsert.compile_conv_transpose2d(w, stride=2), sparsert.compile_product()
    )  # fmt: skip
    for held in (conv, transposed, product, conv.bind(x), transposed.bind(x), product.bind(x, x)):
        assert repr(held)
        for what in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(UnsupportedError, match="cannot be copied or pickled"):
                what(held)
    assert "6x6 nnz=324" in repr(transposed)
