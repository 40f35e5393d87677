"""A whole operator as one native call: groups of column tiles around packing, the row blocks, and unpacking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import Builder, Program, S, check
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..sparsity.reorder import ORDERS
from ..sparsity.taps import Taps
from ..target import Target
from . import epilogue, layout, planes
from .accumulate import accumulate
from .arguments import Arg
from .blocks import Blocks
from .handover import Handover
from .layout import Cursor
from .plan import Plan, plan


@dataclass(frozen=True, eq=False)
class Kernel:
    """The program of an operator and how its data is arranged.

    Attributes:
        x_loads: vectors of x loaded per column tile.
        scatters: transposed output leaves the accumulators directly, no output panel is needed.
        discarded: vectors of scratch that may be overwritten at any time.
    """

    program: Program
    plan: Plan
    taps: Taps
    x_loads: int
    scatters: bool
    discarded: int

    def pack(self, values: NDArray[np.float32], bias: NDArray[np.float32] | None, out: NDArray[np.float32]) -> None:
        """Values of the pattern (CSR order) and biases into ``out`` (plan.slots,), the array behind Arg.W."""
        p = self.plan
        out[p.value_slot] = self.taps.pack(values)[:, 0].take(p.taps)
        if bias is not None:
            out[p.bias_slot] = bias[p.order]

    def unpack(self, packed: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """What ``pack`` was given."""
        p = self.plan
        values, bias = np.zeros(len(self.taps), np.float32), np.zeros(self.taps.rows, np.float32)
        values[self.taps.source[p.taps, 0]] = packed[p.value_slot]
        bias[p.order[: p.bias_slot.size]] = packed[p.bias_slot]
        return values, bias if p.bias_slot.size else None


def spare(task: Task, target: Target) -> int:
    """Vector registers no accumulator may take: those of the inner loop or of the epilogue, whichever needs more."""
    code = epilogue.template(task, target, Builder())
    transposing = layout.TRANSPOSE_REGISTERS if _scatters(task) else 0
    return max(epilogue.inner_registers(target), code.registers + target.scratch if code else 0, transposing)


def _scatters(task: Task) -> bool:
    """Whether output rows come in fours, which can be transposed in registers."""
    return task.layout == "transposed" and task.pattern.rows % 4 == 0


def generate(task: Task, schedule: Schedule, target: Target) -> Kernel:
    """The vector program of ``task`` under ``schedule``.

    Raises:
        ScheduleError: the schedule does not fit the target's registers.
    """
    schedule.check(target, spare(task, target))
    rows, extent, taps = task.pattern.rows, task.extent, task.taps
    order = ORDERS[schedule.order](task.pattern, schedule.rows)
    scatters = _scatters(task) and schedule.order == "natural" and schedule.rows >= 4
    p = plan(taps, extent, order, schedule, task.bias, 4 if scatters else 1)
    b = Builder()
    packing = schedule.packing if task.layout == "row_major" else "none"
    tiled = packing != "none" or task.layout != "row_major"
    handover = _handover(task, schedule, target, p, scatters)
    transposes = task.layout == "transposed"  # between groups, which overwrites what waits in the accumulators
    body = accumulate(taps, p, schedule, target, tiled, packing, handover)
    done, group = b.label("done"), b.label("next group of tiles")
    images = planes.Images(task, task.window, target) if task.window else None
    b.emit("enter")
    if images is not None:
        images.open(b)
    for source, variable in (
        (Arg.START, Arg.X_NEXT),
        (Arg.START, Arg.Y_NEXT),
        (Arg.START, Arg.R_NEXT),
        (Arg.TILES, Arg.LEFT),
    ):
        b.emit("s_arg", d=S.TMP, disp=source.byte)
        b.emit("s_put", a=S.TMP, disp=variable.byte)
    if handover.chained and not transposes:
        handover.open(b)
    b.place(group)
    b.emit("s_arg", d=S.T, disp=Arg.LEFT.byte)
    b.emit("jump_zero", a=S.T, disp=done)
    b.emit("s_min_arg", d=S.T, disp=Arg.GROUP.byte)
    b.emit("s_put", a=S.T, disp=Arg.COUNT.byte)
    if task.layout == "transposed":
        layout.pack_transposed(b, target, extent, layout.TRANSPOSED_X, Arg.X_PITCH, Arg.PANEL)
        if task.residual:
            layout.pack_transposed(b, target, rows, layout.TRANSPOSED_R, Arg.R_PITCH, Arg.R_PANEL)
    if handover.chained and transposes:
        handover.open(b)
    Blocks(
        task, target, schedule, p, body, tiled, packing, epilogue.template(task, target, b), handover, scatters
    ).emit(b)
    if handover.chained and transposes:
        handover.close(b)
    if task.layout == "transposed" and not scatters:
        layout.unpack_transposed(b, target, rows, layout.TRANSPOSED_Y, Arg.Y_PITCH, Arg.Y_PANEL)
    for next_group, step in ((Arg.X_NEXT, Arg.X_GROUP), (Arg.Y_NEXT, Arg.Y_GROUP), (Arg.R_NEXT, Arg.R_GROUP)):
        Cursor(next_group, Arg.ZERO, Arg.ZERO, step).advance(b)
    b.emit("s_arg", d=S.T, disp=Arg.LEFT.byte)
    b.emit("s_arg", d=S.K, disp=Arg.COUNT.byte)
    b.emit("s_sub", d=S.T, a=S.K)
    b.emit("s_put", a=S.T, disp=Arg.LEFT.byte)
    b.emit("jump", disp=group)
    b.place(done)
    if handover.chained and not transposes:
        handover.close(b)
    if images is not None:
        images.close(b)
    b.emit("leave")
    program = b.finish()
    check(program)
    return Kernel(program, p, taps, int(np.count_nonzero(p.fresh)), scatters, handover.discarded)


def _handover(task: Task, schedule: Schedule, target: Target, p: Plan, scatters: bool) -> Handover:
    """Results wait for the next turn unless transposed in registers, or permuted with turns of other blocks between."""
    chained = schedule.order == "natural" and not scatters and p.blocks.size > 1
    if chained:
        return Handover(task, target, p, int(np.diff(p.blocks).min()), True)
    deferred = 0 if scatters or schedule.tiles == 1 or schedule.blocks != 1 else schedule.rows
    return Handover(task, target, p, deferred, False)
