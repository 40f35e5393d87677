"""Dense products as native calls: the looped form bound to arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..codegen.x86.assemble import assemble
from ..kernels.dense import UNROLL, VECTORS, Form, Slot, generate
from ..runtime.cpu import Executable, Frame, address_of
from ..schedule.dense import DenseSchedule
from ..target import Target

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Code:
    """The machine code of one form, which serves every shape."""

    form: Form
    target: Target
    rows: int
    executable: Executable
    size: int
    instructions: int


@lru_cache(64)
def code_of(form: Form, target: Target) -> Code:
    """Code for ``form``, generated once per process."""
    kernel = generate(form, target)
    code = assemble(kernel.program, target.isa)
    return Code(form, target, kernel.rows, Executable(code.code), len(code.code), code.instructions)


@dataclass(frozen=True)
class Extents:
    """C (batch, M, N) = A (batch, M, K) @ B (batch, K, N), and where things lie, in bytes.

    Pitches go from row to row as stored: of A given by columns, and of B transposed, those of the stored array.
    ``a_block``: from block to block of packed rows of A; ``panel``: from panel to panel of packed B.
    """

    batch: int
    m: int
    n: int
    k: int
    a_pitch: int
    b_pitch: int
    c_pitch: int
    r_pitch: int = 0
    a_batch: int = 0
    b_batch: int = 0
    c_batch: int = 0
    r_batch: int = 0
    a_block: int = 0
    panel: int = 0


def blocks_of_rows(m: int, most: int) -> tuple[int, int, int]:
    """Large blocks, small blocks, and the rows of a large one; small ones have a row less."""
    count = -(-m // most)
    size = -(-m // count)
    large = m - count * (size - 1)
    return large, count - large, size


def frame(code: Code, e: Extents, schedule: DenseSchedule) -> Frame:
    """An argument block and scratch for such arrays, all but the addresses filled in."""
    lanes, tile, form = code.target.lanes, code.target.tile_bytes, code.form
    width = VECTORS * lanes
    kc = min(schedule.k_block, e.k)
    last = e.k - (-(-e.k // kc) - 1) * kc
    panels, rest = divmod(e.n, width)
    large, small, size = blocks_of_rows(e.m, code.rows)
    result = Frame(len(Slot), 3 * lanes + 16 + (kc + lanes) * width)
    s, at = result.slots, address_of(result.scratch)
    masks = result.scratch[: 3 * lanes].view(np.int32).reshape(3, lanes)
    for mask, count in zip(masks, ((e.n - 1) % lanes + 1, kc % lanes, last % lanes), strict=True):
        mask[:] = np.where(np.arange(lanes) < count, -1, 0)
    rows, by_rows = form.a == "rows", form.bias == "rows"
    for n, slot in zip((1, 3, 5, 7), (Slot.A_PITCH, Slot.A_PITCH3, Slot.A_PITCH5, Slot.A_PITCH7), strict=True):
        s[slot] = n * e.a_pitch
    transposed = form.b == "transposed"
    overlap = -rest % 4 if rest % 4 else 0
    packed = e.panel > 0
    values = {
        Slot.B_PITCH: e.b_pitch, Slot.C_PITCH: e.c_pitch, Slot.R_PITCH: e.r_pitch,
        Slot.A_BATCH: e.a_batch, Slot.B_BATCH: e.b_batch, Slot.C_BATCH: e.c_batch, Slot.R_BATCH: e.r_batch,
        Slot.A_K: kc * 4 if rows else kc * e.a_pitch, Slot.B_K: kc * (4 if transposed else e.b_pitch),
        Slot.B_PANEL: e.panel or (width * e.b_pitch if transposed else VECTORS * tile),
        Slot.C_PANEL: VECTORS * tile, Slot.R_PANEL: VECTORS * tile,
        Slot.BIAS_PANEL: VECTORS * tile if form.bias == "columns" else 0,
        Slot.BATCH: e.batch, Slot.K_BLOCKS: -(-e.k // kc) - 1, Slot.PANELS: panels, Slot.TAIL: -(-rest // lanes),
        Slot.LARGE: large, Slot.SMALL: small, Slot.SKIP_LARGE: code.rows - size, Slot.SKIP_SMALL: code.rows - size + 1,
        Slot.TURNS: kc // UNROLL, Slot.REST: kc % UNROLL, Slot.LAST_TURNS: last // UNROLL, Slot.LAST_REST: last % UNROLL,
        Slot.NEXT: 2 if schedule.anew else 1,
        Slot.PACK: int(not packed and large + small > 1), Slot.PACK_TAIL: int(not packed),
        Slot.PANEL: at + 12 * lanes + 64, Slot.MASK: at,
        Slot.K_GROUPS: kc // lanes, Slot.LAST_K_GROUPS: last // lanes,
        Slot.K_TAIL: kc % lanes, Slot.LAST_K_TAIL: last % lanes, Slot.K_MASK: at + tile, Slot.LAST_K_MASK: at + 2 * tile,
        Slot.QUADS: rest // 4, Slot.OVERLAP: -4 * overlap, Slot.OVERLAP_PITCH: -overlap * e.b_pitch,
        Slot.QUAD_PITCH: 4 * e.b_pitch, Slot.SIXTEEN: 16, Slot.ONE: 1,
    }  # fmt: skip
    for slot, value in values.items():
        s[slot] = value
    for name, count in (("LARGE", size), ("SMALL", size - 1)):
        s[Slot[f"A_{name}"]] = e.a_block or count * (e.a_pitch if rows else 4)
        s[Slot[f"C_{name}"]], s[Slot[f"R_{name}"]] = count * e.c_pitch, count * e.r_pitch
        s[Slot[f"BIAS_{name}"]] = 4 * count if by_rows else 0
    return result


def pack_rows(weight: Array, most: int) -> tuple[Array, int, int]:
    """W (M, K) as blocks of rows [block][k][row], its pitch and the bytes of a block; a lacking row is 0."""
    m, k = weight.shape
    large, small, size = blocks_of_rows(m, most)
    out = np.zeros((large + small, k, size), np.float32)
    out[:large] = weight[: large * size].reshape(large, size, k).transpose(0, 2, 1)
    if small:
        out[large:, :, : size - 1] = weight[large * size :].reshape(small, size - 1, k).transpose(0, 2, 1)
    return out, 4 * size, 4 * k * size


def pack_panels(weight: Array, lanes: int) -> tuple[Array, int]:
    """W (N, K) as panels of columns [panel][k][column], zeros behind the last one, and the bytes of a panel.

    A last panel of one vector has rows of one vector.
    """
    raise NotImplementedError
