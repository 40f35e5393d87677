"""The machine at hand: which targets it can execute, its caches, how many threads we may use."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ExecutableMemoryError, TargetUnavailableError, UnsupportedError
from ..target import NATIVE_ORDER, TARGETS, Target
from . import arm64, cpuid

MACOS_NOTE = "generated code on macOS is untested; please report how it goes"


@cache
def cpu_features() -> frozenset[str]:
    """Features of this CPU that the operating system has enabled; empty on a machine that no target is for.

    On x86-64 from CPUID and XCR0, on AArch64 from the capabilities that the kernel tells.
    """
    if on_arm():
        return arm64.features()
    return cpuid.features() if on_linux_x86() else frozenset()


def on_linux_x86() -> bool:
    """Whether code for x86-64 can execute here at all."""
    return (
        sys.platform.startswith("linux")
        and platform.machine() in ("x86_64", "AMD64")
        and ctypes.sizeof(ctypes.c_void_p) == 8
    )


def on_arm() -> bool:
    """Whether code for AArch64 can execute here at all; on macOS that is untested."""
    system = sys.platform.startswith("linux") or sys.platform == "darwin"
    return system and platform.machine() in ("aarch64", "arm64") and ctypes.sizeof(ctypes.c_void_p) == 8


def unavailable(name: str) -> str | None:
    """Why code for target ``name`` cannot run here, or None where it can."""
    target = TARGETS[name]
    if target.isa == "reference":
        return None
    if not (on_arm() if target.machine == "aarch64" else on_linux_x86()):
        return f"its code runs on Linux {target.machine}, and this is {platform.system()} {platform.machine()}"
    try:
        missing = [f for f in target.needs if f not in cpu_features()]
    except (TargetUnavailableError, ExecutableMemoryError) as error:
        return error.what
    return f"this CPU, or its operating system, lacks {', '.join(missing)}" if missing else None


def lookup(name: str) -> Target:
    """The target called ``name``; ``native`` is the best one this machine can execute.

    Raises:
        UnsupportedError: no such target. TargetUnavailableError: ``native``, and no compiled target can run here.
    """
    if not isinstance(name, str):
        raise UnsupportedError(f"{name!r} is not the name of a target", where="target", hint=f"Known: {_known()}.")
    if name == "native":
        reasons = {n: unavailable(n) for n in NATIVE_ORDER}
        for candidate, reason in reasons.items():
            if reason is None:
                return with_host_caches(TARGETS[candidate])
        raise TargetUnavailableError("; ".join(f"{n}: {r}" for n, r in reasons.items()), where="target='native'",
                                     hint="Use target='reference' (NumPy) for correct, slow results.")  # fmt: skip
    if name not in TARGETS:
        raise UnsupportedError(f"unknown target {name!r}", where="target", hint=f"Known: {_known()}.")
    return with_host_caches(TARGETS[name])


def _known() -> str:
    return ", ".join(("native", *TARGETS))


def resolve(name: str) -> Target:
    """As :func:`lookup`, and this machine can execute it.

    Raises:
        TargetUnavailableError: with the reason. ExecutableMemoryError: policy forbids even the probe of the CPU.
    """
    if name != "reference":
        cpu_features()
    target = lookup(name)
    reason = unavailable(target.name)
    if reason:
        raise TargetUnavailableError(
            reason,
            where=f"target={name!r}",
            hint="Use target='native' for the best available one, or target='reference' (NumPy).",
        )
    return target


@cache
def host_caches() -> dict[str, int]:
    """Bytes of this machine's caches per core, as far as the system tells: keys l1i, l1d, l2, l3."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
            name = f"l{level}" + ({"Instruction": "i", "Data": "d"}.get(kind, "") if level == "1" else "")
            found[name] = int(size.rstrip("KM")) * unit
        except (OSError, ValueError):
            continue
    return found


def with_host_caches(target: Target) -> Target:
    """``target`` with the cache sizes of this machine."""
    sizes = {k: v for k, v in host_caches().items() if k in ("l1i", "l1d", "l2") and v > 0}
    return replace(target, **sizes) if sizes else target  # type: ignore[arg-type]


def default_threads() -> int:
    """What the affinity mask and the cgroup quota allow, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota()))


_NO_LIMIT = 1 << 20


@cache
def _quota() -> int:
    """Whole cores that the cgroups around this process grant; a large number where none sets a limit."""
    root, limits = Path("/sys/fs/cgroup"), [_NO_LIMIT]
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = (line.split(":", 2) + ["", ""])[:3]
        version2 = not controllers
        if not version2 and "cpu" not in controllers.split(","):
            continue
        top = root if version2 else root / controllers
        own = top / group.lstrip("/")
        for folder in (own, *own.parents):
            words = (_text(folder / "cpu.max") if version2 else " ".join(
                _text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))).split()  # fmt: skip
            if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
                limits.append(max(1, int(words[0]) // int(words[1])))
            if folder == top:
                break
    return min(limits)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def host_report() -> dict[str, Any]:
    """What ``sparsert info`` prints: cpu, features, targets with the reason where unavailable, caches, threads."""
    targets = {name: unavailable(name) for name in TARGETS}
    try:
        features = sorted(cpu_features())
    except ExecutableMemoryError:  # CPUID is read by generated code; the targets' reasons say so
        features = []
    native = next((n for n in NATIVE_ORDER if targets[n] is None), None)
    return {
        "cpu": cpu_name(),
        "features": features,
        "targets": targets,
        "native": native,
        "notes": [MACOS_NOTE] if sys.platform == "darwin" and native else [],
        "caches": dict(host_caches()),
        "threads": default_threads(),
    }
