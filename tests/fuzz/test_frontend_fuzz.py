"""Mutated weight files: whatever the bytes, a reader returns valid layers or raises an error of ours, in little memory.

Every mutant is seeded by its number, so a failure names the one to look at.
"""

from __future__ import annotations

import functools
import io
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sparsert.errors import SparseRTError
from sparsert.frontend.weights import load_layers
from sparsert.sparsity.pattern import from_csr
from tflite_writer import DEQUANTIZE, FULLY_CONNECTED, Network, encode

QUICK, FULL = 300, 4000  # mutants of each seed file
MEMORY = 2**23  # bytes that a reader of a few kilobytes may use at any time
WORDS = np.array([0, 1, 2, 4, 7, 8, 127, 128, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1])


def _weight(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * 1000 + cols)
    mask = rng.random((rows, cols)) < 0.4
    return np.where(mask, rng.standard_normal((rows, cols)), 0).astype(np.float32), mask


@functools.cache
def tflite_net() -> bytes:
    """Several layers in every encoding: half and single precision, blocks, an unusual order, dense storage."""
    net = Network()
    weight, mask = _weight(8, 6)
    net.conv("a/conv", weight.astype(np.float16), mask, np.ones(8, np.float16), activation=3, stride=2)
    net.conv("b/conv", weight, mask, np.ones(8, np.float32), index_type="int32")
    parameters, values = encode(weight, mask, [1, 0, 2, 3], [True, False, False, False], [(0, 4), (1, 2)])
    stored = net.tensor("blocks", weight.shape, "float32", values, parameters)
    net.operator(FULLY_CONNECTED, [net.tensor("x", (2, 6)), stored, -1], [net.tensor("y", (2, 8))])
    half = net.tensor("half", weight.shape, "float16", weight.astype(np.float16))
    net.operator(FULLY_CONNECTED, [0, net.through(DEQUANTIZE, half)], [net.tensor("y", (2, 8))], (8, {}))
    return net.pack()


def npy_file() -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, _weight(9, 5)[0])
    return stream.getvalue()


def smtx_file() -> bytes:
    _, mask = _weight(12, 10)
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
    lines = [f"12, 10, {mask.sum()}", " ".join(map(str, indptr)), " ".join(map(str, np.nonzero(mask)[1]))]
    return "\n".join(lines).encode()


def npz_members(scipy_form: str = "") -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``: a CSR group and a dense layer, or one matrix as SciPy saves it."""
    weight, mask = _weight(6, 8)
    rows, columns = np.nonzero(mask)
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
    parts = {
        "data": weight[mask],
        "indices": columns.astype(np.uint16),
        "indptr": indptr,
        "shape": np.array(mask.shape),
    }
    if scipy_form == "csc":
        parts["shape"] = parts["shape"][::-1]
    elif scipy_form == "coo":
        parts = {"row": rows, "col": columns, "data": weight[mask], "shape": np.array(mask.shape)}
    elif scipy_form == "bsr":
        blocks = weight.reshape(3, 2, 4, 2).transpose(0, 2, 1, 3).reshape(12, 2, 2)
        parts = {
            "data": blocks,
            "indices": np.tile(np.arange(4), 3),
            "indptr": np.arange(4) * 4,
            "shape": np.array([6, 8]),
        }
    if scipy_form:
        return parts | {"format": np.array(scipy_form.encode())}
    return {f"pw.{name}": array for name, array in parts.items()} | {"pw.b": np.ones(6), "fc.w": weight}


def pack(arrays: dict[str, np.ndarray], rng: np.random.Generator | None = None) -> bytes:
    """An ``.npz``. With ``rng``, one member is mutated before it is packed: past the checksum, which hides damage."""
    stream = io.BytesIO()
    victim = rng.integers(len(arrays)) if rng else -1
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, array) in enumerate(arrays.items()):
            member = io.BytesIO()
            np.lib.format.write_array(member, array)
            raw = member.getvalue()
            archive.writestr(f"{name}.npy", mutate(raw, rng) if rng and number == victim else raw)
    return stream.getvalue()


def mutate(raw: bytes, rng: np.random.Generator) -> bytes:
    """One to four edits: bits, bytes, words, digits, cuts, repeats, moves."""
    data = bytearray(raw)
    for _ in range(int(rng.integers(1, 5))):
        size = len(data)
        if size < 8:
            break
        at, kind = int(rng.integers(size)), int(rng.integers(9))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, *b"0 9-.,\n"]))
        elif kind in (2, 3, 4):
            at = min(at & ~3, size - 4)
            word = int(rng.choice(WORDS))
            if kind == 4:  # close to what is there: offsets and counts that are nearly right
                word = (int.from_bytes(data[at : at + 4], "little") + int(rng.integers(-8, 9))) % 2**32
            data[at : at + 4] = word.to_bytes(4, "little")
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 7:
            data[at:at] = data[at : at + int(rng.integers(1, 65))]
        else:
            source = int(rng.integers(size))
            piece = data[source : source + int(rng.integers(1, 17))]
            data[at : at + len(piece)] = piece
    return bytes(data)


SEEDS: dict[str, Callable[[np.random.Generator | None], bytes]] = {
    "net.tflite": lambda rng: mutate(tflite_net(), rng) if rng else tflite_net(),
    "layer.npy": lambda rng: mutate(npy_file(), rng) if rng else npy_file(),
    "layer.smtx": lambda rng: mutate(smtx_file(), rng) if rng else smtx_file(),
    "archive.npz": lambda rng: mutate(pack(npz_members()), rng) if rng else pack(npz_members()),
    "groups.npz": lambda rng: pack(npz_members(), rng),
    **{f"{form}.npz": lambda rng, form=form: pack(npz_members(form), rng) for form in ("csr", "csc", "coo", "bsr")},  # type: ignore[misc]
}


def check(path: Path, limit: int = MEMORY) -> bool:
    """Read a file; True when it has layers, which are then valid, False when it was refused by an error of ours."""
    tracemalloc.reset_peak()
    try:
        layers = load_layers(path)
    except SparseRTError as error:
        assert path.stem in error.where, f"the error does not name the file: {error}"  # noqa: PT017
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < limit, f"{peak} bytes were used"
    assert layers
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        pattern = layer.weight.pattern
        again = from_csr(layer.weight.values, pattern.indices, pattern.indptr, pattern.shape)
        assert again.pattern == pattern
        assert layer.bias is None or layer.bias.shape == (pattern.rows,)
        assert layer.columns is None or layer.columns > 0
    return True


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def run(folder: Path, name: str, count: int, seed: int) -> None:
    path = folder / name
    path.write_bytes(SEEDS[name](None))
    assert check(path), "the seed file is valid"
    refused = 0
    for number in range(count):
        raw = SEEDS[name](np.random.default_rng([seed, number]))
        path.write_bytes(raw)
        try:
            refused += not check(path)
        except Exception as error:
            error.add_note(f"mutant {number} of {name} with --seed {seed}")
            raise
    assert 0 < refused, "no mutant was damaged enough to be refused"


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("name", SEEDS)
def test_mutants(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    run(tmp_path, name, QUICK, request.config.getoption("--seed"))


@pytest.mark.full
@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("name", SEEDS)
def test_many_mutants(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    run(tmp_path, name, FULL, request.config.getoption("--seed") + 1)


@pytest.mark.full
@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("name", ["pose_detection.tflite", "face_detection_full_range_sparse.tflite"])
def test_mutants_of_published_nets(test_data: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    """Edits among the tables (behind the buffers' data lies nothing to get wrong but values)."""
    raw = (test_data / "models" / name).read_bytes()
    path = tmp_path / "net.tflite"
    for number in range(400):
        rng = np.random.default_rng([request.config.getoption("--seed"), number])
        data = bytearray(raw)
        for at in rng.integers(len(raw) - 4, size=int(rng.integers(1, 200))) & ~3:
            data[at : at + 4] = int(rng.choice(WORDS)).to_bytes(4, "little")
        path.write_bytes(data)
        check(path, 64 * len(raw))
