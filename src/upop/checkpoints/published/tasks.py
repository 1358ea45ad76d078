"""How published checkpoints become models of upop: one row per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from upop.checkpoints.fitting.fit import build_to_fit, expecting_shapes, fit
from upop.checkpoints.names.clip import to_openai
from upop.checkpoints.published.blip import (
    DECODER_CROSS,
    blip_sizes,
    nlvr_sizes,
    resized_positions,
    retrieval_sizes,
    vqa_sizes,
    vqa_start,
    with_new_queues,
    with_one_branch,
    with_two_branches,
)
from upop.checkpoints.published.clip import clip_complete, clip_sizes, crossget_start, crossget_state
from upop.checkpoints.published.vit import (
    State,
    as_encoder,
    classifier_positions,
    classifier_sizes,
    named_sizes,
    segmenter_positions,
    segmenter_sizes,
)
from upop.errors import CheckpointError, SettingError, nearest
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.classifier import ClassifierConfig, build_classifier
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.crossget import CrossGetClip, CrossGetConfig
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig
from upop.pruning import Group
from upop.values import problems


@dataclass(frozen=True)
class Official:
    """How the published checkpoints of a task become a model.

    Attributes:
        config: class of the model's configuration.
        model: builds the model from its configuration.
        read_config: infers the configuration from the shapes of a checkpoint; KeyError names a missing tensor.
        adapt: converts the tensors of a checkpoint to those of the model: names, sizes of positions and queues.
        start: converts those of another task's checkpoint beforehand, to fine-tune from it.
        may_start_afresh: whether such a checkpoint may lack a key of the model.
        fixed_scale: whether the published code keeps the dense softmax scale of a compressed group.
        export: converts the tensors of a model to those of a published checkpoint.
        implied: sizes that follow from overrides.
    """

    config: type[Any]
    model: Callable[[Any], nn.Module]
    read_config: Callable[[State], dict[str, Any]]
    adapt: Callable[[State, Any], dict[str, Tensor]]
    start: Callable[[State], dict[str, Tensor]]
    may_start_afresh: Callable[[str], bool]
    fixed_scale: Callable[[Group], bool] = lambda group: group.modality == "vision"
    export: Callable[[State], dict[str, Tensor]] = dict
    implied: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _overrides: {}


def build_model(
    task: str,
    tensors: State,
    source: str,
    sizes: Mapping[str, Any] | None = None,
    *,
    library_scale: bool = False,
    strict: bool = True,
) -> nn.Module:
    """Build the model of a published checkpoint from its tensors, in evaluation mode.

    Args:
        task: the name of the task, or of its model.
        tensors: tensors under the published names.
        source: their origin, for messages.
        sizes: fields of the model's configuration that the shapes do not determine.
        library_scale: whether attention divides by the square root of the kept head_dim, as transformers, timm and
            open_clip do. The published ViT keeps dividing by that of the dense one.
        strict: False warns of misfits; missing weights keep their initial values.

    Raises:
        CheckpointError: the tensors do not fit; misfits are listed.
        SettingError: the task or a field is unknown.
    """
    row = row_of(task)
    config = _config(row, tensors, source, sizes or {})
    with expecting_shapes(source):
        state = row.adapt(tensors, config)
    fixed_scale = row.fixed_scale if not library_scale else lambda _group: False
    model = build_to_fit(lambda: row.model(config), state, source, strict=strict)
    return fit(model, state, source, fixed_scale, strict=strict).eval()


def task_of(state: State, source: str) -> str:
    """Infer the task of a checkpoint from its tensor names.

    Raises:
        CheckpointError: they fit no task.
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
    """Return the task whose published checkpoints hold models like this one.

    Raises:
        CheckpointError: it is not one of upop's own models.
    """
    task = task_of_config(type(getattr(model, "config", None)))
    if task is None:
        raise CheckpointError(
            f"A {type(model).__name__} has no published form; the models of {', '.join(sorted(_TASKS))} have one."
        )
    return task


def task_of_config(config: type[Any]) -> str | None:
    """Return the task whose model has this configuration class, or None."""
    return next((task for task, row in _TASKS.items() if row.config is config), None)


# Names of tensors or modules that identify a task's model; the first match counts.
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


def task_named(task: str) -> str:
    """Return the name of a task, given that name or the name of its model ("deit", "clip").

    Raises:
        SettingError: the task is unknown.
    """
    name = _ALIASES.get(task, task)
    if name not in _TASKS:
        known = sorted([*_TASKS, *_ALIASES])
        raise SettingError(f"task={task!r} is not known{nearest(task, known)}; known are {known}.")
    return name


def row_of(task: str) -> Official:
    """Return the row of a task, given as for `task_named`."""
    return _TASKS[task_named(task)]


def _config(row: Official, state: State, source: str, overrides: Mapping[str, Any]) -> Any:
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


_NEW_FOR_RETRIEVAL = ("vision_proj", "text_proj", "itm_head", "temp")
# Names of models by which the checkpoints of a task are known.
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
        lambda state: blip_sizes(state, "text_decoder.bert"),
        resized_positions,
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
        nlvr_sizes,
        resized_positions,
        with_two_branches,
        lambda key: "merge_layer" in key or key.startswith("cls_head."),
    ),
    "retrieval": Official(
        RetrievalConfig,
        BlipRetrieval,
        retrieval_sizes,
        with_new_queues,
        with_one_branch,
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
        segmenter_positions,
        as_encoder,
        lambda key: key.startswith(("decoder.", "encoder.head.")),
    ),
    "vqa": Official(
        VqaConfig,
        BlipVqa,
        vqa_sizes,
        resized_positions,
        vqa_start,
        lambda key: bool(DECODER_CROSS.fullmatch(key)),
    ),
}
