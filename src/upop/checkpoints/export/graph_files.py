"""Leaving for other runtimes: ONNX, OpenVINO and torch.export programs, checked against the model that they come from.

A model of upop's own tasks becomes the graphs that its task calls; any other one a graph of one call of it.
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
"""Largest allowed difference from the model's own outputs, relative to the largest element."""
_DESCRIPTION = "export.json"
_OTHER_BATCHES = (1, 3)
"""Batches that an exported graph is checked with: others than it was traced with."""
_OTHER_TOKENS = 9


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
        quantize: "int8", for ONNX and OpenVINO: the weights of linear layers become integers, and their inputs as they
            come; with `samples` the ranges of all that is computed are measured on those beforehand.
        samples: batches of what the model takes, as `example`. Of a model of upop with several graphs, mappings with
            the inputs of all of them, by the names that `export.json` has; what one graph gives another is computed.
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
    way = writer(format)
    folder = Path(folder)
    check_folder(folder, "graphs", overwrite=overwrite)
    if samples is not None and (quantize is None or not len(samples)):
        why = "there are none" if quantize else "that was not asked for"
        raise SettingError(
            f"samples are what quantize='int8' measures ranges on, but {why}. Give both, or leave both out."
        )
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
        way = writer(format)
        file = way.file(folder, "model")
        way.write(_Module(model, graph), graph, file)
        return way.runner(graph, file)


def without_empty_branches(model: nn.Module) -> nn.Module:
    """Return a model that computes the same and has no empty tensors, which other runtimes do not take."""
    if all(parameter.numel() for parameter in model.parameters()):
        return model
    return without_empty(model, groups_here(model, plan_of(model)))


def check_quantize(quantize: str | None, format: str) -> None:
    """Refuse a quantization that is none, or that a format does not take.

    Raises:
        SettingError: so it is.
    """
    if quantize is not None and quantize not in get_args(Quantization):
        raise SettingError(f"quantize={quantize!r} is not known; there is int8.")
    if quantize is not None and format not in QUANTIZERS:
        raise SettingError(
            f"quantize='int8' is for {' and '.join(QUANTIZERS)}, and the format is {format!r}. Take one of those, or "
            "leave it out."
        )


def _quantized(
    model: nn.Module, graph: Graph, way: Writer, file: Path, format: str, samples: Samples | None
) -> dict[str, Any]:
    """Turn a graph that was written and checked into integers; return what that costs."""
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
            f"This {type(model).__name__} was traced, but does not take the inputs that its graph should be checked "
            f"with ({sizes}): {' '.join(str(error).split())[:200]}. Give `example`, one batch of what it takes."
        ) from error
    found = run(inputs)
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
