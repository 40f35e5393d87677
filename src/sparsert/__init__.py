"""SparseRT: machine code for pruned neural networks, generated from their sparsity pattern."""

from __future__ import annotations

from . import errors, target
from .compiler import compile_linear, compile_matmul, compile_product
from .errors import SparseRTError
from .kernels.activations import Clip
from .operators.matmul import Bound, CompiledLinear, CompiledMatmul
from .operators.product import CompiledProduct
from .schedule.schedule import Schedule

__version__ = "0.1.0"
__all__ = [
    "Bound", "Clip", "CompiledLinear", "CompiledMatmul", "CompiledProduct", "Schedule", "SparseRTError", "__version__",
    "compile_linear", "compile_matmul", "compile_product", "errors", "target",
]  # fmt: skip
