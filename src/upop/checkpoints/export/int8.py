"""Whole numbers of 8 bits in ONNX files, by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from upop.libraries import naming_missing


def quantized(file: Path, samples: Sequence[Sequence[Tensor]] | None) -> None:
    """Replace an ONNX file by one with matrix products in 8-bit integers.

    Args:
        file: the graph.
        samples: what it is called with to measure the ranges of all that is computed on the way; without them the
            range is measured anew in every call (dynamic quantization).
    """
    with naming_missing():
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    whole = file.with_name(f"{file.stem}.whole.onnx")
    if samples is None:
        quantize_dynamic(file, whole, weight_type=QuantType.QInt8)
    else:
        # A scale per row of weights, where one for all of them costs many times as much.
        quantize_static(file, whole, _Reader(file, samples), quant_format=QuantFormat.QDQ, per_channel=True)
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)
    whole.replace(file)


class _Reader:
    """Samples as onnxruntime asks for them: one after the other, and None at the end."""

    def __init__(self, file: Path, samples: Sequence[Sequence[Tensor]]) -> None:
        import onnxruntime

        names = [
            each.name for each in onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).get_inputs()
        ]
        self._left: Iterator[dict[str, Any]] = (
            {name: value.numpy() for name, value in zip(names, sample, strict=True)} for sample in samples
        )

    def get_next(self) -> dict[str, Any] | None:
        """Return the next sample."""
        return next(self._left, None)
