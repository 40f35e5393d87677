"""SparseRT: machine code for pruned neural networks, generated from their sparsity pattern."""

from __future__ import annotations

from . import errors, target
from .compiler import compile_linear, compile_matmul, compile_product
from .convolution import compile_conv1d, compile_conv2d, compile_conv_transpose2d
from .errors import SparseRTError
from .kernels.activations import Clip
from .operators.conv import CompiledConv
from .operators.conv_transpose import CompiledConvTranspose
from .operators.matmul import Bound, CompiledLinear, CompiledMatmul
from .operators.planes import Planes
from .operators.product import CompiledProduct
from .schedule.schedule import Schedule

__version__ = "0.1.0"
__all__ = [
    "Bound", "Clip", "CompiledConv", "CompiledConvTranspose", "CompiledLinear", "CompiledMatmul", "CompiledProduct",
    "Planes", "Schedule", "SparseRTError", "__version__", "compile_conv1d", "compile_conv2d",
    "compile_conv_transpose2d", "compile_linear", "compile_matmul", "compile_product", "errors", "target",
]  # fmt: skip
