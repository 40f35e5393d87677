"""What happens to the accumulators before they are stored: residual and activation, in registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codegen.registers import ACCUMULATOR, Operand, Recorder, Template, assign
from ..codegen.vector import OP, Builder, S
from ..schedule.task import Task
from ..target import Target
from .activations import ACTIVATIONS


def inner_registers(target: Target) -> int:
    """Registers that multiply-adds take beside the accumulators: x, and a weight where it is loaded on its own."""
    return 1 + (0 if target.embedded_broadcast else 1)


def template(task: Task, target: Target, b: Builder) -> Template | None:
    """The element-wise code for one accumulator, or None where there is nothing to do.

    Its registers are those that the multiply-adds leave idle; only what needs more costs accumulators.
    """
    if task.activation is None and task.residual is None:
        return None
    v = Recorder()
    value: Operand = v.input()
    if task.residual == "before":
        value = v.add(value, v.residual())
    if task.activation is not None:
        value = ACTIVATIONS[task.activation].function(v, value, *task.parameters)
    if task.residual == "after":
        value = v.add(value, v.residual())
    return assign(v, value, b, inner_registers(target), target.addend_only)


def apply(b: Builder, code: Template, accumulators: int, place: dict[str, Any]) -> None:
    """Run ``code`` on accumulators 0 .. n-1; ``place`` tells where each one's residual lies (ptr, step, disp), and
    the operation and mask that load it, if it is not ``load``."""
    if any(value < 0 for _, value in code.preload) or any(row[3] < 0 for row in code.rows):
        b.emit("s_const", d=S.CONST)
    for register, constant in code.preload:
        b.emit("const", d=accumulators + register, b=constant)
    n, length = accumulators, len(code.rows)
    if not length:
        return

    def spread(values: list[int]) -> Any:
        """A register of the template for every accumulator: (n * length,)."""
        column = np.array(values)
        own = np.arange(n)[:, None]
        real = np.where(column >= 0, column + n, column)
        return np.where(column == ACCUMULATOR, own, real).reshape(-1)

    loads, load, mask = [row[0] == "residual" for row in code.rows], place.pop("op", OP["load"]), place.pop("b", 0)
    ops = np.tile(
        np.array([load if loaded else OP[row[0]] for loaded, row in zip(loads, code.rows, strict=True)], np.uint8), n
    )
    at_load = np.tile(np.array(loads), n)
    memory = {key: np.where(at_load, np.repeat(np.broadcast_to(value, n), length), 0) for key, value in place.items()}
    immediate = np.tile(np.array([row[4] for row in code.rows]), n)
    memory["disp"] = memory.get("disp", 0) + immediate
    b.emit_many(
        ops, n * length, spread([r[1] for r in code.rows]), spread([r[2] for r in code.rows]),
        np.where(at_load, mask, spread([r[3] for r in code.rows])), **memory,
    )  # fmt: skip
