"""Drawn layers as AArch64 code, under Unicorn on guarded pages.

They are compared with float64, to the bit with the interpreter and, where this machine executes a target of its own,
with that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import sparsert
from emulator import MISSING, Emulated, every_form
from fuzz import guard_cases
from oracle import complaint, expected, same_bits
from sparsert import compiler, crew
from sparsert.codegen.interpreter import Region, run
from sparsert.errors import InternalError
from sparsert.kernels.arguments import SLOTS
from sparsert.runtime import host
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import NATIVE_ORDER, TARGETS

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
TARGET = "aarch64-neon"
QUICK, FULL = 40, 400
BUDGET = 10_000  # rows that the interpreter executes in a call


class Twice(Emulated):
    """The emulator and, on a copy of the memory, the interpreter of the vector program: the same bits."""

    program: Any = None
    compared = 0

    def call(self, address: int) -> None:
        super().call(address)
        runs: list[tuple[int, bytearray]] = []
        for page, data in sorted(self.before.items()):
            if runs and runs[-1][0] + len(runs[-1][1]) == page:
                runs[-1][1].extend(data)
            else:
                runs.append((page, bytearray(data)))
        memory = {str(at): Region(at, np.frombuffer(data, np.uint8)) for at, data in runs}
        slots = next(r.data[address - r.address :][: 8 * SLOTS] for r in memory.values() if address in _span(r))
        try:
            run(self.program, TARGETS[TARGET].lanes, slots.view(np.int64), memory, budget=BUDGET)
        except InternalError as error:
            if "no end" in error.what:
                return  # too long for it; the checks against float64 and of other layouts and schedules remain
            raise
        Twice.compared += 1
        for start, want in memory.values():
            before = np.frombuffer(b"".join(self.before[start + i] for i in range(0, want.size, 4096)), np.uint8)
            got = np.frombuffer((ctypes.c_uint8 * want.size).from_address(start), np.uint8)
            ours = before != want  # other bytes of these pages may be anybody's, and change
            assert not _differs(want, got, np.flatnonzero(ours & (want != got))), "the interpreter has other bits"


def _span(region: Region) -> range:
    return range(region.address, region.address + region.data.size)


def _differs(a: np.ndarray, b: np.ndarray, places: np.ndarray) -> bool:
    """Whether bytes at ``places`` differ for another reason than being of NaN; floats may start at any byte."""
    for at in places.tolist():
        words = [(a[i : i + 4].tobytes(), b[i : i + 4].tobytes()) for i in range(max(at - 3, 0), at + 1)]
        if not any(np.isnan(np.frombuffer(one + other, np.float32)).all() for one, other in words if len(one) == 4):
            return True
    return False


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``aarch64-neon`` counts as available, and its code goes to the emulator; other targets are as they were."""
    generate, reason, executable = compiler.matmul.generate, host.unavailable, compiler.Executable
    where: list[str] = []
    program: list[Any] = []

    def remember(task: Any, schedule: Any, target: Any) -> Any:
        kernel = generate(task, schedule, target)
        where[:], program[:] = [target.name], [kernel.program]
        return kernel

    def make(code: bytes) -> Any:
        if where != [TARGET]:
            return executable(code)
        made = Twice(code)
        made.program = program[0]
        return made

    monkeypatch.setattr(host, "unavailable", lambda name: None if name == TARGET else reason(name))
    monkeypatch.setattr(compiler.matmul, "generate", remember)
    monkeypatch.setattr(compiler, "Executable", make)
    with every_form(monkeypatch):
        monkeypatch.setattr(crew, "Executable", make)
        yield


def campaign(seed: int, first: int, count: int) -> None:
    for number in range(first, first + count):
        case, rng = guard_cases.draw(seed, number, [TARGET])
        if case.target == TARGET:
            problems = guard_cases.run_case(case, rng)
            assert not problems, f"{case}:\n  " + "\n  ".join(problems)


@pytest.mark.parametrize("part", range(2))
def test_drawn_layers(part: int, emulated: None, request: pytest.FixtureRequest) -> None:
    before = Twice.compared
    campaign(request.config.getoption("--seed"), part * QUICK // 2, QUICK // 2)
    assert Twice.compared - before > QUICK // 2, "most calls are short enough for the interpreter"


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_many_drawn_layers(part: int, emulated: None, request: pytest.FixtureRequest) -> None:
    campaign(request.config.getoption("--seed") + 1, part * FULL // 10, FULL // 10)


def test_bits_are_those_of_this_machine(emulated: None, rng: np.random.Generator) -> None:
    """Sums are fused and in one order on every instruction set, and activations the same operations."""
    own = next((name for name in NATIVE_ORDER if name != TARGET and host.unavailable(name) is None), None)
    if own is None:
        pytest.skip("this machine executes no target of its own")
    weight = np.where(rng.random((45, 70)) < 0.2, rng.standard_normal((45, 70)), 0).astype(np.float32)
    bias, x = rng.standard_normal(45).astype(np.float32), 3 * rng.standard_normal((70, 37)).astype(np.float32)
    for activation in (None, "relu", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "relu6"):
        theirs, ours = (sparsert.compile_matmul(weight, bias, activation, target=t) for t in (own, TARGET))
        assert same_bits(ours(x), theirs(x))


def test_a_wrong_instruction_is_noticed(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above can fail: with the lanes of weights mixed up they do."""
    from sparsert.codegen.arm64 import lower

    recipes = lower._PARSED | {"fma_lane": {"": (("fmla_lane", ("d", "a", "b", "0")),)}}
    monkeypatch.setattr(lower, "_PARSED", recipes)
    with pytest.raises(AssertionError):
        campaign(0, 0, 5)


@pytest.mark.full
def test_a_loop_longer_than_a_conditional_branch_reaches(emulated: None, rng: np.random.Generator) -> None:
    weight = np.where(rng.random((700, 900)) < 0.5, rng.standard_normal((700, 900)), 0).astype(np.float32)
    op = sparsert.compile_matmul(weight, target=TARGET, schedule=sparsert.Schedule(28, blocks=0))
    x = rng.standard_normal((900, 9)).astype(np.float32)
    assert op.stats.code_bytes > 1 << 20
    assert "b.eq .+8" in op.listing()
    assert not complaint(op(x), expected(as_sparse(weight), x, None, None, None, None))
