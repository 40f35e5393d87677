"""SparseRT: machine code for pruned neural networks, generated from their sparsity pattern."""

from __future__ import annotations

from .errors import SparseRTError

__version__ = "0.1.0"
__all__ = ["SparseRTError", "__version__"]
