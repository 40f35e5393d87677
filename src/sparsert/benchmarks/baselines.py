"""The table of baselines: what each is, what it was allowed, and the packages it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

from ..errors import MissingDependencyError, UnsupportedError
from . import environment
from .dense_peers import numpy_forms, torch_forms
from .engine_peers import onnxruntime_forms, openvino_forms
from .peers import Candidate, Form, Prepared, WrongResultError, bind
from .sparse_peers import mkl_forms, scipy_forms, torch_csr_forms


@dataclass(frozen=True)
class Baseline:
    """A peer.

    Attributes:
        name: as in ``--baseline``.
        title: as in tables and charts.
        packages: distributions it needs, as pip names them.
        allowed: what it was allowed to do before and during timing.
        forms: the products it offers at a number of threads, imported on call.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    allowed: str
    forms: Callable[[int], list[Form]]


ENGINES = "one-node graphs, constant weights, bound tensors"
_ROWS = (
    Baseline(
        "numpy", "NumPy", ("numpy",), "np.matmul with NumPy's BLAS into out=; a transposed copy of W is made before",
        numpy_forms),
    Baseline(
        "torch", "torch", ("torch",), "torch.mm into out=, linear, conv2d (MKL, oneDNN), prepacked weights",
        torch_forms),
    Baseline(
        "onnxruntime", "ONNX Runtime", ("onnxruntime", "onnx"), f"{ENGINES}, all graph optimisations and prepacking",
        onnxruntime_forms),
    Baseline(
        "openvino", "OpenVINO", ("openvino",), f"{ENGINES}, f32 precision hint; its default precision as an extra",
        openvino_forms),
    Baseline("scipy", "SciPy CSR", ("scipy",), "csr_array @ X, always one thread, allocates its result", scipy_forms),
    Baseline("torch_csr", "torch CSR", ("torch",), "torch.mm of a sparse_csr_tensor into out=", torch_csr_forms),
    Baseline(
        "mkl", "MKL sparse", ("mkl",), "mkl_sparse_s_mm after set_mm_hint and optimize, both orders of X", mkl_forms),
)  # fmt: skip
BASELINES: dict[str, Baseline] = {row.name: row for row in _ROWS}


class Selection(NamedTuple):
    """The baselines to run with their loaded forms, and a sentence for each one that is skipped."""

    forms: dict[str, list[Form]]
    skipped: dict[str, str]


def select(names: Sequence[str] | None, threads: int) -> Selection:
    """Load the baselines of ``names``; None means every one that can run here.

    Raises:
        UnsupportedError: a name is unknown.
        MissingDependencyError: one that was asked for by name cannot run here.
    """
    unknown = [name for name in names or () if name not in BASELINES]
    if unknown:
        raise UnsupportedError(
            f"unknown baseline {unknown[0]!r}", where="baseline", hint=f"Known: {', '.join(BASELINES)}."
        )
    selection = Selection({}, {})
    for name in BASELINES if names is None else names:
        row = BASELINES[name]
        reason = obstacle(row, threads)
        if not reason:
            try:
                selection.forms[name] = row.forms(threads)
            except (ImportError, OSError, AttributeError) as error:  # installed, but broken or of a foreign version
                reason = f"it cannot be loaded ({type(error).__name__}: {str(error)[:200]})"
        if reason and names is not None:
            raise MissingDependencyError(f"baseline {name!r} cannot run: {reason}", where="baseline",
                                         hint=f"pip install {' '.join(row.packages)}")  # fmt: skip
        if reason:
            selection.skipped[name] = reason
    environment.pin_threads(threads)
    return selection


def obstacle(baseline: Baseline, threads: int) -> str:
    """Why ``baseline`` cannot run here, or an empty string. Looks at installed metadata only; nothing is imported."""
    missing = [package for package in baseline.packages if version(package) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if baseline.name == "numpy" and not environment.can_pin_blas(threads):
        return f"its threads cannot be set to {threads}: install threadpoolctl, or set OPENBLAS_NUM_THREADS beforehand"
    return ""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def prepare(name: str, forms: Sequence[Form], prepared: Prepared) -> tuple[list[Candidate], list[str]]:
    """Bind every form that suits the problem; one that fails or computes something else is dropped, with a sentence."""
    candidates, dropped = [], []
    for form in forms:
        if prepared.problem.kind not in form.kinds:
            continue
        try:
            candidates.append(bind(form, name, prepared))
        except WrongResultError as error:
            dropped.append(f"{name} {form.name}: wrong result, not timed ({error})")
        except Exception as error:
            if form.role == "ours":
                raise
            dropped.append(f"{name} {form.name}: failed, not timed ({type(error).__name__}: {str(error)[:200]})")
    return candidates, dropped
