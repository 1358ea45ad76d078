"""Dual encoders of transformers and open_clip: embeddings of images and texts, and contrastive losses.

The softmax loss classifies the text of each image among the batch's, and vice versa (CLIP, arXiv 2103.00020). The
sigmoid loss classifies each pair of the batch separately (SigLIP, arXiv 2303.15343); models with a logit bias are
trained with it.
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
    """Check that a model encodes images and texts separately, and has a scale of similarities.

    Raises:
        CheckpointError: it is not a dual encoder.
    """
    lacking = [part for part, names in _METHODS.items() if not any(hasattr(model, name) for name in names)]
    if lacking or _scale_of(model) is None:
        raise CheckpointError(
            f"{source} holds a {type(model).__name__}, which is not a dual encoder: it has "
            f"{f'no features of {lacking[0]}s' if lacking else 'no scale of similarities'}. Give a CLIP, SigLIP, "
            "SigLIP 2, VisionTextDualEncoder or open_clip model."
        )


def embeddings(output: Any) -> tuple[Tensor, Tensor]:
    """Return the normalised embeddings of images and texts in a dual encoder's output, [batch, dim] each.

    Args:
        output: of transformers or open_clip: an object, a mapping, or a tuple that starts with the two.

    Raises:
        StepError: it has no embeddings.
    """
    found = [
        next((value for name in names if isinstance(value := _part(output, name), Tensor)), None)
        for names in (_IMAGES, _TEXTS)
    ]
    if isinstance(output, tuple) and len(output) >= 2:
        found = [value if isinstance(value, Tensor) else None for value in output[:2]]
    image, text = found
    if image is None or text is None:
        raise StepError(f"A dual encoder must return embeddings of images and texts; found {type(output).__name__}.")
    return _normal(image), _normal(text)


def encoded(model: nn.Module, part: Literal["image", "text"], inputs: Mapping[str, Any]) -> Tensor:
    """Return the normalised embeddings of images or texts, [batch, dim].

    Args:
        model: a dual encoder.
        part: "image" or "text".
        inputs: of the model; those of the other part are ignored.
    """
    method = next(getattr(model, name) for name in _METHODS[part] if hasattr(model, name))
    found = method(**taken(method, inputs))
    return _normal(found if isinstance(found, Tensor) else found.pooler_output)


def taken(method: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a method has parameters for."""
    named = inspect.signature(method).parameters
    return {name: value for name, value in inputs.items() if name in named}


def contrast(model: nn.Module, output: Any, kind: LossName = "auto") -> Tensor:
    """Return the contrastive loss over the batches of all processes, a scalar.

    Args:
        model: a dual encoder, wrapped or not; it has the scale and, for sigmoid, the bias.
        output: of the model, for a batch of image-text pairs.
        kind: "softmax", "sigmoid", or "auto": sigmoid if the model has a logit bias.

    Raises:
        SettingError: `kind` is "sigmoid", and the model has no bias.
    """
    own = unwrapped(model)
    image, text = (gather_with_gradients(rows) for rows in embeddings(output))
    scale, bias = _scale_of(own), getattr(own, "logit_bias", None)
    assert scale is not None
    if kind == "sigmoid" and bias is None:
        raise SettingError(
            f"loss: sigmoid needs a logit_bias, and {type(own).__name__} has none; without it, the loss takes nearly "
            "all pairs of a batch for positives. Use loss: softmax."
        )
    with torch.autocast(image.device.type, enabled=False):  # scales are near 100, too coarse for bfloat16
        logits = scale * image @ text.t()  # [images, texts]
    if kind == "sigmoid" or (kind == "auto" and bias is not None):
        return sigmoid_loss(logits + (bias if bias is not None else 0.0))
    return softmax_loss(logits)


def softmax_loss(logits: Tensor) -> Tensor:
    """Return the cross-entropy averaged over both directions, for logits with positives on the diagonal.

    Args:
        logits: [batch, batch].
    """
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.t(), right)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Return SigLIP's loss, summed over pairs and averaged over images, for logits with positives on the diagonal."""
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def _scale_of(model: nn.Module) -> Tensor | None:
    """Return the scale of the cosine similarities, a scalar; None if the model has none."""
    logarithm = getattr(model, "logit_scale", None)
    if isinstance(logarithm, Tensor):
        return logarithm.float().exp()
    temperature = getattr(model, "temperature", None)
    return 1 / temperature.float() if isinstance(temperature, Tensor) else None


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _normal(rows: Tensor) -> Tensor:
    return F.normalize(precise(rows), dim=-1)
