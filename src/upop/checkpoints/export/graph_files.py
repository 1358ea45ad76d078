"""Writes ONNX, OpenVINO and torch.export graphs, each verified against the model.

A model of upop's own tasks becomes the graphs that its task calls; any other model, a graph of one call.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from upop.checkpoints.export.any_graph import graph_of_any
from upop.checkpoints.export.cached_graph import graph_with_cache
from upop.checkpoints.export.graphs import FEWEST_TOKENS, Graph, own_graphs, sample_inputs
from upop.checkpoints.export.int8 import QUANTIZERS, Samples
from upop.checkpoints.export.writers import Format, Runner, Writer, onnx_between, tensors, writer
from upop.checkpoints.loading import load_named
from upop.checkpoints.saving.folder import groups_here
from upop.errors import SettingError, VerificationError, nearest
from upop.files import check_folder, replacing_folder
from upop.models import kind_of
from upop.pruning.carried import plan_of
from upop.pruning.costs import evaluating
from upop.pruning.filled import without_empty
from upop.pruning.slips import check_model

Quantization = Literal["int8"]
_TOLERANCE = 1e-4
"""Largest allowed difference from the model's outputs, relative to the largest element."""
_DESCRIPTION = "export.json"
_OTHER_BATCHES = (1, 3)
"""Batch sizes for the verification, other than the traced one."""
_OTHER_TOKENS = 9


class _Module(nn.Module):
    """One function of a model as a module, which exporters require."""

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
    """Write a model, dense or compressed, as graphs for other runtimes, each verified against the model.

    The folder holds `<graph>.onnx`, `<graph>.xml` or `<graph>.pt2` per graph, and `export.json` with inputs, outputs
    and the largest differences. A model of any library becomes one graph `model`, of one call without the cache of a
    decoder; batch and length are dynamic if the model's code allows it. The folder is written under another name and
    renamed; only a folder of `export` that holds nothing else is replaced. To run a graph elsewhere:

        upop.export(upop.load("output/caption-2x/best"), "out")
        encoder = onnxruntime.InferenceSession("out/vision.onnx")

    Args:
        model: a model of any library, on the CPU, written in float32; or a checkpoint, as for `upop.load`.
        folder: the folder to write.
        format: "onnx" or "openvino" (with the extra `export`), or "torch-export".
        example: one batch of inputs for a model of another library: a tensor, a tuple of tensors, or a mapping of
            keyword arguments. By default the inputs with which its groups were found.
        cache: for a generating decoder of transformers: whether the graph takes and returns keys and values of every
            layer (`past_key_values.0.key` and `present.0.key`, [batch, heads, tokens, head_dim]), so that each new
            token costs one call with that token alone. A prompt is a call with an empty cache.
        quantize: "int8", for ONNX and OpenVINO, quantizes linear layers: weights, and inputs dynamically; with
            `samples`, ranges of activations are calibrated beforehand.
        samples: calibration batches, as `example`. For a model of upop with several graphs, mappings with the inputs of
            all graphs, by their names in `export.json`; outputs of one graph that another takes are computed.
        overwrite: whether a folder that `save` or `export` wrote may be replaced though its files were changed since.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SettingError: the format is unknown, the model cannot be traced, or the format lacks one of its operations.
        MissingLibraryError: a library of the format is not installed.
        VerificationError: a graph gives other outputs. In every case nothing was written.
        RunFolderError: the folder holds files of others, or cannot be written; nothing was changed.
    """
    if format not in get_args(Format):
        raise SettingError(
            f"format={format!r} is not known{nearest(format, get_args(Format))}; there is {', '.join(get_args(Format))}"
            " for graphs, and `upop export --to padded` or `--to nemotron-nas` for models."
        )
    check_quantize(quantize, format)
    way = writer(format)
    folder = Path(folder)
    check_folder(folder, "graphs", overwrite=overwrite)
    if samples is not None and (quantize is None or not len(samples)):
        why = "there are none" if quantize else "quantize is not given"
        raise SettingError(f"samples calibrate quantize='int8', but {why}. Give both, or leave both out.")
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
    with evaluating(model), torch.no_grad():
        measured = None if samples is None else [sample_inputs(model, graphs, sample) for sample in samples]
    described: dict[str, Any] = {"format": format, "model": kind_of(model) or type(model).__name__, "graphs": {}}
    with replacing_folder(folder, "graphs", overwrite=overwrite) as fresh, evaluating(model), _quiet():
        for name, graph in graphs.items():
            file = way.file(fresh, name)
            way.write(_Module(model, graph), graph, file)
            run = way.runner(graph, file)
            difference = max(_difference(model, graph, run, name, batch) for batch in _OTHER_BATCHES)
            described["graphs"][name] = {
                "file": file.name,
                "inputs": {key: list(axes) for key, axes in graph.inputs.items()},
                "outputs": list(graph.outputs),
                **({"tokens": [FEWEST_TOKENS, graph.positions]} if graph.positions else {}),
                "largest_difference": difference,
            }
            if quantize is not None:
                mine = None if measured is None else [sample[name] for sample in measured]
                described["graphs"][name]["quantized"] = _quantized(model, graph, way, file, format, mine)
            if format == "openvino":
                for part in fresh.glob(f"{onnx_between(file).name}*"):
                    part.unlink()
        (fresh / _DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return folder


def running(model: nn.Module, graph: Graph, format: Format, folder: Path) -> Runner:
    """Return a function that runs a graph in the runtime of a format: input tensors -> output tensors.

    Args:
        model: the model of the graph.
        graph: one of its graphs.
        format: as for `export`.
        folder: for temporary files.

    Raises:
        SettingError: the format lacks one of the operations.
        MissingLibraryError: a library of the format is not installed.
    """
    with _quiet():
        way = writer(format)
        file = way.file(folder, "model")
        way.write(_Module(model, graph), graph, file)
        return way.runner(graph, file)


def without_empty_branches(model: nn.Module) -> nn.Module:
    """Return an equivalent model without empty tensors, which other runtimes do not accept."""
    if all(parameter.numel() for parameter in model.parameters()):
        return model
    return without_empty(model, groups_here(model, plan_of(model)))


def check_quantize(quantize: str | None, format: str) -> None:
    """Check that a format supports a quantization.

    Raises:
        SettingError: the quantization is unknown, or the format does not support it.
    """
    if quantize is not None and quantize not in get_args(Quantization):
        raise SettingError(f"quantize={quantize!r} is not known; there is int8.")
    if quantize is not None and format not in QUANTIZERS:
        raise SettingError(
            f"quantize='int8' is for {' and '.join(QUANTIZERS)}, and the format is {format!r}. Give one of those, or "
            "leave quantize out."
        )


def _quantized(
    model: nn.Module, graph: Graph, way: Writer, file: Path, format: str, samples: Samples | None
) -> dict[str, Any]:
    """Quantize a written graph; return a report of sizes and differences."""
    before = way.bytes(file)
    ranges = QUANTIZERS[format](file, samples)
    drawn = tuple(samples[0].values()) if samples else graph.draw(_OTHER_BATCHES[-1], _OTHER_TOKENS)
    expected, found = tensors(graph.forward(model, *drawn)), way.runner(graph, file)(drawn)
    return {
        "to": "int8",
        "ranges": ranges,
        "bytes": [before, way.bytes(file)],
        "difference": max(_distance(wanted, got) for wanted, got in zip(expected, found, strict=True)),
    }


def _distance(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, got) else float("inf")
    largest = wanted.abs().max()
    return float((wanted - got).abs().max() / largest) if largest > 0 else float((wanted - got).abs().max())


def _difference(model: nn.Module, graph: Graph, run: Runner, name: str, batch: int) -> float:
    inputs = graph.draw(batch, _OTHER_TOKENS)
    try:
        expected = tensors(graph.forward(model, *inputs))
    except Exception as error:  # a model's own
        sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in zip(graph.inputs, inputs, strict=True))
        raise SettingError(
            f"This {type(model).__name__} was traced, but rejects the inputs for verifying its graph ({sizes}): "
            f"{' '.join(str(error).split())[:200]}. Give `example`, one batch of inputs."
        ) from error
    found = run(inputs)
    worst = 0.0
    for output, wanted, got in zip(graph.outputs, expected, found, strict=True):
        difference = _distance(wanted, got)
        if not difference <= _TOLERANCE:
            raise VerificationError(
                f"The exported graph {name!r} does not compute what the model does: {output} {tuple(got.shape)} "
                f"differs by {difference:.2e} of its largest element in a batch of {batch}, "
                f"{_TOLERANCE:.0e} is allowed. Nothing was written; please report it, with your libraries' versions."
            )
        worst = max(worst, difference)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and warnings of exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
