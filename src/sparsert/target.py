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
        needs: CPU features (as CPUID names them) without which the code faults.
        l1i, l1d, l2: bytes of cache per core.
        fmas, loads, broadcasts: what a core starts in a cycle: vector multiply-adds, loads of a whole vector, loads of
            one float that is then broadcast (in the multiply-add, or by an instruction of its own).
        fma_bytes: code of a nonzero, with its share of everything else.
        far_fetch: bytes of code a cycle that the front end gets from beyond its first cache.
    """

    name: str
    isa: str
    lanes: int
    registers: int = 0
    embedded_broadcast: bool = False
    needs: tuple[str, ...] = ()
    l1i: int = 32 << 10
    l1d: int = 32 << 10
    l2: int = 1 << 20
    fmas: float = 1.0
    loads: float = 1.0
    broadcasts: float = 2.0
    fma_bytes: float = 9.5
    far_fetch: float = 8.0

    @property
    def tile_bytes(self) -> int:
        """Bytes of one row of a tile."""
        return 4 * self.lanes


# Throughputs are those of Zen 4 (AMD, Software Optimization Guide for the Zen 4 Microarchitecture, publication 57647):
# vectors of 512 bits take both halves of the multiply-add pipes and of the vector unit's load ports, of 256 bits one.
# Measured multiply-adds agree (117.5 GFLOP/s at 3.67 GHz are one of 16 lanes a cycle). Bytes of code are medians over
# the benchmarks' layers. The fetch was measured on code that runs once, out of L2 (docs/design/0010).
TARGETS = {
    t.name: t
    for t in (
        Target("x86-avx512", "x86-avx512", 16, 32, True, ("avx512f", "avx512bw", "avx512dq", "avx512vl")),
        Target("x86-avx2", "x86-avx2", 8, 16, False, ("avx2", "fma"), fmas=2.0, loads=2.0, fma_bytes=17.0),
        Target("reference", "reference", 16),
    )
}
NATIVE_ORDER = ("x86-avx512", "x86-avx2")
"""Which target ``native`` stands for: the first one available."""
