"""Dual encoders of transformers and open_clip: embeddings of images and texts, and the losses that compare them.

Softmax: every image is to find its text among the batch's, and every text its image (CLIP, arXiv 2103.00020).
Sigmoid: every pair of the batch is told right or wrong by itself (SigLIP, arXiv 2303.15343). A model that has a bias
beside its scale was trained with the second one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.errors import CheckpointError, SettingError, StepError
from upop.models.contrast import gather_with_gradients
from upop.pruning.masks import unwrapped
from upop.pruning.precision import precise

LossName = Literal["auto", "softmax", "sigmoid"]

_IMAGES = ("image_embeds", "image_features")
_TEXTS = ("text_embeds", "text_features")
_METHODS = {"image": ("get_image_features", "encode_image"), "text": ("get_text_features", "encode_text")}


def check_dual(model: nn.Module, source: str) -> None:
    """Refuse a model that does not embed images and texts apart.

    Raises:
        CheckpointError: it is no dual encoder.
    """
    lacking = [part for part, names in _METHODS.items() if not any(hasattr(model, name) for name in names)]
    if lacking or _scale_of(model) is None:
        raise CheckpointError(
            f"{source} holds a {type(model).__name__}, which is no dual encoder: it has "
            f"{f'no features of {lacking[0]}s' if lacking else 'no scale of similarities'}. Give a CLIP, SigLIP, "
            "SigLIP 2, VisionTextDualEncoder or open_clip model."
        )


def embeddings(output: Any) -> tuple[Tensor, Tensor]:
    """Return the embeddings of images and texts in a dual encoder's output, [batch, dim] each, of length one.

    Args:
        output: of transformers or of open_clip: an object, a mapping, or a tuple that begins with the two.

    Raises:
        StepError: it holds none.
    """
    found = [
        next((value for name in names if isinstance(value := _part(output, name), Tensor)), None)
        for names in (_IMAGES, _TEXTS)
    ]
    if isinstance(output, tuple) and len(output) >= 2:
        found = [value if isinstance(value, Tensor) else None for value in output[:2]]
    image, text = found
    if image is None or text is None:
        raise StepError(f"A dual encoder gives embeddings of images and texts; this one gave {type(output).__name__}.")
    return _normal(image), _normal(text)


def encoded(model: nn.Module, part: Literal["image", "text"], inputs: Mapping[str, Any]) -> Tensor:
    """Return the embeddings of images or of texts alone, [batch, dim], of length one.

    Args:
        model: a dual encoder.
        part: which of the two.
        inputs: of the model; those that the part does not take are left out.
    """
    method = next(getattr(model, name) for name in _METHODS[part] if hasattr(model, name))
    found = method(**taken(method, inputs))
    return _normal(found if isinstance(found, Tensor) else found.pooler_output)


def taken(method: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some inputs that a method names among its arguments."""
    named = inspect.signature(method).parameters
    return {name: value for name, value in inputs.items() if name in named}


def contrast(model: nn.Module, output: Any, kind: LossName = "auto") -> Tensor:
    """Return the contrastive loss of a batch, a scalar; the batches of all processes are compared with each other.

    Args:
        model: a dual encoder, wrapped or not; it has the scale, and the bias if there is one.
        output: what it gave for a batch of images and their texts, in order.
        kind: "softmax", "sigmoid", or "auto": sigmoid where the model has a bias.

    Raises:
        SettingError: a sigmoid loss is asked for, and the model has no bias.
    """
    own = unwrapped(model)
    image, text = (gather_with_gradients(rows) for rows in embeddings(output))
    scale, bias = _scale_of(own), getattr(own, "logit_bias", None)
    assert scale is not None
    if kind == "sigmoid" and bias is None:
        raise SettingError(
            f"loss: sigmoid was asked for, and {type(own).__name__} has no logit_bias, without which nearly all pairs "
            "of a batch are called right. Take loss: softmax."
        )
    with torch.autocast(image.device.type, enabled=False):  # scales are near 100: bfloat16 would round most of it away
        logits = scale * image @ text.t()  # [images, texts]
    if kind == "sigmoid" or (kind == "auto" and bias is not None):
        return sigmoid_loss(logits + (bias if bias is not None else 0.0))
    return softmax_loss(logits)


def softmax_loss(logits: Tensor) -> Tensor:
    """Return the mean of the cross-entropies of both directions, of logits [batch, batch] whose diagonal is right."""
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.t(), right)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Return SigLIP's loss of logits [batch, batch] whose diagonal is right: a sum over pairs, a mean over images."""
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def _scale_of(model: nn.Module) -> Tensor | None:
    """Return what cosines are multiplied by."""
    logarithm = getattr(model, "logit_scale", None)
    if isinstance(logarithm, Tensor):
        return logarithm.float().exp()
    temperature = getattr(model, "temperature", None)
    return 1 / temperature.float() if isinstance(temperature, Tensor) else None


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _normal(rows: Tensor) -> Tensor:
    return F.normalize(precise(rows), dim=-1)
