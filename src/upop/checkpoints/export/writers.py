"""Writes graphs in each format, and runs them: by torch.export, onnxruntime and OpenVINO."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from upop.checkpoints.export.any_graph import AnyGraph, untraceable
from upop.errors import SettingError
from upop.libraries import naming_missing

if TYPE_CHECKING:
    from upop.checkpoints.export.graphs import Graph

Format = Literal["onnx", "openvino", "torch-export"]
Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Input tensors -> output tensors."""
_LACKING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
_F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class Writer:
    """A format.

    Attributes:
        suffix: file extension.
        write: writes the graph of a module, whose `model` is the exported model.
        runner: returns a function that runs a file in its runtime.
        beside: extensions of further files of a graph.
    """

    suffix: str
    write: Callable[[nn.Module, Graph, Path], None]
    runner: Callable[[Graph, Path], Runner]
    beside: tuple[str, ...] = ()

    def file(self, folder: Path, name: str) -> Path:
        """Return the path of a graph."""
        return folder / f"{name}.{self.suffix}"

    def bytes(self, file: Path) -> int:
        """Return the size of a written graph in bytes."""
        parts = [file, *(part for ending in self.beside if (part := file.with_name(f"{file.stem}.{ending}")).is_file())]
        return sum(part.stat().st_size for part in parts)


def writer(format: Format) -> Writer:
    """Return the writer of a format.

    Raises:
        MissingLibraryError: a library of the format is not installed.
    """
    with naming_missing():
        if format != "torch-export":
            import onnx  # noqa: F401 - torch's exporter needs it, and onnxscript
            import onnxruntime  # noqa: F401 - to check what is written, and to quantize it
            import onnxscript  # noqa: F401
        if format == "openvino":
            import openvino  # noqa: F401
    return _WRITERS[format]


def tensors(found: Tensor | tuple[Tensor, ...]) -> Sequence[Tensor]:
    """Return the outputs of a graph as a sequence."""
    return (found,) if isinstance(found, Tensor) else found


def onnx_between(file: Path) -> Path:
    """Return the path of the ONNX file that a file of OpenVINO was converted from."""
    return file.with_suffix(".onnx")


def convert_onnx(file: Path) -> None:
    """Write the file of OpenVINO from the ONNX file beside it."""
    import openvino

    openvino.save_model(openvino.convert_model(onnx_between(file)), file, compress_to_fp16=False)


def _program(module: nn.Module, graph: Graph) -> torch.export.ExportedProgram:
    try:
        return graph.program(module)
    except Exception as error:  # one of the many of torch.export
        raise untraceable(module.model, error) from error  # type: ignore[arg-type]


def _write_program(module: nn.Module, graph: Graph, file: Path) -> None:
    held = io.BytesIO()  # torch ends the process where its own file runs out of space
    torch.export.save(_program(module, graph), held)
    file.write_bytes(held.getbuffer())


def _run_program(_graph: Graph, file: Path) -> Runner:
    read = torch.export.load(file).module()
    return lambda inputs: tensors(read(*inputs))


def _write_onnx(module: nn.Module, graph: Graph, file: Path) -> None:
    try:
        torch.onnx.export(
            _unchecked(_program(module, graph)),
            (),
            file,
            dynamo=True,
            external_data=sum(part.numel() for part in module.parameters()) * 4 > 2**30,  # the format ends at 2 GiB
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _lacking(error, type(module.model).__name__) from error
    if isinstance(graph, AnyGraph):
        _name_axes(file, graph.symbols)


def _unchecked(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove assertions on inputs, and what only they use: ONNX has no such operations."""
    program = copy.deepcopy(program)
    for node in list(program.graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("aten._assert_"):
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _lacking(error: BaseException, model: str) -> SettingError:
    """Return the error for an operation that ONNX lacks, named if torch's exporter names it."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__
    found = next((match[1] for text in messages for match in [_LACKING.search(text)] if match), None)
    why = f"has no operation for {found}" if found else f"fails: {' '.join(messages[-1].split())[:200]}"
    return SettingError(
        f"This {model} cannot be written as ONNX, which {why}. Write it with format='torch-export' "
        "(--to torch-export), or replace this operation."
    )


def _run_onnx(graph: Graph, file: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as torch, so that times compare
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    taken = {each.name for each in session.get_inputs()}  # unused inputs are dropped
    return lambda inputs: [
        torch.from_numpy(value)
        for value in session.run(
            list(graph.outputs),
            {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True) if name in taken},
        )
    ]


def _name_axes(file: Path, symbols: Mapping[str, str]) -> None:
    """Name the dynamic axes in a file batch and tokens, as export.json does."""
    import onnx

    held = onnx.load(file, load_external_data=False)
    for value in (*held.graph.input, *held.graph.output, *held.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in symbols:
                size.dim_param = symbols[size.dim_param]
    onnx.save(held, file)


def _write_openvino(module: nn.Module, graph: Graph, file: Path) -> None:
    _write_onnx(module, graph, onnx_between(file))
    convert_onnx(file)


def _run_openvino(graph: Graph, file: Path) -> Runner:
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", _F32)
    taken = {name for each in compiled.inputs for name in each.names}

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given: Any = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True) if name in taken}
        found = compiled(given)
        return [torch.from_numpy(found[name].copy()) for name in graph.outputs]

    return run


_WRITERS: Mapping[Format, Writer] = {
    "onnx": Writer("onnx", _write_onnx, _run_onnx, ("onnx.data",)),
    "openvino": Writer("xml", _write_openvino, _run_openvino, ("bin",)),
    "torch-export": Writer("pt2", _write_program, _run_program),
}
