"""CPU features from CPUID and XCR0, through two small generated functions.

A feature counts only if the operating system saves the registers it needs (XCR0 bits 1-2 for AVX, 5-7 for AVX-512).
Bit positions: Intel SDM vol. 2, CPUID leaves 1 and 7.
"""

from __future__ import annotations

import ctypes

from .memory import ExecutableMemory

# mov eax, edi; mov ecx, esi; push rbx; cpuid; eax, ebx, ecx, edx to [r8]; pop rbx; ret   (rdx is the result pointer)
_CPUID = bytes.fromhex("f30f1efa 89f8 89f1 4989d0 53 0fa2 418900 41895804 41894808 4189500c 5b c3")
# xor ecx, ecx; xgetbv; ret
_XGETBV = bytes.fromhex("f30f1efa 31c9 0f01d0 c3")

_AVX_STATE, _AVX512_STATE = 0x6, 0xE6
# feature -> leaf, register (eax ebx ecx edx), bit, state it needs
_BITS = {
    "sse4.2": (1, 2, 20, 0), "fma": (1, 2, 12, _AVX_STATE), "avx": (1, 2, 28, _AVX_STATE),
    "f16c": (1, 2, 29, _AVX_STATE), "avx2": (7, 1, 5, _AVX_STATE),
    "avx512f": (7, 1, 16, _AVX512_STATE), "avx512dq": (7, 1, 17, _AVX512_STATE),
    "avx512bw": (7, 1, 30, _AVX512_STATE), "avx512vl": (7, 1, 31, _AVX512_STATE),
    "avx512vnni": (7, 2, 11, _AVX512_STATE), "avx512vbmi": (7, 2, 1, _AVX512_STATE),
}  # fmt: skip


def features() -> frozenset[str]:
    """Names of the features in the table above that this CPU has and this system enables, and ``avx512bf16``."""
    with_code = [ExecutableMemory(_CPUID), ExecutableMemory(_XGETBV)]
    cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(with_code[0].address)
    xgetbv = ctypes.CFUNCTYPE(ctypes.c_uint32)(with_code[1].address)

    def leaf(number: int, sub: int = 0) -> list[int]:
        result = (ctypes.c_uint32 * 4)()
        cpuid(number, sub, ctypes.addressof(result))
        return list(result)

    highest = leaf(0)[0]
    leaves = {n: leaf(n) if n <= highest else [0] * 4 for n in (1, 7)}
    state = int(xgetbv()) if leaves[1][2] >> 27 & 1 else 0  # OSXSAVE
    found = {name for name, (n, register, bit, needs) in _BITS.items()
             if leaves[n][register] >> bit & 1 and state & needs == needs}  # fmt: skip
    if highest >= 7 and leaves[7][0] >= 1 and leaf(7, 1)[0] >> 5 & 1 and state & _AVX512_STATE == _AVX512_STATE:
        found.add("avx512bf16")
    return frozenset(found)
