"""Convolutions and dense products as AArch64 code, under Unicorn: on guarded pages, or on exactly the arrays' bytes.

Convolutions are compared with float64 and to the bit with this machine's own target of general convolutions; dense
products with float64 and to the bit with the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsert
from emulator import MISSING, Emulated, Fault, emulate, every_form, routed
from fuzz import convolution_cases, guard_convolutions, product_cases
from oracle import ACTIVATIONS, complaint, expected, same_bits
from sparsert import compiler
from sparsert.codegen.assemble import assemble
from sparsert.codegen.interpreter import Region, region, run
from sparsert.codegen.vector import Builder, S
from sparsert.kernels import looped
from sparsert.kernels.dense import generate
from sparsert.kernels.dense_arguments import Form, Slot
from sparsert.operators.compact import CompactProduct
from sparsert.operators.dense import Code, Extents, frame
from sparsert.runtime import host
from sparsert.runtime.cpu import address_of
from sparsert.schedule.dense import DenseSchedule
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import TARGETS
from unit.test_convolution import drawn
from unit.test_few_columns import uneven

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
TARGET = "aarch64-neon"
GENERAL = "x86-avx2"  # no masks, as here: the same form of convolutions
Array = NDArray[np.float32]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``aarch64-neon`` counts as available, and its code goes to the emulator; other targets are as they were."""
    reason = host.unavailable
    monkeypatch.setattr(host, "unavailable", lambda name: None if name == TARGET else reason(name))
    monkeypatch.setattr(compiler, "Executable", routed)
    with every_form(monkeypatch):
        yield


@pytest.fixture
def calls(emulated: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The argument blocks of all emulated calls."""
    made, call = list[int](), Emulated.call
    monkeypatch.setattr(Emulated, "call", lambda self, address: (made.append(address), call(self, address))[1])
    return made


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
def test_drawn_convolutions(part: int, calls: list[int], request: pytest.FixtureRequest) -> None:
    convolutions(request.config.getoption("--seed"), part * 14, 14)
    assert len(calls) > 14, "they are executed, most of them, twice"


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_many_drawn_convolutions(part: int, emulated: None, request: pytest.FixtureRequest) -> None:
    convolutions(request.config.getoption("--seed") + 1, part * 40, 40)


def every_kind(seed: int, first: int, count: int) -> None:
    for number in range(first, first + count):
        outcome = convolution_cases.run_case(seed, number, [TARGET])
        assert not outcome.problems, f"{outcome.name}:\n  " + "\n  ".join(outcome.problems)


def test_drawn_convolutions_of_every_kind(calls: list[int], request: pytest.FixtureRequest) -> None:
    """Transposed, along one axis, looped, shared out, under drawn schedules."""
    every_kind(request.config.getoption("--seed"), 0, 20)
    assert len(calls) > 40


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_many_drawn_convolutions_of_every_kind(part: int, emulated: None, request: pytest.FixtureRequest) -> None:
    every_kind(request.config.getoption("--seed") + 1, part * 30, 30)


def test_a_wrong_mask_is_noticed(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
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
            arrays |= {"aheads": made.kept} if isinstance(made.kept, np.ndarray) else {}
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


def test_drawn_products_of_activations(calls: list[int], request: pytest.FixtureRequest) -> None:
    """Drawn strides, batches and extents on guarded pages."""
    products(request.config.getoption("--seed"), 0, 30)
    assert len(calls) > 30


@pytest.mark.full
@pytest.mark.parametrize("part", range(5))
def test_many_drawn_products(part: int, emulated: None, request: pytest.FixtureRequest) -> None:
    products(request.config.getoption("--seed") + 1, part * 40, 40)


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_products_have_the_bits_of_this_machine(
    transpose_a: bool, transpose_b: bool, emulated: None, rng: np.random.Generator
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


def test_dense_layers_have_the_bits_of_this_machine(emulated: None, rng: np.random.Generator) -> None:
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


# ---- products that loop over the pattern as data --------------------------------------------------------------------


@pytest.mark.parametrize("residual", [None, "before", "after"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "sigmoid"])
def test_few_columns(activation: str | None, residual: str | None, calls: list[int], rng: np.random.Generator) -> None:
    """Looped for one to three columns, and for any number where code may take no more: the bits of unrolled code."""
    for shape, density in (((1, 1), 1.0), ((1, 40), 0.3), ((17, 33), 0.2), ((45, 70), 0.1), ((30, 20), 0.0)):
        matrix = uneven(rng, *shape, density)
        bias = rng.standard_normal(shape[0]).astype(np.float32) if rng.random() < 0.5 else None
        options: dict[str, Any] = {"residual": residual, "target": TARGET, "threads": 1}
        op = sparsert.compile_matmul(matrix, bias, activation, **options)
        linear = sparsert.compile_linear(matrix, bias, activation, **options)
        x, r = (rng.standard_normal((n, 9)).astype(np.float32) for n in (shape[1], shape[0]))
        wide = op(x, residual=r if residual else None)
        assert not complaint(wide, expected(matrix, x, bias, activation, residual, r))
        for n in (1, 2, 3, 4):
            some, rest = np.ascontiguousarray(x[:, :n]), np.ascontiguousarray(r[:, :n]) if residual else None
            assert (op._compact(n) is not None) == (n < 4)
            assert same_bits(op(some, residual=rest), wide[:, :n])
            assert same_bits(op(x[:, :n], residual=rest), wide[:, :n])
            turned = linear(np.ascontiguousarray(some.T), residual=None if rest is None else rest.T)
            assert same_bits(turned.T, wide[:, :n])
        if op.stats.code_bytes > 9500:
            small = sparsert.compile_matmul(matrix, bias, activation, max_code_bytes=9500, **options)
            assert small.schedule is None
            assert same_bits(small(x, residual=r if residual else None), wide)
    assert calls


@pytest.mark.parametrize(("cols", "columns"), [(70, 1), (70, 3), (70, 4), (70, 10), ((1 << 16) + 40, 4)])
def test_loops_over_patterns(cols: int, columns: int, rng: np.random.Generator) -> None:
    """Code and interpreter may access exactly the arrays, scratch, pattern, counts and the argument block."""
    found = TARGETS[TARGET]
    matrix = uneven(rng, 21, cols, min(0.2, 40 / cols))
    task = Task(matrix.pattern, True, "silu", residual="after")
    bias = rng.standard_normal(21).astype(np.float32)
    layer = CompactProduct(task, found, by_lookup=False)
    layer.load(matrix.values, bias)
    x, r = rng.standard_normal((cols, columns), np.float32), rng.standard_normal((21, columns), np.float32)
    program = looped.generate(task, found, layer.form)  # type: ignore[arg-type]
    code, weights, results = assemble(program, found.isa).code, layer.values[0].packed[0][0], []
    steps = (4 * columns, 4)
    for interpreted in (False, True):
        y = np.full((21, columns), np.nan, np.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "_code", lambda _: lambda _: routed(code))
            made = layer.new_frame((columns, *steps, *steps, *steps), 0)
        made.point(address_of(x), address_of(y), address_of(r), address_of(weights))
        arrays = {"x": x, "y": y, "r": r, "w": weights, "scratch": made.scratch, "data": layer.data,
                  "counts": layer.counts}  # fmt: skip
        if interpreted:
            memory = {name: region(address_of(a), a) for name, a in arrays.items()}
            run(program, found.lanes, made.slots, memory)
        else:
            emulate(code, made.address, [(address_of(a), a.nbytes) for a in (*arrays.values(), made.slots)])
        results.append(y)
    assert same_bits(*results)
    assert not complaint(results[0], expected(as_sparse(matrix), x, bias, "silu", "after", r))


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 20_001, (1 << 24) + 4])
def test_narrow_scalars_in_memory(start: int, rng: np.random.Generator) -> None:
    """Bytes, halves and words at any offset, unsigned, as they are and as what is added to a register."""
    data = rng.integers(128, 256, 64, dtype=np.uint8)
    b = Builder()
    b.emit("enter")
    for register, slot in ((S.PANEL, 0), (S.X, 1)):
        b.emit("s_arg", d=register, disp=8 * slot)
    puts = 2
    for name, shift in (("s_load32", 0), *product(("s_at8", "s_at16", "s_at32"), (0, 4, 6))):
        for place in (0, 3, 17):
            for pointer in (S.PANEL, S.X):
                b.emit(name, d=S.K, a=S.Y if name == "s_load32" else pointer, b=shift, ptr=pointer, disp=start + place)
                b.emit("s_put", a=S.K, disp=8 * puts)
                puts += 1
    b.emit("s_store32", a=S.K, ptr=S.PANEL, disp=start + 40)
    b.emit("s_store32", a=S.K, ptr=S.X, disp=start + 53)
    b.emit("prefetch_near", ptr=S.PANEL, disp=4096 + start)
    b.emit("leave")
    program, results = b.finish(), []
    for interpreted in (False, True):
        memory, args = data.copy(), np.zeros(puts, np.int64)
        results.append((memory, args))
        args[:2] = address_of(memory) - start
        if interpreted:
            args[:2] = results[0][1][:2]  # values hold addresses: the same for both
            run(program, 4, args, {"data": Region(address_of(results[0][0]), memory)})
        else:
            code = assemble(program, TARGET).code
            emulate(code, address_of(args), [(address_of(memory), 64), (address_of(args), args.nbytes)])
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
    assert not np.array_equal(results[0][0], data)
