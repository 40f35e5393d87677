"""Weight files in every format, whole and damaged."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsert.errors import DTypeError, FormatError, ShapeError, SparseRTError, UnsupportedError, ValueRangeError
from sparsert.frontend import container
from sparsert.frontend.weights import Layer, load_layers, pick
from sparsert.sparsity.pattern import as_sparse


@pytest.fixture
def weight(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random((7, 11)) < 0.3, rng.standard_normal((7, 11)), 0).astype(np.float32)


def csr(weight: np.ndarray) -> dict[str, np.ndarray]:
    matrix = as_sparse(weight)
    pattern = matrix.pattern
    return {
        "data": matrix.values,
        "indices": pattern.indices,
        "indptr": pattern.indptr,
        "shape": np.array(weight.shape),
    }


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def npy_header(text: str, body: bytes = b"", version: int = 1) -> bytes:
    head = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(head)) + head + body


def smtx(weight: np.ndarray) -> bytes:
    parts = csr(weight)
    lines = [", ".join(str(n) for n in (*weight.shape, parts["data"].size))]
    lines += [" ".join(str(n) for n in parts[name]) for name in ("indptr", "indices")]
    return ("\n".join(lines) + "\n").encode()


def put(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def one(path: Path | str) -> Layer:
    (layer,) = load_layers(path)
    return layer


# -- .npy


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
@pytest.mark.parametrize("fortran", [False, True])
def test_npy(tmp_path: Path, weight: np.ndarray, dtype: str, fortran: bool) -> None:
    stored = (np.asfortranarray if fortran else np.ascontiguousarray)(weight.astype(dtype))
    layer = one(put(tmp_path, "dense.npy", npy(stored)))
    assert (layer.name, layer.bias, layer.columns) == ("dense", None, None)
    np.testing.assert_array_equal(layer.weight.to_dense(), weight.astype(dtype).astype(np.float32))
    assert layer.weight.pattern == as_sparse(weight).pattern


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_versions(tmp_path: Path, weight: np.ndarray, version: tuple[int, int]) -> None:
    layer = one(put(tmp_path, "w.npy", npy(weight, version=version)))
    np.testing.assert_array_equal(layer.weight.to_dense(), weight)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_npy_of_small_extents(tmp_path: Path, shape: tuple[int, int]) -> None:
    assert one(put(tmp_path, "w.npy", npy(np.ones(shape, np.float32)))).weight.shape == shape


BAD_NPY = {
    "empty": b"",
    "no mark": b"0123456789" * 20,
    "truncated header": npy(np.ones((3, 4), np.float32))[:40],
    "truncated data": npy(np.ones((3, 4), np.float32))[:-1],
    "too much data": npy(np.ones((3, 4), np.float32)) + b"\0",
    "version 9": b"\x93NUMPY\x09\x00" + bytes(100),
    "huge shape": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824, 1073741824), }"),
    "negative shape": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }"),
    "overflowing shape": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 0), }"),
    "record": npy_header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", bytes(4)),
    "code": npy_header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,), }"),
    "expression": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9, 10**9), }"),
    "nested": npy_header("(" * 5000),
    "empty strings": npy_header("{'descr': '<U0', 'fortran_order': False, 'shape': (4000000000,), }"),
    "long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31),
}


@pytest.mark.parametrize("kind", BAD_NPY)
def test_bad_npy(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path, "w.npy", BAD_NPY[kind])
    with pytest.raises(FormatError) as caught:
        load_layers(path)
    assert str(path) in caught.value.where


class Bomb:
    """Would create a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    array = np.array([Bomb(proof)], object)
    for name, raw in (("w.npy", npy(array)), ("pickle.npy", pickle.dumps(array))):
        with pytest.raises(FormatError):
            load_layers(put(tmp_path, name, raw))
    np.savez(tmp_path / "w.npz", layer=array)
    with pytest.raises(FormatError, match="layer"):
        load_layers(tmp_path / "w.npz")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists()  # the bomb is one


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.ones((2, 3), np.int32), DTypeError),
        (np.ones(3, np.float32), ShapeError),
        (np.full((2, 3), np.inf, np.float32), ValueRangeError),
        (np.full((2, 3), 1e300), ValueRangeError),
    ],
)
def test_arrays_that_are_no_weights(tmp_path: Path, array: np.ndarray, error: type[SparseRTError]) -> None:
    with pytest.raises(error) as caught:
        load_layers(put(tmp_path, "w.npy", npy(array)))
    assert caught.value.where.endswith("w.npy: w")


# -- .npz


def test_npz_of_dense_and_csr_layers(tmp_path: Path, weight: np.ndarray, rng: np.random.Generator) -> None:
    path = tmp_path / "net.npz"
    bias = rng.standard_normal(7).astype(np.float32)
    groups = {f"pw0.{part}": value for part, value in csr(weight).items()}
    groups["pw0.indices"] = groups["pw0.indices"].astype(np.uint16)
    np.savez_compressed(path, **{
        **groups, "pw0.b": bias, "fc.w": weight, "fc.b": bias.astype(np.float64), "plain": weight[:, ::-1],
        "conv.w": weight[:, :, None, None], "first.w": np.ones((7, 3, 3, 3), np.float32), "lonely.b": bias,
        "counts": np.arange(12).reshape(3, 4),
    })  # fmt: skip
    layers = load_layers(path)
    assert [layer.name for layer in layers] == ["pw0", "fc", "plain", "conv"]
    for layer, expected in zip(layers, (weight, weight, weight[:, ::-1], weight), strict=True):
        np.testing.assert_array_equal(layer.weight.to_dense(), expected)
    for layer in layers[:2]:
        assert layer.bias is not None
        assert layer.bias.dtype == np.float32
        np.testing.assert_array_equal(layer.bias, bias)
    assert layers[2].bias is None


def test_csr_keeps_explicit_zeros_and_sums_duplicates(tmp_path: Path) -> None:
    parts = {"data": np.array([0.0, 1, 2]), "indices": np.array([1, 0, 0]), "indptr": np.array([0, 1, 3])}
    np.savez(
        tmp_path / "w.npz", **{f"a.{part}": value for part, value in (parts | {"shape": np.array([2, 3])}).items()}
    )
    matrix = one(tmp_path / "w.npz").weight
    assert matrix.pattern.indices.tolist() == [1, 0]
    assert matrix.values.tolist() == [0.0, 3.0]


def test_csr_of_a_convolution(tmp_path: Path, rng: np.random.Generator) -> None:
    kernel = np.where(rng.random((4, 18)) < 0.4, 1, 0).astype(np.float32)
    parts = csr(kernel) | {"shape": np.array([4, 2, 3, 3])}
    np.savez(tmp_path / "w.npz", **{f"conv.{part}": value for part, value in parts.items()})
    layer = one(tmp_path / "w.npz")
    assert layer.weight.shape == (4, 18)
    assert layer.note == "conv 3x3, columns in (input channel, ky, kx) order"


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr"])
def test_scipy_files(tmp_path: Path, weight: np.ndarray, form: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    square = np.zeros((8, 12), np.float32)
    square[:7, :11] = weight
    matrix = sparse.csr_matrix(square).asformat(form)
    if form == "bsr":
        matrix = sparse.bsr_matrix(square, blocksize=(2, 3))
    sparse.save_npz(tmp_path / "layer.npz", matrix)
    layer = one(tmp_path / "layer.npz")
    assert layer.name == "layer"
    np.testing.assert_array_equal(layer.weight.to_dense(), square)
    assert layer.weight.pattern == as_sparse(matrix).pattern  # explicit zeros of blocks included


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia", "nonsense"])
def test_scipy_files_that_lie(tmp_path: Path, form: str) -> None:
    parts: dict[str, Any] = {
        "data": np.ones(3, np.float32),
        "shape": np.array([2, 2]),
        "format": np.array(form.encode()),
    }
    for bad in ([0, 1, 5], [0, -1, 1], [0, 1], [0.0, 1.0, 1.0]):
        extra = {name: np.array(bad) for name in ("row", "col", "indices", "indptr", "offsets")}
        np.savez(tmp_path / "w.npz", **parts, **extra)
        with pytest.raises(FormatError, match="w"):
            load_layers(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", **parts)
    with pytest.raises(FormatError):
        load_layers(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("indptr", [0, 1]),
        ("indptr", [0, 9, 2]),
        ("indptr", [1, 1, 3]),
        ("indices", [0, 1, 3]),
        ("indices", [0, 1, -1]),
        ("indices", [0.0, 1.0, 2.0]),
        ("data", [1.0, 2.0]),
        ("shape", [2]),
        ("shape", [2.0, 3.0]),
        ("shape", [2, -3]),
        ("shape", [2**40, 3]),
        ("shape", [2, 2**16, 2**16]),
        ("shape", [3, 3]),
        ("b", [1.0]),
        ("b", [1, 2]),
    ],
)
def test_bad_csr_groups(tmp_path: Path, part: str, value: list[float]) -> None:
    arrays = {
        "data": np.ones(3),
        "indices": np.array([0, 2, 1]),
        "indptr": np.array([0, 2, 3]),
        "shape": np.array([2, 3]),
    }
    path = tmp_path / "w.npz"
    np.savez(path, **{f"pw.{name}": array for name, array in arrays.items()})
    load_layers(path)
    arrays[part] = np.array(value)
    np.savez(path, **{f"pw.{name}": array for name, array in arrays.items()})
    with pytest.raises(FormatError) as caught:
        load_layers(path)
    assert str(path) in caught.value.where
    assert "pw" in str(caught.value)


@pytest.mark.parametrize("value", [1e300, np.inf, np.nan])
def test_bias_that_is_not_finite(tmp_path: Path, weight: np.ndarray, value: float) -> None:
    np.savez(tmp_path / "w.npz", **{"fc.w": weight, "fc.b": np.full(7, value)})
    with pytest.raises(ValueRangeError, match=r"fc\.b"):
        load_layers(tmp_path / "w.npz")


def test_files_without_a_layer(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", counts=np.arange(3))
    with pytest.raises(FormatError, match="no layer"):
        load_layers(tmp_path / "none.npz")


# -- .smtx and archives


def test_smtx(tmp_path: Path, weight: np.ndarray) -> None:
    first, again = one(put(tmp_path, "a.smtx", smtx(weight))), one(put(tmp_path, "b.smtx", smtx(weight)))
    assert first.weight.pattern == as_sparse(weight).pattern
    assert "N(0, 1)" in first.note
    assert first.weight.values.dtype == np.float32
    np.testing.assert_array_equal(first.weight.values, again.weight.values)  # a pattern's values are its own
    seed = int(first.weight.pattern.digest, 16)
    draw = np.random.default_rng(seed).standard_normal(first.weight.values.size)
    np.testing.assert_array_equal(first.weight.values, draw.astype(np.float32))


def test_smtx_values_are_standard_normal(tmp_path: Path) -> None:
    values = one(put(tmp_path, "a.smtx", smtx(np.ones((300, 300))))).weight.values
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize("text", [b"0, 0, 0\n0\n\n", b"0, 0, 0\n0", b"2, 3, 0\n0 0 0\n\n", b"2, 3, 0\r\n0 0 0\r\n\r\n"])
def test_smtx_without_nonzeros(tmp_path: Path, text: bytes) -> None:
    assert one(put(tmp_path, "a.smtx", text)).weight.pattern.nnz == 0


BAD_SMTX = {
    "empty": b"",
    "one line": b"2, 3, 2",
    "two lines": b"2, 3, 2\n0 1 2",
    "no commas": b"2 3 2\n0 1 2\n0 1\n",
    "words": b"a, b, c\n0 1 2\n0 1\n",
    "negative extent": b"-2, 3, 2\n0 1 2\n0 1\n",
    "negative index": b"2, 3, 2\n0 1 2\n0 -1\n",
    "float index": b"2, 3, 2\n0 1 2\n0 1.0\n",
    "index outside": b"2, 3, 2\n0 1 2\n0 3\n",
    "index overflows": b"2, 3, 2\n0 1 2\n0 99999999999999999999999\n",
    "offset too few": b"2, 3, 2\n0 2\n0 1\n",
    "offsets fall": b"3, 3, 2\n0 2 1 2\n0 1\n",
    "nonzeros fewer": b"2, 3, 2\n0 1 2\n0\n",
    "nonzeros more": b"2, 3, 2\n0 1 2\n0 1 2\n",
    "nonzeros other": b"2, 3, 1\n0 1 2\n0 1\n",
    "huge rows": b"1000000000, 3, 2\n0 1 2\n0 1\n",
    "huge nonzeros": b"2, 3, 999999999999\n0 1 2\n0 1\n",
    "rows unbacked": b"16000000, 3, 2\n0 1 2\n0 1\n",
    "repeated column": b"1, 3, 2\n0 2\n1 1\n",
    "fourth line": b"2, 3, 2\n0 1 2\n0 1\n0 1\n",
}


@pytest.mark.parametrize("kind", BAD_SMTX)
def test_bad_smtx(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FormatError) as caught:
        load_layers(put(tmp_path, "layer.smtx", BAD_SMTX[kind]))
    assert "layer.smtx: layer" in caught.value.where


def test_archives_of_patterns(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "rn50.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rn50/0.9/a.smtx", smtx(weight))
        archive.writestr("rn50/0.9/b.smtx", smtx(weight.T))
        archive.writestr("dense.npy", npy(weight))
        archive.writestr("README", "hello")
    assert [layer.name for layer in load_layers(path)] == ["rn50/0.9/a", "rn50/0.9/b", "dense"]
    layer = one(f"{path}:rn50/0.9/b.smtx")
    assert layer.weight.pattern == as_sparse(weight.T).pattern
    assert layer.name == "rn50/0.9/b"
    with pytest.raises(FormatError, match=r"no such member.*rn50/0\.9/a\.smtx"):
        load_layers(f"{path}:c.smtx")
    with pytest.raises(UnsupportedError):
        load_layers(f"{path}:README")


# -- archives that lie


def zip_of(name: str, raw: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, raw)
    return stream.getvalue()


def test_archives_that_are_none(tmp_path: Path) -> None:
    whole = zip_of("w.npy", npy(np.ones((9, 9), np.float32)))
    for number, raw in enumerate([b"", b"PK\x03\x04" + bytes(100), bytes(1000), whole[:-4], whole[: len(whole) // 2]]):
        with pytest.raises(FormatError, match=f"{number}.npz"):
            load_layers(put(tmp_path, f"{number}.npz", raw))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_that_are_damaged(tmp_path: Path, method: int) -> None:
    raw = bytearray(zip_of("w.npy", npy(np.arange(90, dtype=np.float32).reshape(9, 10)), method))
    raw[150] ^= 0x55
    with pytest.raises(FormatError, match="w"):
        load_layers(put(tmp_path, "w.npz", bytes(raw)))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_whose_memory_is_not_bounded(tmp_path: Path, method: int) -> None:
    with pytest.raises(FormatError, match="compression method"):
        load_layers(put(tmp_path, "w.npz", zip_of("w.npy", npy(np.ones((9, 9), np.float32)), method)))


def test_encrypted_members(tmp_path: Path) -> None:
    raw = bytearray(zip_of("w.npy", npy(np.ones((9, 9), np.float32))))
    for mark, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        raw[raw.index(mark) + flags] |= 1
    with pytest.raises(FormatError, match="unpacked"):
        load_layers(put(tmp_path, "w.npz", bytes(raw)))


def test_zip_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    size = 2**27
    head = npy(np.zeros((0, 0), np.float32)).replace(b"(0, 0), }" + b" " * 16, b"(8192, 4096), }" + b" " * 10)
    assert len(head) == 128
    raw = zip_of("w.npy", head + bytes(size))
    assert len(raw) < size // 900
    path = put(tmp_path, "bomb.npz", raw)
    tracemalloc.start()
    with pytest.raises(FormatError, match="claim to unpack"):
        load_layers(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_member_that_unpacks_to_more_than_it_claims(tmp_path: Path) -> None:
    raw = bytearray(zip_of("w.npy", npy(np.zeros((999, 999), np.float32))))
    for mark, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<I", raw, raw.index(mark) + place, 128 + 4 * 9)
    path = put(tmp_path, "w.npz", bytes(raw))
    tracemalloc.start()
    with pytest.raises(FormatError):
        load_layers(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_sum_of_all_members_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: np.ndarray) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, **{f"w{k}": weight for k in range(8)})
    assert len(load_layers(path)) == 8
    monkeypatch.setattr(container, "MAX_BYTES", 7 * (weight.nbytes + 128))
    path.write_bytes(zip_many({f"w{k}.npy": npy(weight) for k in range(8)}))
    with pytest.raises(FormatError, match="claim to unpack"):
        load_layers(path)


def zip_many(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return stream.getvalue()


# -- paths and names


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    for name in ("missing.npz", "missing.tflite", "folder.npy", "nul\0.npy", "missing.zip:a.smtx"):
        with pytest.raises(FormatError, match=name.partition("\0")[0].partition(":")[0]):
            load_layers(f"{tmp_path}/{name}")
    with pytest.raises(UnsupportedError, match=r"\.pt.*\.npz"):
        load_layers(tmp_path / "model.pt")
    with pytest.raises(UnsupportedError, match="none"):
        load_layers(tmp_path / "model")


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs")
def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.npy")
    with pytest.raises(FormatError, match="no regular file"):
        load_layers(tmp_path / "w.npy")


def test_files_beyond_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    with path.open("wb") as stream:
        stream.truncate(container.MAX_BYTES + 1)  # a hole: no disk is used
    with pytest.raises(FormatError, match="more than"):
        load_layers(path)


def test_pick(weight: np.ndarray) -> None:
    names = ["net/conv2d/Conv2D", "net/conv2d_1/Conv2D", "net/conv2d_1/Conv2D#2", "pw1", "pw11"]
    layers = [Layer(name, as_sparse(weight)) for name in names]
    for text, expected in [("pw1", 3), ("conv2d", 0), ("conv2d/Conv2D", 0), ("net/conv2d_1/Conv2D", 1)]:
        assert pick(layers, text, "f") is layers[expected]
    with pytest.raises(UnsupportedError, match=r"no layer 'pw2'.*pw11"):
        pick(layers, "pw2", "f")
    assert pick(layers, "graph/pw11/MatMul", "f") is layers[4]
    with pytest.raises(UnsupportedError, match="2 layers"):
        pick(layers, "conv2d_1", "f")


# -- real files


def test_published_mobilenet(test_data: Path) -> None:
    layers = load_layers(test_data / "weights" / "mobilenet_v1_1.0_90.npz")
    assert [c.name for c in layers] == [*(f"pw{k}" for k in range(12)), "fc"]
    for layer in layers[1:-1]:
        assert layer.weight.pattern.density == pytest.approx(0.1, abs=0.002)
    assert all(layer.bias is not None for layer in layers)


def test_published_resnet_filters(test_data: Path) -> None:
    layers = load_layers(test_data / "weights" / "resnet50_3x3.npz")
    assert [c.weight.shape for c in layers] == [(64, 576), (128, 1152), (256, 2304)] * 2
    for layer, density in zip(layers, [0.0902] * 3 + [0.04] * 3, strict=True):
        assert layer.weight.pattern.density == pytest.approx(density, abs=2e-4)


def test_published_patterns(test_data: Path) -> None:
    layers = load_layers(test_data / "dlmc" / "rn50__magnitude_pruning__0.95.zip")
    assert len(layers) == 54
    member = f"{test_data}/dlmc/rn50__magnitude_pruning__0.95.zip:{layers[5].name}.smtx"
    assert one(member).weight.pattern == layers[5].weight.pattern
