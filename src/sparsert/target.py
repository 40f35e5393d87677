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
        loops: its lowering has what kernels need that loop over a pattern as data (note 0014).
        l1i, l1d, l2: bytes of cache per core.
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
    loops: bool = False
    l1i: int = 32 << 10
    l1d: int = 32 << 10
    l2: int = 1 << 20

    @property
    def tile_bytes(self) -> int:
        """Bytes of one row of a tile."""
        return 4 * self.lanes


TARGETS = {
    t.name: t
    for t in (
        Target("x86-avx512", "x86-avx512", 16, 32, True, ("avx512f", "avx512bw", "avx512dq", "avx512vl"), loops=True),
        Target("x86-avx2", "x86-avx2", 8, 16, False, ("avx2", "fma"), loops=True),
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
        ),
        Target("reference", "reference", 16),
    )
}
NATIVE_ORDER = ("x86-avx512", "x86-avx2", "aarch64-neon")
"""Which target ``native`` stands for: the first one available."""
