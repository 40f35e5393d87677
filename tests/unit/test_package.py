"""The package as a whole: version, errors, what an import costs, the command line's manners, and its contracts."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest

import sparsert
from sparsert import errors
from sparsert.cli import info
from sparsert.cli import main as cli

ROOT = Path(__file__).parents[2]
ERRORS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.SparseRTError)]
SUBERRORS = [c for c in ERRORS if c is not errors.SparseRTError]


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


# -- the distribution


def test_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", sparsert.__version__)
    assert version("sparsert") == sparsert.__version__


def test_changelog_knows_the_version() -> None:
    assert f"## [{sparsert.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_typed_and_documented() -> None:
    assert files("sparsert").joinpath("py.typed").is_file()
    for name in sparsert.__all__:
        assert hasattr(sparsert, name), name


def test_core_dependencies_stay_three() -> None:
    required = [r for r in metadata("sparsert").get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert {re.split(r"[^\w-]", r)[0] for r in required} == {"numpy", "rich", "platformdirs"}


def test_dependencies_have_lower_bounds_only() -> None:
    for requirement in metadata("sparsert").get_all("Requires-Dist") or []:
        assert not re.search(r"[<~!]|(?<![=><])==", requirement.partition(";")[0]), requirement


@pytest.mark.parametrize("path", sorted((ROOT / "src/sparsert").rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_every_folder_says_what_lives_there(path: Path) -> None:
    assert path.read_text().startswith('"""')


# -- errors


@pytest.mark.parametrize("error", ERRORS, ids=lambda c: c.__name__)
def test_error_has_code_and_doc(error: type[errors.SparseRTError]) -> None:
    assert re.fullmatch(r"[a-z][a-z-]*", error.code)
    assert error.__dict__.get("__doc__"), "says when it is raised"
    raised = error("what happened", where="argument x", hint="Do this.")
    assert str(raised) == f"[{error.code}] argument x: what happened. Do this."
    assert str(error("what happened")) == f"[{error.code}] what happened"


@pytest.mark.parametrize("error", ERRORS, ids=lambda c: c.__name__)
def test_error_survives_a_process_boundary(error: type[errors.SparseRTError]) -> None:
    raised = error("what", where="where", hint="hint")
    again = pickle.loads(pickle.dumps(raised))
    assert type(again) is error
    assert (again.what, again.where, again.hint, str(again)) == ("what", "where", "hint", str(raised))


def test_error_codes_are_unique() -> None:
    assert len(SUBERRORS) >= 10
    assert len({error.code for error in ERRORS}) == len(ERRORS)


def test_errors_are_also_the_builtin_kind() -> None:
    for error in SUBERRORS:
        assert issubclass(error, (ValueError, TypeError, RuntimeError, ImportError)), error


# -- imports

LEAN = ["scipy", "torch", "onnx", "onnxruntime", "openvino", "tflite", "mkl", "matplotlib", "threadpoolctl", "rich"]


@pytest.mark.parametrize("statement", ["import sparsert", "import sparsert.cli.main, sparsert.cli.info"])
def test_import_touches_nothing_heavy(statement: str) -> None:
    done = python("-c", f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')")
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "sparsert" in loaded
    assert not set(LEAN) & set(loaded)


def test_info_does_not_import_the_peers() -> None:
    done = python(
        "-c", "import sys; from sparsert.cli.main import main; main(['info']); print(*sys.modules, file=sys.stderr)"
    )
    assert done.returncode == 0, done.stderr
    assert not set(info.PEERS) & set(done.stderr.split())


def test_import_contracts_name_what_exists() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c for c in config["contracts"] if c["type"] == "layers")["layers"]
    names = {name.strip() for layer in layers for name in re.split(r"[|:]", layer)}
    optional = {name.strip("()") for name in names if name.startswith("(")}  # import-linter's mark for "may be absent"
    required = {name for name in names if not name.startswith("(")}
    package = ROOT / "src/sparsert"
    here = {p.stem for p in package.iterdir() if (p / "__init__.py").is_file() or p.suffix == ".py"} - {"__init__"}
    assert required <= here, "a layer names a module that does not exist"
    assert here <= required | optional, "a module has no layer"


# -- the command line


def use_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Make ``sparsert info`` run a function of ours."""

    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        subparsers.add_parser("info").set_defaults(run=run)

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(add_parser=add_parser))


def raising(error: BaseException) -> object:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_version_flag() -> None:
    done = python("-m", "sparsert.cli.main", "--version")
    assert (done.returncode, done.stdout) == (0, f"sparsert {sparsert.__version__}\n")


def test_help_lists_every_command() -> None:
    done = python("-m", "sparsert.cli.main", "--help")
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert re.search(rf"^ +{name} +\S", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["info", "--frobnicate"]])
def test_wrong_command_line_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: sparsert" in capsys.readouterr().err


@pytest.mark.parametrize("error", SUBERRORS, ids=lambda c: c.__name__)
def test_an_error_is_a_message_and_exit_code_2(
    error: type[errors.SparseRTError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_command(monkeypatch, raising(error("what", where="place", hint="Do this.")))
    assert cli.main(["info"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"sparsert: error: [{error.code}] place: what. Do this.\n")


def test_a_missing_file_is_a_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_command(monkeypatch, raising(FileNotFoundError(2, "No such file or directory", "gone.npz")))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "sparsert: error: gone.npz: No such file or directory\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_command(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "sparsert: interrupted\n"


def test_a_reader_gone_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", "sparsert.cli.main", "info", "--json"],
                              stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_info_json() -> None:
    done = python("-m", "sparsert.cli.main", "info", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sparsert"] == sparsert.__version__
    assert report["targets"]["reference"] is None, "the NumPy target runs everywhere"
    assert report["threads"] >= 1
    assert report["native"] is None or report["targets"][report["native"]] is None, "native names one that runs"
    assert set(report["peers"]) == set(info.PEERS)


def test_info_table() -> None:
    done = python("-m", "sparsert.cli.main", "info", env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    for text in (sparsert.__version__, "reference", *info.PEERS):
        assert text in done.stdout
