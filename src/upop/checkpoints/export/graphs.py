"""The graphs of a model: functions of tensors with dynamic axes.

A model of upop's own tasks becomes one or more graphs (a captioner: its image encoder, and the decoder that is called
per token), with dynamic batch and text length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from upop.errors import SettingError
from upop.models import kind_of
from upop.tokens.cross import has_cross_tokens
from upop.tokens.encoders import removed_tokens
from upop.tokens.matching import token_counts

TRACED_BATCH, TRACED_TOKENS = 2, 6
FEWEST_TOKENS = 3
"""Shortest text of a graph, padding included: torch.export specialises sizes of 1 and 2."""


@dataclass(frozen=True)
class Graph:
    """One function of a model, to be exported.

    Attributes:
        forward: (model, *inputs) -> a tensor or a tuple of tensors.
        inputs: name -> axes of the input: a name ("batch", "tokens") for a dynamic axis, or a size.
        outputs: names of the outputs.
        words: vocabulary size, for random token ids.
        positions: largest number of tokens of a text.
    """

    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Mapping[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]
    words: int = 0
    positions: int = 0

    def draw(self, batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Return random inputs: token ids, masks with padding in the last row, and values in [-2, 2]."""
        generator = torch.Generator().manual_seed(batch)
        tokens = min(tokens, self.positions or tokens)
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

    def program(self, module: nn.Module) -> torch.export.ExportedProgram:
        """Trace the graph by torch.export.

        Args:
            module: calls `forward` with a tuple `inputs`.
        """
        # One symbol per name, so that equal axes are equal in the file.
        names = {axis for axes in self.inputs.values() for axis in axes if isinstance(axis, str)}
        texts = {"min": FEWEST_TOKENS, "max": self.positions}
        sizes = {name: torch.export.Dim(name, **({} if name == "batch" else texts)) for name in names}
        dynamic = tuple(
            {place: sizes[axis] for place, axis in enumerate(axes) if isinstance(axis, str)}
            for axes in self.inputs.values()
        )
        inputs = self.draw(TRACED_BATCH, TRACED_TOKENS)
        return torch.export.export(module, inputs, dynamic_shapes={"inputs": dynamic})


def own_graphs(model: nn.Module) -> dict[str, Graph] | None:
    """Return the graphs of a model of upop's own tasks, by name; None for any other model."""
    kind = kind_of(model)
    return _GRAPHS[kind](cast(Any, model).config, _image_tokens(model)) if kind in _GRAPHS else None


def sample_inputs(model: nn.Module, graphs: Mapping[str, Graph], sample: Any) -> dict[str, dict[str, Tensor]]:
    """Return the inputs of every graph of a model for a sample, by name and in their order.

    Args:
        model: the model.
        graphs: its graphs, in the order of their calls.
        sample: inputs of the model: a tensor, a tuple of tensors, or a mapping. Inputs that an earlier graph returns
            are computed, and the two images of a sample are separated.

    Raises:
        SettingError: a mapping lacks an input.
    """
    if len(graphs) == 1 and not isinstance(sample, Mapping):
        ((name, graph),) = graphs.items()
        return {name: dict(zip(graph.inputs, as_inputs(graph, sample), strict=True))}
    if not isinstance(sample, Mapping):
        raise SettingError(
            f"A {type(model).__name__} has the graphs {', '.join(graphs)}: give a sample as a mapping "
            f"from {', '.join(dict.fromkeys(name for graph in graphs.values() for name in graph.inputs))}."
        )
    known = {name: value for name, value in sample.items() if isinstance(value, Tensor)}
    if "images" in known:
        halves = known["images"].chunk(2)
        known |= {f"images{place}": half for place, half in enumerate(halves)}
    found = {}
    for name, graph in graphs.items():
        only = len(graphs) == len(graph.inputs) == len(known) == 1  # whatever the caller calls it
        given = tuple(known.values()) if only else as_inputs(graph, known)
        rows = min(len(value) for value in given)  # a sample with several answers: the first
        found[name] = {key: value[:rows].clone() for key, value in zip(graph.inputs, given, strict=True)}
        outputs = graph.forward(model, *found[name].values())
        known |= zip(graph.outputs, (outputs,) if isinstance(outputs, Tensor) else outputs, strict=True)
    return found


def as_inputs(graph: Graph, sample: Any) -> tuple[Tensor, ...]:
    """Return the inputs of a graph, in its order, from the inputs of the model.

    Raises:
        SettingError: an input is missing, or the number differs.
    """
    if isinstance(sample, Mapping):
        absent = [name for name in graph.inputs if name not in sample]
        if absent:
            raise SettingError(f"A sample has no {absent[0]}; the graph takes {', '.join(graph.inputs)}.")
        return tuple(sample[name] for name in graph.inputs)
    given = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
    if len(given) != len(graph.inputs):
        raise SettingError(f"A sample has {len(given)} tensors; the graph takes {', '.join(graph.inputs)}.")
    return given


def _image_tokens(model: nn.Module) -> int:
    """Return how many image tokens the encoder returns: fewer if it merges tokens."""
    config: Any = model.config
    counts = 1 + (config.image_size // config.patch_size) ** 2
    removed = removed_tokens(model)
    led = removed is not None and has_cross_tokens(model)  # by one more token, which others see too
    return token_counts(counts, 1, (removed or [[]])[0])[-1] + led


# Inputs of the graphs ------------------------------------------------------------------------------------------------

_TEXT: tuple[str | int, ...] = ("batch", "tokens")


def _image(config: Any) -> tuple[str | int, ...]:
    return ("batch", 3, config.image_size, config.image_size)


def _sizes(config: Any) -> tuple[int, int]:
    return config.vocab_size, config.max_positions


def _states(config: Any, tokens: int) -> tuple[str | int, ...]:
    return ("batch", tokens, config.vision_width)


def _caption(config: Any, tokens: int) -> dict[str, Graph]:
    words = {"input_ids": _TEXT, "attention_mask": _TEXT}
    return {
        "vision": Graph(lambda model, images: model.visual_encoder(images), {"images": _image(config)}, ("states",)),
        "decoder": Graph(
            lambda model, ids, mask, states: (
                model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=states, use_cache=False).logits
            ),
            {**words, "states": _states(config, tokens)},
            ("logits",),
            *_sizes(config),
        ),
    }


def _vqa(config: Any, _tokens: int) -> dict[str, Graph]:
    question = {"question_ids": _TEXT, "question_mask": _TEXT}
    return {
        "question": Graph(
            lambda model, *inputs: model.encode(*inputs)[1],
            {"images": _image(config), **question},
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


def _nlvr(config: Any, _tokens: int) -> dict[str, Graph]:
    return {
        "model": Graph(
            lambda model, first, second, ids, mask: model(torch.cat([first, second]), ids, mask),
            {"images0": _image(config), "images1": _image(config), "input_ids": _TEXT, "attention_mask": _TEXT},
            ("logits",),
            *_sizes(config),
        )
    }


def _retrieval(config: Any, tokens: int) -> dict[str, Graph]:
    words = {"input_ids": _TEXT, "attention_mask": _TEXT}
    return {
        "image": Graph(
            lambda model, images: model.encode_image(images), {"images": _image(config)}, ("states", "features")
        ),
        "text": Graph(lambda model, *words: model.encode_text(*words)[1], words, ("features",), *_sizes(config)),
        "match": Graph(
            lambda model, *inputs: model.match(*inputs),
            {"states": _states(config, tokens), **words},
            ("logits",),
            *_sizes(config),
        ),
    }


def _clip(config: Any, _tokens: int) -> dict[str, Graph]:
    return {
        "image": Graph(
            lambda model, images: nn.functional.normalize(model.encode_image(images), dim=-1),
            {"images": _image(config)},
            ("features",),
        ),
        "text": Graph(
            lambda model, ids: nn.functional.normalize(model.encode_text(ids), dim=-1),
            {"input_ids": _TEXT},
            ("features",),
            *_sizes(config),
        ),
    }


def _images_alone(config: Any, _tokens: int) -> dict[str, Graph]:
    return {"model": Graph(lambda model, images: model(images), {"images": _image(config)}, ("logits",))}


_GRAPHS: dict[str, Callable[[Any, int], dict[str, Graph]]] = {
    "blip-caption": _caption,
    "blip-vqa": _vqa,
    "blip-nlvr": _nlvr,
    "blip-retrieval": _retrieval,
    "clip-retrieval": _clip,
    "classifier": _images_alone,
    "segmenter": _images_alone,
}
