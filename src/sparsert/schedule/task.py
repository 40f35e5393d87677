"""One linear layer to be compiled: its pattern and everything fixed at compile time around it."""

from __future__ import annotations

from dataclasses import dataclass

from ..sparsity.pattern import Pattern

LAYOUTS = ("row_major", "tile_major", "transposed")
"""x (K, N) to y (M, N); x (T, K, lanes) to y (T, M, lanes), ``lanes`` those of the target; x (N, K) to y (N, M) as ``torch.nn.Linear``."""


@dataclass(frozen=True)
class Task:
    """``y = act(W @ x + b)``, with a residual added ``"before"`` or ``"after"`` the activation.

    ``activation`` is a name of the activation table, with its parameters.
    """

    pattern: Pattern
    bias: bool = False
    activation: str | None = None
    parameters: tuple[float, ...] = ()
    residual: str | None = None
    layout: str = "row_major"
