"""What every test may rely on: seeds, test data, golden files, and skips with a reason where something is missing."""

from __future__ import annotations

import ctypes.util
import os
import random
import shutil
import zlib
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# The fast and the full tier draw the same examples every time; deadlines would be timing in tests.
settings.register_profile("sparsert", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("sparsert")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsert")
    group.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what is generated now")
    group.addoption("--seed", type=int, default=0, help="draw other random inputs in every test (default 0)")


def pytest_report_header(config: pytest.Config) -> str:
    data = os.environ.get("SPARSERT_TEST_DATA", "not set (tests on real weights skip)")
    return f"seed: {config.getoption('--seed')}, SPARSERT_TEST_DATA: {data}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, a test whose markers name what this machine lacks."""
    for marker in item.iter_markers("peers"):
        missing = [name for name in marker.args if not is_installed(name)]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")
    for marker in item.iter_markers("tools"):
        missing = [name for name in marker.args if shutil.which(name) is None]
        if missing:
            pytest.skip(f"not found on PATH: {', '.join(missing)}")
    for marker in item.iter_markers("isa"):
        for target in marker.args:
            reason = why_not(target)
            if reason:
                pytest.skip(f"{target}: {reason}")
    if item.get_closest_marker("gpu") and ctypes.util.find_library("cuda") is None:
        pytest.skip("no CUDA driver on this machine")


def is_installed(name: str) -> bool:
    """Whether a module or a distribution (mkl has libraries only) is there; nothing is imported."""
    return find_spec(name) is not None or any(distributions(name=name))


def why_not(target: str) -> str | None:
    """Why this machine cannot execute code for ``target``; None where it can."""
    from sparsert.runtime.host import host_report

    targets = host_report()["targets"]
    if target not in targets:
        raise pytest.UsageError(f"marker isa names an unknown target {target!r}; known: {', '.join(targets)}")
    reason: str | None = targets[target]
    return reason


def _seed_of(request: pytest.FixtureRequest) -> list[int]:
    """A test's own seed: the same in every process and order, another one for each --seed."""
    return [request.config.getoption("--seed"), zlib.crc32(request.node.nodeid.encode())]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(_seed_of(request))


@pytest.fixture(autouse=True)
def _global_seeds(request: pytest.FixtureRequest) -> None:
    """Global generators too, for what draws from them unasked."""
    random.seed(repr(_seed_of(request)))
    np.random.seed(_seed_of(request))  # noqa: NPY002


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real weights and models that SPARSERT_TEST_DATA names."""
    name = os.environ.get("SPARSERT_TEST_DATA")
    if not name:
        pytest.skip("SPARSERT_TEST_DATA is not set: no real weights to test with")
    folder = Path(name)
    if not folder.is_dir():
        raise pytest.UsageError(f"SPARSERT_TEST_DATA={name} is no folder")
    return folder


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))
