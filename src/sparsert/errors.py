"""Every error a user can meet: what happened, where, and what to do about it.

An error has a short stable ``code`` (for logs and tests), a ``where`` (the argument, file, layer or operator it is
about) and a ``hint`` (the next step for the reader).  User mistakes never surface as ``AssertionError``.
"""

from __future__ import annotations

from typing import ClassVar


class SparseRTError(Exception):
    """Base of all errors that SparseRT raises on purpose."""

    code: ClassVar[str] = "sparsert"

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        place = f"{where}: " if where else ""
        advice = f"{'' if what.endswith(('.', '!', '?')) else '.'} {hint}" if hint else ""
        super().__init__(f"[{self.code}] {place}{what}{advice}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(cls: type[SparseRTError], what: str, where: str, hint: str) -> SparseRTError:
    return cls(what, where=where, hint=hint)


class ShapeError(SparseRTError, ValueError):
    """An array has the wrong rank or extent."""

    code = "shape"


class DTypeError(SparseRTError, TypeError):
    """An array has an element type that the operator does not take."""

    code = "dtype"


class ValueRangeError(SparseRTError, ValueError):
    """A value lies outside what is meaningful: non-finite weights, a sparsity of 130 %, sizes that overflow."""

    code = "range"


class AliasError(SparseRTError, ValueError):
    """Two buffers overlap that must not."""

    code = "alias"


class FormatError(SparseRTError, ValueError):
    """A file, or a sparse matrix handed over in memory, is malformed."""

    code = "format"


class MissingDependencyError(SparseRTError, ImportError):
    """An optional package is needed and not installed."""

    code = "dependency"


class UnsupportedError(SparseRTError, ValueError):
    """A name (activation, precision, baseline, problem) that SparseRT does not know."""

    code = "unsupported"


class PatternMismatchError(SparseRTError, ValueError):
    """New weights have a nonzero outside the pattern that was compiled."""

    code = "pattern"


class ScheduleError(SparseRTError, ValueError):
    """A schedule is illegal for its task or its target."""

    code = "schedule"


class CodeBudgetError(SparseRTError, ValueError):
    """The generated code would exceed the permitted number of bytes."""

    code = "code-budget"


class TargetUnavailableError(SparseRTError, RuntimeError):
    """This machine cannot execute code for the requested target."""

    code = "target"


class ExecutableMemoryError(SparseRTError, RuntimeError):
    """The operating system refuses executable memory."""

    code = "exec-memory"


class InternalError(SparseRTError, RuntimeError):
    """A broken invariant inside SparseRT: always a bug of ours."""

    code = "internal"


class TuningWarning(UserWarning):
    """The records of tuning cannot be read or written, or hold lines that are none. Nothing fails for that."""
