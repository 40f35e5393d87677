"""The meaning of vector programs: operations one by one, whole kernels on exactly-sized memory, and what is refused.

Where this machine executes a target, its results are the interpreter's to the last bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest

from emulator import MISSING, emulate
from oracle import complaint, expected
from oracle import program as rows
from sparsert import Clip
from sparsert.codegen.arm64.lower import RECIPES as RECIPES_ARM64
from sparsert.codegen.arm64.lower import lower as lower_arm64
from sparsert.codegen.assemble import assemble
from sparsert.codegen.interpreter import EFFECTS, LANES, Region, fused, region, run
from sparsert.codegen.vector import OPS, Builder, Program, S, check
from sparsert.codegen.x86.assemble import ENCODINGS
from sparsert.codegen.x86.lower import RECIPES as RECIPES_X86
from sparsert.codegen.x86.lower import lower as lower_x86
from sparsert.errors import InternalError
from sparsert.kernels import activations, matmul
from sparsert.kernels.arguments import SLOTS, Arg
from sparsert.operators.native import NativeProduct
from sparsert.runtime.cpu import Executable, address_of
from sparsert.runtime.host import unavailable
from sparsert.schedule.schedule import Schedule, most_rows
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import TARGETS, Target

COMPILED = [t for t in TARGETS.values() if t.isa != "reference"]


def emulated(target: Target) -> bool:
    """Whether its code runs under an emulator here."""
    return target.machine == "aarch64" and unavailable(target.name) is not None


def can_run(target: Target) -> bool:
    return target in COMPILED and (MISSING is None if emulated(target) else unavailable(target.name) is None)


def mark(target: Target) -> pytest.MarkDecorator:
    if emulated(target):
        return pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
    return pytest.mark.isa(target.name)


executed = pytest.mark.parametrize("target", [pytest.param(t, id=t.name, marks=mark(t)) for t in COMPILED])
FOUR = Target("four lanes", "none", 4, 32)  # no ISA here has them; the vocabulary does not mind
EDGES = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 0.49999997, 8388609, 2147483520, 2147483648, -2147483648, -2147483904,
     3e38, -3e38, 1e-45, -1e-45, 1.1754942e-38, np.inf, -np.inf, np.nan, -np.nan], np.float32)  # fmt: skip


def names() -> set[str]:
    return {op.name for op in OPS}


def test_every_operation_has_one_meaning() -> None:
    assert set(LANES) | set(EFFECTS) == names()
    assert not set(LANES) & set(EFFECTS)


def memory_at(address: int, size: int) -> Region:
    """``size`` bytes of this process as a region."""
    return Region(address, np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit, except that any NaN will do for a NaN."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def execute(program: Program, target: Target, args: np.ndarray, *arrays: np.ndarray) -> None:
    """Machine code of ``program`` on its argument block and the arrays that it leads to."""
    code = assemble(program, target.isa).code
    if emulated(target):
        emulate(code, address_of(args), [(address_of(a), a.nbytes) for a in (args, *arrays)])
    else:
        executable = Executable(code)  # a name: its memory lives no longer than it does
        executable.call(address_of(args))


# ---- operations one by one -----------------------------------------------------------------------------------------


def lanewise(op: str, lanes: int, constant: float | None = None, immediate: int = 0) -> Program:
    """For Arg.TILES vectors each of d, a and b at X, one behind the other: the result to Y."""
    b, width = Builder(), 4 * lanes
    top = b.label("vectors")
    b.emit("enter")
    for register, slot in ((S.X, Arg.X), (S.Y, Arg.Y), (S.T, Arg.TILES)):
        b.emit("s_arg", d=register, disp=slot.byte)
    b.emit("s_const", d=S.CONST)
    b.place(top)
    for i in range(3):
        b.emit("load", d=i, ptr=S.X, disp=i * width)
    second = 2 if constant is None else -1 - b.constant(int(np.float32(constant).view(np.uint32)))
    b.emit(op, d=0, a=1, b=second, disp=immediate)
    b.emit("store", a=0, ptr=S.Y)
    b.emit("s_addi", d=S.X, disp=3 * width)
    b.emit("s_addi", d=S.Y, disp=width)
    b.emit("loop", a=S.T, disp=top)
    b.emit("leave")
    made = b.finish()
    check(made)
    return made


def operands(rng: np.random.Generator, lanes: int) -> np.ndarray:
    """(vectors, 3, lanes): all pairs of edges, and triples of arbitrary bits, close numbers and cancelling products."""
    pairs = np.array(list(product(EDGES, repeat=2)), np.float32)
    edges = np.column_stack([rng.choice(EDGES, len(pairs)), pairs])
    wild = rng.integers(0, 2**32, (400, 3), dtype=np.uint32).view(np.float32)
    near = rng.standard_normal((400, 3)).astype(np.float32)
    cancel = near.copy()
    cancel[:, 0] = -(cancel[:, 1] * cancel[:, 2])
    rows = np.concatenate([edges, wild, near, cancel, near * np.float32(1e-20), cancel * np.float32(1e9)])
    rows = rows[: len(rows) // lanes * lanes]
    return np.ascontiguousarray(rows.reshape(-1, lanes, 3).transpose(0, 2, 1))


def block(**slots: int) -> np.ndarray:
    args = np.zeros(SLOTS, np.int64)
    for name, value in slots.items():
        args[Arg[name]] = value
    return args


OPS_OF = {isa: set(RECIPES_X86[encoding]) for isa, encoding in ENCODINGS.items()} | {"aarch64-neon": set(RECIPES_ARM64)}
LANEWISE = [(op, None, 0) for op in LANES if op != "const"]
LANEWISE += [("const", -0.0, 0), ("add", 1.5, 0), ("fma_mul", 3.0, 0), ("min", np.nan, 0), ("bit_and", -0.0, 0)]
LANEWISE += [("shl", None, n) for n in (0, 1, 23, 31)]


@pytest.mark.parametrize(("op", "constant", "immediate"), LANEWISE)
@executed
def test_operations_mean_what_the_processor_does(
    target: Target, op: str, constant: float | None, immediate: int, rng: np.random.Generator
) -> None:
    if op not in OPS_OF[target.isa]:
        pytest.skip(f"kernels do without {op} on {target.isa}")
    x = operands(rng, target.lanes)
    got, want = np.zeros((2, len(x), target.lanes), np.float32)
    made = lanewise(op, target.lanes, constant, immediate)
    args = block(X=address_of(x), Y=address_of(want), TILES=len(x))
    run(made, target.lanes, args, {"x": region(address_of(x), x), "y": region(address_of(want), want)})
    args[Arg.Y] = address_of(got)
    execute(made, target, args, x, got)
    assert same_bits(got, want)


def apply(op: str, a: Any, b: Any = (), d: Any = ()) -> list[float]:
    lanes = [np.array(v, np.float32) for v in (d, a, b)]
    with np.errstate(all="ignore"):
        return LANES[op](*lanes).tolist()


def test_minimum_and_maximum_give_the_second_operand_where_equal_or_unordered() -> None:
    assert np.signbit(apply("min", [0.0, -0.0], [-0.0, 0.0])).tolist() == [True, False]
    assert np.signbit(apply("max", [0.0, -0.0], [-0.0, 0.0])).tolist() == [True, False]
    assert apply("min", [np.nan, 1.0], [2.0, 3.0]) == [2.0, 1.0]
    assert np.isnan(apply("max", [1.0], [np.nan])[0])


def test_rounding_is_to_nearest_even_and_integers_saturate_to_the_least() -> None:
    assert apply("round", [0.5, 1.5, 2.5, -0.5, -1.5]) == [0.0, 2.0, 2.0, -0.0, -2.0]
    given = np.array([2.5, -3.5, 2147483520, 2147483648, -2147483648, np.nan, np.inf], np.float32)
    least = -(2**31)
    assert LANES["to_int"](given, given, given).view(np.int32).tolist() == [2, -4, 2147483520, *[least] * 4]


def test_select_by_sign_bit_and_zips_within_four_lanes() -> None:
    assert apply("select_neg", [1] * 4, [2] * 4, [-0.0, 0.0, -np.inf, 5.0]) == [1, 2, 1, 2]
    a, b = list(range(8)), list(range(10, 18))
    assert apply("zip_lo", a, b) == [0, 10, 1, 11, 4, 14, 5, 15]
    assert apply("zip_hi", a, b) == [2, 12, 3, 13, 6, 16, 7, 17]
    assert apply("zip2_lo", a, b) == [0, 1, 10, 11, 4, 5, 14, 15]
    assert apply("zip2_hi", a, b) == [2, 3, 12, 13, 6, 7, 16, 17]
    assert apply("evens", a, b) == [0, 2, 4, 6, 10, 12, 14, 16]


def nearest(exact: Fraction) -> np.float32:
    """``exact`` as float32, to nearest even, worked out with integers."""
    if exact == 0:
        return np.float32(0)
    exponent = max(-149, (abs(exact).numerator.bit_length() - abs(exact).denominator.bit_length()) - 25)
    while abs(exact) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    return np.float32(round(exact / Fraction(2) ** exponent) * 2.0**exponent)


def test_multiply_adds_round_once(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 3000)).astype(np.float32)
    c = rng.standard_normal(3000).astype(np.float32)
    c[:1000], c[1000:2000] = -(a[:1000] * b[:1000]), a[1000:2000] * np.float32(2**-24)
    # Halfway between two float32 numbers plus or minus less than float64 sees; then the smallest numbers there are.
    a = np.concatenate([a, np.float32([1 + 2**-12] * 3 + [2**-75, 2**-74])])
    b = np.concatenate([b, np.float32([1 + 2**-12, 1 + 2**-12, -1 - 2**-12, 2**-75, 1.5 * 2**-75])])
    c = np.concatenate([c, np.float32([2.0**-60, -(2.0**-60), -(2.0**-60), 2**-126, -(2**-149)])])
    got = fused(a, b, c)
    exact = [x * y + z for x, y, z in zip(*([Fraction(float(v)) for v in part] for part in (a, b, c)), strict=True)]
    want = [nearest(value) for value in exact]
    assert np.array_equal(got, np.array(want, np.float32))
    assert np.any(got != (a.astype(np.float64) * b + c).astype(np.float32)), "the cases show what double rounding does"


def masked(lanes: int) -> Program:
    b = Builder()
    b.emit("enter")
    b.emit("s_arg", d=S.X, disp=Arg.X.byte)
    b.emit("s_arg", d=S.Y, disp=Arg.Y.byte)
    b.emit("s_arg", d=S.W, disp=Arg.W.byte)
    b.emit("set_mask", ptr=S.W)
    b.emit("load_mask", d=0, ptr=S.X)
    b.emit("store_mask", a=0, ptr=S.Y)
    b.emit("store", a=0, ptr=S.Y, disp=4 * lanes)
    for i in range(lanes // 4):
        b.emit("insert4" if i else "load4", d=1, b=i, ptr=S.W, disp=16 * i)
        b.emit("store4", a=1, b=i, ptr=S.Y, disp=8 * lanes + 16 * i)
    b.emit("leave")
    return b.finish()


@pytest.mark.parametrize("target", [*COMPILED, FOUR], ids=lambda t: t.name)
@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_masked_lanes_are_left_alone_and_quarters_placed(target: Target, count: int, rng: np.random.Generator) -> None:
    lanes = target.lanes
    x = rng.standard_normal(count).astype(np.float32)  # as many as the mask selects: one more read is an error
    mask = np.where(np.arange(lanes) < count, -1, 1).astype(np.float32) * rng.integers(1, 9, lanes).astype(np.float32)
    start = np.full(3 * lanes, 7, np.float32)
    regions = {"x": region(1 << 20, x), "y": region(1 << 21, start), "w": region(1 << 22, mask)}
    program = masked(lanes)
    run(program, lanes, block(X=1 << 20, Y=1 << 21, W=1 << 22), regions)
    zeros = np.zeros(lanes - count, np.float32)
    assert start.tolist() == [*x, *np.full(lanes - count, 7, np.float32), *x, *zeros, *mask]
    if can_run(target):
        wide, got = np.append(x, zeros), np.full(3 * lanes, 7, np.float32)
        args = block(X=address_of(wide), Y=address_of(got), W=address_of(mask))
        execute(program, target, args, wide, got, mask)
        assert got.tolist() == start.tolist()


SCALAR = [
    ("s_mov", {"a": S.K}), ("s_add", {"a": S.K}), ("s_sub", {"a": S.K}), ("s_addi", {"disp": 7}),
    ("s_set", {"disp": -3}), ("s_addi", {"disp": -(2**31)}), ("s_muli", {"a": S.K, "disp": -24}),
    ("s_add_arg", {"disp": 8}), ("s_max_arg", {"disp": 8}), ("s_min_arg", {"disp": 8}),
]  # fmt: skip
WORDS = [0, 1, -1, 5, 2**31, -(2**31) - 1, 2**47 - 1, 2**63 - 1, -(2**63)]


def scalars() -> Program:
    """Slots 2 and following: what each operation makes of slots 0 and 1; then which way jumps, loops and calls went."""
    b = Builder()
    zero, top, after, routine = (b.label() for _ in range(4))
    b.emit("enter")
    for i, (name, columns) in enumerate(SCALAR):
        b.emit("s_arg", d=S.T, disp=0)
        b.emit("s_arg", d=S.K, disp=8)
        b.emit(name, d=S.T, **columns)
        b.emit("s_put", a=S.T, disp=16 + 8 * i)
    place = 16 + 8 * len(SCALAR)
    b.emit("s_set", d=S.X, disp=100)
    b.emit("s_arg", d=S.T, disp=0)
    b.emit("jump_zero", a=S.T, disp=zero)
    b.emit("s_set", d=S.X, disp=200)
    b.place(zero)
    b.emit("s_set", d=S.K, disp=5)
    b.place(top)
    b.emit("call", disp=routine)
    b.emit("loop", a=S.K, disp=top)
    b.emit("jump", disp=after)
    b.place(routine)
    b.emit("s_addi", d=S.X, disp=1)
    b.emit("ret")
    b.place(after)
    b.emit("s_put", a=S.X, disp=place)
    b.emit("leave")
    return b.finish()


@executed
def test_scalars_and_control_mean_what_the_processor_does(target: Target) -> None:
    for first, second in product(WORDS, repeat=2):
        want, got = np.zeros((2, 3 + len(SCALAR)), np.int64)
        for args in (want, got):
            args[:2] = first, second
        run(scalars(), target.lanes, want, {})
        execute(scalars(), target, got)
        assert got.tolist() == want.tolist()
        assert want[-1] == (105 if first == 0 else 205)


# ---- whole kernels -------------------------------------------------------------------------------------------------


class Interpreted:
    """Stands where an Executable does; every row of every array is a region of its own."""

    def __init__(self, task: Task, schedule: Schedule, target: Target, kernel: matmul.Kernel) -> None:
        self.task, self.schedule, self.target, self.kernel = task, schedule, target, kernel
        self.arrays: dict[str, np.ndarray] = {}

    def memory(self, address: int) -> dict[str, Region]:
        """All that a call with the argument block at ``address`` may access, to the byte."""
        slots = memory_at(address, 8 * SLOTS).data.view(np.int64)
        memory = {"weights": memory_at(int(slots[Arg.W]), 4 * self.kernel.plan.slots)}
        for name, array in self.arrays.items():
            whole = array.reshape(1, -1) if self.task.layout == "tile_major" else array
            for i in range(whole.shape[0]):
                memory[f"{name}[{i}]"] = memory_at(address_of(whole[i]), 4 * whole.shape[1])
        for slot, height in self.panels().items():
            memory[slot.name] = memory_at(int(slots[slot]), height * self.target.tile_bytes * int(slots[Arg.GROUP]))
        memory["DISCARD"] = memory_at(int(slots[Arg.DISCARD]), self.kernel.discarded * self.target.tile_bytes)
        return memory

    def call(self, address: int) -> None:
        slots = memory_at(address, 8 * SLOTS).data.view(np.int64)
        run(self.kernel.program, self.target.lanes, slots, self.memory(address))

    def panels(self) -> dict[Arg, int]:
        """Rows of scratch that a column tile may use."""
        (m, k), staged = self.task.pattern.shape, self.task.layout == "transposed"
        rows = {Arg.PANEL: k} if staged or (self.schedule.packing != "none" and self.task.layout == "row_major") else {}
        rows |= {Arg.Y_PANEL: m} if staged else {}
        rows |= {Arg.R_PANEL: m} if staged and self.task.residual else {}
        return rows | ({Arg.PARTIAL: m} if self.kernel.plan.segments > 1 else {})


class Emulated(Interpreted):
    """The machine code, executed by an emulator on the same memory."""

    def call(self, address: int) -> None:
        regions = [(at, data.size) for at, data in self.memory(address).values()]
        code = assemble(self.kernel.program, self.target.isa).code
        emulate(code, address, [(address, 8 * SLOTS), *regions])


def arranged(dense: np.ndarray, layout: str, lanes: int, pad: int) -> np.ndarray:
    """A (rows, columns) array as the layout has it, with ``pad`` elements between rows."""
    if layout == "tile_major":
        return np.ascontiguousarray(dense.reshape(len(dense), -1, lanes).transpose(1, 0, 2))
    inner = dense.T if layout == "transposed" else dense
    wide = np.zeros((inner.shape[0], inner.shape[1] + pad), np.float32)
    wide[:, : inner.shape[1]] = inner
    return wide[:, : inner.shape[1]]


def plain(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "tile_major":
        return array.transpose(1, 0, 2).reshape(array.shape[1], -1)
    return array.T if layout == "transposed" else array


def check_product(
    target: Target, weight: np.ndarray, columns: int, schedule: Schedule, rng: np.random.Generator, *,
    layout: str = "row_major", bias: bool = False, activation: Any = None, residual: str | None = None, pad: int = 0,
    special: bool = False,
) -> None:  # fmt: skip
    """Interpret the kernel, compare with float64 and, to the last bit, with the machine code where it can run."""
    columns = -(-columns // target.lanes) * target.lanes if layout == "tile_major" else columns
    matrix = as_sparse(weight)
    (m, k), (found, parameters) = matrix.shape, activations.parse(activation)
    task = Task(matrix.pattern, bias, found.name if found else None, parameters, residual, layout)
    schedule = schedule if layout == "row_major" or schedule.packing == "none" else Schedule(schedule.rows)
    kernel = matmul.generate(task, schedule, target)
    x, r = rng.standard_normal((k, columns)).astype(np.float32), rng.standard_normal((m, columns)).astype(np.float32)
    if special:
        some = rng.random(x.shape) < 0.1
        x[some] = rng.choice(EDGES, int(some.sum()))
    b = rng.standard_normal(m).astype(np.float32) if bias else None
    given = {"x": x, "y": np.full((m, columns), 99, np.float32)} | ({"r": r} if residual else {})
    own = {name: arranged(array, layout, target.lanes, pad) for name, array in given.items()}
    fake = Interpreted(task, schedule, target, kernel)
    fake.arrays = own

    def product(executable: Any, y: np.ndarray) -> np.ndarray:
        whole = NativeProduct(task, schedule, target, kernel, executable)
        whole.load(matrix.values, b)
        whole.run(own["x"], y, own.get("r"), columns)
        return y

    product(fake, own["y"])
    want = expected(matrix, x, b, activation, residual, r)
    assert not complaint(plain(own["y"], layout), want)
    if can_run(target):
        y = arranged(given["y"], layout, target.lanes, pad)
        if emulated(target):
            executable: Any = Emulated(task, schedule, target, kernel)
            executable.arrays = own | {"y": y}
        else:
            executable = Executable(assemble(kernel.program, target.isa).code)
        native = product(executable, y)
        assert same_bits(np.ascontiguousarray(native), np.ascontiguousarray(own["y"]))


def sparse(rng: np.random.Generator, rows: int, cols: int, density: float) -> np.ndarray:
    weight = np.where(rng.random((rows, cols)) < density, rng.standard_normal((rows, cols)), 0).astype(np.float32)
    if rows > 2:
        weight[rows // 2] = 0
    return weight


SCHEDULES = [
    Schedule(1), Schedule(3), Schedule(2, tiles=1), Schedule(3, tiles=2, order="count"), Schedule(2, k_segment=3),
    Schedule(3, k_segment=2, tiles=1, order="overlap"), Schedule(3, packing="beside"), Schedule(2, prefetch=True),
    Schedule(2, k_segment=4, tiles=2, packing="beside"),
    Schedule(3, k_segment=5, tiles=1, packing="beside", prefetch=True), Schedule(2, blocks=0),
    Schedule(3, blocks=2, packing="beside"), Schedule(2, k_segment=4, blocks=2, packing="beside"),
    Schedule(2, k_segment=3, blocks=0, tiles=2, order="overlap"), Schedule(3, packing="ahead"),
    Schedule(2, k_segment=4, blocks=2, tiles=2, packing="ahead"),
]  # fmt: skip
EPILOGUES: list[dict[str, Any]] = [
    {}, {"bias": True}, {"residual": "before"}, {"residual": "after", "bias": True},
    {"activation": "relu", "bias": True},
    {"activation": Clip(-0.5, 0.25), "residual": "after"}, {"activation": "hardswish", "residual": "before"},
    {"activation": "silu"}, {"activation": "gelu", "bias": True}, {"activation": "relu6"},
    {"activation": "gelu_tanh", "residual": "before", "bias": True},
]  # fmt: skip
targets = pytest.mark.parametrize("target", [*COMPILED, FOUR], ids=lambda t: t.name)
layouts = pytest.mark.parametrize("layout", ["row_major", "tile_major", "transposed"])


@targets
@layouts
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule(target: Target, layout: str, schedule: Schedule, rng: np.random.Generator) -> None:
    weight = sparse(rng, 7, 10, 0.4)
    check_product(target, weight, 39, schedule, rng, layout=layout, bias=True, residual="before", pad=3)


@targets
@layouts
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: "+".join(map(str, e.values())) or "none")
def test_every_epilogue(target: Target, layout: str, epilogue: dict[str, Any], rng: np.random.Generator) -> None:
    weight = sparse(rng, 5, 8, 0.5)
    check_product(target, weight, 21, Schedule(2), rng, layout=layout, **epilogue)
    check_product(target, weight, 21, Schedule(2), rng, layout=layout, special=True, **epilogue)


@targets
@layouts
@pytest.mark.parametrize("extents", [(1, 1, 16), (4, 4, 16), (4, 5, 17), (6, 7, 31), (5, 19, 32), (9, 4, 64)])
def test_every_extent(target: Target, layout: str, extents: tuple[int, int, int], rng: np.random.Generator) -> None:
    rows, cols, columns = extents
    if layout == "transposed" and min(rows, cols) < 4:
        pytest.skip("products this narrow run as row-major ones")
    for density in (0.0, 0.3, 1.0):
        for schedule in (Schedule(2), Schedule(most_rows(target, 12), packing="beside")):
            check_product(target, sparse(rng, rows, cols, density), columns, schedule, rng, layout=layout)


@targets
def test_far_rows_of_a_wide_layer(target: Target, rng: np.random.Generator) -> None:
    """More columns of W than a pointer reaches in one window, with pitches that are no multiple of anything."""
    for layout in ("row_major", "tile_major"):
        check_product(target, sparse(rng, 3, 700, 0.03), 16, Schedule(2), rng, layout=layout, bias=True, pad=1)


# ---- programs that are refused -------------------------------------------------------------------------------------


ARG_X = ("s_arg", {"d": S.X, "disp": Arg.X.byte})
ZERO = ("zero", {"d": 0})
PITCHES = [("s_set", {"d": r, "disp": 64 * n}) for r, n in ((S.PX, 1), (S.PX3, 3), (S.PX5, 5), (S.PX7, 6))]
BROKEN = {
    "a byte beyond": (rows(ARG_X, ("load", {"ptr": S.X, "disp": 1})), "64 bytes at 0x1001 are outside"),
    "a byte before": (rows(ARG_X, ("load", {"ptr": S.X, "disp": -1})), "outside"),
    "a store beyond": (rows(ARG_X, ZERO, ("store", {"ptr": S.X, "disp": 4})), "outside"),
    "a broadcast beyond": (rows(ARG_X, ("bcast", {"ptr": S.X, "disp": 64})), "4 bytes at 0x1040 are outside"),
    "a vector register nobody wrote": (rows(("add", {"d": 0, "a": 1, "b": 1})), "vector register 1 is read before"),
    "an accumulator nobody cleared": (rows(ZERO, ("fma_acc", {"d": 5, "a": 0, "b": 0})), "register 5 is read before"),
    "a pointer nobody set": (rows(("load", {"ptr": S.W})), "scalar register W is read before"),
    "a constant without the pool": (rows(ZERO, ("add", {"d": 0, "a": 0, "b": -1})), "before s_const"),
    "steps without a pitch": (rows(("s_set", {"d": S.W}), ("load", {"ptr": S.W, "step": 1})), "W has no pitch"),
    "a wrong multiple of the pitch": (rows(ARG_X, *PITCHES, ("load", {"ptr": S.X, "step": 1})), "multiples of the"),
    "TMP across a step": (
        rows(ARG_X, *PITCHES[:3], ("s_set", {"d": S.PX7, "disp": 448}), ("s_set", {"d": S.TMP}),
             ("load", {"ptr": S.X, "step": 1, "disp": -64}), ("s_add", {"d": S.X, "a": S.TMP})), "TMP is read before"),
    "a mask nobody set": (rows(ARG_X, ("load_mask", {"ptr": S.X})), "before set_mask"),
    "a slot outside the block": (rows(("s_arg", {"d": S.X, "disp": 8 * SLOTS})), "no slot"),
    "half a slot": (rows(("s_arg", {"d": S.X, "disp": 4})), "no slot"),
    "a return without a call": (rows(("ret", {})), "without a call"),
    "an end inside a call": (rows(("call", {"disp": 0}), ("label", {"disp": 0}), ("leave", {}), labels=1), "inside a"),
    "a jump to nowhere": (rows(("jump", {"disp": 3})), "label 3 is nowhere"),
    "no end": (rows(ZERO), "past the end"),
    "a loop for ever": (rows(("label", {"disp": 0}), ("jump", {"disp": 0}), labels=1), "no end after 1000 rows"),
    "wrong operation for a load": (rows(ARG_X, ("store", {"ptr": S.X})), "vector register 0 is read before"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_programs_are_refused(what: str) -> None:
    program, message = BROKEN[what]
    with pytest.raises(InternalError, match=message):
        run(program, 16, block(X=4096), {"x": region(4096, np.zeros(16, np.float32))}, budget=1000)


def test_an_error_names_the_row() -> None:
    with pytest.raises(InternalError) as caught:
        run(BROKEN["a byte beyond"][0], 16, block(X=4096), {"x": region(4096, np.zeros(16, np.float32))})
    assert caught.value.where.startswith("row 1, load d=0")


def test_one_byte_less_of_any_array_is_noticed(rng: np.random.Generator) -> None:
    """The regions of the tests above are tight: the same kernel fails once any of them lacks its last byte."""
    weight, target = sparse(rng, 4, 6, 1.0), TARGETS["x86-avx512"]
    weight[2] = 1
    task = Task(as_sparse(weight).pattern, True, None, (), "after")
    kernel = matmul.generate(task, Schedule(3), target)
    arrays = {name: np.zeros((extent, 20), np.float32) for name, extent in (("x", 6), ("y", 4), ("r", 4))}
    fake = Interpreted(task, Schedule(3), target, kernel)
    fake.arrays = arrays
    whole = NativeProduct(task, Schedule(3), target, kernel, fake)
    whole.load(np.ones(24, np.float32), np.ones(4, np.float32))
    whole.run(arrays["x"], arrays["y"], arrays["r"], 20)
    for name in arrays:
        fake.arrays = arrays | {name: arrays[name][:-1]}
        with pytest.raises(InternalError, match="outside all regions"):
            whole.run(arrays["x"], arrays["y"], arrays["r"], 20)
    unbiased = matmul.generate(Task(task.pattern, False, None, (), "after"), Schedule(3), target)
    fake.arrays, fake.kernel = arrays, replace(kernel, plan=unbiased.plan)  # four weights fewer
    with pytest.raises(InternalError, match="outside all regions"):
        whole.run(arrays["x"], arrays["y"], arrays["r"], 20)


FAR = ("load", {"ptr": S.X, "disp": 1 << 20})
MOVED = [ARG_X, ("label", {"disp": 0}), FAR, ("s_set", {"d": S.T}), ("loop", {"a": S.T, "disp": 0})]
ADDED = [ARG_X, FAR, ("s_addi", {"d": S.X, "disp": 64}), ("load", {"ptr": S.X, "disp": 0})]


@pytest.mark.parametrize("isa", ENCODINGS)
@pytest.mark.parametrize("emitted", [MOVED, ADDED], ids=["across a label", "added to"])
def test_a_pointer_that_is_moved_may_not_be_used_on(isa: str, emitted: list[Any]) -> None:
    with pytest.raises(InternalError, match="pointer X"):
        lower_x86(rows(*emitted, labels=1), ENCODINGS[isa])


def test_an_operation_without_recipe_is_refused() -> None:
    with pytest.raises(InternalError, match="fma_bcast"):
        lower_x86(rows(ARG_X, ("fma_bcast", {"ptr": S.X})), ENCODINGS["x86-avx2"])
    with pytest.raises(InternalError, match="mul_bcast"):
        lower_arm64(rows(ARG_X, ("mul_bcast", {"ptr": S.X})))


@pytest.mark.parametrize("emitted", [[], [("label", {"disp": 0})] * 2, [("label", {"disp": 1})]])
def test_labels_are_placed_exactly_once(emitted: list[Any]) -> None:
    with pytest.raises(InternalError, match="exactly once"):
        check(rows(*emitted, labels=1))
