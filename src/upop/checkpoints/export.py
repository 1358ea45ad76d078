"""Leaving for other runtimes: ONNX files and torch.export programs, checked against the model that they come from.

A model becomes one graph or a few (a captioner: the picture's encoder, and the decoder that is called for every word),
each with a batch of any size and, where there are texts, texts of any length.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from upop.errors import SettingError, VerificationError, nearest
from upop.files import replacing_folder
from upop.models import kind_of
from upop.pruning.costs import evaluating

Format = Literal["onnx", "torch-export"]
_SUFFIXES = {"onnx": "onnx", "torch-export": "pt2"}
_TOLERANCE = 1e-4
"""Largest allowed difference from the model's own outputs, relative to the largest entry."""
_DESCRIPTION = "export.json"
_OTHER_BATCHES = (1, 3)
"""Batches that an exported graph is checked with: others than it was traced with."""
_TRACED_BATCH, _TRACED_TOKENS, _OTHER_TOKENS = 2, 6, 9
_FEWEST_TOKENS = 3
"""Of a text that a graph takes, padding included: tracing takes lengths of 1 and 2 for something special."""


@dataclass(frozen=True)
class Graph:
    """One function of a model, as it is exported.

    Attributes:
        forward: (model, *inputs) -> a tensor or a tuple of tensors.
        inputs: name -> the axes of the input: a name (such as "batch" and "tokens") where any size will do, or a size.
        outputs: the names of the outputs.
        words: how many there are to draw token numbers from.
        positions: the most tokens of a text.
    """

    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Mapping[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]
    words: int = 0
    positions: int = 0

    def draw(self, batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Return random inputs: token numbers, masks that end early in the last row, and numbers of -2 to 2."""
        generator = torch.Generator().manual_seed(batch)
        drawn = []
        for name, axes in self.inputs.items():
            shape = [(batch if axis == "batch" else tokens) if isinstance(axis, str) else axis for axis in axes]
            if name.endswith("mask"):
                mask = torch.ones(shape, dtype=torch.long)
                mask[-1, tokens // 2 + 1 :] = 0
                drawn.append(mask)
            elif name.endswith("ids"):
                drawn.append(torch.randint(1, self.words, shape, generator=generator))
            else:
                drawn.append(torch.rand(shape, generator=generator) * 4 - 2)
        return tuple(drawn)


class _Module(nn.Module):
    """One function of a model as a module of its own, which is what exporters take."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self._graph = graph

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._graph.forward(self.model, *inputs)


def export(model: nn.Module, folder: str | Path, format: Format = "onnx", *, overwrite: bool = False) -> Path:
    """Write a model, dense or compressed, as graphs for other runtimes, each checked against the model.

    The folder holds `<graph>.onnx` or `<graph>.pt2` for every graph, and `export.json`, which says what goes in and
    comes out, and by how much the outputs differ. It is written beside and renamed; only a folder that `export` wrote,
    and that holds nothing else, is replaced. In other places:

        upop.export(upop.load("output/caption-2x/best"), "out")
        encoder = onnxruntime.InferenceSession("out/vision.onnx")

    Args:
        model: one of upop's models, on the CPU.
        folder: where to write.
        format: "onnx" (needs the extra `export`: onnx, onnxscript, onnxruntime) or "torch-export".
        overwrite: whether a folder that `save` or `export` wrote may be replaced though its files were changed since.

    Raises:
        SettingError: the format is unknown, its libraries are missing, or upop knows no graphs of such a model.
        VerificationError: an exported graph computes something else; nothing was written.
        RunFolderError: the folder holds what upop did not write, or cannot be written; nothing was changed.
    """
    if format not in get_args(Format):
        raise SettingError(
            f"format={format!r} is not known{nearest(format, get_args(Format))}; "
            f"there is {' and '.join(get_args(Format))}."
        )
    graphs = graphs_of(model)
    write = _onnx_writer() if format == "onnx" else _write_program
    folder = Path(folder)
    described: dict[str, Any] = {"format": format, "model": kind_of(model), "graphs": {}}
    with evaluating(model), replacing_folder(folder, "graphs", overwrite=overwrite) as fresh, _quiet():
        for name, graph in graphs.items():
            file = fresh / f"{name}.{_SUFFIXES[format]}"
            run = write(_Module(model, graph), graph, file)
            difference = max(_difference(model, graph, run, name, batch) for batch in _OTHER_BATCHES)
            described["graphs"][name] = {
                "file": file.name,
                "inputs": {key: list(axes) for key, axes in graph.inputs.items()},
                "outputs": list(graph.outputs),
                **({"tokens": [_FEWEST_TOKENS, graph.positions]} if graph.positions else {}),
                "largest_difference": difference,
            }
        (fresh / _DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return folder


def graphs_of(model: nn.Module) -> dict[str, Graph]:
    """Return the graphs that a model is exported as, by name.

    Raises:
        SettingError: upop knows none; the message says what it knows.
    """
    kind = kind_of(model)
    if kind not in _GRAPHS:
        raise SettingError(
            f"A {type(model).__name__} cannot be exported by upop, which knows the graphs of {', '.join(_GRAPHS)}. "
            "Use torch.onnx.export or torch.export.export: a compressed model is an ordinary one to them."
        )
    return _GRAPHS[kind](cast(Any, model).config)


_Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _dynamic(graph: Graph) -> tuple[dict[int, Any], ...]:
    # One symbol per name, so that the file tells which axes go together.
    names = {axis for axes in graph.inputs.values() for axis in axes if isinstance(axis, str)}
    texts = {"min": _FEWEST_TOKENS, "max": graph.positions}
    sizes = {name: torch.export.Dim(name, **({} if name == "batch" else texts)) for name in names}
    return tuple(
        {place: sizes[axis] for place, axis in enumerate(axes) if isinstance(axis, str)}
        for axes in graph.inputs.values()
    )


def _program(module: nn.Module, graph: Graph) -> torch.export.ExportedProgram:
    inputs = graph.draw(_TRACED_BATCH, _TRACED_TOKENS)
    return torch.export.export(module, inputs, dynamic_shapes={"inputs": _dynamic(graph)})


def _write_program(module: nn.Module, graph: Graph, file: Path) -> _Runner:
    torch.export.save(_program(module, graph), file)
    read = torch.export.load(file).module()
    return lambda inputs: _tensors(read(*inputs))


def _onnx_writer() -> Callable[[nn.Module, Graph, Path], _Runner]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise SettingError(
            f"format='onnx' needs {error.name}, which is not installed. Run pip install 'upop[export]'."
        ) from None

    def write(module: nn.Module, graph: Graph, file: Path) -> _Runner:
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
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda inputs: [
            torch.from_numpy(value)
            for value in session.run(
                list(graph.outputs),
                {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)},
            )
        ]

    return write


def _difference(model: nn.Module, graph: Graph, run: _Runner, name: str, batch: int) -> float:
    inputs = graph.draw(batch, _OTHER_TOKENS)
    expected, found = _tensors(graph.forward(model, *inputs)), run(inputs)
    worst = 0.0
    for output, wanted, got in zip(graph.outputs, expected, found, strict=True):
        difference = (
            float((wanted - got).abs().max() / wanted.abs().max()) if wanted.shape == got.shape else float("inf")
        )
        if not difference <= _TOLERANCE:
            raise VerificationError(
                f"The exported graph {name!r} does not compute what the model does: {output} {tuple(got.shape)} "
                f"differs by {difference:.2e} of its largest entry in a batch of {batch}, "
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


# Inputs of the graphs ------------------------------------------------------------------------------------------------

_TEXT: tuple[str | int, ...] = ("batch", "tokens")


def _picture(config: Any) -> tuple[str | int, ...]:
    return ("batch", 3, config.image_size, config.image_size)


def _sizes(config: Any) -> tuple[int, int]:
    return config.vocab_size, config.max_positions


def _states(config: Any) -> tuple[str | int, ...]:
    return ("batch", 1 + (config.image_size // config.patch_size) ** 2, config.vision_width)


def _caption(config: Any) -> dict[str, Graph]:
    words = {"input_ids": _TEXT, "attention_mask": _TEXT}
    return {
        "vision": Graph(lambda model, images: model.visual_encoder(images), {"images": _picture(config)}, ("states",)),
        "decoder": Graph(
            lambda model, ids, mask, states: (
                model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=states, use_cache=False).logits
            ),
            {**words, "states": _states(config)},
            ("logits",),
            *_sizes(config),
        ),
    }


def _vqa(config: Any) -> dict[str, Graph]:
    question = {"question_ids": _TEXT, "question_mask": _TEXT}
    return {
        "question": Graph(
            lambda model, *inputs: model.encode(*inputs)[1],
            {"images": _picture(config), **question},
            ("states",),
            *_sizes(config),
        ),
        "decoder": Graph(
            lambda model, *inputs: model.decode(*inputs),
            {
                "answer_ids": ("batch", "answer_tokens"),
                "answer_mask": ("batch", "answer_tokens"),
                "states": (*_TEXT, config.text_width),
                "question_mask": _TEXT,
            },
            ("logits",),
            *_sizes(config),
        ),
    }


def _nlvr(config: Any) -> dict[str, Graph]:
    return {
        "model": Graph(
            lambda model, first, second, ids, mask: model(torch.cat([first, second]), ids, mask),
            {"images0": _picture(config), "images1": _picture(config), "input_ids": _TEXT, "attention_mask": _TEXT},
            ("logits",),
            *_sizes(config),
        )
    }


def _retrieval(config: Any) -> dict[str, Graph]:
    words = {"input_ids": _TEXT, "attention_mask": _TEXT}
    return {
        "image": Graph(
            lambda model, images: model.encode_image(images), {"images": _picture(config)}, ("states", "features")
        ),
        "text": Graph(lambda model, *words: model.encode_text(*words)[1], words, ("features",), *_sizes(config)),
        "match": Graph(
            lambda model, *inputs: model.match(*inputs),
            {"states": _states(config), **words},
            ("logits",),
            *_sizes(config),
        ),
    }


def _clip(config: Any) -> dict[str, Graph]:
    return {
        "image": Graph(
            lambda model, images: nn.functional.normalize(model.encode_image(images), dim=-1),
            {"images": _picture(config)},
            ("features",),
        ),
        "text": Graph(
            lambda model, ids: nn.functional.normalize(model.encode_text(ids), dim=-1),
            {"input_ids": _TEXT},
            ("features",),
            *_sizes(config),
        ),
    }


def _pictures_alone(config: Any) -> dict[str, Graph]:
    return {"model": Graph(lambda model, images: model(images), {"images": _picture(config)}, ("logits",))}


_GRAPHS: dict[str, Callable[[Any], dict[str, Graph]]] = {
    "blip-caption": _caption,
    "blip-vqa": _vqa,
    "blip-nlvr": _nlvr,
    "blip-retrieval": _retrieval,
    "clip-retrieval": _clip,
    "classifier": _pictures_alone,
    "segmenter": _pictures_alone,
}
