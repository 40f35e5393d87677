"""Records of tuning: round trips, merging, rubbish, bounds, several processes, places that cannot be written."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import dense_matrix
from sparsert import Schedule
from sparsert.errors import InternalError, TuningWarning
from sparsert.schedule import database
from sparsert.schedule.database import Database, Record, columns_class, key, machine
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import TARGETS

KEY = "0123456789abcdef" * 2
DATE = "2026-01-31T12:00:00Z"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are given once for a file and complaint; here, once a test."""
    monkeypatch.setattr(database, "_SAID", set())
    monkeypatch.setattr(database, "_PARSED", {})


def record(**changes: Any) -> Record:
    base = Record(KEY, "x86-avx512", "AMD-EPYC-25.17.1", "fast", 96.1e-6, 99e-6, str(Schedule(31, packing="beside")),
                  str(Schedule(30, k_segment=7, prefetch=True)), 97e-6, DATE, "512x512, 26214 nonzeros")  # fmt: skip
    return dataclasses.replace(base, **changes)


def find(path: Path, **changes: Any) -> Record | None:
    return Database(path).find(*record(**changes).identity)


@pytest.mark.parametrize("changes", [{}, {"runner_up": "", "runner_up_seconds": 0.0}, {"remark": ""},
                                     {"remark": "a # b then 3us rows=3"}, {"effort": "full"}, {"seconds": 1e-9},
                                     {"seconds": 3600.0}])  # fmt: skip
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, one = tmp_path / "deep" / "down" / "tuning.txt", record(**changes)
    assert Database(path).add(one)
    found = find(path)
    assert found is not None
    assert dataclasses.replace(found, seconds=0, first=0, runner_up_seconds=0) == dataclasses.replace(
        one, seconds=0, first=0, runner_up_seconds=0
    )
    assert (found.seconds, found.first) == pytest.approx((one.seconds, one.first), abs=6e-10)
    assert Schedule.parse(found.schedule) == Schedule(31, packing="beside")
    text = path.read_text()
    assert text.startswith("# sparsert tuning records")
    assert text.count("\n") == 2
    assert text.endswith(one.line() + "\n")


def test_a_missing_file_is_an_empty_one(tmp_path: Path) -> None:
    assert find(tmp_path / "none.txt") is None
    assert Database(tmp_path / "none.txt").records() == []
    assert not (tmp_path / "none.txt").exists()


def test_no_other_task_target_or_machine(tmp_path: Path) -> None:
    Database(tmp_path / "t").add(record())
    for other in ({"key": "f" * 32}, {"target": "x86-avx2"}, {"cpu": "other"}):
        assert find(tmp_path / "t", **other) is None
    assert Database(tmp_path / "t").find(*record().identity, ("full",)) is None


def test_remarks_are_one_line_of_text(tmp_path: Path) -> None:
    Database(tmp_path / "t").add(record(remark="two\nlines\x1b[31m\x00" + "x" * 5000))
    Database(tmp_path / "t").add(record(key="a" * 32))
    assert len(Database(tmp_path / "t").records()) == 2
    assert "\x1b" not in (tmp_path / "t").read_text()
    with pytest.raises(InternalError):
        Database(tmp_path / "t").add(record(cpu="two words"))


def test_which_line_counts() -> None:
    """Full before fast, then the later date, then the later line."""
    early, late = record(seconds=1e-6), record(seconds=2e-6, date="2026-02-01T00:00:00Z")
    full = record(seconds=3e-6, effort="full", date="2025-01-01T00:00:00Z")
    same = record(seconds=4e-6)
    for lines, wanted in (([early, late], late), ([late, early], late), ([late, full], full), ([full, late], full),
                          ([early, same], same), ([same, early], early)):  # fmt: skip
        found, said = database.parse("\n".join(r.line() for r in lines).encode())
        assert not said
        assert found[KEY, "x86-avx512", "AMD-EPYC-25.17.1"].seconds == pytest.approx(wanted.seconds)


def test_merging_is_concatenation(tmp_path: Path) -> None:
    one, two, merged = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    for k in range(20):
        Database(one).add(record(key=f"{k:032x}", seconds=k * 1e-6))
        Database(two).add(record(key=f"{k + 10:032x}", seconds=k * 2e-6, date="2026-03-01T00:00:00Z"))
    merged.write_bytes(one.read_bytes() + two.read_bytes())
    assert len(Database(merged).records()) == 30
    assert {r.key: r.seconds for r in Database(merged).records()} == {
        **{r.key: r.seconds for r in Database(one).records()}, **{r.key: r.seconds for r in Database(two).records()},
    }  # fmt: skip
    reverse = two.read_bytes() + one.read_bytes().replace(b"\n", b"\r\n")
    assert database.parse(reverse)[0] == database.parse(merged.read_bytes())[0]


RUBBISH = {
    "binary": bytes(range(256)) * 50,
    "zeros": bytes(100_000),
    "long line": b"1 " + b"a" * 1_000_000,
    "conflict": b"<<<<<<< ours\n=======\n>>>>>>> theirs\n",
    "no schedule": record(schedule="rows=3 colour=red").line().encode(),
    "illegal schedule": record(schedule="rows=0").line().encode(),
    "prefetch with blocks": record(schedule="rows=3 blocks=2 prefetch").line().encode(),
    "bad runner-up": record(runner_up="rows=3 order=best").line().encode(),
    "huge number": record(schedule="rows=3 k_segment=99999999999999").line().encode(),
    "negative": record().line().replace("rows=31", "rows=-1").encode(),
    "time": record().line().replace("96.100us", "soon").encode(),
    "cut": record().line()[:-60].split(" then")[0][:-30].encode(),
    "key": record().line().replace(KEY, KEY[:-1]).encode(),
    "words in a row": b"1 " + KEY.encode() + b" a b fast 2026-01-01T00:00:00Z 1.0us 1.0us rows=3 " + b"a " * 400 + b"!",
    "code": b"__import__('os').system('true')",
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH.keys())
def test_rubbish_is_ignored_with_one_warning(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "t"
    Database(path).add(record())
    good = path.read_bytes()
    path.write_bytes(good + rubbish + b"\n" + record(key="b" * 32).line().encode() + b"\n")
    read = "import sys, pathlib, sparsert.schedule.database as d; d.Database(pathlib.Path(sys.argv[1])).records()"
    # No expression backtracks for ever.
    subprocess.run([sys.executable, "-W", "ignore", "-c", read, str(path)], check=True, timeout=120)
    with pytest.warns(TuningWarning, match=r"ignored|no records") as caught:
        assert len(Database(path).records()) == 2
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(path) is not None  # said once
        assert Database(path).add(record(key="c" * 32))


def test_every_line_cut_anywhere_is_a_line_or_nothing() -> None:
    line = record().line().encode()
    for end in range(len(line)):
        found, _ = database.parse(line[:end])
        for one in found.values():
            Schedule.parse(one.schedule)


def test_random_damage(rng: np.random.Generator) -> None:
    clean = "\n".join(record(key=f"{k:032x}").line() for k in range(5)).encode()
    for _ in range(300):
        data = bytearray(clean)
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(256)
        found, said = database.parse(bytes(data))
        assert len(found) >= 1
        assert said or len(found) <= 5
        for one in found.values():
            assert Schedule.parse(one.schedule).rows >= 1


def test_other_formats_are_ignored(tmp_path: Path) -> None:
    old, new = (
        record(key="a" * 32, format=0),
        record(key="b" * 32, format=database.FORMAT + 1, schedule="rows=3 warp=9"),
    )
    (tmp_path / "t").write_text("\n".join(r.line() for r in (old, record(), new)))
    with pytest.warns(TuningWarning, match="2 records are of another format"):
        assert [r.key for r in Database(tmp_path / "t").records()] == [KEY]


def test_a_line_without_an_end(tmp_path: Path) -> None:
    """A process that died while writing, or a person with an editor, does not spoil the next record."""
    (tmp_path / "t").write_text(record().line())
    Database(tmp_path / "t").add(record(key="a" * 32))
    assert len(Database(tmp_path / "t").records()) == 2


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("\\documentclass{article}\n" * 10)
    with pytest.warns(TuningWarning, match="left alone"):
        assert not Database(path, limit=100).add(record())
    assert path.read_text() == "\\documentclass{article}\n" * 10


def test_bounded(tmp_path: Path) -> None:
    """Beyond the limit the newest half stays; nothing is left behind; the permissions and the link stay."""
    path, limit = tmp_path / "t", 20_000
    link = tmp_path / "link"
    link.symlink_to(path)
    for k in range(400):
        date = f"2026-01-01T{k // 60:02}:{k % 60:02}:00Z"
        assert Database(link, limit).add(record(key=f"{k:032x}", date=date))
        assert path.stat().st_size <= limit + 600
        if k == 10:
            path.chmod(0o600)
    kept = [int(r.key, 16) for r in Database(path).records()]
    assert kept == list(range(kept[0], 400))
    assert 15 <= len(kept) < 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "t"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert link.is_symlink()


def test_duplicates_are_dropped_first(tmp_path: Path) -> None:
    for _ in range(300):
        Database(tmp_path / "t", 20_000).add(record())
    assert (tmp_path / "t").stat().st_size < 21_000
    assert len(Database(tmp_path / "t").records()) == 1


def test_huge_files_are_read_from_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MOST_BYTES", 10_000)
    lines = [record(key=f"{k:032x}").line() for k in range(1000)]
    (tmp_path / "t").write_text("\n".join(lines) + "\n")
    found = Database(tmp_path / "t").records()
    assert 0 < len(found) <= 10_000 // len(lines[0])
    assert int(found[-1].key, 16) == 999


def _write(path: str, who: int, count: int, limit: int) -> None:
    for k in range(count):
        assert Database(Path(path), limit).add(record(key=f"{who:016x}{k:016x}"))


@pytest.mark.parametrize(("limit", "complete"), [(1 << 20, True), (60_000, False)])
def test_several_processes_lose_nothing(tmp_path: Path, limit: int, complete: bool) -> None:
    """Four processes append 60 records each. With a small limit they also replace the file under each other's hands:
    every line stays whole then, and the last record of each is younger than what is dropped."""
    path, count = tmp_path / "t", 60
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(str(path), who, count, limit)) for who in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Database(path).records()
    assert len({r.key for r in found}) == len(found)
    assert len(found) == 4 * count if complete else 60 < len(found) <= 4 * count
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_compaction_between_two_writers_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the old file before it was replaced notices once it has the lock, and opens the new one."""
    path, real = tmp_path / "t", database._lock
    Database(path).add(record())

    def replaced_meanwhile(handle: int) -> None:
        monkeypatch.setattr(database, "_lock", real)
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes() + record(key="d" * 32).line().encode() + b"\n")
        copy.replace(path)
        real(handle)

    monkeypatch.setattr(database, "_lock", replaced_meanwhile)
    assert Database(path).add(record(key="e" * 32))
    assert {r.key[0] for r in Database(path).records()} == {"0", "d", "e"}


def test_a_lock_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(database, "_PATIENCE", 0.05)
    path = tmp_path / "t"
    Database(path).add(record())
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert Database(path).add(record(key="a" * 32))
    assert len(Database(path).records()) == 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a line is written and no more: the file is as before."""
    path = tmp_path / "t"
    Database(path).add(record())
    before, write = path.read_bytes(), os.write

    def full(handle: int, data: bytes) -> int:
        write(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in (full, lambda handle, data: write(handle, data[:10])):
        monkeypatch.setattr(database, "_SAID", set())
        monkeypatch.setattr(os, "write", broken)
        with pytest.warns(TuningWarning, match="No space left"):
            assert not Database(path).add(record(key="a" * 32))
        monkeypatch.setattr(os, "write", write)
        assert path.read_bytes() == before


def test_a_full_disk_while_compacting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    for k in range(5):
        Database(path).add(record(key=f"{k:032x}"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(TuningWarning, match="No space left"):
        Database(path, limit=100).add(record(key="a" * 32))
    assert len(Database(path).records()) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


SOMEWHERE = {"directory": "", "below a file": "file/t", "fifo": "fifo", "long": "x" * 300}


@pytest.mark.parametrize("name", SOMEWHERE.values(), ids=SOMEWHERE.keys())
def test_places_that_are_none(tmp_path: Path, name: str) -> None:
    """A warning, and the operator is there."""
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    path = f"{tmp_path}/{name}"
    with pytest.warns(TuningWarning):
        op = sparsert.compile_matmul(np.eye(40, dtype=np.float32), tune="fast", tuning=path)
    assert np.array_equal(op(np.ones((40, 3), np.float32)), np.ones((40, 3)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.warns(TuningWarning, match="Permission denied"):
        sparsert.compile_matmul(np.eye(40, dtype=np.float32), tune="fast", tuning=tmp_path / "t")


def _compile_thrice(path: Path) -> None:
    for _ in range(3):
        sparsert.compile_matmul(np.eye(40, dtype=np.float32), tune="fast", tuning=path)


def test_a_folder_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who is not root: whatever opens the file for writing is refused."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(TuningWarning, match="Permission denied") as caught:
        _compile_thrice(tmp_path / "t")
    assert len(caught) == 1


def test_where_records_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(database.VARIABLE, raising=False)
    assert database.default_path() == tmp_path / "sparsert" / "tuning.txt"
    for off in ("off", " OFF "):
        monkeypatch.setenv(database.VARIABLE, off)
        assert database.default_path() is None
    monkeypatch.setenv(database.VARIABLE, "~/records")
    assert database.default_path() == Path.home() / "records"


def test_platformdirs_is_imported_only_when_needed() -> None:
    body = """
        import sys, numpy as np, sparsert
        sparsert.compile_matmul(np.eye(4, dtype=np.float32))
        assert "platformdirs" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsert.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_keys_tell_tasks_apart(rng: np.random.Generator) -> None:
    weight = dense_matrix(rng, 20, 30, 0.2)
    pattern, moved = as_sparse(weight).pattern, as_sparse(np.roll(weight, 1, 0)).pattern
    tasks = [Task(pattern), Task(moved), Task(pattern, bias=True), Task(pattern, activation="relu"),
             Task(pattern, activation="clip", parameters=(0.0, 6.0)),
             Task(pattern, activation="clip", parameters=(0.0, 5.0)),
             Task(pattern, residual="before"), Task(pattern, residual="after"), Task(pattern, layout="tile_major"),
             Task(pattern, layout="transposed")]  # fmt: skip
    keys = [key(task, tiles) for task in tasks for tiles in (1, 4)]
    assert len(set(keys)) == len(keys)
    assert key(Task(as_sparse(2 * weight).pattern), 4) == key(Task(pattern), 4)  # values do not matter


def test_keys_are_the_same_in_every_process() -> None:
    """A file of records is worth nothing once this changes."""
    pattern = as_sparse(np.eye(3, dtype=np.float32)).pattern
    assert key(Task(pattern, activation="relu"), 4) == "4fa060e7e3f996df10630f92ba2e9f9b"
    assert key(Task(pattern, activation="relu"), 4, cold=True) == "a0308f95523e2213e417ff0e7a452f4c"


def test_columns_share_a_record_by_powers_of_two() -> None:
    target = TARGETS["x86-avx512"]
    assert [columns_class(n, target) for n in (1, 16, 17, 32, 33, 64, 65, 196, 256, 257)] == [
        1,
        1,
        2,
        2,
        4,
        4,
        8,
        16,
        16,
        32,
    ]


@pytest.mark.parametrize("name", ["AMD EPYC 9654 25.17.1", "Intel(R) Xeon(R) @ 2.0GHz", "", "日本", "x" * 500, "a\nb"])
def test_machines_are_words(tmp_path: Path, name: str) -> None:
    word = machine(name)
    assert word
    assert Database(tmp_path / "t").add(record(cpu=word))
    assert find(tmp_path / "t", cpu=word) is not None
