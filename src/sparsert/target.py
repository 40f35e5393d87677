"""What code is generated for: instruction set, registers, caches.

Which of them this machine is: :mod:`sparsert.runtime.host`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One set of machine code and the figures its cost model needs.

    Attributes:
        name: public name; the same as ``isa`` for compiled targets.
        lanes: float32 lanes of a vector register, which is also the number of columns of a tile.
        registers: vector registers.
        embedded_broadcast: an FMA may broadcast one float from memory by itself.
        by_element: a multiply-add takes its weight from any element of a register: one load brings several weights.
        addend_only: multiply-adds overwrite their addend, and no form overwrites a factor.
        scratch: how many vector registers, the last ones, element-wise code leaves to sequences of its instruction set.
        machine: what this code runs on, as the platform names it.
        needs: CPU features (as CPUID or the system names them) without which the code faults.
        masks: mask registers that loads of the accumulate loop may use.
        indexed: multiply-adds take a vector from memory at a base plus 8 times a register; x86 addresses so.
        narrow: the variant with vectors half as long, for fewer columns than lanes.
        loops: its lowering has what kernels need that loop over a pattern as data (note 0014).
        l1i, l1d, l2: bytes of cache per core.
        fmas, loads, broadcasts: what a core starts in a cycle: vector multiply-adds, loads of a whole vector, loads of
            one float that is then broadcast (in the multiply-add, or by an instruction of its own).
        fma_bytes: code of a nonzero, with its share of everything else.
    """

    name: str
    isa: str
    lanes: int
    registers: int = 0
    embedded_broadcast: bool = False
    needs: tuple[str, ...] = ()
    by_element: bool = False
    addend_only: bool = False
    scratch: int = 0
    machine: str = "x86-64"
    masks: int = 0
    loops: bool = False
    indexed: bool = False
    narrow: str = ""
    l1i: int = 32 << 10
    l1d: int = 32 << 10
    l2: int = 1 << 20
    fmas: float = 1.0
    loads: float = 1.0
    broadcasts: float = 2.0
    fma_bytes: float = 9.5

    @property
    def tile_bytes(self) -> int:
        """Bytes of one row of a tile."""
        return 4 * self.lanes


# Throughputs are those of Zen 4 (AMD, Software Optimization Guide for the Zen 4 Microarchitecture, publication 57647):
# vectors of 512 bits take both halves of the multiply-add pipes and of the vector unit's load ports, of 256 bits one.
# Measured multiply-adds agree (117.5 GFLOP/s at 3.67 GHz are one of 16 lanes a cycle). Bytes of code are medians over
# the benchmarks' layers. For AArch64 they are those of Neoverse N1 (Arm, Neoverse N1 Software Optimization Guide: two
# multiply-adds and two loads a cycle, a load brings four weights), not measured.
TARGETS = {
    t.name: t
    for t in (
        Target(
            "x86-avx512",
            "x86-avx512",
            16,
            32,
            True,
            ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
            masks=5,
            loops=True,
            indexed=True,
            narrow="x86-avx512-256",
        ),
        Target(
            "x86-avx2",
            "x86-avx2",
            8,
            16,
            False,
            ("avx2", "fma"),
            fmas=2.0,
            loads=2.0,
            fma_bytes=17.0,
            loops=True,
            indexed=True,
        ),
        Target(
            "aarch64-neon",
            "aarch64-neon",
            4,
            32,
            False,
            ("asimd",),
            by_element=True,
            addend_only=True,
            scratch=2,
            machine="aarch64",
            l1i=64 << 10,
            l1d=64 << 10,
            fmas=2.0,
            loads=2.0,
            broadcasts=8.0,
            loops=True,
            fma_bytes=7.0,
        ),
        Target("reference", "reference", 16),
    )
}
VARIANTS = {
    t.name: t
    for t in (
        Target("x86-avx512-256", "x86-avx512-256", 8, 32, True, TARGETS["x86-avx512"].needs, fmas=2.0, loads=2.0,
               masks=5, loops=True, indexed=True),
    )
}  # fmt: skip
"""What few columns are computed with beside the targets' own vectors; no target that anyone asks for."""
NATIVE_ORDER = ("x86-avx512", "x86-avx2", "aarch64-neon")
"""Which target ``native`` stands for: the first one available."""


def named(name: str) -> Target:
    """The target or variant called ``name``."""
    return TARGETS.get(name) or VARIANTS[name]
