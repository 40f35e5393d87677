"""Depthwise convolutions: several image rows of one channel in a block, and a loop over channels around it.

A row of the table of taps is a pair of channel and image row here. A loaded vector then serves as many output rows as
the kernel has rows, and the weights of a channel stay in registers. Planes have no gaps (their loads are masked), so
any run of positions is a tile: blocks that overlap, at the end of rows and planes, compute the same bits twice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import Builder, Program, S, check
from ..schedule.task import Task
from ..sparsity.taps import Window
from ..target import Target
from . import epilogue
from .arguments import Arg, Move
from .planes import Images

_TEMPORARY = 1  # the last register, through which masks go
MOST_ROWS = 14


def fits(task: Task, target: Target) -> bool:
    """Whether ``task`` is depthwise with every channel's whole kernel in the pattern, and ``target`` has masks."""
    window = task.window
    if window is None or not window.masked or target.masks < window.kernel[1] or window.stride[1] > 2:
        return False
    places = window.kernel[0] * window.kernel[1]
    p = task.pattern
    own = window.groups == p.rows and p.cols == places and p.nnz == places * window.groups
    return own and most_rows(task, target) >= 4


def most_rows(task: Task, target: Target) -> int:
    """Image rows per block: accumulators that weights, epilogue and masks leave."""
    taken = _temporaries(task, target) + task.pattern.cols + task.bias + _TEMPORARY
    return min(MOST_ROWS, target.registers - taken)


def _temporaries(task: Task, target: Target) -> int:
    code = epilogue.template(task, target, Builder())
    return max(epilogue.inner_registers(target), code.registers if code else 0)


def pack(task: Task, values: NDArray[np.float32], bias: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """(channels, taps), by displacement, behind them the biases if there are any."""
    by_channel = values.reshape(task.pattern.rows, -1)[:, _order(task)]
    return by_channel if bias is None else np.concatenate([by_channel, bias[:, None]], axis=1)


def _order(task: Task) -> NDArray[np.int64]:
    """The taps of a channel by displacement."""
    return np.argsort(task.taps.key[: task.pattern.cols], kind="stable")


def generate(task: Task, window: Window, target: Target, rows: int, tail: int) -> Program:
    """The program for blocks of ``rows`` image rows; one argument block, whose images are channels.

    A tile behind the last ``tail`` rows reaches beyond the plane: of these, only the row itself is stored.
    """
    b = Builder()
    images = Images(task, window, target, channels=1, outputs=0, weights=4 * (task.pattern.cols + task.bias))
    code = epilogue.template(task, target, b)
    order = _order(task)
    plane, pitch, offset = task.taps.place(task.taps.key[: task.pattern.cols][order])
    first = rows + _temporaries(task, target)
    bias = first + order.size
    b.emit("enter")
    images.open(b)
    b.emit("s_arg", d=S.W, disp=Arg.W_HERE.byte)
    for tap in range(order.size + task.bias):
        b.emit("bcast", d=first + tap, ptr=S.W, disp=4 * tap)
    for k, register in enumerate((S.PX, S.PX3, S.PX5, S.PX7)):
        b.emit("s_arg", d=register, disp=Arg(Arg.X_PITCH + k).byte)
    b.emit("s_arg", d=S.W, disp=Arg.MASKS.byte)
    b.emit("s_arg", d=S.K, disp=Arg.TILES.byte)
    b.emit("s_arg", d=S.PANEL, disp=Arg.ZERO.byte)
    row, tile = b.label("rows of a channel"), b.label("columns")
    b.place(row)
    b.emit("s_arg", d=S.T, disp=Arg.GROUP.byte)
    b.emit("s_arg", d=S.CONST, disp=Arg.ZERO.byte)
    b.emit("align", disp=16)
    b.place(tile)
    for mask in range(window.masks):
        b.emit("mask_from", d=mask, ptr=S.W, disp=mask * target.tile_bytes)
    b.emit("s_addi", d=S.W, disp=window.masks * target.tile_bytes)
    # The block's first position, in bytes: of the row and of the column, neither beyond its last.
    b.emit("s_mov", d=S.X, a=S.CONST)
    b.emit("s_min_arg", d=S.X, disp=Arg.R_LAST.byte)
    b.emit("s_mov", d=S.Y, a=S.PANEL)
    b.emit("s_min_arg", d=S.Y, disp=Arg.Y_LAST.byte)
    b.emit("s_add", d=S.Y, a=S.X)
    b.emit("s_min_arg", d=S.Y, disp=Arg.X_LAST.byte)
    b.emit("s_put", a=S.Y, disp=Arg.YT.byte)
    b.emit("s_mov", d=S.X, a=S.Y)
    b.emit("s_add_arg", d=S.X, disp=Arg.X_PLANES.byte)
    started: set[int] = set()
    at = 0
    for phase in np.unique(plane).tolist():
        for _ in range(phase - at):
            b.emit("s_add_arg", d=S.X, disp=Arg.X_PLANE.byte)
        at = phase
        own = np.flatnonzero(plane == phase)
        for line in range(rows + int(pitch[own].max())):
            for column in np.unique(offset[own]).tolist():
                served = [(line - int(pitch[tap]), int(tap)) for tap in own if offset[tap] == column]
                served = [(accumulator, tap) for accumulator, tap in served if 0 <= accumulator < rows]
                if not served:
                    continue
                place = {"ptr": S.X, "step": line, "disp": 4 * column}
                if window.masks:
                    number = window.mask_places.index((window.phases[phase][1], column))
                    b.emit("load_by_mask", d=rows, b=number, **place)
                else:
                    b.emit("load", d=rows, **place)
                for accumulator, tap in served:
                    if accumulator in started:
                        b.emit("fma_acc", d=accumulator, a=rows, b=first + tap)
                    elif task.bias:
                        b.emit("mov", d=accumulator, a=bias)
                        b.emit("fma_acc", d=accumulator, a=rows, b=first + tap)
                    else:
                        b.emit("mul", d=accumulator, a=rows, b=first + tap)
                    started.add(accumulator)
        if at < int(plane.max()) and rows + int(pitch[own].max()) > 8:
            b.emit("s_arg", d=S.X, disp=Arg.YT.byte)  # the lines moved it
            b.emit("s_add_arg", d=S.X, disp=Arg.X_PLANES.byte)
            at = 0
    if code is not None:
        b.emit("s_mov", d=S.TMP, a=S.CONST)
        b.emit("s_put", a=S.TMP, disp=Arg.XT.byte)
        where = {}
        if task.residual:
            b.emit("s_arg", d=S.Y, disp=Arg.YT.byte)
            b.emit("s_add_arg", d=S.Y, disp=Arg.R_PLANES.byte)
            b.emit("s_arg", d=S.PY, disp=Arg.R_PITCH.byte)
            where = {"ptr": S.Y, "step": np.arange(rows)}
        epilogue.apply(b, code, rows, where)
        b.emit("s_arg", d=S.CONST, disp=Arg.XT.byte)
    b.emit("s_arg", d=S.Y, disp=Arg.YT.byte)
    b.emit("s_add_arg", d=S.Y, disp=Arg.Y_PLANES.byte)
    b.emit("s_arg", d=S.PY, disp=Arg.Y_PITCH.byte)
    if tail:
        b.emit("s_arg", d=S.TMP, disp=Move.MASK.byte(len(window.phases)))
        b.emit("set_mask", ptr=S.TMP)
    for accumulator in range(rows):
        b.emit("store" if accumulator < rows - tail else "store_mask", a=accumulator, ptr=S.Y)
        if accumulator + 1 < rows:
            b.emit("s_add", d=S.Y, a=S.PY)
    b.emit("s_addi", d=S.CONST, disp=target.tile_bytes)
    b.emit("loop", a=S.T, disp=tile)
    b.emit("s_add_arg", d=S.PANEL, disp=Arg.Y_GROUP.byte)
    b.emit("loop", a=S.K, disp=row)
    images.close(b)
    b.emit("leave")
    program = b.finish()
    check(program)
    return program
