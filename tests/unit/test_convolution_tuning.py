"""``tune=`` and ``tuning=`` of convolutions, records that tell them apart, and what transposed ones say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, same_bits
from sparsert import Schedule
from sparsert.cli import main as cli
from sparsert.conv_request import layer_of
from sparsert.convolution import tune_convolution
from sparsert.errors import (
    AliasError,
    CodeBudgetError,
    PatternMismatchError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
    ValueRangeError,
)
from sparsert.kernels import matmul
from sparsert.schedule import database, space
from sparsert.schedule.database import Database
from sparsert.sparsity.geometry import padding as read_padding
from sparsert.target import TARGETS
from unit.test_convolution import pruned
from unit.test_tune import fake


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may touch the records of whoever runs it."""
    monkeypatch.setenv(database.VARIABLE, "off")
    monkeypatch.setattr(database, "_SAID", set())


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("residual", [None, "before"])
def test_tuning_changes_no_bit(target: str, residual: str | None, rng: np.random.Generator) -> None:
    w, bias = pruned(rng, (24, 10, 3, 3), 0.3), rng.standard_normal(24).astype(np.float32)
    x = rng.standard_normal((2, 10, 13, 17)).astype(np.float32)
    for stride, dilation, size in ((1, 1, (13, 17)), (2, 1, None), ((1, 3), 1, 20), (1, 2, None)):
        options: dict[str, Any] = {
            "stride": stride, "dilation": dilation, "padding": 2, "residual": residual, "target": target,
        }  # fmt: skip
        plain, fast = (sparsert.compile_conv2d(w, bias, "silu", **more, **options) for more in
                       ({}, {"tune": "fast", "size": size}))  # fmt: skip
        r = rng.standard_normal(plain.out_shape(x.shape)).astype(np.float32) if residual else None
        assert same_bits(fast(x, residual=r), plain(x, residual=r))
        assert "tuned now" in fast.explain()
        assert isinstance(fast.schedule, Schedule)
    line = {"target": target, "padding": 1}
    assert same_bits(sparsert.compile_conv1d(w[:, :, 0], tune="fast", size=50, **line)(x[:, :, 0]),
                     sparsert.compile_conv1d(w[:, :, 0], **line)(x[:, :, 0]))  # fmt: skip


@pytest.mark.parametrize("target", COMPILED)
def test_every_candidate_gives_the_same_bits(target: str, rng: np.random.Generator) -> None:
    """Candidates are legal, differ, and the cost model's comes first."""
    w, x = pruned(rng, (70, 40, 3, 3), 0.2), rng.standard_normal((1, 40, 9, 10)).astype(np.float32)
    for groups, padding in ((1, 1), (2, 0)):
        weight = w[:, : 40 // groups]
        found = TARGETS[target]
        layer = layer_of(weight, None, 2, 1, read_padding(padding), 1, groups, None, None, None, "f32", found)
        candidates = space.candidates(layer.task, found, matmul.spare(layer.task, found), 90, 24)
        assert 12 <= len(candidates) <= 24
        assert len({space.canonical(layer.task, s, found, 90) for s in candidates}) == len(candidates)
        options: dict[str, Any] = {"groups": groups, "padding": padding, "target": target}
        plain = sparsert.compile_conv2d(weight, **options)
        assert candidates[0] == plain.schedule
        for schedule in candidates:
            y = sparsert.compile_conv2d(weight, schedule=schedule, **options)(x)
            assert same_bits(y, plain(x)), schedule


@pytest.mark.isa("x86-avx2")
def test_records_know_the_geometry(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = fake(monkeypatch, 2)
    path, w = tmp_path / "records", pruned(rng, (40, 12, 3, 3), 0.3)
    settings: dict[str, Any] = {"target": "x86-avx2", "tuning": path}
    first = sparsert.compile_conv2d(w, padding=1, size=14, tune="fast", **settings)
    assert first.schedule == measured[2]
    count = len(measured)
    assert sparsert.compile_conv2d(w, padding=1, size=14, tune="fast", **settings).schedule == first.schedule
    assert sparsert.compile_conv2d(w, padding=1, size=14, **settings).schedule == first.schedule
    assert "recorded in" in sparsert.compile_conv2d(w, padding=1, **settings).explain()
    assert len(measured) == count
    for options in ({"stride": 2}, {"dilation": 2}, {"size": 40}):
        other = sparsert.compile_conv2d(w, **({"padding": 1} | options), **settings)  # type: ignore[arg-type]
        assert "no record of it" in other.explain(), options
    wide = pruned(rng, (40, 9, 2, 2), 0.3)
    assert "no record" in sparsert.compile_conv2d(wide, **settings).explain()
    assert "no record" in sparsert.compile_conv2d(w.reshape(40, 108), kernel=(9, 1), **settings).explain()
    assert "no record" in sparsert.compile_matmul(w.reshape(40, 108), columns=196, **settings).explain()
    (record,) = Database(path).records()
    assert "convolution, 14x14" in record.remark


@pytest.mark.isa("x86-avx512")
def test_a_depthwise_convolution_in_place_has_nothing_to_tune(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fake(monkeypatch, 1)
    w = pruned(rng, (8, 1, 3, 3), 2.0)
    sparsert.compile_conv2d(w, groups=8, padding=1, tune="fast", tuning=tmp_path / "records", target="x86-avx512")
    ((_, nothing),) = tune_convolution(w, groups=8, padding=1, tuning="off", target="x86-avx512")
    assert nothing is None
    assert not measured
    assert not (tmp_path / "records").exists()


@pytest.mark.isa("x86-avx2")
def test_the_command(tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    w = pruned(rng, (24, 10, 3, 3), 0.3)
    path, records = tmp_path / "layer.npy", tmp_path / "records"
    np.save(path, w.reshape(24, 90))
    common = ["tune", str(path), "--records", str(records), "--target", "x86-avx2", "--kernel", "3x3", "--padding", "1"]
    assert cli.main([*common, "--size", "14x14"]) == 0
    said = capsys.readouterr().out
    assert "kernel 3x3, stride 1x1, images of 14x14" in said
    assert "cost model" in said
    op = sparsert.compile_conv2d(w, padding=1, size=14, tuning=records, target="x86-avx2")
    assert "recorded in" in op.explain()
    assert cli.main([*common, "--transposed", "--stride", "2"]) == 0
    assert capsys.readouterr().out.count("images of") == 4
    back = sparsert.compile_conv_transpose2d(w, padding=1, stride=2, tuning=records, target="x86-avx2")
    assert "recorded in" in back.explain()


def test_what_cannot_be_tuned(rng: np.random.Generator) -> None:
    w = pruned(rng, (8, 4, 3, 3), 0.4)
    cases: tuple[tuple[dict[str, Any], type[Exception]], ...] = (
        ({"tune": "slow"}, UnsupportedError), ({"tune": "fast", "schedule": Schedule(4)}, UnsupportedError),
        ({"size": 0, "tuning": "off"}, ValueRangeError), ({"size": "14x14", "tuning": "off"}, ValueRangeError),
        ({"size": 2, "tuning": "off"}, ShapeError), ({"size": (1, 2, 3)}, ValueRangeError),
        ({"tuning": 3}, UnsupportedError),
    )  # fmt: skip
    for options, error in cases:
        with pytest.raises(error):
            sparsert.compile_conv2d(w, **options)
    with pytest.raises(UnsupportedError):
        tune_convolution(w, target="reference")


# ---- transposed convolutions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", COMPILED)
def test_transposed_convolutions_are_operators_like_others(target: str, rng: np.random.Generator) -> None:
    w, x = pruned(rng, (12, 20, 4, 3), 0.4), rng.standard_normal((2, 12, 7, 6)).astype(np.float32)
    op = sparsert.compile_conv_transpose2d(w, stride=2, padding=1, target=target, threads=1)
    assert op.target == target
    assert op.tile == TARGETS[target].lanes
    assert op.stats.nnz == np.count_nonzero(w)
    assert op.stats.density == pytest.approx(np.count_nonzero(w) / w.size)
    parts = [part.op for part in op.parts]
    assert op.stats.code_bytes == sum(part.stats.code_bytes for part in parts)
    assert op.stats.instructions == sum(part.stats.instructions for part in parts)
    assert op.stats.compile_seconds >= max(part.stats.compile_seconds for part in parts)
    reuse = [part.stats.fmas_per_load for part in parts]
    assert min(reuse) <= op.stats.fmas_per_load <= max(reuse)
    assert isinstance(op.schedule, Schedule)
    said = op.explain()
    assert "20x12x4x3 sparse transposed convolution, stride (2, 2), groups 1, as 4 convolutions" in said
    assert said.count("\n  threads   1") == 4
    assert op.listing().count("; phase") == 4
    want = op(x)
    for schedule in (Schedule(3, k_segment=7, packing="beside"), Schedule(5, order="count")):
        other = sparsert.compile_conv_transpose2d(w, stride=2, padding=1, target=target, schedule=schedule, threads=3)
        assert other.schedule == schedule
        assert same_bits(other(x), want)
    tuned = sparsert.compile_conv_transpose2d(w, stride=2, padding=1, target=target, tune="fast", size=7)
    assert same_bits(tuned(x), want)
    before = tuned.explain()
    op.refit(-w)
    assert same_bits(op(x), -want)
    with pytest.raises(PatternMismatchError):
        op.refit(np.ones_like(w))
    assert same_bits(op(x), -want)
    assert tuned.explain() == before
    with pytest.raises(AliasError):
        op(x, out=np.lib.stride_tricks.as_strided(x, want.shape, x.strides))
    with pytest.raises(ScheduleError):
        sparsert.compile_conv_transpose2d(w, target=target, schedule=Schedule(99))


@pytest.mark.parametrize("target", COMPILED)
def test_the_code_of_all_phases_counts(target: str, rng: np.random.Generator) -> None:
    w, x = pruned(rng, (12, 40, 4, 4), 0.6), rng.standard_normal((1, 12, 5, 6)).astype(np.float32)
    whole = sparsert.compile_conv_transpose2d(w, stride=2, target=target)
    fits = sparsert.compile_conv_transpose2d(w, stride=2, target=target, max_code_bytes=whole.stats.code_bytes)
    assert fits.schedule == whole.schedule
    small = sparsert.compile_conv_transpose2d(w, stride=2, target=target, max_code_bytes=whole.stats.code_bytes - 1)
    assert [part.op.schedule for part in small.parts] == [None] * 4
    assert small.stats.code_bytes < whole.stats.code_bytes
    assert same_bits(small(x), whole(x))
    with pytest.raises(CodeBudgetError):
        sparsert.compile_conv_transpose2d(w, stride=2, target=target, max_code_bytes=100)
    with pytest.raises(CodeBudgetError):
        sparsert.compile_conv_transpose2d(
            w, stride=2, target=target, max_code_bytes=whole.stats.code_bytes - 1, schedule=Schedule(6)
        )


def test_absurd_geometry_is_refused_when_it_is_compiled() -> None:
    w = np.ones((4, 4, 3, 3), np.float32)
    absurd: tuple[tuple[type[Exception], tuple[dict[str, Any], ...]], ...] = (
        (ValueRangeError, (
            {"stride": 1 << 19}, {"stride": (65, 64)}, {"stride": 0}, {"dilation": 1 << 19}, {"dilation": (4096, 4096)},
            {"padding": -1}, {"padding": 1 << 21}, {"output_padding": 1}, {"output_padding": -1, "stride": 2},
            {"output_padding": (0, 2), "stride": (3, 2)}, {"threads": 0},
        )),
        (UnsupportedError, (
            {"padding": "same"}, {"padding": "same_upper"}, {"activation": "exp"}, {"residual": "around"},
            {"tune": "x"},
        )),
        (ShapeError, ({"groups": 3}, {"groups": 0}, {"groups": 2.0})),
    )  # fmt: skip
    for error, cases in absurd:
        for options in cases:
            with pytest.raises(error):
                sparsert.compile_conv_transpose2d(w, **options)
    for wide in ({"dilation": 1 << 19}, {"dilation": (3000, 3000)}):
        with pytest.raises(ValueRangeError, match="spans"):
            sparsert.compile_conv2d(w, **wide)  # type: ignore[arg-type]
    with pytest.raises(ValueRangeError, match="of 40 channels"):
        sparsert.compile_conv2d(np.ones((1, 40, 3, 3), np.float32), dilation=2000)
    with pytest.raises(ValueRangeError, match="spans"):
        sparsert.compile_conv1d(w[:, :, 0], dilation=1 << 20)
    line = sparsert.compile_conv1d(w[:, :, 0], dilation=1 << 16, padding=1 << 16)
    assert line(np.ones((1, 4, 5), np.float32)).shape == (1, 4, 5)


def test_padding_beyond_what_phases_read(rng: np.random.Generator) -> None:
    w = pruned(rng, (3, 2, 3, 3), 2.0)
    bias, x = np.array([1, 2], np.float32), rng.standard_normal((2, 3, 3, 8)).astype(np.float32)
    for residual in (None, "before"):
        op = sparsert.compile_conv_transpose2d(w, bias, stride=(1, 3), dilation=(15, 22), padding=(4, 29),
                                               output_padding=(3, 2), residual=residual)  # fmt: skip
        assert op.out_shape(x.shape) == (2, 2, 28, 10)
        r = rng.standard_normal((2, 2, 28, 10)).astype(np.float32) if residual else None
        plain = sparsert.compile_conv_transpose2d(w, bias, stride=(1, 3), dilation=(15, 22), output_padding=(3, 2))
        want = plain(x)[:, :, 4:-4, 29:-29]
        assert np.allclose(op(x, residual=r), want if r is None else want + r, atol=1e-5)


@pytest.mark.parametrize("target", COMPILED)
def test_strides_beyond_the_image(target: str, rng: np.random.Generator) -> None:
    """As good as any other: a single output, and phases that no place of the kernel reaches."""
    w, x = pruned(rng, (4, 3, 3, 3), 0.8), rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    plain = sparsert.compile_conv2d(w, padding=1, target=target)(x)
    for stride in (1 << 20, (1, 1 << 20), 4000):
        op = sparsert.compile_conv2d(w, padding=1, stride=stride, target=target)
        rows = plain.shape[2] if isinstance(stride, tuple) else 1
        assert op(x).shape == (1, 4, rows, 1)
        assert np.allclose(op(x), plain[:, :, :rows, :1], atol=1e-5)
    back = sparsert.compile_conv_transpose2d(w, np.arange(3, dtype=np.float32), stride=64, target=target)
    assert len({id(part.op) for part in back.parts}) < 20
    assert back.stats.nnz == np.count_nonzero(w)
    images = rng.standard_normal((1, 4, 2, 2)).astype(np.float32)
    y = back(images)
    assert y.shape == (1, 3, 67, 67)
    assert np.array_equal(y[0, :, 10, 10], [0, 1, 2])
    for p, q in ((0, 0), (2, 1)):
        want = np.einsum("c,cohw->ohw", images[0, :, p // 2, q], w.astype(np.float64)) + np.arange(3)[:, None, None]
        at = 64 * (p // 2), 64 * q
        assert np.allclose(y[0, :, at[0] : at[0] + 3, at[1] : at[1] + 3], want, atol=1e-5)
    back.refit(-w)
    assert np.allclose(back(images) - y, 2 * (np.arange(3)[:, None, None] - y), atol=1e-4)
