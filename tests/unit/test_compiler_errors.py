"""Whatever a user gets wrong when compiling: the documented class, the argument it is about, and what to do."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, complaint, dense_matrix, expected
from sparsert import Clip, Schedule
from sparsert.errors import (
    CodeBudgetError,
    DTypeError,
    ExecutableMemoryError,
    FormatError,
    ScheduleError,
    ShapeError,
    SparseRTError,
    TargetUnavailableError,
    UnsupportedError,
    ValueRangeError,
)  # fmt: skip
from sparsert.listings import compile_listing
from sparsert.runtime import host, memory
from sparsert.sparsity.pattern import MAX_EXTENT, as_sparse
from sparsert.target import TARGETS

W = np.eye(6, 8, dtype=np.float32)
BOTH = pytest.mark.parametrize("compile_", [sparsert.compile_matmul, sparsert.compile_linear])


class Stubborn:
    """A tensor that DLPack cannot export, as a parameter that requires its gradient."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("requires grad")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def filled(shape: tuple[int, ...], value: float, dtype: str = "float32") -> np.ndarray:
    return np.full(shape, value, dtype)


def csr(data: Any = (1.0, 2.0), indices: Any = (0, 1), indptr: Any = (0, 1, 2), shape: Any = (2, 8)) -> tuple[Any, ...]:
    return np.array(data, np.float32), np.array(indices), np.array(indptr), shape


Kind = type[SparseRTError] | tuple[type[SparseRTError], ...]
WEIGHTS: dict[str, tuple[Any, Kind]] = {
    "a vector": (filled((8,), 1), ShapeError),
    "a scalar": (3.0, ShapeError),
    "nothing": (None, ShapeError),
    "a word": ("weight", ShapeError),
    "three dimensions": (filled((2, 8, 1), 1), ShapeError),
    "a convolution": (filled((6, 8, 1, 1), 1), ShapeError),
    "integers": (W.astype(np.int8), DTypeError),
    "booleans": (W > 0, DTypeError),
    "complex": (W.astype(np.complex64), DTypeError),
    "objects": (W.astype(object), DTypeError),
    "strings": (W.astype(str), DTypeError),
    "a tensor that cannot be exported": (Stubborn(), DTypeError),
    "ragged lists": ([[1.0, 2.0], [3.0]], (ShapeError, DTypeError, FormatError)),
    "a CSR tuple without shape": (csr()[:3], (ShapeError, DTypeError, FormatError)),
    "NaN": (filled((6, 8), np.nan), ValueRangeError),
    "infinity": (filled((6, 8), -np.inf), ValueRangeError),
    "too large for float32": (filled((6, 8), 1e39, "float64"), ValueRangeError),
    "CSR with NaN": (csr(data=(np.nan, 1)), ValueRangeError),
    "CSR whose duplicates overflow": (csr((3e38, 3e38), (1, 1), (0, 2, 2)), ValueRangeError),
    "CSR of integers": ((np.array([1, 2]), *csr()[1:]), DTypeError),
    "CSR with fractional indices": (csr(indices=(0.0, 1.0)), FormatError),
    "CSR with a column too far": (csr(indices=(0, 8)), FormatError),
    "CSR with a negative column": (csr(indices=(0, -1)), FormatError),
    "CSR whose offsets fall": (csr(indptr=(0, 2, 1)), FormatError),
    "CSR with offsets missing": (csr(indptr=(0, 2)), FormatError),
    "CSR with values missing": (csr(data=(1.0,)), FormatError),
    "CSR with three extents": (csr(shape=(2, 8, 1)), ShapeError),
    "too many rows": (np.broadcast_to(np.float32(0), (MAX_EXTENT + 1, 2)), ValueRangeError),
    "too many columns": (csr(shape=(2, MAX_EXTENT + 1)), ValueRangeError),
    "a size that overflows": (csr(shape=(2, 2**70)), ValueRangeError),
    "a negative extent": (csr(shape=(2, -8)), ValueRangeError),
}


@BOTH
@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("target", ["native", "reference"])
def test_weight(what: str, target: str, compile_: Callable[..., Any]) -> None:
    weight, kind = WEIGHTS[what]
    if target == "native" and host.host_report()["native"] is None:
        pytest.skip("nothing compiled runs here")
    with pytest.raises(SparseRTError) as caught:
        compile_(weight, target=target)
    assert isinstance(caught.value, kind)
    assert caught.value.where == "weight"


ARGUMENTS: dict[str, tuple[dict[str, Any], type[SparseRTError], str]] = {
    "bias too short": ({"bias": filled((5,), 0)}, ShapeError, "bias"),
    "bias of the columns": ({"bias": filled((8,), 0)}, ShapeError, "bias"),
    "bias of two dimensions": ({"bias": filled((6, 1), 0)}, ShapeError, "bias"),
    "bias of float64": ({"bias": filled((6,), 0, "float64")}, DTypeError, "bias"),
    "bias of integers": ({"bias": filled((6,), 0, "int32")}, DTypeError, "bias"),
    "bias in a list": ({"bias": [0.0] * 6}, DTypeError, "bias"),
    "bias that is a number": ({"bias": 1.0}, DTypeError, "bias"),
    "bias with NaN": ({"bias": filled((6,), np.nan)}, ValueRangeError, "bias"),
    "bias with infinity": ({"bias": filled((6,), np.inf)}, ValueRangeError, "bias"),
    "an unknown activation": ({"activation": "swish"}, UnsupportedError, "activation"),
    "an activation in capitals": ({"activation": "ReLU"}, UnsupportedError, "activation"),
    "clip without bounds": ({"activation": "clip"}, UnsupportedError, "activation"),
    "a function": ({"activation": np.tanh}, UnsupportedError, "activation"),
    "a list of activations": ({"activation": ["relu"]}, UnsupportedError, "activation"),
    "a true activation": ({"activation": True}, UnsupportedError, "activation"),
    "an unknown residual": ({"residual": "middle"}, UnsupportedError, "residual"),
    "a true residual": ({"residual": True}, UnsupportedError, "residual"),
    "a residual too early": ({"residual": filled((6, 4), 0)}, UnsupportedError, "residual"),
    "an unknown precision": ({"precision": "f64"}, UnsupportedError, "precision"),
    "no precision": ({"precision": None}, UnsupportedError, "precision"),
    "an unknown target": ({"target": "x86-sse2"}, UnsupportedError, "target"),
    "no target": ({"target": None}, UnsupportedError, "target"),
    "no threads": ({"threads": 0}, ValueRangeError, "threads"),
    "negative threads": ({"threads": -1}, ValueRangeError, "threads"),
    "true threads": ({"threads": True}, ValueRangeError, "threads"),
    "threads in words": ({"threads": "2"}, ValueRangeError, "threads"),
    "half a thread": ({"threads": 1.5}, ValueRangeError, "threads"),
    "a schedule in words": ({"schedule": "fast"}, ScheduleError, "schedule"),
    "a schedule's numbers": ({"schedule": (4, 0, 0)}, ScheduleError, "schedule"),
    "a negative budget": ({"max_code_bytes": -1}, ValueRangeError, "max_code_bytes"),
    "a true budget": ({"max_code_bytes": True}, ValueRangeError, "max_code_bytes"),
    "half a budget": ({"max_code_bytes": 1e6}, ValueRangeError, "max_code_bytes"),
}


@BOTH
@pytest.mark.parametrize("what", ARGUMENTS)
@pytest.mark.parametrize("target", ["native", "reference"])
def test_argument(what: str, target: str, compile_: Callable[..., Any]) -> None:
    options, kind, where = ARGUMENTS[what]
    if target == "native" and host.host_report()["native"] is None:
        pytest.skip("nothing compiled runs here")
    with pytest.raises(SparseRTError) as caught:
        compile_(W, **{"target": target, **options})
    assert type(caught.value) is kind
    assert caught.value.where == where


@pytest.mark.parametrize("layout", ["transposed", "columns", None, 3])
def test_layout(layout: Any) -> None:
    with pytest.raises(UnsupportedError, match="layout") as caught:
        sparsert.compile_matmul(W, layout=layout, target="reference")
    assert caught.value.where == "layout"
    assert all(name in caught.value.hint for name in ("row_major", "tile_major"))


@pytest.mark.parametrize("bounds", [(1, 0), (np.nan, 1), (0, np.nan), ("a", "b"), (None, 1)])
def test_clip_without_a_value_between(bounds: tuple[Any, Any]) -> None:
    for make in (
        lambda: Clip(*bounds),
        lambda: sparsert.compile_matmul(W, activation=("clip", *bounds), target="reference"),
    ):
        with pytest.raises(ValueRangeError):
            make()


def test_names_are_suggested() -> None:
    for options, names in (({"activation": "elu"}, ("relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "Clip")),
                           ({"target": "arm"}, ("native", "x86-avx512", "x86-avx2", "aarch64-neon", "reference")),
                           ({"residual": 1}, ("before", "after")),
                           ({"precision": "bf16"}, ("f32",))):  # fmt: skip
        with pytest.raises(UnsupportedError) as caught:
            sparsert.compile_matmul(W, **options)  # type: ignore[arg-type]
        assert all(name in caught.value.hint for name in names)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8"])
def test_weights_of_any_floating_type(dtype: str) -> None:
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    assert np.array_equal(sparsert.compile_matmul((2 * W).astype(dtype), target="reference")(x), 2 * x[:6])


# ---- schedules and budgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_too_many_rows(target: str, activation: str | None) -> None:
    for compile_ in (sparsert.compile_matmul, sparsert.compile_linear, compile_listing):
        with pytest.raises(ScheduleError, match="33 rows need") as caught:
            compile_(W, activation=activation, target=target, schedule=Schedule(rows=33))
        assert caught.value.where == "rows"
        most = int(caught.value.hint.split("rows <= ")[1].rstrip("."))
        assert compile_(W, activation=activation, target=target, schedule=Schedule(rows=most))
        with pytest.raises(ScheduleError):
            compile_(W, activation=activation, target=target, schedule=Schedule(rows=most + 1))


@pytest.mark.parametrize("target", COMPILED)
def test_code_budget(target: str, rng: np.random.Generator) -> None:
    weight = dense_matrix(rng, 60, 60, 0.4)
    for compile_ in (sparsert.compile_matmul, sparsert.compile_linear):
        needed = compile_(weight, target=target).stats.code_bytes
        assert compile_(weight, target=target, max_code_bytes=needed).stats.code_bytes == needed
        looped = compile_(weight, target=target, max_code_bytes=needed - 1)
        assert 1000 < looped.stats.code_bytes < needed
        assert looped.schedule is None
        given = Schedule(rows=4)
        with pytest.raises(CodeBudgetError, match="1000 are permitted"):
            compile_(weight, target=target, max_code_bytes=1000, schedule=given)
        for budget in (1000, 0):
            with pytest.raises(CodeBudgetError, match=f"{budget} are permitted") as caught:
                compile_(weight, target=target, max_code_bytes=budget)
            assert caught.value.where == "max_code_bytes"
            assert "reference" in caught.value.hint
    assert sparsert.compile_matmul(weight, target="reference", max_code_bytes=0).stats.code_bytes == 0


def test_a_hopeless_budget_is_refused_before_any_work() -> None:
    """A billion nonzeros would take minutes and gigabytes; their pattern is a view here."""
    columns = 2**24
    weight = as_sparse((np.ones(columns, np.float32), np.arange(columns), np.array([0, columns]), (1, columns)))
    with pytest.raises(CodeBudgetError, match="at least"):
        sparsert.compile_matmul(weight, target=_compiled_target(), max_code_bytes=1 << 20, form="sparse")


def _compiled_target() -> str:
    found: str | None = host.host_report()["native"]
    if found is None:
        pytest.skip("nothing compiled runs here")
    return found


def test_the_reference_has_no_listing() -> None:
    with pytest.raises(UnsupportedError) as caught:
        compile_listing(W, target="reference")
    assert caught.value.where == "target"


# ---- other machines --------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[("darwin", "arm64", "Darwin"), ("linux", "riscv64", "Linux"), ("win32", "AMD64", "Windows")],
    ids=lambda p: p[2],
)
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Another operating system or processor, as far as Python tells."""
    system, machine, name = request.param
    monkeypatch.setattr(host, "cpu_features", host.cpu_features.__wrapped__)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: name)
    return name, machine


def test_other_machines(elsewhere: tuple[str, str]) -> None:
    for target in ("native", "x86-avx512", "x86-avx2"):
        for compile_ in (sparsert.compile_matmul, sparsert.compile_linear):
            with pytest.raises(TargetUnavailableError) as caught:
                compile_(W, target=target)
            assert f"this is {' '.join(elsewhere)}" in caught.value.what
            assert target in caught.value.where
            assert "reference" in caught.value.hint
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    assert np.array_equal(sparsert.compile_matmul(W, target="reference")(x), x[:6])
    for target in ("x86-avx512", "x86-avx2"):
        assert "vmulps" in compile_listing(W, target=target)
    report = host.host_report()
    assert report["native"] is None
    assert report["features"] == []
    assert " ".join(elsewhere) in report["targets"]["x86-avx2"]


def test_code_for_the_other_processor_is_listed_but_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = [name for name, t in TARGETS.items() if host.unavailable(name)]
    for target in foreign:
        assert "mul" in compile_listing(W, target=target)
        with pytest.raises(TargetUnavailableError) as caught:
            sparsert.compile_matmul(W, target=target)
        assert caught.value.where == f"target={target!r}"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    for features, native in (({"asimd", "fphp"}, "aarch64-neon"), ({"fp"}, None)):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(host, "cpu_features", lambda found=features: frozenset(found))
        report = host.host_report()
        assert report["native"] == native
        assert "runs on Linux x86-64" in report["targets"]["x86-avx512"]
        assert (report["targets"]["aarch64-neon"] is None) == (native is not None)
        assert report["notes"] == []
        monkeypatch.setattr(sys, "platform", "darwin")
        assert host.host_report()["notes"] == ([host.MACOS_NOTE] if native else [])


def test_a_machine_without_linux_calls() -> None:
    """Import, reference, and listings in a process that has neither memfd, affinity nor Linux's names."""
    body = """
        import os, platform, sys
        sys.platform = "darwin"
        platform.machine, platform.system = (lambda: "arm64"), (lambda: "Darwin")
        for name in ("memfd_create", "sched_getaffinity", "MFD_CLOEXEC", "register_at_fork"):
            if hasattr(os, name):
                delattr(os, name)
        import numpy as np
        import sparsert
        from sparsert.listings import compile_listing
        from sparsert.runtime.host import host_report
        w = np.eye(3, dtype=np.float32)
        assert (sparsert.compile_linear(w, activation="gelu", target="reference")(2 * w).diagonal() > 1.9).all()
        assert "vmulps" in compile_listing(w, target="x86-avx512")
        assert host_report()["threads"] >= 1
        try:
            sparsert.compile_matmul(w)
        except sparsert.errors.TargetUnavailableError as error:
            print(error.hint)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsert.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "target='reference'" in done.stdout


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2"])
def test_missing_features(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "on_linux_x86", lambda: True)
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"avx"}))
    for name in (target, "native"):
        with pytest.raises(TargetUnavailableError, match="lacks") as caught:
            sparsert.compile_matmul(W, target=name)
        assert "fma" in caught.value.what or "avx512f" in caught.value.what
    assert "vmulps" in compile_listing(W, target=target)


# ---- executable memory refused by policy -----------------------------------------------------------------------------


class Libc:
    """The C library under a policy: no page becomes executable by mprotect, nor by mmap if ``strict``."""

    def __init__(self, real: Any, strict: bool) -> None:
        self._real, self._strict = real, strict
        self.refused: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def mprotect(self, address: int, size: int, protection: int) -> int:
        if protection & 4:
            self.refused.append("mprotect")
            ctypes.set_errno(errno.EACCES)
            return -1
        return int(self._real.mprotect(address, size, protection))

    def mmap(self, address: Any, size: int, protection: int, flags: int, handle: int, offset: int) -> Any:
        if self._strict and protection & 4:
            self.refused.append("mmap")
            ctypes.set_errno(errno.EPERM)
            return ctypes.c_void_p(-1).value
        return self._real.mmap(address, size, protection, flags, handle, offset)


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Libc]:
    def enforce(strict: bool) -> Libc:
        libc = Libc(memory._libc(), strict)
        monkeypatch.setattr(memory, "_libc", lambda: libc)
        return libc

    return enforce


def mappings(word: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if word in line]


@pytest.mark.parametrize("target", COMPILED)
def test_no_mprotect(target: str, policy: Callable[[bool], Libc], rng: np.random.Generator) -> None:
    host.cpu_features()
    weight, x = dense_matrix(rng, 40, 40, 0.3), rng.standard_normal((40, 40)).astype(np.float32)
    open_files = len(os.listdir("/proc/self/fd"))
    libc = policy(False)
    op = sparsert.compile_matmul(weight, target=target)
    assert libc.refused == ["mprotect"]
    wrong = complaint(op(x), expected(as_sparse(weight), x))
    assert not wrong, wrong
    assert [line.split()[1] for line in mappings("memfd:sparsert")] == ["r-xs"]
    assert len(os.listdir("/proc/self/fd")) == open_files
    del op
    assert mappings("memfd:sparsert") == []


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("without_memfd", [False, True])
def test_no_executable_memory_at_all(
    target: str, without_memfd: bool, policy: Callable[[bool], Libc], monkeypatch: pytest.MonkeyPatch
) -> None:
    host.cpu_features()
    if without_memfd:
        monkeypatch.delattr(os, "memfd_create")
    libc = policy(True)
    before = len(mappings(""))
    for _ in range(5):
        with pytest.raises(ExecutableMemoryError, match="refuses executable memory") as caught:
            sparsert.compile_matmul(W, target=target)
    assert libc.refused[0] == "mprotect"
    assert "Permission denied" in str(caught.value)
    assert all(word in caught.value.hint for word in ("SELinux", "seccomp", "target='reference'"))
    assert len(mappings("")) - before < 5
    assert sparsert.compile_matmul(W, target="reference")(np.ones((8, 1), np.float32)).sum() == 6


@pytest.mark.isa("x86-avx2")
def test_report_where_executable_memory_is_refused(
    policy: Callable[[bool], Libc], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUID is read by generated code as well: the report says why nothing compiled runs; the reference still does."""
    monkeypatch.setattr(host, "cpu_features", host.cpu_features.__wrapped__)
    policy(True)
    report = host.host_report()
    assert report["native"] is None
    assert "executable memory" in report["targets"]["x86-avx2"]
    assert report["targets"]["reference"] is None
    with pytest.raises((ExecutableMemoryError, TargetUnavailableError), match="executable memory"):
        sparsert.compile_matmul(W)
