"""Loads CoOp checkpoints, with or without CrossGET's cross tokens, as classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from upop.checkpoints.files.weights import read_weights
from upop.checkpoints.fitting.fit import load_strictly
from upop.checkpoints.names.clip import from_openai
from upop.checkpoints.published.clip import clip_sizes
from upop.errors import CheckpointError
from upop.models.coop import CoOp, ends_of
from upop.models.crossget import CrossGetConfig

_PROMPT = ("prompt_learner.ctx", "prompt_learner.token_prefix", "prompt_learner.token_suffix")
_TOWERS = (("image_encoder.", "visual."), ("text_encoder.", ""))


def load_coop(path: str | Path, *, rv: int = 0, names: Sequence[int] | None = None, **overrides: int) -> CoOp:
    """Load a CoOp checkpoint (`model.pth.tar-200`) as a classifier, in evaluation mode.

    The file determines everything except the number of removed tokens: its prompts are vectors, and end at the padding.

    Args:
        path: the file, which holds the towers and the prompts.
        rv: image tokens to remove per layer; merging needs cross tokens in the file.
        names: number of words in each class name, if the class is in the middle of the context; see `CoOp`.
        overrides: fields of `CrossGetConfig`, such as `vision_heads` (by default width / 64).

    Raises:
        CheckpointError: the file cannot be read, lacks its prompts or its towers, or has no cross tokens for `rv`.
    """
    state = dict(read_weights(path))
    missing = [name for name in _PROMPT if name not in state]
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]}, so it is no CoOp checkpoint. Give one of the whole model, such as "
            "model.pth.tar-200."
        )
    context, prefix, suffix = (state.pop(name) for name in _PROMPT)
    renamed = {}
    for name, value in state.items():
        start, ours = next((pair for pair in _TOWERS if name.startswith(pair[0])), ("", ""))
        renamed[ours + name.removeprefix(start)] = value.float()
    towers = from_openai(renamed)
    cross = "vision_model.encoder.cross_image" in towers
    if rv and not cross:
        raise CheckpointError(
            f"{path} has no cross tokens, which merging of image tokens (rv={rv}) needs. Load it with rv=0."
        )
    try:
        sizes: dict[str, Any] = {**clip_sizes(towers), "cross": cross, "rv": rv, "rl": 0, **overrides}
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}: it holds prompts without their CLIP.") from None
    ends = ends_of(suffix, 1 + context.shape[-2])
    model = CoOp(CrossGetConfig(**sizes), prefix.float(), suffix.float(), ends, context.float(), names)
    load_strictly(model.clip, towers, str(path), lambda _name: False)
    return model.eval()


def accuracy(model: CoOp, images: torch.utils.data.DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the accuracy of a classifier, in percent.

    Args:
        model: the classifier.
        images: batches of images [batch, 3, size, size] and class indices [batch], such as those of torchvision's
            `ImageFolder`, whose folders must be in the order of the classes.
    """
    right = total = 0
    device = model.context.device
    with torch.no_grad():
        for batch, labels in images:
            found = model(batch.to(device))
            assert isinstance(found, torch.Tensor)
            right += int((found.argmax(1).cpu() == labels).sum())
            total += len(labels)
    return 100 * right / total
