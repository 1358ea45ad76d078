"""Published checkpoints, dense and compressed, into ready models: one row per task."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from upop.checkpoints.blank import outline
from upop.checkpoints.classifier_layout import classifier_sizes, named_sizes
from upop.checkpoints.classifier_layout import with_positions as classifier_positions
from upop.checkpoints.clip_layout import clip_complete, clip_sizes, crossget_start, crossget_state, with_queues
from upop.checkpoints.clip_names import to_openai
from upop.checkpoints.fit import build_to_fit, expecting_shapes, fit, load_strictly, resize_positions, scale_queries
from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.checkpoints.segmenter_layout import as_encoder, segmenter_sizes, with_positions
from upop.checkpoints.sizes import sizes_before
from upop.checkpoints.vit_sizes import HEAD_DIM, State, count_layers, vit_sizes
from upop.errors import CheckpointError, SettingError, nearest
from upop.files import make_folder, replacing_file
from upop.models.blip import BlipConfig
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.classifier import ClassifierConfig, build_classifier
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.crossget import CrossGetClip, CrossGetConfig
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig
from upop.ownership import wrote_archive
from upop.pruning import Group, find_groups
from upop.values import problems


@dataclass(frozen=True)
class Official:
    """How a task's published checkpoints become a model.

    Attributes:
        config: class of the model's configuration.
        model: makes the model from it.
        read_config: reads the configuration off a checkpoint's shapes; KeyError names a tensor that is missing.
        adapt: makes the tensors of a checkpoint those of the model (names, sizes of positions and queues).
        start: does so before, for a checkpoint of another task that a model is fine-tuned from.
        may_start_afresh: says which of the model's keys such a checkpoint may lack.
        fixed_scale: says of which groups the published code keeps the dense softmax scale after compression.
        export: makes the tensors of a model those of a published checkpoint.
        implied: what overrides say of sizes beside themselves.
    """

    config: type[Any]
    model: Callable[[Any], nn.Module]
    read_config: Callable[[State], dict[str, Any]]
    adapt: Callable[[State, Any], dict[str, Tensor]]
    start: Callable[[State], dict[str, Tensor]]
    may_start_afresh: Callable[[str], bool]
    fixed_scale: Callable[[Group], bool] = lambda group: group.modality == "vision"
    export: Callable[[State], dict[str, Tensor]] = dict
    implied: Callable[[dict[str, Any]], dict[str, Any]] = lambda _overrides: {}


def load_official(task: str, path: str | Path | Checkpoint, *, strict: bool = True, **overrides: Any) -> nn.Module:
    """Return the model in a published checkpoint, dense or compressed, ready to use (evaluation mode).

    Sizes are read off the shapes; kept channels too. What shapes cannot tell has the published value, and can be
    overridden: numbers of heads (`vision_heads`, `text_heads`; width / 64 otherwise), MLP widths before pruning
    (`vision_mlp`, `text_mlp`; 4 x width otherwise), `image_size` (position embeddings are resized), dropout.

    Args:
        task: name of the task, or of the model that its checkpoints are known by ("deit", "clip").
        path: a `.pth` with `{"model": state_dict}`, a `.safetensors` file, a folder of transformers, timm, open_clip or
            `upop.save`, or the name of one on the hub ("Salesforce/blip-vqa-base").
        strict: False warns of weights that are missing, unexpected, of another shape or not finite; where there are
            none, the model keeps what it was built with.
        overrides: fields of the task's configuration.

    Raises:
        CheckpointError: the file cannot be read or does not fit; what does not is listed.
        SettingError: the task or an override is unknown.
    """
    row = row_of(task)
    checkpoint = open_checkpoint(path)
    source, found = str(checkpoint.path if path is checkpoint else path), checkpoint.own()
    if found.task is not None and found.task != _ALIASES.get(task, task):
        raise CheckpointError(
            f"{source} holds a {found.kind}, which is a model for {found.task!r}; asked for was {task!r}."
        )
    read = found.read(strict)
    config = _config(row, read, source, {**found.sizes, **overrides})
    with expecting_shapes(source):
        state = row.adapt(read, config)
    # The published ViT keeps dividing by the square root of its dense head_dim after compression; BERT does not, and
    # no class of transformers does.
    fixed_scale = row.fixed_scale if found.task is None else lambda _group: False
    model = build_to_fit(lambda: row.model(config), state, source, strict=strict)
    model = fit(model, state, source, fixed_scale, strict=strict).eval()
    if checkpoint.description is None:
        return model
    from upop.checkpoints.formats import ours

    return ours.merging_as_saved(model, checkpoint.description, checkpoint.path)


def save_official(task: str, model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model, dense or compressed, as a published checkpoint that `load_official` and the published code read.

    Args:
        task: as `load_official` takes it.
        model: one of this task's models; it stays as it is.
        path: of the `.pth` file, which will hold `{"model": state_dict}`.
        overwrite: whether a file that is there already may be replaced though upop did not write it.

    Raises:
        SettingError: the task is unknown.
        CheckpointError: the model is another task's.
        RunFolderError: there is a file that upop did not write, or it cannot be written; nothing was changed.
    """
    row = row_of(task)
    if not isinstance(getattr(model, "config", None), row.config):
        raise CheckpointError(f"A {type(model).__name__} cannot be written as a checkpoint of {task!r}.")
    groups = find_groups(model)
    dense = sizes_before(groups, outline(lambda: row.model(model.config)))
    model = copy.deepcopy(model).cpu()
    for group in groups:
        if 0 < group.size < dense[group.name] and row.fixed_scale(group):
            scale_queries(model, group, group.size, math.sqrt(dense[group.name] / group.size))
    make_folder(Path(path).parent)
    with replacing_file(Path(path), overwrite or wrote_archive) as part:
        torch.save({"model": row.export(model.state_dict())}, part)
    return Path(path)


def start_from(task: str, path: str | Path | Checkpoint, model: nn.Module, *, any_towers: bool = False) -> list[str]:
    """Put the weights of a published checkpoint into a dense model that is to be fine-tuned.

    Position embeddings are resized; for "nlvr", single cross-attentions become twins, and from "nlvr" to other tasks
    twins become single ones. What the checkpoint lacks keeps its initial values.

    Args:
        task: of the dense model.
        path: a published file, or a folder with one of upop's own models.
        model: the dense model.
        any_towers: whether the checkpoint may be of another task, and lack whole towers.

    Returns:
        The keys that the checkpoint lacks (for "nlvr" the head and the merge layers).

    Raises:
        CheckpointError: the file cannot be read or does not fit otherwise.
    """
    row = row_of(task)
    checkpoint = open_checkpoint(path)
    source = str(checkpoint.path)
    with expecting_shapes(source):
        state = row.adapt(row.start(checkpoint.own().read(True)), model.config)
    known = model.state_dict()
    # Pre-trained checkpoints carry heads of other tasks; only whole modules that this model lacks are left out.
    towers = {key.split(".")[0] for key in known}
    state = {key: value for key, value in state.items() if key.split(".")[0] in towers}
    held = {key.split(".")[0] for key in state}
    if not held:
        raise CheckpointError(f"{source} holds nothing that a model for {task} has. Start from a related model.")
    return load_strictly(
        model,
        state,
        source,
        lambda key: row.may_start_afresh(key) or (any_towers and key.split(".")[0] not in held),
    )


def task_of(state: State, source: str) -> str:
    """Return the task whose model has tensors of these names.

    Raises:
        CheckpointError: no task's has.
    """
    names = set(state)
    towers = {name.partition(".")[0] for name in names}
    for task, held in _TELLING.items():
        if all(part in names or part in towers for part in held):
            return task
    raise CheckpointError(
        f"{source} holds no model of a known task: {len(names)} tensors, such as {', '.join(sorted(names)[:4])}. "
        f"Say which one with --task: {', '.join(sorted(_TASKS))}."
    )


def task_for(model: nn.Module) -> str:
    """Return the task whose published checkpoints hold such models.

    Raises:
        CheckpointError: it is none of upop's own models.
    """
    task = task_of_config(type(getattr(model, "config", None)))
    if task is None:
        raise CheckpointError(
            f"A {type(model).__name__} has no published form; the models of {', '.join(sorted(_TASKS))} have one."
        )
    return task


def task_of_config(config: type[Any]) -> str | None:
    """Return the task whose model has a configuration of this class; None if none has."""
    return next((task for task, row in _TASKS.items() if row.config is config), None)


# Names of tensors or of whole modules by which a task's model is known; the first that fits counts.
_TELLING = {
    "nlvr": ("visual_encoder", "text_encoder", "cls_head"),
    "retrieval": ("visual_encoder", "text_encoder", "itm_head"),
    "vqa": ("visual_encoder", "text_encoder", "text_decoder"),
    "caption": ("visual_encoder", "text_decoder"),
    "retrieval-crossget": ("visual.transformer.cross_image",),
    "retrieval-clip": ("visual.conv1.weight",),
    "segmentation": ("encoder", "decoder"),
    "classification": ("patch_embed.proj.weight", "head"),
}


def row_of(task: str) -> Official:
    """Return how a task's published checkpoints become a model; SettingError where the task is unknown."""
    name = _ALIASES.get(task, task)
    if name not in _TASKS:
        known = sorted([*_TASKS, *_ALIASES])
        raise SettingError(f"task={task!r} is not known{nearest(task, known)}; known are {known}.")
    return _TASKS[name]


def _config(row: Official, state: State, source: str, overrides: dict[str, Any]) -> Any:
    unknown = [name for name in overrides if name not in row.config.model_fields]
    if unknown:
        raise SettingError(
            f"{unknown[0]!r} is no field of {row.config.__name__}{nearest(unknown[0], list(row.config.model_fields))}."
        )
    try:
        with expecting_shapes(source):
            return row.config(**{**row.read_config(state), **row.implied(overrides), **overrides})
    except KeyError as error:
        raise CheckpointError(
            f"{source} lacks {error.args[0]}, so it is no checkpoint of this task. It holds {len(state)} tensors, "
            f"such as {', '.join(sorted(state)[:4])}."
        ) from None
    except ValidationError as error:
        raise SettingError(f"{source}: sizes do not fit:\n  " + "\n  ".join(problems(error))) from error


def _blip_config(state: State, text: str = "text_encoder") -> dict[str, Any]:
    """Return the sizes of a BLIP model; `text` is the path of its (first) text tower."""
    vision = vit_sizes(state, "visual_encoder.")
    words = state[f"{text}.embeddings.word_embeddings.weight"]
    return {
        **vision,
        "text_width": words.shape[1],
        "text_depth": count_layers(state, rf"{re.escape(text)}\.encoder\.layer\.(\d+)\."),
        "text_heads": max(1, words.shape[1] // HEAD_DIM),
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
    positions = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
    return {key: resize_positions(value, tokens) if key in positions else value for key, value in state.items()}


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


def _untwinned(state: State) -> dict[str, Tensor]:
    """Make the twins of an NLVR model single cross-attentions: the first, its output as the merge layer takes it."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        head, cross, tail = key.partition(".crossattention.")
        output = f"{head}{cross}output"
        merge = state.get(f"{output}.merge_layer.weight")
        if tail.startswith("self0."):
            result[f"{head}{cross}self.{tail.removeprefix('self0.')}"] = value
        elif tail == "output.dense0.weight":
            result[f"{output}.dense.weight"] = value if merge is None else merge[:, : len(value)] @ value
        elif tail == "output.dense0.bias":
            both = torch.cat([value, state[f"{output}.dense1.bias"]])
            merged = value if merge is None else merge @ both + state[f"{output}.merge_layer.bias"]
            result[f"{output}.dense.bias"] = merged
        elif not tail.startswith(("self1.", "output.dense1.", "output.merge_layer.")):
            result[key] = value
    return result


_DECODER = "text_decoder.bert.embeddings"
_DECODER_CROSS = re.compile(r"text_decoder\.bert\.encoder\.layer\.\d+\.crossattention\.self\.(key|value)\.weight")


def _vqa_config(state: State) -> dict[str, Any]:
    if f"{_DECODER}.word_embeddings.weight" not in state:
        raise KeyError(f"{_DECODER}.word_embeddings.weight")
    return _blip_config(state)


def _vqa_start(state: State) -> dict[str, Tensor]:
    """Leave out the decoder's projections of another width: with ViT-L, a pre-trained one looked at the image."""
    state = _untwinned(state)
    widths = {value.shape[1] for key, value in state.items() if key == f"{_DECODER}.word_embeddings.weight"}
    return {key: value for key, value in state.items() if not _DECODER_CROSS.fullmatch(key) or value.shape[1] in widths}


def _retrieval_config(state: State) -> dict[str, Any]:
    config = {**_blip_config(state), "embed_dim": state["vision_proj.weight"].shape[0]}
    if "itm_head.weight" not in state:
        raise KeyError("itm_head.weight")
    return {**config, "queue_size": state["image_queue"].shape[1]} if "image_queue" in state else config


def _requeued(state: State, config: RetrievalConfig) -> dict[str, Tensor]:
    """Resize positions; start queues afresh that are missing or have another size."""
    return with_queues(_resized(state, config), config)


_NEW_FOR_RETRIEVAL = ("vision_proj", "text_proj", "itm_head", "temp")
# A model's name, where a task's checkpoints are known by it.
_ALIASES = {
    "clip": "retrieval-clip",
    "crossget": "retrieval-crossget",
    "deit": "classification",
    "segmenter": "segmentation",
}

_TASKS = {
    "caption": Official(
        CaptionConfig,
        BlipCaption,
        lambda state: _blip_config(state, "text_decoder.bert"),
        _resized,
        dict,
        lambda _key: False,
    ),
    "classification": Official(
        ClassifierConfig,
        build_classifier,
        classifier_sizes,
        classifier_positions,
        dict,
        lambda key: key.startswith("head"),
        implied=named_sizes,
    ),
    "nlvr": Official(
        NlvrConfig,
        BlipNlvr,
        _nlvr_config,
        _resized,
        _twinned,
        lambda key: "merge_layer" in key or key.startswith("cls_head."),
    ),
    "retrieval": Official(
        RetrievalConfig,
        BlipRetrieval,
        _retrieval_config,
        _requeued,
        _untwinned,
        lambda key: key.startswith(_NEW_FOR_RETRIEVAL) or key.split(".")[0].endswith("_m"),
    ),
    "retrieval-clip": Official(
        ClipConfig,
        ClipRetrieval,
        clip_sizes,
        clip_complete,
        dict,
        lambda _key: False,
        fixed_scale=lambda _group: False,  # the published code divides by the root of what is kept, as libraries do
        export=to_openai,
    ),
    "retrieval-crossget": Official(
        CrossGetConfig,
        CrossGetClip,
        clip_sizes,
        crossget_state,
        crossget_start,
        lambda _key: False,
        fixed_scale=lambda _group: False,
        export=to_openai,
    ),
    "segmentation": Official(
        SegmenterConfig,
        Segmenter,
        segmenter_sizes,
        with_positions,
        as_encoder,
        lambda key: key.startswith(("decoder.", "encoder.head.")),
    ),
    "vqa": Official(
        VqaConfig,
        BlipVqa,
        _vqa_config,
        _resized,
        _vqa_start,
        lambda key: bool(_DECODER_CROSS.fullmatch(key)),
    ),
}
