"""Benchmarks: problems, peers' bookkeeping, interleaving, reports and charts. No test looks at a real time."""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from sparsert.benchmarks import baselines, chart, environment, measure, peers, problems, runner, table
from sparsert.benchmarks.baselines import BASELINES, Baseline, Selection
from sparsert.benchmarks.peers import Bound, Form, Layer, Prepared
from sparsert.benchmarks.problems import Problem
from sparsert.benchmarks.report import Ratio, Report, Row, Timed
from sparsert.cli import bench
from sparsert.errors import (
    FormatError,
    MissingDependencyError,
    SparseRTError,
    UnsupportedError,
    ValueRangeError,
)

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")


# -- problems


def test_uniform_sets_are_those_of_the_target_table() -> None:
    tokens = list(problems.uniform_tokens(None))
    assert {p.shape for p in tokens} == {
        (m, k, n)
        for m, k in ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))
        for n in (128, 256, 512)
    }
    assert all(p.sparsity == pytest.approx(0.9, abs=1e-6) for p in tokens)
    conv = list(problems.uniform_conv(None))
    assert [p.shape for p in conv[:4]] == [(512, 512, 196), (1024, 1024, 196), (2048, 512, 49), (512, 2048, 49)]
    assert list(dict.fromkeys(round(p.sparsity, 4) for p in conv)) == [0.8, 0.9, 0.95, 0.98]
    assert [p.sparsity for p in problems.select("uniform_conv", [0.5])] == [0.5] * 4
    assert len(problems.select("uniform", [0.9])) == 22
    names = [p.name for p in tokens + conv]
    assert len(set(names)) == len(names)


def test_uniform_is_exact_seeded_and_in_order() -> None:
    first, again, other = (problems.uniform(30, 50, 0.9, seed) for seed in (0, 0, 1))
    assert first.pattern.nnz == 150
    assert first.pattern == again.pattern
    assert np.array_equal(first.values, again.values)
    assert first.pattern != other.pattern
    # the same number in every process: no seed may depend on the hash salt of strings
    assert int(problems.generator("uniform", 1).integers(1 << 30)) == 576890178
    assert problems.uniform(4, 4, 0.0).pattern.nnz == 16
    assert problems.uniform(4, 4, 1.0).pattern.nnz == 0
    with pytest.raises(ValueRangeError, match="sparsity"):
        problems.uniform(4, 4, 90)


def test_problem_input_is_reproducible_and_its_own() -> None:
    weight = problems.uniform(8, 6, 0.5)
    one, two = Problem("one", "g", weight, 5), Problem("two", "g", weight, 5)
    assert one.input().shape == (6, 5)
    assert one.input().dtype == np.float32
    assert np.array_equal(one.input(), one.input())
    assert not np.array_equal(one.input(), two.input())


def test_chain_has_nine_patterns_and_linear_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "CHAIN_SHAPES", ((32, 32, 20), (48, 48, 16)))
    first, second = problems.select("chain")
    assert first.group != second.group
    assert len({layer.pattern.digest for layer in first.layers}) == 9
    assert first.shape == (32, 32, 20)
    assert first.nnz == 9 * first.weight.pattern.nnz
    assert first.sparsity == pytest.approx(0.9, abs=1e-3)
    assert [(p.kind, p.columns) for p in problems.select("linear")] == [("linear", 128)] * 2


def test_files_are_problems(tmp_path: Path) -> None:
    path = tmp_path / "layer.npy"
    np.save(path, problems.uniform(12, 10, 0.5).to_dense())
    (problem,) = problems.select(str(path), columns=33)
    assert problem.shape == (12, 10, 33)
    assert problem.group == "layer"
    assert problems.select(str(path))[0].columns == 196


@pytest.mark.parametrize("name", ["mobilenet_v2", "", "uniform,nothing", "weights.txt"])
def test_unknown_problem_sets(name: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown problem set"):
        problems.select(name)


@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet50_1x1", "transformer", "dlmc", "dlmc:ffn"])
def test_sets_of_real_weights_name_the_variable(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSERT_TEST_DATA", raising=False)
    with pytest.raises(UnsupportedError, match="SPARSERT_TEST_DATA"):
        problems.select(name)
    monkeypatch.setenv("SPARSERT_TEST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UnsupportedError, match="no folder"):
        problems.select(name)
    monkeypatch.setenv("SPARSERT_TEST_DATA", str(tmp_path))
    with pytest.raises(UnsupportedError, match="missing from the test data"):
        problems.select(name)


def test_real_sets(test_data: Path) -> None:
    mobile = problems.select("mobilenet_v1")
    assert [p.columns for p in mobile] == [12544, 3136, 3136, 784, 784, *[196] * 6, 49, 49]
    assert mobile[6].shape == (512, 512, 196)
    assert [p.name for p in mobile if p.note] == [mobile[12].name]
    assert "uniform random stand-in" in mobile[12].note
    assert all(p.sparsity == pytest.approx(0.9, abs=2e-3) for p in mobile)
    resnet = problems.select("resnet50_1x1")
    assert len({p.shape for p in resnet}) == len(resnet) == 15
    assert all("3x3 patterns excluded" in p.note for p in resnet)
    assert np.array_equal(resnet[3].weight.values, problems.select("resnet50_1x1")[3].weight.values)
    assert {p.shape[:2] for p in problems.select("transformer")} == {(512, 512), (2048, 512), (512, 2048)}
    (one,) = problems.select("dlmc:rn50__magnitude_pruning__0.95/bottleneck_3_block_group2_2_1")
    assert one.shape == (512, 128, 784)
    assert one.sparsity == pytest.approx(0.95, abs=1e-3)
    with pytest.raises(UnsupportedError, match="no pattern"):
        problems.select("dlmc:nothing_like_this")


# -- peers


def product_form(name: str = "W@X", **changes: object) -> Form:
    form = Form(name, "kn", lambda layer: Bound(lambda: np.matmul(layer.dense, layer.x, out=layer.y)))
    return replace(form, **changes)


def tiny(kind: str = "matmul") -> Problem:
    weight = problems.uniform(7, 9, 0.5)
    return Problem("tiny 7x9x21", "tiny", weight, 21, kind=kind)


@pytest.mark.parametrize("layout", ["kn", "nk", "tiles"])
@pytest.mark.parametrize("columns", [0, 1, 15, 16, 33])
def test_layouts_hold_the_same_matrix(layout: peers.Layout, columns: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, columns), np.float32)
    form = product_form(layout=layout)
    buffer = peers.allocate(5, columns, form)
    assert buffer.shape == peers.shape_of(layout, 5, columns)
    peers.fill(buffer, x, layout)
    assert np.array_equal(peers.unfold(buffer, layout, 5, columns), x)


def test_tiles_are_columns_in_blocks_of_sixteen() -> None:
    x = np.arange(3 * 20, dtype=np.float32).reshape(3, 20)
    buffer = np.full((2, 3, 16), np.nan, np.float32)
    peers.fill(buffer, x, "tiles")
    assert buffer[1, 2, 3] == x[2, 19]
    assert not buffer[1, :, 4:].any()


def test_aligned_buffers_are_aligned() -> None:
    for rows in range(1, 9):
        assert peers.allocate(rows, 3, product_form()).ctypes.data % 64 == 0


@pytest.mark.parametrize(
    ("columns", "size"), [(196, (14, 14)), (128, (8, 16)), (49, (7, 7)), (1, (1, 1)), (13, (1, 13))]
)
def test_image_is_nearly_square(columns: int, size: tuple[int, int]) -> None:
    assert peers.image(columns) == size


def wrong_value(layer: Layer) -> Bound:
    def call() -> None:
        np.matmul(layer.dense, layer.x, out=layer.y)
        layer.y[3, 4] += 0.01

    return Bound(call)


def fails(layer: Layer) -> Bound:
    raise RuntimeError("no such kernel")


def test_wrong_and_failing_forms_are_dropped_and_said() -> None:
    forms = [
        product_form("right"),
        product_form("wrong", bind=wrong_value),
        product_form("silent", bind=lambda layer: Bound(lambda: None)),
        product_form("new array", bind=lambda layer: Bound(lambda: layer.dense @ layer.x)),
        product_form("transposed result", bind=lambda layer: Bound(lambda: (layer.dense @ layer.x).T)),
        product_form("fails", bind=fails),
        product_form("linear only", kinds=("linear",)),
    ]
    candidates, dropped = baselines.prepare("numpy", forms, Prepared.of(tiny()))
    assert [c.key for c in candidates] == ["numpy right", "numpy new array"]
    assert [sentence.split(":")[0] for sentence in dropped] == [
        "numpy wrong", "numpy silent", "numpy transposed result", "numpy fails",
    ]  # fmt: skip
    assert "no such kernel" in dropped[-1]


def test_a_failure_of_ours_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="no such kernel"):
        baselines.prepare("sparsert", [product_form(bind=fails, role="ours")], Prepared.of(tiny()))


def test_a_chain_passes_results_on() -> None:
    layers = [problems.uniform(6, 6, 0.4, seed) for seed in range(3)]
    chain = Problem("chain", "chain", layers[0], 5, successors=tuple(layers[1:]))
    candidate = peers.bind(product_form(), "numpy", Prepared.of(chain))
    candidate.call()
    candidate.call()  # every pass starts from x again
    expected = chain.input().astype(np.float64)
    for layer in layers:
        expected = layer.to_dense().astype(np.float64) @ expected
    x, last, _ = candidate.buffers
    np.testing.assert_allclose(last, expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(x, chain.input())


def test_unknown_and_missing_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="unknown baseline 'cublas'"):
        baselines.select(["numpy", "cublas"], 1)

    def broken(threads: int) -> list[Form]:
        raise ImportError("half a package")

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    rows = {
        "numpy": BASELINES["numpy"],
        "ghost": Baseline("ghost", "Ghost", ("no-such-distribution",), "", broken),
        "half": Baseline("half", "Half", ("numpy",), "", broken),
    }
    monkeypatch.setattr(baselines, "BASELINES", rows)
    selection = baselines.select(None, 1)
    assert list(selection.forms) == ["numpy"]
    assert "no-such-distribution not installed" in selection.skipped["ghost"]
    assert "half a package" in selection.skipped["half"]
    for name in ("ghost", "half"):
        with pytest.raises(MissingDependencyError, match=name):
            baselines.select([name], 1)


def test_numpy_does_not_take_part_on_a_wrong_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    for name in environment.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not environment.can_pin_blas(1)
    with pytest.raises(MissingDependencyError, match="threadpoolctl"):
        baselines.select(["numpy"], 1)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert environment.can_pin_blas(2)
    assert not environment.can_pin_blas(1)


@pytest.mark.parametrize(
    "name",
    ["numpy", *(pytest.param(n, marks=pytest.mark.peers(*BASELINES[n].packages)) for n in BASELINES if n != "numpy")],
)
def test_every_form_of_every_baseline_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    forms = baselines.select([name], 1).forms[name]
    layers = tuple(problems.uniform(24, 24, 0.7, seed) for seed in range(3))
    for problem in (
        Problem("rectangle", "g", problems.uniform(20, 36, 0.7), 21),
        Problem("one column", "g", problems.uniform(20, 36, 0.7), 1),
        Problem("linear", "g", problems.uniform(36, 20, 0.7), 6, kind="linear"),
        Problem("chain", "g", layers[0], 18, successors=layers[1:]),
    ):
        candidates, dropped = baselines.prepare(name, forms, Prepared.of(problem))
        assert dropped == []
        assert len(candidates) == len(forms)


# -- timing


class Clock:
    """A clock that moves only when work is done."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[], float] | float) -> Callable[[], None]:
        def call() -> None:
            self.log += name
            self.now += seconds() if callable(seconds) else seconds

        return call


@pytest.mark.parametrize("seconds", [1e-6, 3e-4, 2e-3, 0.5])
def test_calibration_fills_a_sample(seconds: float) -> None:
    clock = Clock()
    repetitions = measure.calibrate(clock.work("a", seconds), 2e-3, clock)
    assert repetitions * seconds >= 2e-3
    assert repetitions == 1 or repetitions * seconds < 2e-2


def test_calibration_ends_on_a_clock_that_stands_still() -> None:
    assert measure.calibrate(lambda: None, 2e-3, lambda: 0.0) == measure.MAX_REPETITIONS


def test_interleaving_rotates_and_times_each_call() -> None:
    clock = Clock()
    calls = {"a": clock.work("a", 1.0), "b": clock.work("b", 2.0), "c": clock.work("c", 4.0)}
    samples = measure.interleave(calls, rounds=4, sample_seconds=0.5, clock=clock)
    assert {name: samples.seconds[name].tolist() for name in "abc"} == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}
    assert clock.log == "aabbcc" + "aabbcc" + "aaccbb" + "ccaabb" + "ccbbaa"  # calibration, then four rounds
    assert samples.speedup("a", over="c") == (4.0, 4.0, 4.0)
    assert samples.time("b").median == 2.0


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down tenfold in every other round changes times, not ratios."""
    clock = Clock()
    slow = {"factor": 1.0, "calls": 0.0}

    def seconds(base: float) -> Callable[[], float]:
        def step() -> float:
            slow["calls"] += 1
            slow["factor"] = 10.0 if slow["calls"] > 4 and (slow["calls"] - 5) // 4 % 2 else 1.0
            return base * slow["factor"]

        return step

    calls = {"a": clock.work("a", seconds(1.0)), "b": clock.work("b", seconds(3.0))}
    samples = measure.interleave(calls, rounds=8, sample_seconds=0.5, clock=clock)
    assert samples.time("a").high == 10 * samples.time("a").low
    assert samples.speedup("a", over="b") == (3.0, 3.0, 3.0)


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueRangeError, match="rounds"):
        measure.interleave({"a": lambda: None}, rounds=0)


# -- reports


def report_of(dense: Sequence[str] = ("numpy", "torch", "onnxruntime", "openvino"), crippled: Sequence[str] = (),
              rows: int = 3, groups: int = 1, tile_major: bool = False) -> Report:  # fmt: skip
    """A made-up report: ours takes 1, 2, 4 ... microseconds, and dense peers 8, 9, 10 ... times as long."""

    def row(index: int) -> Row:
        ours = Timed(
            "sparsert", "", "ours", 1e-6 * 2**index, 0.9e-6 * 2**index, 1.2e-6 * 2**index, 7, {"schedule": "s"}
        )
        others = [Timed(name, "W@X", "dense", t := (8 + i) * ours.median, t, t) for i, name in enumerate(dense)]
        sparse = Timed("scipy", "CSR@X", "sparse", 4 * ours.median, 4 * ours.median, 4 * ours.median)
        ratios = [Ratio("sparsert", "dense", 8.0 + index, 7.0, 9.0), Ratio("sparsert", "scipy", 4.0, 4.0, 4.0),
                  Ratio("scipy", "dense", 2.0, 2.0, 2.0)]  # fmt: skip
        mine = [ours]
        if tile_major:
            mine.append(replace(ours, form="tile-major", median=0.8 * ours.median))
            ratios += [Ratio("sparsert tile-major", "dense", 10.0 + index, 9.0, 11.0),
                       Ratio("sparsert tile-major", "scipy", 5.0, 5.0, 5.0)]  # fmt: skip
        shape = (64, 32, 16 * (index + 1))
        return Row(f"layer{index} {'x'.join(map(str, shape))}", f"group{index % groups}", *shape, 1, 200, 0.9, "matmul",
                   "a stand-in" if index == 0 else "", (*mine, *others, sparse), tuple(ratios) if dense else (),
                   ("torch conv: failed",) if index == 1 else ())  # fmt: skip

    head = environment.describe(1, "native", "sparsert bench kernels") | {"crippled_by": list(crippled)}
    allowed = {name: BASELINES[name].allowed for name in dense}
    return Report(head, 15, allowed, {"mkl": "mkl not installed"}, tuple(row(i) for i in range(rows)))


def test_json_round_trip() -> None:
    report = report_of(groups=2)
    text = report.to_json()
    again = Report.from_json(text)
    assert again == report
    assert again.to_json() == text
    plain = json.loads(text)
    assert plain["dense_label"] == "best dense"
    assert plain["rows"][0]["fastest_dense"] == "numpy W@X"
    assert plain["environment"]["versions"]["numpy"] == np.__version__
    assert plain["skipped"] == {"mkl": "mkl not installed"}
    assert "notice" not in plain


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1}', "null"])
def test_foreign_json_is_a_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        Report.from_json(text, "some.json")


def test_geometric_means_are_per_group_and_over_all() -> None:
    report = report_of(groups=2)
    means = {(m.group, m.of, m.over): (m.value, m.rows) for m in report.means()}
    assert means["group0", "sparsert", "dense"] == (pytest.approx((8.0 * 10.0) ** 0.5), 2)
    assert means["group1", "sparsert", "dense"] == (pytest.approx(9.0), 1)
    assert means["all", "sparsert", "dense"] == (pytest.approx((8.0 * 9.0 * 10.0) ** (1 / 3)), 3)
    assert "all" not in {m.group for m in report_of(groups=1).means()}
    assert report.mean("nothing", "sparsert") is None


@pytest.mark.parametrize("variable", ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"])
def test_nothing_is_called_best_while_numpy_is_crippled(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.CRIPPLING:
        monkeypatch.delenv(name, raising=False)
    assert environment.describe(1, "native")["crippled_by"] == []
    monkeypatch.setenv(variable, "HASWELL")
    head = environment.describe(1, "native")
    assert head["crippled_by"] == [variable]
    assert head["variables"][variable] == "HASWELL"
    report = replace(report_of(), environment=head)
    assert report.dense_label == "crippled NumPy"
    assert variable in json.loads(report.to_json())["notice"]
    printed = render(report)
    assert variable in printed
    assert "crippled NumPy" in printed
    assert "over best dense" not in printed


def test_best_dense_takes_all_four_engines() -> None:
    assert report_of().dense_label == "best dense"
    assert report_of(dense=("numpy", "openvino")).dense_label == "fastest of NumPy, OpenVINO"
    assert report_of(dense=()).dense_label == "fastest of none"


def test_extra_forms_never_win() -> None:
    report = report_of(rows=1)
    row = report.rows[0]
    fast = Timed("openvino", "X^T@W^T, default precision", "extra", 1e-9, 1e-9, 1e-9)
    changed = replace(row, candidates=(*row.candidates, fast))
    assert changed.fastest_dense == row.fastest_dense
    assert changed.fastest("extra") == fast


def render(report: Report, width: int = 200, by_shape: bool = False) -> str:
    from rich.console import Console

    out = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    table.show(report, out, by_shape)
    return out.export_text()


def test_table_names_winner_ratios_and_what_is_missing() -> None:
    printed = render(report_of())
    assert re.search(r"NumPy +W@X", printed)
    for text in ("layer1 64x32x32", "8.00", "4.00", "mkl skipped: mkl not installed", "a stand-in",
                 "torch conv: failed", "geometric means"):  # fmt: skip
        assert text in printed
    assert f"{(8 * 9 * 10) ** (1 / 3):.2f}" in printed
    assert "fastest of none" in render(report_of(dense=()))


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120, 160])
def test_table_takes_the_width_there_is(width: int) -> None:
    """No row is folded: a line for each problem, whose first column is whole; what had no room is named."""
    report = report_of(rows=4, tile_major=True)
    printed = render(report, width).splitlines()
    assert max(map(len, printed)) <= width
    for index, row in enumerate(report.rows):
        (line,) = [line for line in printed if re.match(rf" *{row.name}\*? ", line)]
        assert f"{8.0 + index:.2f}" in line
    left_out = " ".join(printed).partition("left out at this width: ")[2]
    assert ("spreads" in left_out) == (not any("±" in line for line in printed))
    assert left_out.startswith("spreads") == (width < 100)
    assert ("x over SciPy CSR" in left_out) == (width < 70)


def test_wide_tables_leave_nothing_out() -> None:
    printed = render(report_of(tile_major=True))
    assert "left out" not in printed
    assert "4.00 / 5.00" in printed, "both of our columns over each sparse peer"


def test_output_that_is_no_terminal_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table.console().width == table.WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert table.console().width == 72


def test_rows_of_one_shape_are_merged() -> None:
    first, second, other = report_of().rows
    second = replace(second, rows=first.rows, inputs=first.inputs, columns=first.columns)
    single = replace(first.candidates[1], form="conv 1x1")
    second = replace(second, candidates=(*second.candidates, single))
    report = replace(report_of(), rows=(first, second, other, replace(first, group="another", sparsity=0.5)))
    merged = report.by_shape()
    assert [(row.name, count) for row, count in merged] == [("64x32x16", 2), ("64x32x48", 1), ("64x32x16", 1)]
    row = merged[0][0]
    assert row.nnz == 400
    assert row.ratio("sparsert", "dense") == Ratio(
        "sparsert", "dense", *(pytest.approx(v) for v in (72**0.5, 7.0, 9.0))
    )
    assert row.fastest("ours").median == pytest.approx(2**0.5 * 1e-6)
    assert [c.key for c in row.candidates] == [c.key for c in first.candidates], "only what all of them have"
    assert row.note == "a stand-in"
    assert row.dropped == second.dropped
    printed = render(report, by_shape=True)
    assert [line.split()[:2] for line in printed.splitlines() if re.match(" *64x32x", line)] == [
        ["64x32x16*", "2"], ["64x32x48", "1"], ["64x32x16*", "1"],
    ]  # fmt: skip
    assert report.mean("group0", "sparsert").rows == 3, "means remain those of single rows"


# -- the whole run


def test_run_times_checks_and_compares() -> None:
    selection = Selection({"numpy": [product_form(), product_form("wrong", bind=wrong_value)],
                           "scipy": [product_form("CSR@X", role="sparse")],
                           "openvino": [product_form("bf16", role="extra")]}, {"mkl": "not here"})  # fmt: skip
    steps: list[tuple[int, str]] = []
    report = runner.run(
        [tiny(), replace(tiny(), name="again")], selection, [product_form("", role="ours")],
        rounds=2, sample_seconds=1e-7, progress=lambda done, name: steps.append((done, name)),
    )  # fmt: skip
    assert steps == [(0, "tiny 7x9x21"), (1, "again"), (2, "")]
    row = report.rows[0]
    assert (row.rows, row.inputs, row.columns) == (7, 9, 21)
    assert [c.key for c in row.candidates] == ["sparsert", "numpy W@X", "scipy CSR@X", "openvino bf16"]
    assert len(row.dropped) == 1
    assert {(r.of, r.over) for r in row.ratios} == {
        ("sparsert", "dense"), ("sparsert", "scipy"), ("scipy", "dense"), (runner.EXTRA, "dense"),
    }  # fmt: skip
    assert Report.from_json(report.to_json()) == report
    assert report.allowed["scipy"] == BASELINES["scipy"].allowed


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", "kernels", *words])


def test_command_writes_json_and_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(
        "sparsert.benchmarks.ours.sparsert_forms", lambda threads, target, tune: [product_form("", role="ours")]
    )
    np.save(tmp_path / "layer.npy", problems.uniform(16, 16, 0.9).to_dense())
    words = ["--problems", str(tmp_path / "layer.npy"), "--columns", "8", "--baseline", "numpy", "--rounds", "1"]
    figure = ["--figure", str(tmp_path / "new" / "chart")] if find_spec("matplotlib") else []
    args = parse(*words, "--json", str(tmp_path / "new" / "out.json"), *figure)
    assert args.run(args) == 0
    report = Report.from_json((tmp_path / "new" / "out.json").read_text())
    assert report.rows[0].name == "layer 16x16x8"
    assert report.rounds == 1
    assert "fastest of NumPy" in capsys.readouterr().out
    if figure:
        assert (tmp_path / "new" / "chart.png").is_file()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--problems", "everything"], UnsupportedError),
        (["--baseline", "blas"], UnsupportedError),
        (["--baseline", ""], UnsupportedError),
        (["--sparsity", "0.9,many"], ValueRangeError),
        (["--sparsity", "130"], ValueRangeError),
        (["--threads", "0"], ValueRangeError),
        (["--rounds", "0"], ValueRangeError),
        (["--figure", "chart.jpeg"], UnsupportedError),
    ],
)
def test_command_refuses(words: list[str], error: type[SparseRTError]) -> None:
    args = parse(*words)
    with pytest.raises(error):
        args.run(args)


@pytest.mark.parametrize(
    ("text", "values"), [(None, None), ("0.9", [0.9]), ("80, 0.95,98%", [0.8, 0.95, 0.98]), ("0", [0.0])]
)
def test_sparsities(text: str | None, values: list[float] | None) -> None:
    assert bench.parse_sparsities(text) == values


# -- charts


@needs_matplotlib
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (4, 4), (30, 3)])
def test_chart_is_written_in_both_formats(tmp_path: Path, rows: int, groups: int) -> None:
    png, svg = chart.draw(report_of(rows=rows, groups=groups), tmp_path / "deep" / "chart")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert text.count("geometric mean") >= (1 if rows > 1 else 0)
    for words in ("layer0 64x32x16", "NumPy W@X", "speed-up over best dense", "SciPy CSR"):
        assert words in text


@needs_matplotlib
def test_chart_is_reproducible_and_labels_a_crippled_run(tmp_path: Path) -> None:
    report = replace(report_of(), environment={"cpu": "a CPU", "crippled_by": ["OPENBLAS_CORETYPE"]})
    first, second = (chart.draw(report, tmp_path / name)[0].read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b"speed-up over crippled NumPy" in first
    assert b"best dense" not in first


def slowed(report: Report, factor: float) -> Report:
    """The same report with every ratio over dense times ``factor``."""
    return replace(
        report,
        rows=tuple(
            replace(
                row, ratios=tuple(replace(r, median=factor * r.median) if r.over == "dense" else r for r in row.ratios)
            )
            for row in report.rows
        ),
    )


@needs_matplotlib
@pytest.mark.parametrize("factor", [1.0, 0.01])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (4, 4), (13, 1), (60, 2)])
def test_nothing_lies_outside_a_chart_or_on_its_axes(rows: int, groups: int, factor: float) -> None:
    """Also where every problem is slower than dense, and the line at 1 is above all bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    report = slowed(report_of(rows=rows, groups=groups, tile_major=True), factor)
    series = [*report.columns(), "scipy"]
    figure = chart._figure(Figure, report, series, chart.slots(report, series))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low == 0
        assert high > 1
        for text in [*axes.texts, *axes.get_xticklabels(), axes.yaxis.label]:
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.x1 <= figure.bbox.x1, text
            assert box.y0 >= 0, text
            assert box.y1 <= figure.bbox.y1, text
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert not any(legend.get_window_extent().overlaps(box) for box in boxes)
    assert min(box.height for box in boxes) > 0.3 * figure.bbox.height / len(boxes), "the bars take their share"


def test_many_layers_share_bars_by_shape() -> None:
    report = report_of(rows=84, groups=2)
    rows = tuple(replace(row, columns=16 * (index // 4)) for index, row in enumerate(report.rows))
    report = replace(report, rows=rows)
    first, second, _ = chart.slots(report, ["sparsert"])
    assert len(first) == len(second) == 22
    assert first[0].label == "64x32x0*, 2 layers"
    assert first[0].values["sparsert"] == pytest.approx((8 * 10) ** 0.5)
    assert first[-1].values["sparsert"] == pytest.approx(report.mean("group0", "sparsert").value)
    assert first[-1].sub == "of 42"
    assert len(chart.slots(replace(report, rows=rows[:40]), ["sparsert"])[0]) == 21, "few layers have bars of their own"


@needs_matplotlib
def test_chart_needs_a_dense_figure_and_a_known_format(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="dense"):
        chart.draw(report_of(dense=()), tmp_path / "chart.png")
    with pytest.raises(UnsupportedError, match="pdf"):
        chart.outputs(tmp_path / "chart.pdf")


def test_chart_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        chart.draw(report_of(), tmp_path / "chart.png")


def test_slots_end_each_group_with_its_mean() -> None:
    report = report_of(rows=5, groups=2)
    first, second, last = chart.slots(report, ["sparsert", "scipy"])
    assert [slot.is_mean for slot in first] == [False, False, False, True]
    assert [slot.is_mean for slot in second] == [False, False, True]
    assert last[0].values["sparsert"] == pytest.approx(np.prod([8.0, 9, 10, 11, 12]) ** 0.2)
    assert first[0].label.endswith("*")
    assert first[0].sub == "NumPy W@X"


def test_long_charts_break_between_groups() -> None:
    groups = chart.slots(report_of(rows=90, groups=3), ["sparsert"])
    packed = chart.lines(groups, 64)
    assert [[len(group) for group in line] for line in packed] == [[31, 31], [31, 1]]
    assert [[len(group) for group in line] for line in chart.lines(groups, 10)] == [[31], [31], [31, 1]]
