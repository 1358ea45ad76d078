"""Quantizes written graphs to int8, for onnxruntime and for OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from upop.checkpoints.export.writers import convert_onnx, onnx_between
from upop.libraries import naming_missing

Samples = Sequence[Mapping[str, Tensor]]
_LARGEST = 127


def quantize_onnx(file: Path, samples: Samples | None) -> str:
    """Replace an ONNX file by one with int8 matrix products; return how ranges of activations are set.

    Args:
        file: the graph.
        samples: inputs to calibrate the ranges of activations (static quantization); None quantizes dynamically.
    """
    with naming_missing():
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    whole = file.with_name(f"{file.stem}.whole.onnx")
    if samples is None:
        quantize_dynamic(file, whole, weight_type=QuantType.QInt8)
    else:
        quantize_static(
            file,
            whole,
            _Reader(file, samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,  # a single scale for the tensor costs far more accuracy
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],  # no softmax, no norm, no mask of -inf
            extra_options={"MatMulConstBOnly": True},
        )
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)
    whole.replace(file)
    return "of inputs as they come" if samples is None else f"of {len(samples)} samples"


def quantize_openvino(file: Path, samples: Samples | None) -> str:
    """Replace a graph of OpenVINO by one in int8; return how ranges of activations are set.

    Args:
        file: the graph, beside the ONNX file that it was converted from.
        samples: as for `quantize_onnx`, whose file OpenVINO then converts. Without them the weights of matrix products
            are int8 with one scale per row, and OpenVINO quantizes activations dynamically if the device supports it.
    """
    if samples is not None:
        said = quantize_onnx(onnx_between(file), samples)
        convert_onnx(file)
        return said
    import numpy
    import openvino
    import openvino.opset13 as operations

    model = openvino.convert_model(onnx_between(file))
    for node in model.get_ordered_ops():
        weights = node.input_value(1).get_node() if node.get_type_name() == "MatMul" else None
        if weights is None or weights.get_type_name() != "Constant" or len(weights.get_output_shape(0)) != 2:
            continue
        values = weights.get_data()
        inner = 1 if node.get_attributes()["transpose_b"] else 0
        scale = numpy.abs(values).max(inner, keepdims=True) / _LARGEST
        scale[scale == 0] = 1
        whole = operations.constant(numpy.round(values / scale).astype(numpy.int8))
        unpacked = operations.multiply(operations.convert(whole, "f32"), operations.constant(scale))
        node.input(1).replace_source_output(unpacked.output(0))
    openvino.save_model(model, file, compress_to_fp16=False)
    return "of inputs as they come"


QUANTIZERS: Mapping[str, Callable[[Path, Samples | None], str]] = {
    "onnx": quantize_onnx,
    "openvino": quantize_openvino,
}
"""Format -> function that quantizes its files."""


class _Reader:
    """Calibration samples behind onnxruntime's interface: one at a time, and None at the end."""

    def __init__(self, file: Path, samples: Samples) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        self._left: Iterator[dict[str, Any]] = (
            {name: sample[name].contiguous().numpy() for name in names} for sample in samples
        )

    def get_next(self) -> dict[str, Any] | None:
        """Return the next sample, or None."""
        return next(self._left, None)
