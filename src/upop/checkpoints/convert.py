"""Converts models between three forms: published file, folder of upop, and transformers' own class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from upop.checkpoints.fitting.carried import refuse_cross_tokens
from upop.checkpoints.fitting.fit import kept_sizes, load_strictly
from upop.checkpoints.fitting.sizes import resize
from upop.checkpoints.names.counterparts import counterpart_of
from upop.checkpoints.official import load_official, save_official
from upop.checkpoints.opening import Checkpoint, open_checkpoint
from upop.checkpoints.published.tasks import task_for, task_of
from upop.checkpoints.saving.folder import save
from upop.checkpoints.saving.quantizer import mark
from upop.errors import VerificationError
from upop.files import check_folder
from upop.models import kind_of
from upop.ownership import refuse_foreign_file, wrote_archive
from upop.pruning import find_prunable
from upop.pruning.costs import evaluating

Form = Literal["official", "upop", "hugging-face"]

TOLERANCE = 1e-5
"""Largest difference of an output that a conversion may make, relative to the output's largest element."""


def read_model(source: str | Path | Checkpoint, task: str | None = None, **overrides: Any) -> nn.Module:
    """Read a checkpoint of any format as one of upop's own models.

    Args:
        source: a published file, a folder of upop, transformers, timm or open_clip, or a name on the hub.
        task: the task of a published file; by default inferred from its tensor names.
        overrides: fields of the configuration that a published file does not determine; see `load_official`.

    Raises:
        CheckpointError: it cannot be read, or none of upop's own models computes the same.
        SettingError: the task or an override is unknown.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.library == "upop":  # with its plan
        return checkpoint.load()
    stated = checkpoint.own().task
    if stated is None:
        stated = task or task_of(checkpoint.state, str(checkpoint.path))
    return load_official(stated, checkpoint, **overrides)


def write_model(model: nn.Module, target: str | Path, form: Form, *, overwrite: bool = False) -> Path:
    """Write one of upop's own models in one of the three forms.

    Tensors for training only (momentum encoders, queues, the temperature) are left out of the transformers form, whose
    class is verified to compute the same outputs.

    Args:
        model: the model.
        target: a file for a published checkpoint, else a folder.
        form: which of the three.
        overwrite: see `save_official` and `save`.

    Raises:
        CheckpointError: this model has no such form.
        VerificationError: the outputs differ.
        RunFolderError: the target is not upop's, or it cannot be written; nothing was changed.
    """
    check_target(target, form, overwrite=overwrite)
    if form == "official":
        return save_official(task_for(model), model, target, overwrite=overwrite)
    return save(to_transformers(model) if form == "hugging-face" else model, target, overwrite=overwrite)


def check_target(target: str | Path, form: Form, *, overwrite: bool = False) -> None:
    """Refuse a target that `write_model` may not replace, before any work.

    Raises:
        RunFolderError: the target is not upop's; the message says why.
    """
    if form == "official":
        refuse_foreign_file(Path(target), overwrite or wrote_archive)
    else:
        check_folder(Path(target), "model", overwrite=overwrite)


@torch.no_grad()
def to_transformers(model: nn.Module) -> PreTrainedModel:
    """Convert a model of upop, dense or compressed, to transformers' own class, in evaluation mode.

    Raises:
        CheckpointError: transformers has no class for it, or none with its cross tokens.
        VerificationError: its outputs differ.
    """
    row = counterpart_of(kind_of(model), type(model).__name__)
    refuse_cross_tokens(model, "transformers' class")
    config = row.config(model.config)
    kind = getattr(transformers, _class_for(config, row.kind))
    theirs: PreTrainedModel = kind(config)
    state = row.export(model.state_dict())
    groups = find_prunable(theirs).groups
    kept = kept_sizes(groups, state, type(model).__name__)
    resize(theirs, {group.name: (kept[group.name], group.size) for group in groups if kept[group.name] < group.size})
    load_strictly(theirs, state, type(model).__name__)
    theirs.eval().to(dtype=next(model.parameters()).dtype)
    verify_same(model, theirs)
    mark(theirs)
    return theirs


@torch.no_grad()
def verify_same(model: nn.Module, theirs: PreTrainedModel) -> float:
    """Return the largest relative difference between the outputs of a model and its counterpart.

    Raises:
        VerificationError: it is above `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    with evaluating(model), evaluating(theirs):
        pairs = _OUTPUTS[str(kind_of(model))](model, theirs, generator)
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"transformers' {type(theirs).__name__} does not compute what the {type(model).__name__} does: outputs "
            f"differ by {worst:.1e} of their largest element, {TOLERANCE:.0e} is allowed. The model has parts that "
            "this class lacks; nothing was written."
        )
    return worst


def _class_for(config: Any, kind: str) -> str:
    return "DeiTForImageClassificationWithTeacher" if config.model_type == "deit" else kind


Outputs = list[tuple[Tensor, Tensor]]
_BATCH, _WORDS = 2, 6


def _images(config: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
    shape = (_BATCH, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=generator).to(next(model.parameters()))


def _texts(config: Any, generator: torch.Generator, first: int) -> dict[str, Tensor]:
    """Return texts of two lengths, with the first token that upop's models expect."""
    words = min(_WORDS, config.max_positions)
    ids = torch.randint(1, max(2, config.vocab_size - 2), (_BATCH, words), generator=generator)
    ids[:, 0] = first
    mask = torch.ones_like(ids)
    mask[1, max(2, words - 2) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _caption(model: Any, theirs: Any, generator: torch.Generator) -> Outputs:
    images = _images(model.config, model, generator)
    words = _texts(model.config, generator, model.config.vocab_size - 2)
    return [(model(images, **words), theirs(pixel_values=images, **words).logits)]


def _vqa(model: Any, theirs: Any, generator: torch.Generator) -> Outputs:
    config = model.config
    images = _images(config, model, generator)
    question = _texts(config, generator, config.vocab_size - 1)
    # transformers' decoder attends to the padding of a question, so the compared questions have none.
    question["attention_mask"].fill_(1)
    answer = _texts(config, generator, config.vocab_size - 2)
    _, states = model.encode(images, question["input_ids"], question["attention_mask"])
    ours = model.decode(answer["input_ids"], answer["attention_mask"], states, question["attention_mask"])
    decoder = {f"decoder_{name}": value for name, value in answer.items()}
    return [(ours, _decoded(theirs, images, question, decoder))]


def _decoded(theirs: Any, images: Tensor, question: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of the answer, which the class computes but does not return."""
    found: list[Tensor] = []
    hook = theirs.text_decoder.register_forward_hook(lambda _module, _inputs, outputs: found.append(outputs.logits))
    try:
        theirs(pixel_values=images, **question, **decoder)
    finally:
        hook.remove()
    return found[0]


def _retrieval(model: Any, theirs: Any, generator: torch.Generator) -> Outputs:
    images = _images(model.config, model, generator)
    words = _texts(model.config, generator, model.config.vocab_size - 1)
    states, image = model.encode_image(images)
    _, text = model.encode_text(**words)
    compared = theirs(pixel_values=images, **words, use_itm_head=False).itm_score
    return [
        (model.match(states, **words), theirs(pixel_values=images, **words).itm_score),
        (image @ text.t(), compared),
    ]


def _clip(model: Any, theirs: Any, generator: torch.Generator) -> Outputs:
    images = _images(model.config, model, generator)
    ids = _texts(model.config, generator, model.config.vocab_size - 2)["input_ids"]
    ids[:, -1] = model.config.vocab_size - 1
    found = theirs(pixel_values=images, input_ids=ids)
    image, text = model(images, ids)
    return [(image, found.image_embeds), (text, found.text_embeds)]


def _classifier(model: Any, theirs: Any, generator: torch.Generator) -> Outputs:
    images = _images(model.config, model, generator)
    return [(model(images), theirs(pixel_values=images).logits)]


_OUTPUTS: Mapping[str, Callable[[Any, Any, torch.Generator], Outputs]] = {
    "blip-caption": _caption,
    "blip-vqa": _vqa,
    "blip-retrieval": _retrieval,
    "clip-retrieval": _clip,
    "classifier": _classifier,
}
