"""Convolutions and dense products as AArch64 code, under Unicorn: on guarded pages, or on exactly the arrays' bytes.

Convolutions are compared with float64 and to the bit with this machine's own target of general convolutions; dense
products with float64 and to the bit with the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsert
from emulator import MISSING, Emulated, Fault, emulate
from fuzz import guard_convolutions, product_cases
from oracle import ACTIVATIONS, same_bits
from sparsert import compiler
from sparsert.codegen.assemble import assemble
from sparsert.codegen.interpreter import region, run
from sparsert.kernels.dense import generate
from sparsert.kernels.dense_arguments import Form, Slot
from sparsert.operators import dense, depthwise
from sparsert.operators.dense import Code, Extents, frame
from sparsert.runtime import host
from sparsert.runtime.cpu import Executable, address_of
from sparsert.schedule.dense import DenseSchedule
from sparsert.target import TARGETS
from unit.test_convolution import drawn

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
TARGET = "aarch64-neon"
GENERAL = "x86-avx2"  # no masks, as here: the same form of convolutions
FIRST_WORD = bytes.fromhex("5f2403d5")  # bti c, with which every entry begins
Array = NDArray[np.float32]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """``aarch64-neon`` counts as available and its code goes to the emulator; the code objects that were made."""
    reason, made = host.unavailable, list[bytes]()

    def make(code: bytes) -> Any:
        if not code.startswith(FIRST_WORD):
            return Executable(code)
        made.append(code)
        return Emulated(code)

    def forget() -> None:
        dense.code_of.cache_clear()
        dense.transposer_of.cache_clear()

    monkeypatch.setattr(host, "unavailable", lambda name: None if name == TARGET else reason(name))
    for module in (compiler, dense, depthwise):
        monkeypatch.setattr(module, "Executable", make)
    forget()
    yield made
    forget()


# ---- convolutions --------------------------------------------------------------------------------------------------


def convolutions(seed: int, first: int, count: int) -> None:
    targets = [TARGET] + [GENERAL] * (host.unavailable(GENERAL) is None)
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number])
        c = drawn(rng)
        c["activation"] = str(rng.choice([name for name in ACTIVATIONS if name])) if rng.random() < 0.5 else None
        c["size"] = tuple(min(n, 24) for n in c["size"])
        problems = guard_convolutions.run_case(c, rng, targets)
        assert not problems, f"seed {seed}, number {number}, {c}:\n  " + "\n  ".join(problems)


@pytest.mark.parametrize("part", range(3))
def test_drawn_convolutions(part: int, emulated: list[bytes], request: pytest.FixtureRequest) -> None:
    convolutions(request.config.getoption("--seed"), part * 14, 14)
    assert len(emulated) > 7, "they are executed, most of them"


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_many_drawn_convolutions(part: int, emulated: list[bytes], request: pytest.FixtureRequest) -> None:
    convolutions(request.config.getoption("--seed") + 1, part * 40, 40)


def test_a_wrong_mask_is_noticed(emulated: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above can fail: where the tails of rows are not cut, they do."""
    from sparsert.codegen.arm64 import lower

    monkeypatch.setattr(lower, "_PARSED", lower._PARSED | {"load_mask": {"": (("ldr_q", ("d", "mem")),)}})
    with pytest.raises((AssertionError, Fault)):
        convolutions(0, 0, 14)


# ---- dense products ------------------------------------------------------------------------------------------------

FORMS = [
    (Form("rows"), (1, 1, 1), 1), (Form("rows"), (29, 7, 19), 3),
    (Form("columns", bias="rows", activation="relu", residual="before"), (15, 9, 41), 4),
    (Form("rows", bias="columns", residual="after"), (9, 13, 37), 13),
    (Form("rows", "transposed", scale=True), (4, 18, 21), 18),
    (Form("columns", "transposed", activation="gelu"), (3, 5, 34), 3),
    (Form("rows", "transposed", "columns", "hardswish", residual="before"), (31, 10, 11), 8),
    (Form("columns", bias="columns", activation="silu", residual="after"), (16, 33, 8), 16),
    (Form("rows", activation="sigmoid", scale=True), (13, 4, 6), 2),
]  # fmt: skip


def bounds(c: Array | np.ndarray[Any, Any], size: np.ndarray[Any, Any], form: Form, k: int) -> np.ndarray[Any, Any]:
    known = ACTIVATIONS[form.activation]
    return known.slope * 1e-6 * np.sqrt(k + 2) * size + 4 * np.spacing(np.abs(c).astype(np.float32)) + known.absolute


@pytest.mark.parametrize(("form", "shape", "k_block"), FORMS, ids=str)
def test_dense_products(form: Form, shape: tuple[int, int, int], k_block: int, rng: np.random.Generator) -> None:
    """Two matrices of a batch; code and interpreter may access exactly the arrays, scratch and the argument block."""
    found, (m, k, n) = TARGETS[TARGET], shape
    kernel = generate(form, found)
    machine = assemble(kernel.program, found.isa).code
    a = rng.standard_normal((2, *((m, k) if form.a == "rows" else (k, m))), np.float32)
    b = rng.standard_normal((2, *((k, n) if form.b == "rows" else (n, k))), np.float32)
    r = rng.standard_normal((2, m, n), np.float32)
    bias = rng.standard_normal({"rows": m, "columns": n, None: 1}[form.bias], np.float32)
    extents = Extents(2, m, n, k, a.strides[1], b.strides[1], 4 * n, 4 * n, a.strides[0], b.strides[0], 4 * m * n,
                      4 * m * n)  # fmt: skip
    left = (a if form.a == "rows" else a.swapaxes(1, 2)).astype(np.float64)
    right = (b if form.b == "rows" else b.swapaxes(1, 2)).astype(np.float64)
    want, size = left @ right, np.abs(left) @ np.abs(right)
    if form.bias:
        along = bias[:, None] if form.bias == "rows" else bias
        want, size = want + along, size + np.abs(along)
    if form.scale:
        want, size = want * bias[0], size * abs(bias[0])
    if form.residual == "before":
        want, size = want + r, size + np.abs(r)
    want = ACTIVATIONS[form.activation].of(want)
    if form.residual == "after":
        want, size = want + r, size + np.abs(r)
    for schedule in (DenseSchedule(k_block, 2), DenseSchedule(k, 1), DenseSchedule(k_block, 3, copy=True)):
        results = []
        for interpreted in (False, True):
            y = np.full((2, m, n), np.nan, np.float32)
            made = frame(Code(form, found, kernel.rows, None, 0, 0), extents, schedule)  # type: ignore[arg-type]
            made.slots[Slot.BIAS] = address_of(bias)
            made.point(address_of(a), address_of(b), address_of(y), address_of(r))
            arrays = {"a": a, "b": b, "y": y, "r": r, "bias": bias, "scratch": made.scratch}
            if interpreted:
                memory = {name: region(address_of(array), array) for name, array in arrays.items()}
                run(kernel.program, found.lanes, made.slots, memory)
            else:
                regions = [(address_of(array), array.nbytes) for array in (*arrays.values(), made.slots)]
                emulate(machine, made.address, regions)
            results.append(y)
        assert (np.abs(results[0] - want) <= bounds(want, size, form, k)).all()
        assert same_bits(*results)


def products(seed: int, first: int, count: int) -> None:
    for number in range(first, first + count):
        problems, _ = product_cases.run_case(seed, number, [TARGET])
        assert not problems, f"seed {seed}, number {number}:\n  " + "\n  ".join(problems)


def test_drawn_products_of_activations(emulated: list[bytes], request: pytest.FixtureRequest) -> None:
    """Drawn strides, batches and extents on guarded pages."""
    products(request.config.getoption("--seed"), 0, 30)
    assert emulated


@pytest.mark.full
@pytest.mark.parametrize("part", range(5))
def test_many_drawn_products(part: int, emulated: list[bytes], request: pytest.FixtureRequest) -> None:
    products(request.config.getoption("--seed") + 1, part * 40, 40)


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_products_have_the_bits_of_this_machine(
    transpose_a: bool, transpose_b: bool, emulated: list[bytes], rng: np.random.Generator
) -> None:
    if host.unavailable(GENERAL):
        pytest.skip("this machine executes no target of its own")
    for m, k, n in ((1, 1, 1), (3, 5, 2), (13, 4, 33), (29, 33, 17), (40, 20, 8)):
        a, b = rng.standard_normal((2, m, k), np.float32), rng.standard_normal((k, n), np.float32)
        a = np.ascontiguousarray(a.swapaxes(1, 2)) if transpose_a else a
        b = np.ascontiguousarray(b.T) if transpose_b else b
        ours, theirs = (
            sparsert.compile_product(
                transpose_a=transpose_a, transpose_b=transpose_b, scale=0.125, activation="gelu", target=t
            )
            for t in (TARGET, GENERAL)
        )
        assert same_bits(ours(a, b), theirs(a, b))


def test_dense_layers_have_the_bits_of_this_machine(emulated: list[bytes], rng: np.random.Generator) -> None:
    own = None if host.unavailable(GENERAL) else GENERAL
    if own is None:
        pytest.skip("this machine executes no target of its own")
    for m, k, n in ((1, 1, 1), (15, 17, 31), (28, 16, 8), (29, 33, 21), (64, 70, 9)):
        weight, bias = rng.standard_normal((m, k), np.float32), rng.standard_normal(m, np.float32)
        x, r = rng.standard_normal((k, n), np.float32), rng.standard_normal((m, n), np.float32)
        for activation, residual in ((None, None), ("relu", "before"), ("silu", "after")):
            options: dict[str, Any] = {"residual": residual, "form": "dense", "threads": 1}
            ours, theirs = (sparsert.compile_matmul(weight, bias, activation, target=t, **options)
                            for t in (TARGET, own))  # fmt: skip
            turned = sparsert.compile_linear(weight, bias, activation, target=TARGET, **options)
            y = theirs(x, residual=r if residual else None)
            assert same_bits(ours(x, residual=r if residual else None), y)
            assert same_bits(turned(np.ascontiguousarray(x.T), residual=r.T if residual else None).T, y)
