"""Leaving for other runtimes: ONNX, OpenVINO and torch.export programs, checked against the model that they come from.

A model of upop's own tasks becomes the graphs that its task calls; any other one a graph of one call of it.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from upop.checkpoints.export.any_graph import AnyGraph, graph_of_any, untraceable
from upop.checkpoints.export.cached_graph import graph_with_cache
from upop.checkpoints.export.graphs import FEWEST_TOKENS, Graph, own_graphs
from upop.checkpoints.loading import load_named
from upop.checkpoints.saving.folder import groups_here
from upop.errors import SettingError, VerificationError, nearest
from upop.files import replacing_folder
from upop.libraries import naming_missing
from upop.models import kind_of
from upop.pruning.carried import plan_of
from upop.pruning.costs import evaluating
from upop.pruning.filled import without_empty
from upop.pruning.slips import check_model

Format = Literal["onnx", "openvino", "torch-export"]
Quantization = Literal["int8"]
_SUFFIXES = {"onnx": "onnx", "openvino": "xml", "torch-export": "pt2"}
_TOLERANCE = 1e-4
"""Largest allowed difference from the model's own outputs, relative to the largest element."""
_DESCRIPTION = "export.json"
_OTHER_BATCHES = (1, 3)
"""Batches that an exported graph is checked with: others than it was traced with."""
_OTHER_TOKENS = 9
_LACKING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


class _Module(nn.Module):
    """One function of a model as a module of its own, which is what exporters take."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self._graph = graph

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._graph.forward(self.model, *inputs)


def export(
    model: nn.Module | str | Path,
    folder: str | Path,
    format: Format = "onnx",
    *,
    example: Any = None,
    cache: bool = False,
    quantize: Quantization | None = None,
    samples: Sequence[Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, dense or compressed, as graphs for other runtimes, each checked against the model.

    The folder holds `<graph>.onnx`, `<graph>.xml` or `<graph>.pt2` for every graph, and `export.json`, which says what
    goes in and comes out, and by how much the outputs differ. A model of any library becomes the graph `model`, of one
    call of it, without the cache of a decoder; batch and length are free where its code lets them be. The folder is
    written beside and renamed; only one that `export` wrote, and that holds nothing else, is replaced. In other places:

        upop.export(upop.load("output/caption-2x/best"), "out")
        encoder = onnxruntime.InferenceSession("out/vision.onnx")

    Args:
        model: of upop, transformers, timm, open_clip, or one's own, on the CPU; what is not in float32 is written so.
            Or a checkpoint: what `upop.load` takes.
        folder: where to write.
        format: "onnx" or "openvino" (with the extra `export`), or "torch-export".
        example: one batch of what the model takes, if it is none of upop's own: a tensor, a tuple of tensors, or a
            mapping of keyword arguments. By default what its groups were read with.
        cache: of a decoder of transformers that generates: the graph takes and gives keys and values of every layer
            (`past_key_values.0.key` and `present.0.key`, [batch, heads, tokens, size]), so that a token costs one call
            with that token alone. A prompt is the call with a cache of no tokens.
        quantize: "int8" has onnxruntime turn the weights of linear layers into integers, and their inputs as they
            come; with `samples` it measures the range of the inputs on those beforehand.
        samples: batches of what the graph takes, as `example`; for a model with one graph.
        overwrite: whether a folder that `save` or `export` wrote may be replaced though its files were changed since.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SettingError: the format is unknown, the model cannot be traced, or the format lacks one of its operations.
        MissingLibraryError: a library of the format is not installed.
        VerificationError: an exported graph computes something else. In every case nothing was written.
        RunFolderError: the folder holds what upop did not write, or cannot be written; nothing was changed.
    """
    if format not in get_args(Format):
        raise SettingError(
            f"format={format!r} is not known{nearest(format, get_args(Format))}; there is {', '.join(get_args(Format))}"
            " for graphs, and `upop export --to padded` or `--to nemotron-nas` for models."
        )
    check_quantize(quantize, format)
    write = _WRITERS[format]()
    shrink = None if quantize is None else _quantizer(quantize)
    if isinstance(model, str | Path):
        model = load_named(model, own=True)
    check_model(model, "export()")
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in model.state_dict().values()):
        model = copy.deepcopy(model).float()
    model = without_empty_branches(model)
    with evaluating(model), _quiet():
        graphs: Mapping[str, Graph]
        if cache:
            graphs = {"model": graph_with_cache(model)}
        else:
            graphs = own_graphs(model) or {"model": graph_of_any(model, example)}
    if samples is not None and (quantize is None or len(graphs) > 1):
        raise SettingError(
            f"samples are for quantize='int8' of a model with one graph; this {type(model).__name__} has "
            f"{', '.join(graphs)}. Leave them out: the ranges of inputs are then measured as they come."
        )
    folder = Path(folder)
    described: dict[str, Any] = {"format": format, "model": kind_of(model) or type(model).__name__, "graphs": {}}
    with replacing_folder(folder, "graphs", overwrite=overwrite) as fresh, evaluating(model), _quiet():
        for name, graph in graphs.items():
            file = fresh / f"{name}.{_SUFFIXES[format]}"
            run = write(_Module(model, graph), graph, file)
            difference = max(_difference(model, graph, run, name, batch) for batch in _OTHER_BATCHES)
            described["graphs"][name] = {
                "file": file.name,
                "inputs": {key: list(axes) for key, axes in graph.inputs.items()},
                "outputs": list(graph.outputs),
                **({"tokens": [FEWEST_TOKENS, graph.positions]} if graph.positions else {}),
                "largest_difference": difference,
            }
            if shrink is not None:
                described["graphs"][name]["quantized"] = shrink(model, graph, file, samples)
        (fresh / _DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return folder


def running(
    model: nn.Module, graph: Graph, format: Format, folder: Path
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Return what runs a graph in the runtime of a format: tensors of its inputs -> those of its outputs.

    Args:
        model: that the graph is of.
        graph: of one of its functions.
        format: as for `export`.
        folder: for files that nothing needs afterwards.

    Raises:
        SettingError: the format lacks one of the operations.
        MissingLibraryError: a library of the format is not installed.
    """
    with _quiet():
        return _WRITERS[format]()(_Module(model, graph), graph, folder / f"model.{_SUFFIXES[format]}")


def without_empty_branches(model: nn.Module) -> nn.Module:
    """Return a model that computes the same and has no empty tensors, which other runtimes do not take."""
    if all(parameter.numel() for parameter in model.parameters()):
        return model
    return without_empty(model, groups_here(model, plan_of(model)))


_Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_Writer = Callable[[nn.Module, Graph, Path], _Runner]


def _program(module: nn.Module, graph: Graph) -> torch.export.ExportedProgram:
    try:
        return graph.program(module)
    except Exception as error:  # one of the many of torch.export
        raise untraceable(module.model, error) from error  # type: ignore[arg-type]


def _write_program(module: nn.Module, graph: Graph, file: Path) -> _Runner:
    torch.export.save(_program(module, graph), file)
    read = torch.export.load(file).module()
    return lambda inputs: _tensors(read(*inputs))


def _onnx_writer() -> _Writer:
    with naming_missing():
        import onnx  # noqa: F401 - torch's exporter needs it, and onnxscript
        import onnxruntime  # noqa: F401 - to check what is written
        import onnxscript  # noqa: F401

    def write(module: nn.Module, graph: Graph, file: Path) -> _Runner:
        _write_onnx(module, graph, file)
        return _onnx_runner(graph, file)

    return write


def _write_onnx(module: nn.Module, graph: Graph, file: Path) -> None:
    try:
        torch.onnx.export(
            _program(module, graph),
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


def _lacking(error: BaseException, model: str) -> SettingError:
    """Say which operation ONNX lacks, as far as torch's exporter tells."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__
    found = next((match[1] for text in said for match in [_LACKING.search(text)] if match), None)
    why = f"has no operation for {found}" if found else f"cannot say it: {' '.join(said[-1].split())[:200]}"
    return SettingError(
        f"This {model} cannot be written as ONNX, which {why}. Write it with format='torch-export' "
        "(--to torch-export), or do without what computes it."
    )


def _onnx_runner(graph: Graph, file: Path) -> _Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    taken = {each.name for each in session.get_inputs()}  # of an input that nothing depends on there is none
    return lambda inputs: [
        torch.from_numpy(value)
        for value in session.run(
            list(graph.outputs),
            {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True) if name in taken},
        )
    ]


def _name_axes(file: Path, symbols: Mapping[str, str]) -> None:
    """Have a file call the sizes of axes batch and tokens, as export.json does."""
    import onnx

    held = onnx.load(file, load_external_data=False)
    for value in (*held.graph.input, *held.graph.output, *held.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in symbols:
                size.dim_param = symbols[size.dim_param]
    onnx.save(held, file)


def _openvino_writer() -> _Writer:
    with naming_missing():
        import openvino
    to_onnx = _onnx_writer()

    def write(module: nn.Module, graph: Graph, file: Path) -> _Runner:
        between = file.with_suffix(".onnx")
        to_onnx(module, graph, between)
        openvino.save_model(openvino.convert_model(between), file, compress_to_fp16=False)
        for part in (between, between.with_name(f"{between.name}.data")):
            part.unlink(missing_ok=True)
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        taken = {name for each in compiled.inputs for name in each.names}

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            given = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True) if name in taken}
            found = compiled(given)
            return [torch.from_numpy(found[name].copy()) for name in graph.outputs]

        return run

    return write


_WRITERS: Mapping[str, Callable[[], _Writer]] = {
    "onnx": _onnx_writer,
    "openvino": _openvino_writer,
    "torch-export": lambda: _write_program,
}


def check_quantize(quantize: str | None, format: str) -> None:
    """Refuse a quantization that is none, or that a format does not take.

    Raises:
        SettingError: so it is.
    """
    if quantize is not None and quantize not in get_args(Quantization):
        raise SettingError(f"quantize={quantize!r} is not known; there is int8.")
    if quantize is not None and format != "onnx":
        raise SettingError(f"quantize='int8' is done by onnxruntime, and the format is {format!r}. Take format='onnx'.")


def _quantizer(quantize: str) -> Callable[[nn.Module, Graph, Path, Sequence[Any] | None], dict[str, Any]]:
    """Return what turns a graph that was written and checked into integers, and says what that costs."""
    from upop.checkpoints.export.int8 import quantized

    def shrink(model: nn.Module, graph: Graph, file: Path, samples: Sequence[Any] | None) -> dict[str, Any]:
        before = file.stat().st_size
        inputs = None if samples is None else [as_inputs(graph, sample) for sample in samples]
        quantized(file, inputs)
        drawn = inputs[0] if inputs else graph.draw(_OTHER_BATCHES[-1], _OTHER_TOKENS)
        expected, found = _tensors(graph.forward(model, *drawn)), _onnx_runner(graph, file)(drawn)
        return {
            "to": quantize,
            "ranges": "of inputs as they come" if inputs is None else f"of {len(inputs)} samples",
            "bytes": [before, file.stat().st_size],
            "difference": max(_distance(wanted, got) for wanted, got in zip(expected, found, strict=True)),
        }

    return shrink


def as_inputs(graph: Graph, sample: Any) -> tuple[Tensor, ...]:
    """Return the tensors that a graph takes, in its order, from what a model is called with.

    Raises:
        SettingError: a mapping lacks one of them.
    """
    if isinstance(sample, Mapping):
        absent = [name for name in graph.inputs if name not in sample]
        if absent:
            raise SettingError(f"A sample has no {absent[0]}; the graph takes {', '.join(graph.inputs)}.")
        return tuple(sample[name] for name in graph.inputs)
    return tuple(sample) if isinstance(sample, tuple | list) else (sample,)


def _distance(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, got) else float("inf")
    largest = wanted.abs().max()
    return float((wanted - got).abs().max() / largest) if largest > 0 else float((wanted - got).abs().max())


def _difference(model: nn.Module, graph: Graph, run: _Runner, name: str, batch: int) -> float:
    inputs = graph.draw(batch, _OTHER_TOKENS)
    expected, found = _tensors(graph.forward(model, *inputs)), run(inputs)
    worst = 0.0
    for output, wanted, got in zip(graph.outputs, expected, found, strict=True):
        difference = _distance(wanted, got)
        if not difference <= _TOLERANCE:
            raise VerificationError(
                f"The exported graph {name!r} does not compute what the model does: {output} {tuple(got.shape)} "
                f"differs by {difference:.2e} of its largest element in a batch of {batch}, "
                f"allowed are {_TOLERANCE:.0e}. Nothing was written; please report it, with your libraries' versions."
            )
        worst = max(worst, difference)
    return worst


def _tensors(found: Tensor | tuple[Tensor, ...]) -> Sequence[Tensor]:
    return (found,) if isinstance(found, Tensor) else found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what exporters tell about their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
