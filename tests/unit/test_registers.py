"""Register assignment of element-wise code: any expression keeps its value, and few registers and copies are spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsert.codegen.interpreter import LANES, region, run
from sparsert.codegen.registers import ACCUMULATOR, Constant, Node, Operand, Recorder, Template, Value, assign
from sparsert.codegen.vector import Builder, S
from sparsert.errors import InternalError
from sparsert.kernels.activations import ACTIVATIONS
from sparsert.kernels.epilogue import apply

BINARY = ["add", "sub", "mul", "div", "min", "max", "bit_and", "bit_or", "bit_xor", "add_i"]
UNARY = ["round", "to_int"]
TERNARY = ["fma", "fnma", "select_neg"]
ACCUMULATORS, WIDTH = 3, 16
MANY, NONE = 99, 0  # idle registers: constants are held in them, or loaded where they are used


def evaluate(recorder: Recorder, result: Value, x: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """The recorded expression on lanes, node by node: no registers."""
    values: list[np.ndarray] = []

    def of(operand: Operand) -> np.ndarray:
        if isinstance(operand, Constant):
            return np.full(x.shape, operand.bits, np.uint32).view(np.float32)
        return values[operand.number]

    with np.errstate(all="ignore"):
        for node in recorder.nodes:
            if node.op in ("input", "residual"):
                values.append(x if node.op == "input" else residual)
                continue
            given = [of(operand) for operand in node.operands]
            if node.op == "shl":
                values.append((given[0].view(np.uint32) << np.uint32(node.immediate)).view(np.float32))
            elif node.op in ("fma", "fnma"):
                a, b, c = given
                values.append(LANES[f"{node.op}_acc"](c, a, b))
            elif node.op == "select_neg":
                values.append(LANES["select_neg"](*given))
            else:
                values.append(LANES[node.op](x, given[0], given[-1]))
    return values[result.number]


def execute(template: Template, b: Builder, x: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """The template on accumulators, interpreted."""
    n = len(x)
    out = np.empty_like(x)
    b.emit("s_set", d=S.X, disp=4096)
    b.emit("s_set", d=S.Y, disp=8192)
    b.emit("s_set", d=S.W, disp=16384)
    b.emit_many("load", n, d=np.arange(n), ptr=S.X, disp=np.arange(n) * 64)
    apply(b, template, n, {"ptr": S.W, "disp": np.arange(n) * 64})
    b.emit_many("store", n, a=np.arange(n), ptr=S.Y, disp=np.arange(n) * 64)
    b.emit("leave")
    memory = {"x": region(4096, x), "y": region(8192, out), "residual": region(16384, residual)}
    run(b.finish(), WIDTH, np.zeros(0, np.int64), memory)
    return out


def compiled(build: Callable[[Recorder], Operand], idle: int = MANY) -> tuple[Template, Recorder, Operand, Builder]:
    recorder, builder = Recorder(), Builder()
    result = build(recorder)
    return assign(recorder, result, builder, idle), recorder, result, builder


def lanes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, residual = rng.standard_normal((2, ACCUMULATORS, WIDTH)).astype(np.float32) * np.float32(3)
    x[0, :4] = [0.0, -0.0, np.inf, np.nan]
    return np.ascontiguousarray(x), np.ascontiguousarray(residual)


def agree(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.all((got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))))


@st.composite
def expressions(draw: st.DrawFn) -> list[tuple[str, list[int], int]]:
    """Operations with operands among the values so far (from 0, the input) and four constants (below 0)."""
    made: list[tuple[str, list[int], int]] = []
    for i in range(1, draw(st.integers(2, 14))):
        op = draw(st.sampled_from(BINARY + UNARY + TERNARY + ["fma", "fnma", "shl", "residual"]))
        count = 2 if op in BINARY else 3 if op in TERNARY else 0 if op == "residual" else 1
        recent = st.integers(max(0, i - 3), i - 1)
        operand = recent | recent | st.integers(0, i - 1) | (st.integers(-4, -1) if count > 1 else recent)
        made.append((op, [draw(operand) for _ in range(count)], draw(st.integers(0, 31))))
    return made


def record(recorder: Recorder, made: list[tuple[str, list[int], int]]) -> Value:
    values: list[Value] = [recorder.input()]
    constants = [recorder.const(0.5), recorder.const(-3.0), recorder.bits(0x7FFFFFFF), recorder.bits(1 << 23)]
    for op, operands, immediate in made:
        given = [values[o] if o >= 0 else constants[o] for o in operands]
        values.append(getattr(recorder, op)(*given, *([immediate] if op == "shl" else [])))
    return values[-1]


@given(expressions(), st.integers(0, 100))
@example([("fma", [0, 0, 0], 0), ("fma", [1, 0, 1], 0), ("fnma", [2, -1, -2], 0)], 0)
@example([("fma", [-1, -2, 0], 0), ("fma", [-1, -1, -1], 0), ("select_neg", [0, 2, 0], 0)], 0)
@example([("select_neg", [-1, 0, -2], 0), ("select_neg", [1, 1, 1], 0)], 0)
def test_any_expression_keeps_its_value(made: list[tuple[str, list[int], int]], seed: int) -> None:
    for idle in (MANY, NONE):
        template, recorder, result, builder = compiled(lambda v: record(v, made), idle)
        assert isinstance(result, Value)
        x, residual = lanes(seed)
        assert agree(execute(template, builder, x, residual), evaluate(recorder, result, x, residual))


@given(expressions(), st.sampled_from([MANY, NONE]))
def test_registers_count_from_zero_and_preloads_stay(made: list[tuple[str, list[int], int]], idle: int) -> None:
    template, _, _, _ = compiled(lambda v: record(v, made), idle)
    written = {row[1] for row in template.rows}
    preloaded = {register for register, _ in template.preload}
    assert not written & preloaded
    assert all(register < template.registers for register in (written | preloaded) - {ACCUMULATOR})
    assert all(constant < 0 for _, constant in template.preload)


def test_the_input_itself_needs_no_code() -> None:
    template, _, _, _ = compiled(lambda v: v.input())
    assert template == Template((), (), 0)


def test_a_chain_runs_in_place() -> None:
    """relu(x * 2 + 1): every value dies where it is used, constants stay in memory where the instruction allows."""
    template, _, _, builder = compiled(lambda v: v.max(v.add(v.mul(v.input(), v.const(2)), v.const(1)), v.const(0)))
    assert [row[0] for row in template.rows] == ["mul", "add", "max"]
    assert all(row[1] == row[2] == ACCUMULATOR for row in template.rows)
    assert (template.preload, template.registers) == ((), 0)
    assert len(builder.finish().constants) == 3


@pytest.mark.parametrize(
    ("build", "ops"),
    [
        (lambda v: v.fma(v.residual(), v.const(2), v.input()), ["residual", "fma_acc"]),  # the addend dies
        (lambda v: v.fma(v.input(), v.residual(), v.const(2)), ["residual", "fma_mul"]),  # a factor dies
        (lambda v: v.fnma(v.const(2), v.residual(), v.input()), ["residual", "fnma_acc"]),  # the constant is a factor
    ],
)
def test_a_multiply_add_overwrites_the_operand_that_dies(build: Callable[[Recorder], Operand], ops: list[str]) -> None:
    template, _, _, _ = compiled(build)
    assert [row[0] for row in template.rows] == ops
    assert template.preload == ()


def test_horner_needs_a_copy_per_step_at_most() -> None:
    def polynomial(v: Recorder) -> Operand:
        x = v.input()
        y: Operand = v.const(7)
        for coefficient in (6, 5, 4, 3, 2):
            y = v.fma(y, x, v.const(coefficient))
        return y

    template, _, _, _ = compiled(polynomial)
    kinds = Counter(row[0] for row in template.rows)
    assert kinds["fma_mul"] + kinds["fma_acc"] == 5
    assert kinds["mov"] + kinds["const"] <= 2
    assert template.registers <= 2


def test_operands_that_cannot_lie_in_memory_are_preloaded_once() -> None:
    template, _, _, _ = compiled(lambda v: v.sub(v.const(1), v.sub(v.const(1), v.input())))
    assert len(template.preload) == 1
    assert [row[0] for row in template.rows] == ["sub", "sub"]


def test_without_idle_registers_they_are_loaded_instead() -> None:
    def build(v: Recorder) -> Operand:
        return v.sub(v.const(1), v.sub(v.const(2), v.min(v.const(3), v.input())))

    held, loaded = (compiled(build, idle)[0] for idle in (3, 2))
    assert (len(held.preload), held.registers) == (3, 3)
    assert (len(loaded.preload), loaded.registers) == (0, 1)
    assert [row[0] for row in loaded.rows] == ["const", "min", "const", "sub", "const", "sub"]


def test_commutative_operations_take_their_constant_from_memory() -> None:
    for op in ("add", "mul", "bit_and", "bit_or", "bit_xor", "add_i"):
        template, _, _, _ = compiled(lambda v, op=op: getattr(v, op)(v.const(3), v.input()))
        assert (template.preload, template.registers) == ((), 0)
        assert template.rows == ((op, ACCUMULATOR, ACCUMULATOR, -1, 0),)


def test_the_order_of_minimum_and_maximum_is_kept() -> None:
    """They are not commutative: NaN."""
    template, recorder, result, builder = compiled(lambda v: v.max(v.const(0), v.min(v.const(6), v.input())))
    assert isinstance(result, Value)
    x, residual = lanes(0)
    got = execute(template, builder, x, residual)
    assert np.isnan(got[0, 3])
    assert agree(got, evaluate(recorder, result, x, residual))


def test_what_the_result_does_not_depend_on_is_not_computed() -> None:
    def build(v: Recorder) -> Operand:
        kept = v.add(v.input(), v.const(1))
        v.mul(kept, v.const(2))
        return kept

    template, _, _, _ = compiled(build)
    assert [row[0] for row in template.rows] == ["add"]


def test_a_constant_is_no_function_of_the_input() -> None:
    recorder = Recorder()
    with pytest.raises(InternalError, match="depend on its input"):
        assign(recorder, recorder.const(1.0), Builder(), MANY)


def test_a_recorder_counts_its_values_from_the_input() -> None:
    recorder = Recorder()
    assert recorder.shl(recorder.input(), 5) == Value(1)
    assert recorder.nodes == [Node("input", ()), Node("shl", (Value(0),), 5)]
    assert recorder.const(-1.0) == Constant(0xBF800000)
    assert recorder.bits(-1) == Constant(0xFFFFFFFF)


@pytest.mark.parametrize("idle", [MANY, NONE])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_their_value(name: str, idle: int) -> None:
    parameters: tuple[Any, ...] = (-1.0, 2.0) if name == "clip" else ()
    for seed in range(5):
        template, recorder, result, builder = compiled(
            lambda v: ACTIVATIONS[name].function(v, v.input(), *parameters), idle
        )
        assert isinstance(result, Value)
        x, residual = lanes(seed)
        assert agree(execute(template, builder, x, residual), evaluate(recorder, result, x, residual))
    assert idle or template.registers <= 5, "the others of 16 are accumulators"
