"""One linear layer to be compiled: its pattern and everything fixed at compile time around it."""

from __future__ import annotations

from dataclasses import dataclass

from ..sparsity.pattern import Pattern

LAYOUTS = ("row_major", "tile_major", "transposed")
"""x to y: (K, N) to (M, N); (T, K, lanes) to (T, M, lanes) for the target's lanes; (N, K) to (N, M) as in torch."""


@dataclass(frozen=True)
class Task:
    """``y = act(W @ x + b)``, with a residual added ``"before"`` or ``"after"`` the activation.

    ``activation`` is a name of the activation table, with its parameters. ``height`` is how many rows y has where these
    are but some of them, else 0.
    """

    pattern: Pattern
    bias: bool = False
    activation: str | None = None
    parameters: tuple[float, ...] = ()
    residual: str | None = None
    layout: str = "row_major"
    height: int = 0
