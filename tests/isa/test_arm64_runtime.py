"""What surrounds AArch64 code: the routine that synchronises instruction caches, frames, and a whole program that an
emulator of processes runs."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emulator import MISSING, Fault, emulate
from isa.test_arm64_encoder import PREFIX, assembled, decoded, oracle
from sparsert.codegen.assemble import assemble
from sparsert.codegen.vector import Builder, Program, S
from sparsert.runtime.arm64 import SYNCHRONISE
from sparsert.runtime.cpu import address_of

unicorn = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ISA = "aarch64-neon"


@oracle
def test_the_routine_for_instruction_caches_says_what_its_remarks_say(tmp_path: Path) -> None:
    text = """bti c; mrs x2, ctr_el0; ubfx x3, x2, #16, #4; mov x4, #4; lsl x3, x4, x3; and x2, x2, #15; lsl x2, x4, x2
        sub x5, x3, #1; bic x5, x0, x5; 1: dc cvau, x5; add x5, x5, x3; cmp x5, x1; b.lo 1b; dsb ish
        sub x5, x2, #1; bic x5, x0, x5; 2: ic ivau, x5; add x5, x5, x2; cmp x5, x1; b.lo 2b; dsb ish; isb; ret"""
    assert (
        np.frombuffer(SYNCHRONISE, "<u4").tolist() == assembled(text.replace("; ", "\n").split("\n"), tmp_path).tolist()
    )
    assert len(decoded(np.frombuffer(SYNCHRONISE, "<u4"), tmp_path)) == 23


def adder() -> Program:
    """y[i] = x[i] + 1.5 for as many vectors as slot 2 says."""
    b = Builder()
    top = b.label()
    b.emit("enter")
    for register, slot in ((S.X, 0), (S.Y, 1), (S.T, 2)):
        b.emit("s_arg", d=register, disp=8 * slot)
    b.emit("s_const", d=S.CONST)
    b.place(top)
    b.emit("load", d=9, ptr=S.X)
    b.emit("add", d=9, a=9, b=-1 - b.constant(0x3FC00000))
    b.emit("store", a=9, ptr=S.Y)
    b.emit("s_addi", d=S.X, disp=16)
    b.emit("s_addi", d=S.Y, disp=16)
    b.emit("loop", a=S.T, disp=top)
    b.emit("leave")
    return b.finish()


@unicorn
def test_the_emulator_sees_what_code_may_not_do() -> None:
    x, y = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    args = np.array([address_of(x), address_of(y), 2], np.int64)
    regions = [(address_of(a), a.nbytes) for a in (args, x, y)]
    code = assemble(adder(), ISA).code
    emulate(code, address_of(args), regions)
    assert y.tolist() == [i + 1.5 for i in range(8)]
    for i in (1, 2):  # one byte less of x or of y
        less = [(at, size - (i == k)) for k, (at, size) in enumerate(regions)]
        with pytest.raises(Fault, match="8 bytes at"):
            emulate(code, address_of(args), less)
    clobbered = [0xD2800013, 0xD65F03C0], [0x6F00E409, 0xD65F03C0], [0xD10043FF, 0xD65F03C0]  # x19, v9, sp
    for words in clobbered:
        with pytest.raises(Fault, match="are changed"):
            emulate(struct.pack("<2I", *words), 0, [])
    with pytest.raises(Fault):
        emulate(bytes(8), 0, [])


def executable(code: bytes) -> bytes:
    """An ELF file for Linux whose one segment is ``code`` at 0x400000, entered at its first byte."""
    base, head = 0x400000, 0x1000
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 183, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, base, base, head + len(code), head + len(code), 0x1000)
    return (elf + segment).ljust(head, b"\0") + code


@oracle
@pytest.mark.tools("qemu-aarch64-static")
def test_a_second_emulator_runs_the_same_code(tmp_path: Path) -> None:
    """As a process of its own: data in the file, the kernel called, its results written to standard output."""
    kernel = assemble(adder(), ISA).code
    x = np.linspace(-3, 3, 32, dtype=np.float32)
    start = ["adr x0, args", "adr x1, data", "str x1, [x0]", "adr x1, out", "str x1, [x0, #8]", "bl kernel",
             "mov x0, #1", "adr x1, out", f"mov x2, #{x.nbytes}", "mov x8, #64", "svc #0",
             "mov x0, #0", "mov x8, #93", "svc #0",
             ".balign 8", "args: .quad 0, 0, 8", "data:", *(f".word {w:#x}" for w in x.view(np.uint32)),
             "out:", f".space {x.nbytes}", ".balign 4096", "kernel:"]  # fmt: skip
    program = tmp_path / "program"
    program.write_bytes(executable(assembled(start, tmp_path).tobytes() + kernel))
    program.chmod(0o755)
    done = subprocess.run(["qemu-aarch64-static", program], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr, PREFIX)
    assert np.array_equal(np.frombuffer(done.stdout, np.float32), x + np.float32(1.5))


@pytest.mark.isa(ISA)
def test_new_code_in_old_memory_is_what_runs() -> None:
    """Pages come and go at the same addresses: instruction caches have to follow."""
    from sparsert.runtime.cpu import Executable

    for constant in range(50):
        b = Builder()
        b.emit("enter")
        b.emit("s_set", d=S.T, disp=constant)
        b.emit("s_put", a=S.T, disp=0)
        b.emit("leave")
        args = np.full(1, -1, np.int64)
        made = Executable(assemble(b.finish(), ISA).code)
        made.call(address_of(args))
        assert args[0] == constant
