"""Published checkpoints, dense and compressed, into ready models: one row per task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from upop.checkpoints.fit import fit, load_strictly, resize_positions
from upop.checkpoints.read import read_weights
from upop.errors import CheckpointError, SettingError, nearest
from upop.models.blip import BlipConfig
from upop.models.nlvr import BlipNlvr, NlvrConfig

State = Mapping[str, Tensor]

_HEAD_DIM = 64  # of every published model


@dataclass(frozen=True)
class _Official:
    """How a task's published checkpoints become a model.

    Attributes:
        config: class of the model's configuration.
        model: makes the model from it.
        read_config: reads the configuration off a checkpoint's shapes; KeyError names a tensor that is missing.
        adapt: makes the tensors of a checkpoint those of the model (names, sizes of positions and queues).
        start: does so before, for a checkpoint of another task that a model is fine-tuned from.
        may_start_afresh: says which of the model's keys such a checkpoint may lack.
    """

    config: type[Any]
    model: Callable[[Any], nn.Module]
    read_config: Callable[[State], dict[str, Any]]
    adapt: Callable[[State, Any], dict[str, Tensor]]
    start: Callable[[State], dict[str, Tensor]]
    may_start_afresh: Callable[[str], bool]


def load_official(task: str, path: str | Path, **overrides: Any) -> nn.Module:
    """Return the model in a published checkpoint, dense or compressed, ready to use (evaluation mode).

    Sizes are read off the shapes; kept entries too. What shapes cannot tell has the published value, and can be
    overridden: numbers of heads (`vision_heads`, `text_heads`; width / 64 otherwise), MLP widths before pruning
    (`vision_mlp`, `text_mlp`; 4 x width otherwise), `image_size` (position embeddings are resized), dropout.

    Args:
        task: "nlvr".
        path: a `.pth` with `{"model": state_dict}`, or a `.safetensors` file.
        overrides: fields of the task's configuration.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        SettingError: the task or an override is unknown.
    """
    row = _row(task)
    state = read_weights(path)
    config = _config(row, state, str(path), overrides)
    state = row.adapt(state, config)
    # The published ViT keeps dividing by the square root of its dense head_dim after compression; BERT does not.
    return fit(row.model(config), state, str(path), lambda unit: unit.modality == "vision").eval()


def start_from(task: str, path: str | Path, model: nn.Module) -> list[str]:
    """Put the weights of a published checkpoint into a dense model that is to be fine-tuned.

    Position embeddings are resized; for "nlvr", single cross-attentions become twins. What the checkpoint lacks keeps
    its initial values.

    Returns:
        The keys that the checkpoint lacks ("nlvr": the head and the merge layers).

    Raises:
        CheckpointError: the file cannot be read or does not fit otherwise.
    """
    row = _row(task)
    state = row.adapt(row.start(read_weights(path)), model.config)
    known = model.state_dict()
    # Pre-trained checkpoints carry heads of other tasks; only whole modules that this model lacks are left out.
    towers = tuple({f"{key.split('.')[0]}." for key in known})
    state = {key: value for key, value in state.items() if key.startswith(towers)}
    return load_strictly(model, state, str(path), row.may_start_afresh)


def _row(task: str) -> _Official:
    if task not in _TASKS:
        raise SettingError(f"task={task!r} is not known{nearest(task, list(_TASKS))}; known are {sorted(_TASKS)}.")
    return _TASKS[task]


def _config(row: _Official, state: State, source: str, overrides: dict[str, Any]) -> Any:
    unknown = [name for name in overrides if name not in row.config.model_fields]
    if unknown:
        raise SettingError(
            f"{unknown[0]!r} is no field of {row.config.__name__}{nearest(unknown[0], list(row.config.model_fields))}."
        )
    try:
        return row.config(**{**row.read_config(state), **overrides})
    except KeyError as error:
        raise CheckpointError(
            f"{source} lacks {error.args[0]}, so it is no checkpoint of this task. It holds {len(state)} tensors, "
            f"such as {', '.join(sorted(state)[:4])}."
        ) from None
    except ValidationError as error:
        raise SettingError(f"{source}: {error}") from error


def _layers(state: State, pattern: str) -> int:
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def _blip_config(state: State, text: str = "text_encoder") -> dict[str, Any]:
    """Return the sizes of a BLIP model; `text` is the path of its (first) text tower."""
    patches = state["visual_encoder.patch_embed.proj.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    words = state[f"{text}.embeddings.word_embeddings.weight"]
    return {
        "patch_size": patch,
        "image_size": math.isqrt(state["visual_encoder.pos_embed"].shape[1] - 1) * patch,
        "vision_width": width,
        "vision_depth": _layers(state, r"visual_encoder\.blocks\.(\d+)\."),
        "vision_heads": max(1, width // _HEAD_DIM),
        "vision_mlp": 4 * width,
        "text_width": words.shape[1],
        "text_depth": _layers(state, rf"{re.escape(text)}\.encoder\.layer\.(\d+)\."),
        "text_heads": max(1, words.shape[1] // _HEAD_DIM),
        "text_mlp": 4 * words.shape[1],
        "vocab_size": words.shape[0],
        "max_positions": state[f"{text}.embeddings.position_embeddings.weight"].shape[0],
    }


def _nlvr_config(state: State) -> dict[str, Any]:
    if "cls_head.0.weight" not in state:
        raise KeyError("cls_head.0.weight")
    config = _blip_config(state)
    merged = [int(key.split(".")[3]) for key in state if key.endswith("crossattention.output.merge_layer.weight")]
    return {**config, "merge_from": min(merged, default=config["text_depth"])}


def _resized(state: State, config: BlipConfig) -> dict[str, Tensor]:
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    return {
        key: resize_positions(value, tokens) if key == "visual_encoder.pos_embed" else value
        for key, value in state.items()
    }


def _twinned(state: State) -> dict[str, Tensor]:
    """Copy every single cross-attention of the text encoder to both twins."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        head, cross, tail = key.partition(".crossattention.")
        if cross and tail.startswith(("self.", "output.dense.")):
            for twin in "01":
                result[head + cross + tail.replace("self.", f"self{twin}.").replace("dense.", f"dense{twin}.")] = value
        else:
            result[key] = value
    return result


_TASKS = {
    "nlvr": _Official(
        NlvrConfig,
        BlipNlvr,
        _nlvr_config,
        _resized,
        _twinned,
        lambda key: "merge_layer" in key or key.startswith("cls_head."),
    ),
}
