"""Records of tuning: a text file, one line for each task, target, machine and number of columns.

    1 <key> x86-avx512 <cpu> fast 2026-01-31T12:00:00Z 96.1us 99.0us rows=31 ... then 96.9us rows=30 ... # 512x512 ...

A line is the format of schedules, the digest of the task, target, CPU, effort, date, time of a call as tuned and with
the cost model's choice, the schedule, the next best one with its time, and a remark for people. Lines of one key are
ranked: full effort before fast, then the later date, then the later line; the first counts. Two files are merged by
putting one behind the other, in any way: order matters only between equal dates.

New lines are appended, each by one write, under a lock where the system has one; a file that grows beyond a limit is
written anew with the newest half, and replaces the old one at once. Whatever else stands in the file is ignored, with
one warning; a file that is none of records is left alone. Nothing in it is executed: a schedule that comes from here is
checked like one that a caller gave.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from ..errors import InternalError, ScheduleError, TuningWarning
from ..target import Target
from .schedule import FORMAT, Schedule
from .task import Task

VARIABLE = "SPARSERT_TUNING"
OFF = "off"
LIMIT = 2 << 20  # bytes: some 6,000 records
MOST_BYTES = 16 << 20  # read of a file: far beyond the limit, so whatever comes before was not written here
MOST_LINE = 1024
HEADER = "# sparsert tuning records; lines may be removed, merged and moved to other machines"
_PATIENCE = 2.0  # seconds to wait for another process's lock

_SCHEDULE = "rows=[0-9]+(?: [a-z0-9_=]+)*?"
_LINE = re.compile(
    rf"(?P<format>\d{{1,6}}) (?P<key>[0-9a-f]{{32}}) (?P<target>[\w.-]{{1,64}}) (?P<cpu>[\w.-]{{1,128}}) "
    rf"(?P<effort>fast|full) (?P<date>\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ) "
    rf"(?P<us>\d{{1,12}}\.\d{{1,3}})us (?P<first>\d{{1,12}}\.\d{{1,3}})us "
    rf"(?P<schedule>{_SCHEDULE})(?: then (?P<next_us>\d{{1,12}}\.\d{{1,3}})us (?P<next>{_SCHEDULE}))?"
    rf"(?: # (?P<remark>[^\n]*))?"
)
_EFFORTS = ("fast", "full")


@dataclass(frozen=True)
class Record:
    """What is known of a task: the tuned schedule, its time in seconds, that of the cost model's choice, the next best.

    ``schedule`` and ``runner_up`` are text as it stands in the file.
    """

    key: str
    target: str
    cpu: str
    effort: str
    seconds: float
    first: float
    schedule: str
    runner_up: str = ""
    runner_up_seconds: float = 0.0
    date: str = ""
    remark: str = ""
    format: int = FORMAT

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.key, self.target, self.cpu

    def rank(self) -> tuple[int, str]:
        """The highest of one identity counts."""
        return _EFFORTS.index(self.effort), self.date

    def line(self) -> str:
        """The record as it stands in the file, without the end of the line."""
        then = f" then {1e6 * self.runner_up_seconds:.3f}us {self.runner_up}" if self.runner_up else ""
        remark = "".join(c if c.isprintable() else " " for c in self.remark)[:200]
        return (
            f"{self.format} {self.key} {self.target} {self.cpu} {self.effort} {self.date} {1e6 * self.seconds:.3f}us "
            f"{1e6 * self.first:.3f}us {self.schedule}{then}" + (f" # {remark}" if remark else "")
        )


def columns_class(columns: int, target: Target) -> int:
    """Tiles of ``columns``, rounded up to a power of two: numbers of columns that share a record."""
    tiles = max(1, -(-columns // target.lanes))
    return 1 << (tiles - 1).bit_length()


def key(task: Task, tiles: int, cold: bool = False) -> str:
    """The name of ``task`` for ``tiles`` tiles of columns: its pattern's digest and whatever is not as by default.

    What was measured ``cold`` and what was measured warm have different names.
    """
    facts = [f"{f.name}={getattr(task, f.name)!r}" for f in fields(task)
             if f.name != "pattern" and getattr(task, f.name) != f.default]  # fmt: skip
    return hashlib.blake2b(
        "\n".join([task.pattern.digest, f"tiles={tiles}", *facts, *["cold"] * cold]).encode(), digest_size=16
    ).hexdigest()


def machine(cpu: str) -> str:
    """A CPU's name as one word."""
    return re.sub(r"[^\w.-]+", "-", cpu, flags=re.ASCII).strip("-")[:128] or "unknown"


def default_path() -> Path | None:
    """Where records are kept: what SPARSERT_TUNING names, None if that is "off", or the user's cache folder."""
    given = os.environ.get(VARIABLE, "").strip()
    if given.lower() == OFF:
        return None
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("sparsert", appauthor=False)) / "tuning.txt"


class Database:
    """The records in the file ``path``, which need not exist. Reading and writing never raise: they warn."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path, self.limit = Path(os.path.realpath(path)), limit

    def find(self, key: str, target: str, cpu: str, efforts: tuple[str, ...] = _EFFORTS) -> Record | None:
        """The record that counts, if it is of one of these efforts."""
        found = self._read().get((key, target, cpu))
        return found if found is not None and found.effort in efforts else None

    def records(self) -> list[Record]:
        """All that count, by date."""
        return sorted(self._read().values(), key=lambda record: record.date)

    def add(self, record: Record) -> bool:
        """Append a record, dated now unless it has a date; whether that worked."""
        if not record.date:
            record = replace(record, date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        line = record.line()
        if len(line) > MOST_LINE or _LINE.fullmatch(line) is None:  # it would be ignored
            raise InternalError(f"no line of tuning records: {line[:200]!r}", where="database")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._opened() as handle:
                size = os.fstat(handle).st_size
                if size and not _ours(handle):
                    raise OSError(0, "holds something other than tuning records and is left alone")
                _append(handle, size, line)
                if size > self.limit:
                    self._compact(handle)
        except (OSError, ValueError) as error:
            self._warn(f"cannot be written: {_reason(error)}")
            return False
        return True

    def _read(self) -> dict[tuple[str, str, str], Record]:
        """The records that count, parsed again only where the file has changed."""
        try:
            handle = os.open(self.path, os.O_RDONLY | _FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"cannot be read: {_reason(error)}")
            return {}
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "it is no file")
            signature = (status.st_ino, status.st_dev, status.st_size, status.st_mtime_ns)
            known = _PARSED.get(str(self.path))
            if known is None or known[0] != signature:
                records, ignored = parse(_contents(handle))
                if ignored:
                    self._warn(ignored)
                if len(_PARSED) >= 16:
                    _PARSED.clear()
                _PARSED[str(self.path)] = known = signature, records
            return known[1]
        except OSError as error:
            self._warn(f"cannot be read: {_reason(error)}")
            return {}
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The file, open for appending and locked. One that another process has just replaced is opened again."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _FLAGS, 0o644)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise OSError(0, "it is no file")
                _lock(handle)
                if self._is(handle):
                    yield handle
                    return
            finally:
                os.close(handle)  # and with it the lock

    def _is(self, handle: int) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(handle))
        except FileNotFoundError:
            return False

    def _compact(self, handle: int) -> None:
        """Replace the file, whose lock we hold, by one of the newest records that count: half of the limit."""
        import tempfile

        records, _ = parse(_contents(handle))
        lines, room = [], self.limit // 2
        for record in sorted(records.values(), key=lambda record: record.date, reverse=True):
            line = record.line() + "\n"
            room -= len(line.encode())
            if room < 0:
                break
            lines.append(line)
        replacement, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        try:
            with os.fdopen(replacement, "w", encoding="utf-8") as stream:
                stream.writelines([HEADER + "\n", *reversed(lines)])
            os.chmod(name, stat.S_IMODE(os.fstat(handle).st_mode))
            os.replace(name, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _warn(self, what: str) -> None:
        """Once for each file and complaint."""
        if (str(self.path), what) in _SAID:
            return
        if len(_SAID) < 256:
            _SAID.add((str(self.path), what))
        warnings.warn(f"tuning records {str(self.path)!r}: {what}", TuningWarning, stacklevel=2)


def parse(data: bytes) -> tuple[dict[tuple[str, str, str], Record], str]:
    """The records that count, and a sentence about what was ignored, empty if nothing was."""
    found: dict[tuple[str, str, str], Record] = {}
    strange = foreign = first = 0
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip() or raw.startswith(b"#"):
            continue
        record = _record(raw)
        if record is None:
            strange, first = strange + 1, first or number
        elif record.format != FORMAT:
            foreign += 1
        else:
            other = found.get(record.identity)
            if other is None or record.rank() >= other.rank():
                found[record.identity] = record
    said = []
    if strange:
        said.append(f"{strange} lines are no records (the first is line {first})")
    if foreign:
        said.append(f"{foreign} records are of another format than {FORMAT}")
    return found, " and ".join(said) + (": ignored" if said else "")


def _record(raw: bytes) -> Record | None:
    """The record of a line, None if it is none."""
    if len(raw) > MOST_LINE:
        return None
    match = _LINE.fullmatch(raw.rstrip(b"\r").decode("utf-8", "replace"))
    if match is None:
        return None
    g = match.groupdict(default="")
    seconds, first, then = (1e-6 * float(g[name] or 0) for name in ("us", "first", "next_us"))
    form = int(g["format"])
    try:
        if form == FORMAT:
            for text in filter(None, (g["schedule"], g["next"])):
                Schedule.parse(text)
    except ScheduleError:
        return None
    return Record(g["key"], g["target"], g["cpu"], g["effort"], seconds, first, g["schedule"], g["next"], then,
                  g["date"], g["remark"], form)  # fmt: skip


_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_PARSED: dict[str, tuple[tuple[int, ...], dict[tuple[str, str, str], Record]]] = {}
_SAID: set[tuple[str, str]] = set()


def _contents(handle: int) -> bytes:
    """What an open file holds; of an absurdly large one the end."""
    size = os.fstat(handle).st_size
    at = max(0, size - MOST_BYTES)
    os.lseek(handle, at, os.SEEK_SET)
    with os.fdopen(os.dup(handle), "rb") as stream:
        data = stream.read(MOST_BYTES)
    return data.partition(b"\n")[2] if at else data


def _ours(handle: int) -> bool:
    """Whether an open file begins as one of records, or holds some near its beginning."""
    os.lseek(handle, 0, os.SEEK_SET)
    start = os.read(handle, 1 << 16)
    return start.startswith(HEADER[:25].encode()) or any(_record(line) for line in start.split(b"\n"))


def _append(handle: int, size: int, line: str) -> None:
    """One write of one line, behind the end of a line; what a full disk leaves of it is removed."""
    before = f"{HEADER}\n" if not size else ""
    if size:
        os.lseek(handle, size - 1, os.SEEK_SET)
        before = "" if os.read(handle, 1) == b"\n" else "\n"
    data = f"{before}{line}\n".encode()
    try:
        if os.write(handle, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, size)
        raise


def _lock(handle: int) -> None:
    """An exclusive lock, as far as the system has one. A process that holds it for long is not waited for: appending
    is one write in any case."""
    try:
        import fcntl
    except ImportError:
        return
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.005)
        except OSError:
            return


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
