"""``tune=`` of the compile functions, records in use, and ``sparsert tune``: real measurements of small layers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, complaint, dense_matrix, expected, same_bits
from sparsert import Schedule, compiler
from sparsert.cli import main as cli
from sparsert.compiler import tune_layer
from sparsert.errors import CodeBudgetError, TuningWarning, UnsupportedError, ValueRangeError
from sparsert.kernels import matmul
from sparsert.operators import trials, tuned
from sparsert.operators.native import NativeProduct
from sparsert.runtime import host
from sparsert.schedule import database, space, tuner
from sparsert.schedule.database import Database
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import TARGETS


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may touch the records of whoever runs it."""
    monkeypatch.setenv(database.VARIABLE, "off")
    monkeypatch.setattr(database, "_SAID", set())


def fake(monkeypatch: pytest.MonkeyPatch, winner: int | None) -> list[Schedule]:
    """Measurements that take the candidate of this number for twice as fast; returns what gets measured."""
    measured: list[Schedule] = []
    real = trials.Trials.__call__

    def measure(self: trials.Trials, task: Task, schedule: Schedule) -> float:
        real(self, task, schedule)
        if schedule not in measured:
            measured.append(schedule)
        return 1.0 if measured.index(schedule) == winner else 2.0

    monkeypatch.setattr(trials.Trials, "__call__", measure)
    return measured


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("layout", ["row_major", "tile_major", "transposed"])
@pytest.mark.parametrize("residual", [None, "before"])
def test_tuning_changes_no_bit(target: str, layout: str, residual: str | None, rng: np.random.Generator) -> None:
    """Real measurements: whatever wins, results are those of the cost model's schedule, and right."""
    weight, bias = dense_matrix(rng, 70, 90, 0.15), rng.standard_normal(70).astype(np.float32)
    options: dict[str, Any] = {"bias": bias, "activation": "silu", "residual": residual, "target": target}
    compile_ = sparsert.compile_linear if layout == "transposed" else sparsert.compile_matmul
    if layout != "transposed":
        options["layout"] = layout
    plain, fast = compile_(weight, **options), compile_(weight, tune="fast", columns=50, **options)
    lanes = TARGETS[target].lanes
    for columns in (lanes, 5 * lanes, 3) if layout != "tile_major" else (lanes, 5 * lanes):
        x = rng.standard_normal((90, columns)).astype(np.float32)
        r = rng.standard_normal((70, columns)).astype(np.float32) if residual else None

        def form(a: np.ndarray | None) -> np.ndarray | None:
            if a is None or layout == "row_major":
                return a
            if layout == "transposed":
                return np.ascontiguousarray(a.T)
            return np.ascontiguousarray(a.reshape(a.shape[0], -1, lanes).swapaxes(0, 1))

        y, wanted = fast(form(x), residual=form(r)), plain(form(x), residual=form(r))
        assert same_bits(y, wanted)
        back = {"row_major": y, "transposed": y.T}.get(layout)
        back = y.swapaxes(0, 1).reshape(70, columns) if back is None else back
        wrong = complaint(back, expected(as_sparse(weight), x, bias, "silu", residual, r))
        assert not wrong, wrong


@pytest.mark.parametrize("target", COMPILED)
def test_every_candidate_gives_the_same_bits(target: str, rng: np.random.Generator) -> None:
    weight, x = dense_matrix(rng, 80, 600, 0.06), rng.standard_normal((600, 45)).astype(np.float32)
    wanted = sparsert.compile_matmul(weight, target=target)(x)
    task, found = Task(as_sparse(weight).pattern), host.resolve(target)
    every = space.candidates(task, found, matmul.spare(task, found), 45, 200)
    assert len(every) > 30
    for schedule in every:
        assert same_bits(sparsert.compile_matmul(weight, target=target, schedule=schedule)(x), wanted), schedule


@pytest.mark.parametrize("target", COMPILED)
def test_the_fastest_is_used_and_recorded(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    path, weight = tmp_path / "t", dense_matrix(rng, 70, 90, 0.15)
    measured = fake(monkeypatch, 2)
    op = sparsert.compile_matmul(weight, target=target, tune="fast", tuning=path, columns=64)
    assert op.schedule == measured[2]
    assert len(measured) >= 4
    said = op.explain()
    assert "because   tuned now: fast tuning measured 1000000.0 us, 2000000.0 us with the cost model's choice" in said
    assert "next best, 2000000.0 us: rows=" in said
    assert "on 64 columns" in said
    again = sparsert.compile_matmul(weight, target=target, tune="fast", tuning=path, columns=50)  # the same class
    assert again.schedule == op.schedule
    assert f"because   recorded in {path} on 20" in again.explain()
    assert "next best" in again.explain()
    by_path = sparsert.compile_matmul(3 * weight, target=target, tuning=path, columns=64)  # the pattern counts
    assert by_path.schedule == op.schedule
    before = len(measured)
    for other in ({"columns": 1000}, {"activation": "relu"}, {"layout": "tile_major"}):
        unknown = sparsert.compile_matmul(weight, target=target, tuning=path, **{"columns": 64, **other})
        assert "because   no record of it; chosen by the cost model: " in unknown.explain()
    plain = sparsert.compile_matmul(weight, target=target)
    assert "because   chosen by the cost model: " in plain.explain()
    assert plain.schedule == measured[0]
    assert len(measured) == before
    assert path.read_text().count("\n") == 2


def test_cold_and_warm_samples_have_records_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    weight = dense_matrix(rng, 70, 90, 0.15)
    options: dict[str, Any] = {"tuning": tmp_path / "t", "columns": 32}
    fake(monkeypatch, 1)
    warm = sparsert.compile_matmul(weight, tune="fast-warm", **options)
    assert "; warm samples" in warm.explain()
    assert sparsert.compile_matmul(weight, **options).schedule == warm.schedule  # better than nothing
    fake(monkeypatch, 2)
    cold = sparsert.compile_matmul(weight, tune="fast", **options)
    assert "; cold samples" in cold.explain()
    assert cold.schedule != warm.schedule
    assert sparsert.compile_matmul(weight, **options).schedule == cold.schedule
    assert sparsert.compile_matmul(weight, tune="fast-warm", **options).schedule == warm.schedule
    assert sorted(r.remark.split(", ")[-1] for r in Database(tmp_path / "t").records()) == ["cold", "warm"]


@pytest.mark.parametrize("cold", [False, True])
def test_what_a_sample_is(cold: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Cold: copies of the code are called in turn, each at an address of its own and with the same results."""
    weight, target = dense_matrix(rng, 40, 50, 0.2), host.resolve("native")
    if target.isa == "reference":
        pytest.skip("nothing is compiled here")
    matrix = as_sparse(weight)
    task, _ = compiler.make_task(matrix, None, None, None, "f32", "row_major")
    budget = compiler.MAX_CODE_BYTES
    measure = trials.Trials(
        task, target, lambda s: compiler._build(task, s, target, budget, matrix.values, None), 64, cold=cold
    )
    products, results = [], []
    bind = NativeProduct.bind

    def spy(self: NativeProduct, *arrays: Any) -> Any:
        products.append(self)
        return bind(self, *arrays)

    monkeypatch.setattr(NativeProduct, "bind", spy)
    schedule = Schedule(rows=8)
    assert 0 < measure(task, schedule) < 1
    assert len(products) == measure._ready[schedule].products == (trials.CHAIN if cold else 1)
    assert len({product.executable.address for product in products}) == len(products)
    assert len({product.values[0].addresses[0] for product in products}) == len(products)
    for product in list(products):  # calls bind again
        measure.y[...] = np.nan
        product.run(measure.x, measure.y, None, 64)
        results.append(measure.y.copy())
    assert all(same_bits(results[0], other) for other in results)
    assert not complaint(results[0], expected(matrix, measure.x, None, None, None, None))


def test_long_code_needs_few_copies(rng: np.random.Generator) -> None:
    target = host.resolve("native")
    if target.isa == "reference":
        pytest.skip("nothing is compiled here")
    matrix = as_sparse(dense_matrix(rng, 40, 50, 0.2))
    task, _ = compiler.make_task(matrix, None, None, None, "f32", "row_major")
    budget = compiler.MAX_CODE_BYTES
    build = lambda s: compiler._build(task, s, target, budget, matrix.values, None)  # noqa: E731
    size = build(Schedule(rows=8)).code_bytes
    for room, copies in ((1, 1), (size, 1), (3 * size, 3), (100 * size, trials.CHAIN)):
        measure = trials.Trials(task, target, build, 64)
        measure.room = room
        measure(task, Schedule(rows=8))
        assert copies - 1 <= measure._ready[Schedule(rows=8)].products <= copies


def test_full_is_not_satisfied_with_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    weight, measured = dense_matrix(rng, 70, 90, 0.15), fake(monkeypatch, None)
    options: dict[str, Any] = {"tuning": tmp_path / "t", "columns": 32}
    sparsert.compile_matmul(weight, tune="fast", **options)
    fast = len(measured)
    sparsert.compile_matmul(weight, tune="full", **options)
    assert len(measured) > fast
    said = sparsert.compile_matmul(weight, tune="fast", **options).explain()
    assert "full tuning found nothing better than the cost model's choice" in said
    assert [r.effort for r in Database(tmp_path / "t").records()] == ["full"]


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator) -> None:
    weight = dense_matrix(rng, 70, 90, 0.15)
    monkeypatch.setenv(database.VARIABLE, str(tmp_path / "by variable"))
    sparsert.compile_matmul(weight)
    assert not list(tmp_path.iterdir())  # nobody asked for tuning
    op = sparsert.compile_matmul(weight, tune="fast", tuning="off")
    assert "tuned now" in op.explain()
    assert not list(tmp_path.iterdir())
    sparsert.compile_matmul(weight, tune="fast")
    assert [p.name for p in tmp_path.iterdir()] == ["by variable"]


@pytest.mark.parametrize("schedule", ["rows=500", "rows=3 k_segment=1", "rows=3 order=overlap packing=ahead"])
def test_records_are_checked(tmp_path: Path, schedule: str, rng: np.random.Generator) -> None:
    """What is legal by itself may not fit the task: then it is tuned again. What is odd is computed as it says."""
    path, weight = tmp_path / "t", dense_matrix(rng, 40, 3000, 0.02)
    sparsert.compile_matmul(weight, tune="fast", tuning=path, columns=16)
    line = path.read_text().splitlines()[1]
    start = line.index(" rows=")
    path.write_text(f"{line[:start]} {schedule}\n".replace("2026", "2027"))
    op = sparsert.compile_matmul(weight, tuning=path, columns=16)
    taken = schedule.startswith("rows=3 order")
    assert ("recorded in" in op.explain()) is taken
    x = rng.standard_normal((3000, 20)).astype(np.float32)
    assert same_bits(op(x), sparsert.compile_matmul(weight)(x))
    tuned_again = sparsert.compile_matmul(weight, tune="fast", tuning=path, columns=16)
    assert ("recorded in" in tuned_again.explain()) is taken


def test_rubbish_for_records(tmp_path: Path, rng: np.random.Generator) -> None:
    path, weight = tmp_path / "t", dense_matrix(rng, 40, 30, 0.2)
    path.write_bytes(bytes(range(256)) * 10)
    with pytest.warns(TuningWarning, match="are no records"):
        sparsert.compile_matmul(weight, tuning=path)
    with pytest.warns(TuningWarning, match="left alone"):
        sparsert.compile_matmul(weight, tune="fast", tuning=path)
    assert path.read_bytes() == bytes(range(256)) * 10


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"tune": "best"}, UnsupportedError), ({"tune": True}, UnsupportedError), ({"tune": ["fast"]}, UnsupportedError),
     ({"tuning": ""}, UnsupportedError), ({"tuning": 3}, UnsupportedError), ({"tuning": "a\0b"}, UnsupportedError),
     ({"columns": 0}, ValueRangeError), ({"columns": -3}, ValueRangeError), ({"columns": 2.0}, ValueRangeError),
     ({"columns": True}, ValueRangeError), ({"columns": 2**40}, ValueRangeError),
     ({"tune": "fast", "schedule": Schedule(4)}, UnsupportedError)],
)  # fmt: skip
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    for compile_ in (sparsert.compile_matmul, sparsert.compile_linear):
        with pytest.raises(error):
            compile_(np.eye(8, dtype=np.float32), **arguments)


def test_absurd_columns_take_no_absurd_memory(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(trials, "MOST_BYTES", 4 * 90 * 1000)
    op = sparsert.compile_matmul(dense_matrix(rng, 70, 90, 0.15), tune="fast", columns=2**31)
    assert "on 1000 columns" in op.explain()


def test_layers_with_nothing_to_tune() -> None:
    for shape in ((0, 5), (5, 0), (3, 3)):
        op = sparsert.compile_matmul(np.zeros(shape, np.float32), tune="full")
        assert "no other schedule would differ" in op.explain()
        assert op(np.ones((shape[1], 20), np.float32)).shape == (shape[0], 20)
        assert tune_layer(np.zeros(shape, np.float32)) is None


def test_the_reference_has_nothing_to_tune() -> None:
    op = sparsert.compile_matmul(np.eye(3, dtype=np.float32), target="reference", tune="fast")
    assert op.schedule is None
    with pytest.raises(UnsupportedError, match="no schedules"):
        tune_layer(np.eye(3, dtype=np.float32), target="reference")
    with pytest.raises(UnsupportedError, match="layout"):
        tune_layer(np.eye(3, dtype=np.float32), layout="diagonal")


def test_the_budget_of_code_counts(rng: np.random.Generator) -> None:
    """Candidates beyond it are not chosen; if the cost model's own is, the pattern is looped over."""
    weight = dense_matrix(rng, 70, 90, 0.15)
    fits = sparsert.compile_matmul(weight).stats.code_bytes
    op = sparsert.compile_matmul(weight, tune="full", max_code_bytes=fits)
    assert op.stats.code_bytes <= fits
    assert sparsert.compile_matmul(weight, tune="fast", max_code_bytes=fits - 1).schedule is None
    with pytest.raises(CodeBudgetError):
        sparsert.compile_matmul(weight, tune="fast", max_code_bytes=fits - 1, form="sparse")


def test_many_nonzeros_get_fewer_candidates(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    weight, measured = dense_matrix(rng, 70, 90, 0.15), fake(monkeypatch, None)
    monkeypatch.setattr(tuned, "_MEMORY", 1)
    sparsert.compile_matmul(weight, tune="full")
    assert len(measured) == tuner.LEAST


# -- the command line


@pytest.fixture
def layer_file(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "layers.npz"
    np.savez(path, first=dense_matrix(rng, 70, 90, 0.15), second=dense_matrix(rng, 40, 30, 0.2),
             empty=np.zeros((3, 3), np.float32))  # fmt: skip
    return path


def test_the_command_prints_and_records(
    layer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.txt"
    monkeypatch.setenv(database.VARIABLE, str(path))
    assert cli.main(["tune", str(layer_file), "--columns", "40"]) == 0
    out = capsys.readouterr().out
    for words in ("first: 70x90x40", "second: 40x30x40", "cost model", "chosen", "rows=", "schedules in", "records:",
                  "empty: 3x3x40, 0 nonzeros, row_major: no two schedules would differ"):  # fmt: skip
        assert words in out, words
    assert len(Database(path).records()) == 2
    with np.load(layer_file) as arrays, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "recorded in" in sparsert.compile_matmul(arrays["first"], tuning=path, columns=40).explain()


def test_one_layer_in_full(layer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records.txt"
    words = ["tune", str(layer_file), "--layer", "first", "--full", "--layout", "transposed", "--records", str(path)]
    assert cli.main([*words, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert 2 <= out.count("rows=") <= 4
    assert "second" not in out
    (record,) = Database(path).records()
    assert record.effort == "full"
    assert "70x90" in record.remark
    assert "transposed" in record.remark


def test_nothing_is_recorded_where_that_is_off(layer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", str(layer_file), "--layer", "second", "--records", "off"]) == 0
    assert "nothing is recorded" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--columns", "0"], ["--layer", "third"], ["--top", "0"]])
def test_wrong_words(layer_file: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", str(layer_file), *wrong]) == cli.EXIT_ERROR
    assert "sparsert: error: " in capsys.readouterr().err


def test_bench_with_tuning(layer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layouts are tuned for the columns of the problem, and what is timed is what was recorded."""
    path = tmp_path / "records.txt"
    monkeypatch.setenv(database.VARIABLE, str(path))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # as the baseline asks
    with np.load(layer_file) as arrays:
        np.save(tmp_path / "one.npy", arrays["first"])
    words = ["bench", "kernels", "--problems", f"{tmp_path}/one.npy", "--columns", "40", "--baseline", "numpy"]
    words += ["--rounds", "1"]
    assert cli.main([*words, "--tune", "fast", "--json", str(tmp_path / "out.json")]) == 0
    records = Database(path).records()
    assert {r.remark.split(", ")[2] for r in records} >= {"row_major", "tile_major"}
    assert all("40 columns" in r.remark for r in records)
    report = json.loads((tmp_path / "out.json").read_text())
    for record in records:
        assert record.schedule in json.dumps(report)
