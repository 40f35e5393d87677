"""Drawn convolutions of every kind on guarded arrays: ``python tests/fuzz/convolution_cases.py --count 1000``.

Of images, along one axis, transposed; unrolled, looped over the pattern, on several threads and under drawn schedules,
which must all give the same bits; compared with PyTorch in float64 where it is installed, else with NumPy. Some cases
ask for what cannot be, and must be refused with an error of ours.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsert
from fuzz.guard import Buffers, Outcome, campaign, guarded
from fuzz.guard_convolutions import finished
from oracle import ACTIVATIONS, F64, same_bits
from sparsert import Schedule, convolution
from sparsert.errors import CodeBudgetError, ShapeError, SparseRTError
from sparsert.operators import images, looped_conv
from sparsert.schedule import cost
from unit.test_convolution import close, convolve, drawn, pruned, transpose

Array = NDArray[np.float32]
KINDS = ("images", "images", "images", "line", "transposed", "transposed")
ABSURD: tuple[dict[str, Any], ...] = (
    {"stride": 0}, {"stride": (1, -1)}, {"stride": 1.5}, {"padding": -1}, {"padding": 1 << 21}, {"padding": "valid"},
    {"padding": ((1, 1), (1, -1))}, {"padding": None}, {"dilation": 0}, {"dilation": 1 << 19},
    {"dilation": (1 << 23, 1)},
    {"groups": 0}, {"groups": 1 << 10}, {"groups": True}, {"groups": 2.0}, {"threads": 0}, {"max_code_bytes": 10},
    {"max_code_bytes": -1}, {"residual": "around"}, {"activation": "exp"}, {"schedule": "fast"}, {"tune": "slow"},
    {"schedule": Schedule(4), "tune": "fast"}, {"size": 0, "tuning": "off"}, {"size": (1, 2, 3), "tuning": "off"},
    {"bias": np.ones(1 << 10, np.float32)}, {"bias": np.full(7, np.nan, np.float32)}, {"precision": "f64"},
    {"stride": 1 << 20, "kind": "transposed"}, {"output_padding": 9, "kind": "transposed"},
    {"padding": "same_upper", "kind": "transposed"}, {"output_padding": -1, "kind": "transposed"},
)  # fmt: skip
"""Added to a valid case, each of these cannot be. (A dilation only where the kernel has several places.)"""


def case(rng: np.random.Generator) -> dict[str, Any]:
    """The parameters of a convolution."""
    c = drawn(rng) | {"kind": str(rng.choice(KINDS))}
    c["activation"] = str(rng.choice([name for name in ACTIVATIONS if name])) if rng.random() < 0.4 else None
    wide = rng.random()
    if wide < 0.08:  # kernels far larger than images, or images that are nearly all padding
        c["pads"] = tuple(tuple(int(n) for n in rng.integers(0, 60, 2)) for _ in range(2))
        c["dilation"] = tuple(int(n) for n in rng.integers(1, 25, 2))
        c["size"] = tuple(int(n) for n in rng.integers(1, 12, 2))
    elif wide < 0.12:
        c["kernel"] = tuple(int(n) for n in rng.integers(5, 14, 2))
    elif wide < 0.15:
        c["density"] = 0.0
    if c["kind"] == "line":
        c["kernel"], c["stride"], c["dilation"], c["pads"] = (
            (1, c["kernel"][1]), (1, c["stride"][1]), (1, c["dilation"][1]), ((0, 0), c["pads"][1])
        )  # fmt: skip
        c["size"] = 1, int(c["size"][1] * rng.integers(1, 8))
    if c["kind"] == "transposed":
        c["pads"] = tuple((side[0],) * 2 for side in c["pads"])
        c["extra"] = tuple(int(rng.integers(max(a, b))) for a, b in zip(c["stride"], c["dilation"], strict=True))
        c["size"] = tuple(min(n, 14) for n in c["size"])
    return c


def weight_of(c: dict[str, Any], rng: np.random.Generator) -> Array:
    """In the form that the compile function of its kind takes."""
    each = (c["inputs"], c["outputs"]) if c["kind"] == "transposed" else (c["outputs"], c["inputs"])
    w = pruned(rng, (each[0], each[1] // c["groups"], *c["kernel"]), c["density"])
    return w[:, :, 0] if c["kind"] == "line" else w


def compiler(c: dict[str, Any]) -> Callable[..., Any]:
    """The compile function, all geometry given."""
    options = {"stride": c["stride"], "dilation": c["dilation"], "groups": c["groups"], "padding": c["pads"]}
    kinds: dict[str, Callable[..., Any]] = {
        "images": sparsert.compile_conv2d, "line": sparsert.compile_conv1d,
        "transposed": sparsert.compile_conv_transpose2d,
    }  # fmt: skip
    if c["kind"] == "line":
        options |= {"stride": c["stride"][1], "dilation": c["dilation"][1], "padding": c["pads"][1]}
    if c["kind"] == "transposed":
        options |= {"output_padding": c["extra"]}
    return lambda *a, **more: kinds[c["kind"]](*a, **(options | more))


def expected(c: dict[str, Any], x: Any, w: Any) -> tuple[F64, F64] | None:
    """The result in float64 and its sum of magnitudes; None where there is none."""
    if c["kind"] == "line":
        x, w = x[:, :, None], w[:, :, None]
    pads = tuple(side[0] for side in c["pads"])
    if c["kind"] == "transposed":
        axes = zip(x.shape[2:], c["stride"], c["dilation"], c["kernel"], c["extra"], pads, strict=True)
        extents = [(n - 1) * s + d * (k - 1) + 1 + e - 2 * p for n, s, d, k, e, p in axes]
        if min(extents) < 1:
            return None
    elif any(n + sum(p) < (k - 1) * d + 1 for n, p, k, d in
             zip(x.shape[2:], c["pads"], c["kernel"], c["dilation"], strict=True)):  # fmt: skip
        return None
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        both = []
        for a, v in ((x, w), (np.abs(x), np.abs(w))):
            image, weight = (torch.from_numpy(np.ascontiguousarray(n)).double() for n in (a, v))
            if c["kind"] == "transposed":
                y = torch.nn.functional.conv_transpose2d(image, weight, None, c["stride"], pads, c["extra"],
                                                         c["groups"], c["dilation"])  # fmt: skip
            else:
                (top, bottom), (left, right) = c["pads"]
                image = torch.nn.functional.pad(image, (left, right, top, bottom))
                y = torch.nn.functional.conv2d(image, weight, None, c["stride"], 0, c["dilation"], c["groups"])
            both.append(y.numpy())
        want, magnitude = both
    elif c["kind"] == "transposed":
        want, magnitude = (transpose(a, v, c["stride"], pads, c["extra"], c["dilation"], c["groups"])
                           for a, v in ((x, w), (np.abs(x), np.abs(w))))  # fmt: skip
    else:
        want, magnitude = convolve(x, w, c["stride"], c["pads"], c["dilation"], c["groups"])
    return (want[:, :, 0], magnitude[:, :, 0]) if c["kind"] == "line" else (want, magnitude)


@contextmanager
def shared_out(threads: int) -> Iterator[dict[str, Any]]:
    """Options of an operator whose every call is shared out, however little there is to do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "LEAST_SHARE", 1)
        patch.setattr(images, "_LEAST_COLUMNS", 3)
        yield {"threads": threads}


@contextmanager
def looped(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Options of an operator that loops over its pattern, in bands of any size."""

    def refuse(*_: Any) -> Any:
        raise CodeBudgetError("as if unrolled code were too large", where="max_code_bytes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "build", refuse)
        patch.setattr(looped_conv, "_PLANES", int(rng.choice([100, 3000, 1 << 20])))
        yield {"threads": 1}


@contextmanager
def scheduled(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    yield {"threads": 1, "schedule": Schedule(
        int(rng.integers(1, 8)), int(rng.choice([0, 0, 5, 40])), int(rng.integers(0, 4)), int(rng.integers(0, 3)),
        str(rng.choice(["none", "ahead", "beside"])), str(rng.choice(["natural", "count", "overlap"])),
    )}  # fmt: skip


def run_case(seed: int, number: int, targets: Sequence[str], note: Callable[[Any], None] = lambda _: None) -> Outcome:
    """One drawn case on one of ``targets``."""
    rng = np.random.default_rng([seed, number])
    c, target = case(rng), str(rng.choice(targets))
    name = f"seed {seed}, number {number}, {target}, {c}"
    note(name)
    if rng.random() < 0.06:
        return absurd(c, target, name, rng)
    w = weight_of(c, rng)
    shape = (c["images"], c["inputs"], *c["size"][-1 if c["kind"] == "line" else 0 :])
    bias = rng.standard_normal(c["outputs"]).astype(np.float32) if c["bias"] else None
    compile_, buffers = compiler(c), Buffers()
    ways = [("threads", shared_out(int(rng.integers(2, 5)))), ("looped", looped(rng)), ("schedule", scheduled(rng))]
    chosen = [way for way in ways if rng.random() < 0.5]
    problems, results, counted = list[str](), list[Array](), [c["kind"], target]
    with guarded(buffers):
        x = _placed(buffers, "x", shape, rng)
        x[...] = rng.standard_normal(shape)
        special = rng.random() < 0.08
        if special and x.size:  # what multiplies them depends on the pattern alone: bits are compared, values are not
            flat = rng.integers(x.size, size=3)
            x[np.unravel_index(flat, shape)] = [np.nan, np.inf, -np.inf]
        wanted = expected(c, np.zeros(shape, np.float32) if special else x, w)
        settings: dict[str, Any] = {"activation": c["activation"], "residual": c["residual"], "target": target}
        if wanted is None:
            op = compile_(w, bias, **settings)
            try:
                op(x)
            except ShapeError:
                return Outcome([], name, [*counted, "nothing left of y"])
            return Outcome(["no error, though there is no output"], name, [])
        r = None
        if c["residual"]:
            r = _placed(buffers, "residual", wanted[0].shape, rng)
            r[...] = rng.standard_normal(r.shape)
        out = _placed(buffers, "out", wanted[0].shape, rng)
        parts = [*wanted, r] if c["kind"] != "line" else [None if a is None else a[:, :, None] for a in (*wanted, r)]
        want, size = finished(parts[0], parts[1], bias, c["activation"], c["residual"], parts[2])
        terms = int(np.prod(w.shape[1:] if c["kind"] != "transposed" else (w.shape[0], *w.shape[2:]))) + 2
        for kind, way in [("one thread", shared_out(1)), *chosen]:
            with way as options:
                op = compile_(w, bias, **settings, **options)
                for _ in range(2):
                    out[...] = -7e33
                    op(x, out=out, residual=r)
                    results.append(np.array(out))
            if not same_bits(results[-1], results[0]) or not same_bits(results[-2], results[0]):
                problems.append(f"{kind}: other bits")
            counted.append(kind)
        y = results[0][:, :, None] if c["kind"] == "line" else results[0]
        if not special and not close(y, want, size, terms):
            problems.append("wrong")
        if r is not None and rng.random() < 0.5:  # and a residual that is y itself
            r_copy = r.copy()
            out[...] = r_copy
            problems += ["residual in place: other bits"] * (not same_bits(op(x, out=out, residual=out), results[0]))
    problems += buffers.complaints()
    if not buffers.internal():
        problems.append("no buffer of the package's own was guarded")
    return Outcome(problems, name, counted)


def absurd(c: dict[str, Any], target: str, name: str, rng: np.random.Generator) -> Outcome:
    """Something that cannot be must be refused when it is compiled, by an error of ours."""
    change = dict(ABSURD[int(rng.integers(len(ABSURD)))])
    c["kind"] = change.pop("kind", c["kind"])
    c |= {"extra": (0, 0), "density": 1.0}
    if change.get("dilation", 0) != 0:
        c["kernel"] = 3, 3
        change["dilation"] = change["dilation"] if c["kind"] != "line" else 1 << 23
    if c["kind"] == "line":
        c["kernel"], c["size"] = (1, c["kernel"][1]), (1, c["size"][1])
        change = {"stride": 0} if set(change) <= {"padding", "size", "tuning"} else change
    if c["kind"] == "transposed":
        c["pads"] = tuple((side[0],) * 2 for side in c["pads"])
    try:
        compiler(c)(weight_of(c, rng), **{"target": target, **change})
    except SparseRTError:
        return Outcome([], name, [c["kind"], target, "refused"])
    except BaseException as error:  # whatever else it is, it is wrong
        return Outcome([f"{change}: {type(error).__name__}: {error}"], name, [])
    return Outcome([f"{change} was compiled"], name, [])


def _placed(buffers: Buffers, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """An array at a guard page, rows, channels and images perhaps apart."""
    strides, step = [4], 4
    for axis, extent in enumerate(reversed(shape[1:])):
        step = step * extent + int(rng.choice([0, 0, 4, 12] if axis == 0 else [0, 0, 8]))
        strides.insert(0, step)
    return buffers.array(name, shape, tuple(strides), at_end=bool(rng.random() < 0.6))


def main() -> int:
    with contextlib.suppress(ImportError):
        import_module("torch")
    return campaign(run_case)


if __name__ == "__main__":
    sys.exit(main())
