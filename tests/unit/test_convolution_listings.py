"""Listings of convolutions and of dense products: what is compiled, for any target, with nothing executed."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, dense_matrix
from sparsert.cli import main as cli
from sparsert.errors import CodeBudgetError, ShapeError, SparseRTError, UnsupportedError, ValueRangeError
from sparsert.listings import compile_listing
from sparsert.runtime import cpu, memory
from sparsert.target import TARGETS
from unit.test_convolution import pruned

EVERY = [name for name in TARGETS if name != "reference"]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("code was mapped")

    for module in (cpu, memory):
        monkeypatch.setattr(module, "ExecutableMemory", refuse)


@pytest.mark.parametrize("target", EVERY)
def test_every_kind_of_convolution_is_listed_for_every_target(
    target: str, nothing_runs: None, rng: np.random.Generator
) -> None:
    w = pruned(rng, (8, 4, 3, 3), 0.4)
    for options, outputs, phases in (
        ({}, 8, 0), ({"stride": 2, "padding": 1}, 8, 0), ({"stride": (1, 3), "dilation": 2}, 8, 0),
        ({"padding": "same_upper", "groups": 2}, 8, 0), ({"transposed": True, "stride": 2, "output_padding": 1}, 4, 4),
        ({"transposed": True, "groups": 2, "dilation": (1, 2)}, 8, 1),
    ):  # fmt: skip
        text = compile_listing(w, np.ones(outputs, np.float32), "silu", residual="before", target=target, **options)
        assert text.count("\n") > 100
        assert text.count("; phase") == phases
    assert compile_listing(w[:, :, 0], target=target, stride=2) == compile_listing(
        w[:, :, :1], target=target, stride=(1, 2)
    )
    matrix = w.reshape(8, 36)
    assert compile_listing(matrix, kernel=3, target=target) == compile_listing(w, target=target)
    assert compile_listing(matrix, kernel=3, transposed=True, target=target) == compile_listing(
        w, transposed=True, target=target
    )
    depthwise = compile_listing(pruned(rng, (6, 1, 3, 3), 2.0), groups=6, padding=1, size=(20, 30), target=target)
    assert ("; in place, for images of 20 x 30" in depthwise) == (TARGETS[target].masks > 1)
    assert ("; any other images" in depthwise) == (TARGETS[target].masks > 1)


@pytest.mark.parametrize("target", EVERY)
def test_the_form_that_is_compiled_is_listed(target: str, nothing_runs: None, rng: np.random.Generator) -> None:
    sparse, full = dense_matrix(rng, 60, 60, 0.5), rng.standard_normal((300, 300)).astype(np.float32)
    for layout in ("row_major", "transposed"):
        dense = compile_listing(sparse, form="dense", target=target, layout=layout)
        assert dense != compile_listing(sparse, target=target, layout=layout)
        assert dense == compile_listing(full[:60, :60], form="dense", target=target, layout=layout)
        assert compile_listing(full, target=target, layout=layout) == dense  # nothing is zero, and it is large
    assert compile_listing(full, form="sparse", target=target).count("\n") > 90_000
    weight = pruned(rng, (40, 20, 3, 3), 0.5)
    for layer in (weight, full, dense_matrix(rng, 90, 90, 0.5)):
        assert "bundle of rows" in compile_listing(layer, max_code_bytes=12_000, target=target)
        with pytest.raises(CodeBudgetError):
            compile_listing(layer, max_code_bytes=12, target=target)
    for form in ("dense", "sparse"):
        with pytest.raises(CodeBudgetError):
            compile_listing(full, max_code_bytes=12_000, form=form, target=target)


@pytest.mark.parametrize("target", COMPILED)
def test_listings_are_those_of_operators(target: str, rng: np.random.Generator) -> None:
    w, x = pruned(rng, (8, 4, 3, 3), 0.4), np.ones((1, 4, 9, 9), np.float32)
    for options in ({}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"max_code_bytes": 3000}):
        settings: dict[str, Any] = {"target": target, **options}
        assert sparsert.compile_conv2d(w, **settings).listing() == compile_listing(w, **settings)
    back = sparsert.compile_conv_transpose2d(w, stride=2, target=target)
    assert back.listing() == compile_listing(w, stride=2, transposed=True, target=target)
    wide = pruned(rng, (4, 1, 3, 3), 2.0)
    op = sparsert.compile_conv2d(wide, groups=4, padding=1, target=target)
    general = op.listing()
    op(x)
    whole = compile_listing(wide, groups=4, padding=1, size=9, target=target)
    assert whole == op.listing()[len(general) :] + ("; any other images\n" if op.listing() != general else "") + general
    dense = rng.standard_normal((40, 40)).astype(np.float32)
    for compile_, layout in ((sparsert.compile_matmul, "row_major"), (sparsert.compile_linear, "transposed")):
        assert compile_(dense, form="dense", target=target).listing() == compile_listing(
            dense, form="dense", layout=layout, target=target
        )


def test_what_cannot_be_listed(rng: np.random.Generator) -> None:
    w = pruned(rng, (8, 4, 3, 3), 0.4)
    cases: tuple[tuple[Any, dict[str, Any], type[SparseRTError]], ...] = (
        (w[0, 0], {"stride": 2}, UnsupportedError), (w[0, 0], {"padding": 1}, UnsupportedError),
        (w, {"form": "dense"}, UnsupportedError), (w, {"output_padding": 1}, UnsupportedError),
        (w, {"transposed": True, "output_padding": 1}, ValueRangeError), (w, {"groups": 3}, ShapeError),
        (w, {"dilation": 1 << 19}, ValueRangeError), (w[0], {"transposed": True}, ShapeError),
        (w[0, 0], {"layout": "diagonal"}, UnsupportedError),
    )  # fmt: skip
    for weight, options, error in cases:
        with pytest.raises(error):
            compile_listing(weight, target="x86-avx2", **options)


def test_the_command(tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    w = pruned(rng, (8, 4, 3, 2), 0.4)
    path = tmp_path / "layer.npy"
    np.save(path, w.reshape(8, 24))

    def said(*more: str) -> str:
        assert cli.main(["asm", str(path), *more]) == 0
        return capsys.readouterr().out

    for target, (flags, options) in product(
        EVERY,
        (
            (("--kernel", "3x2", "--stride", "2x1", "--padding", "0,1,2,0"),
             {"kernel": (3, 2), "stride": (2, 1), "padding": ((0, 1), (2, 0))}),
            (("--kernel", "3x2", "--padding", "same_lower", "--dilation", "2", "--groups", "2"),
             {"kernel": (3, 2), "padding": "same_lower", "dilation": 2, "groups": 2}),
            (("--kernel", "3x2", "--transposed", "--stride", "2", "--output-padding", "1"),
             {"kernel": (3, 2), "transposed": True, "stride": 2, "output_padding": 1}),
            (("--form", "dense", "--layout", "transposed"), {"form": "dense", "layout": "transposed"}),
        ),
    ):  # fmt: skip
        head, _, text = said("--target", target, *flags).partition("\n")
        assert head.startswith("; layer: 8x24")
        assert text == compile_listing(w.reshape(8, 24), target=target, **options)
    for flags in (("--stride", "2"), ("--transposed",), ("--kernel", "threexthree"), ("--kernel", "3,1,1,1"),
                  ("--kernel", "5x5")):  # fmt: skip
        assert cli.main(["asm", str(path), *flags]) != 0
        assert "sparsert" in capsys.readouterr().err
