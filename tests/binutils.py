"""GNU as and objdump as oracles for machine code: text in, bytes out, and back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple


class Decoded(NamedTuple):
    offset: int
    raw: str
    text: str


def assembled(lines: list[str], folder: Path) -> bytes:
    """The .text section that GNU as makes of ``lines``; branches and rip operands resolved."""
    source, made, text = folder / "a.s", folder / "a.o", folder / "a.bin"
    source.write_text("\n".join([".intel_syntax noprefix", ".text", *lines, ""]))
    done = subprocess.run(["as", "--64", "-o", str(made), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"GNU as refuses the text:\n{done.stderr[:2000]}"
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(made), str(text)], check=True)
    return text.read_bytes()


_LINE = re.compile(r"^\s*([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*(?:\t(.*))?$", re.MULTILINE)


def decoded(code: bytes, folder: Path) -> list[Decoded]:
    """objdump's reading of ``code``."""
    raw = folder / "d.bin"
    raw.write_bytes(code)
    command = ["objdump", "-D", "-Mintel", "-b", "binary", "-m", "i386:x86-64", "--insn-width=16", str(raw)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [Decoded(int(a, 16), b.replace(" ", ""), " ".join((c or "").split())) for a, b, c in _LINE.findall(out)]
    assert sum(len(d.raw) for d in found) == 2 * len(code), "objdump skipped bytes"
    return found
