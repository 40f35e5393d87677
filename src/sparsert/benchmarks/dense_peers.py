"""Dense peers inside NumPy and PyTorch. Each function returns the forms that its package offers here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from .peers import Bound, Form, Layer, image


def numpy_forms(threads: int) -> list[Form]:
    """``np.matmul`` with ``out=``; the threads were set before (environment.pin_threads)."""

    def product(layer: Layer) -> Bound:
        return Bound(lambda: np.matmul(layer.dense, layer.x, out=layer.y))

    def transposed(layer: Layer) -> Bound:
        packed = np.ascontiguousarray(layer.dense.T)
        return Bound(lambda: np.matmul(layer.x, packed, out=layer.y))

    return [Form("W@X", "kn", product), Form("X^T@W^T", "nk", transposed)]


def torch_forms(threads: int) -> list[Form]:
    """``torch.mm``, ``linear`` and ``conv2d``, and MKL's and oneDNN's operators with prepacked weights."""
    torch: Any = import_module("torch")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    functional: Any = import_module("torch.nn.functional")

    def tensors(layer: Layer) -> tuple[Any, Any, Any]:
        return torch.from_numpy(layer.dense), torch.from_numpy(layer.x), torch.from_numpy(layer.y)

    def product(layer: Layer) -> Bound:
        w, x, y = tensors(layer)
        mm = torch.mm
        return Bound(lambda: mm(w, x, out=y))

    def linear(layer: Layer) -> Bound:
        w, x, _ = tensors(layer)
        apply = functional.linear
        return Bound(lambda: apply(x, w))

    def linear_mkl_packed(layer: Layer) -> Bound:
        w, x, _ = tensors(layer)
        packed = torch.ops.mkl._mkl_reorder_linear_weight(w, layer.columns)
        apply, columns = torch.ops.mkl._mkl_linear.default, layer.columns
        return Bound(lambda: apply(x, packed, w, None, columns))

    def linear_onednn_packed(layer: Layer) -> Bound:
        w, x, _ = tensors(layer)
        packed = torch.ops.mkldnn._reorder_linear_weight(w, layer.columns)
        apply = torch.ops.mkldnn._linear_pointwise.default
        return Bound(lambda: apply(x, packed, None, "none", [], ""))

    def images(layer: Layer, channels_last: bool) -> tuple[Any, Any]:
        height, width = image(layer.columns)
        w, x, _ = tensors(layer)
        inputs = w.shape[1]
        x = x.view(1, height, width, inputs).permute(0, 3, 1, 2) if channels_last else x.view(1, inputs, height, width)
        return x, w.view(*w.shape, 1, 1)

    def nhwc(y: Any) -> Any:
        return y.permute(0, 2, 3, 1)

    def convolution(layer: Layer) -> Bound:
        x, w = images(layer, channels_last=False)
        apply = functional.conv2d
        return Bound(lambda: apply(x, w))

    def convolution_packed(layer: Layer) -> Bound:
        x, w = images(layer, channels_last=True)
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(w.to_mkldnn(), [0, 0], [1, 1], [1, 1], 1, list(x.shape))
        apply = torch.ops.mkldnn._convolution_pointwise.default
        return Bound(lambda: nhwc(apply(x, packed, None, [0, 0], [1, 1], [1, 1], 1, "none", [], "")))

    forms = [Form("W@X", "kn", product), Form("linear", "nk", linear), Form("conv 1x1", "kn", convolution)]
    packed_forms: list[tuple[str, Callable[[Layer], Bound], Callable[[], Any]]] = [
        ("linear MKL packed", linear_mkl_packed, lambda: torch.ops.mkl._mkl_linear),
        ("linear oneDNN", linear_onednn_packed, lambda: torch.ops.mkldnn._linear_pointwise),
        ("conv 1x1 NHWC oneDNN", convolution_packed, lambda: torch.ops.mkldnn._convolution_pointwise),
    ]
    for name, bind, operator in packed_forms:
        try:  # builds of torch without MKL or oneDNN lack these operators
            operator()
        except AttributeError:
            continue
        forms.append(Form(name, "nk", bind))
    return forms
