"""NumPy's ``.npy`` arrays and zip archives, read without trusting a claimed size and without evaluating anything.

``numpy.load`` would evaluate headers and allocate what they claim; here a header must match a fixed grammar, and its
size must agree with the file's before memory is touched.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError

MAX_BYTES = 2**32  # of one file, unpacked: beyond any single checkpoint shard one compiles from
MAX_RATIO, FREE_BYTES = 250, 2**26  # a member may unpack to 64 MiB, or to 250 times its packed size
PIECE = 2**16
DTYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, OverflowError, IndexError)

_MAGIC = re.compile(rb"\x93NUMPY([\x01\x02\x03])\x00", re.DOTALL)
_HEADER = re.compile(
    r"\{'descr': '(?P<order>[<>|=]?)(?P<kind>[a-zA-Z]\d*)', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,19}L?(?:, ?|,?(?=\))))*)\),? ?\}\s*",
)


def open_file(path: Path) -> IO[bytes]:
    """The file, opened; a FormatError when it is missing, no regular file, or beyond :data:`MAX_BYTES`."""
    try:
        if path.exists() and not path.is_file():
            raise FormatError("this is no regular file", where=str(path))
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FormatError(f"{size} bytes are more than the {MAX_BYTES} that are read", where=str(path))
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from error


def read_file(path: Path) -> bytes:
    """The bytes of a whole file."""
    with open_file(path) as stream:
        return stream.read(os.fstat(stream.fileno()).st_size)  # no more, should it grow meanwhile


def read_npy(raw: bytes, where: str) -> NDArray[Any]:
    """The array of a ``.npy`` file: real numbers, or the byte strings by which SciPy marks a format; never pickles."""
    magic = _MAGIC.match(raw)
    if magic is None:
        raise FormatError("this is not a .npy array (no NUMPY mark)", where=where)
    width = 2 if magic[1] == b"\x01" else 4
    start = 8 + width + int.from_bytes(raw[8 : 8 + width], "little")
    if start > min(len(raw), 2**16):
        raise FormatError(f"the header claims to end at byte {start} of {len(raw)}", where=where)
    header = _HEADER.fullmatch(raw[8 + width : start].decode("latin-1"))
    if header is None or not (header["kind"] in DTYPES or re.fullmatch(r"[SU][1-9]\d?", header["kind"])):
        raise FormatError("the header does not describe an array of numbers", where=where,
                          hint="Object arrays (pickles) and records are not read.")  # fmt: skip
    shape = tuple(int(n.rstrip("L")) for n in re.findall(r"\d+L?", header["shape"]))
    dtype = np.dtype(header["order"] + header["kind"])
    count = math.prod(shape)
    if len(shape) > 8 or max(shape, default=0) > MAX_BYTES or count * dtype.itemsize != len(raw) - start:
        raise FormatError(f"shape {shape} of {dtype} does not fit {len(raw) - start} bytes", where=where)
    flat = np.frombuffer(raw, dtype, count, start) if count else np.empty(0, dtype)
    try:
        return flat.reshape(shape, order="F" if header["fortran"] == "True" else "C")
    except ValueError as error:  # no entries, yet extents whose product overflows
        raise FormatError(f"shape {shape} cannot be: {error}", where=where) from error


class Archive:
    """A zip archive (``.npz`` is one) whose members are read one by one."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        stream = open_file(path)
        try:
            self._zip = zipfile.ZipFile(stream)
            self._infos = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        except ZIP_ERRORS as error:
            stream.close()
            raise FormatError(f"this is not a readable zip archive: {error}", where=self.where) from error
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        self._left = MAX_BYTES  # of all members together

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._stream.close()

    @property
    def names(self) -> list[str]:
        return list(self._infos)

    def read(self, name: str) -> bytes:
        """A member's bytes, after a look at how many it claims."""
        where = f"{self.where}: {name}"
        if name not in self._infos:
            raise FormatError("the archive has no such member", where=where, hint=f"It has {some(self.names)}.")
        info = self._infos[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"compression method {info.compress_type} is not read", where=where,
                              hint="Store or deflate the members.")  # fmt: skip
        packed = min(info.compress_size, self._size)
        if info.file_size > max(FREE_BYTES, MAX_RATIO * packed) or info.file_size > self._left:
            raise FormatError(f"{info.compress_size} packed bytes claim to unpack to {info.file_size}", where=where,
                              hint="Unpack the archive by hand if you trust it.")  # fmt: skip
        self._left -= info.file_size
        try:
            with self._zip.open(info) as member:
                # By pieces: one read of the whole would allocate what is claimed, however little there is.
                raw = b"".join(iter(lambda: member.read(PIECE), b""))
        except ZIP_ERRORS as error:
            raise FormatError(f"the member cannot be unpacked: {error}", where=where) from error
        if len(raw) != info.file_size:
            raise FormatError(f"{len(raw)} bytes instead of {info.file_size}", where=where, hint="It is truncated.")
        return raw


def some(names: list[str], limit: int = 12) -> str:
    """A list of names for a message, cut where it becomes long."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) if names else "none"
