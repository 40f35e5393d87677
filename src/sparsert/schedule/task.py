"""One linear layer to be compiled: its pattern and everything fixed at compile time around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..sparsity.pattern import Pattern
from ..sparsity.taps import Taps, Window, conv_taps, matmul_taps

LAYOUTS = ("row_major", "tile_major", "transposed")
"""x to y: (K, N) to (M, N); (T, K, lanes) to (T, M, lanes) for the target's lanes; (N, K) to (N, M) as in torch."""


@dataclass(frozen=True)
class Task:
    """``y = act(W @ x + b)``, with a residual added ``"before"`` or ``"after"`` the activation.

    ``activation`` is a name of the activation table, with its parameters. ``height`` is how many rows y has where these
    are but some of them, else 0. With a ``window`` the task is a convolution over padded planes: columns are the
    positions of a plane, rows of x and y are planes.
    """

    pattern: Pattern
    bias: bool = False
    activation: str | None = None
    parameters: tuple[float, ...] = ()
    residual: str | None = None
    layout: str = "row_major"
    window: Window | None = None
    height: int = 0

    @cached_property
    def taps(self) -> Taps:
        return conv_taps(self.pattern, self.window) if self.window else matmul_taps(self.pattern)

    @property
    def extent(self) -> int:
        """Input rows: of a matrix; of a convolution one for each of its displacements."""
        return self.taps.extent if self.window else self.pattern.cols
