"""LLaVA-1.5 with CrossGET: the vision tower merges tokens, guided by cross tokens; the language model has them, too.

The model is transformers' LlavaForConditionalGeneration; the published `cross_tokens.bin` holds the added tensors. 278
of 576 image tokens reach the language model, which removes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.errors import CheckpointError
from upop.tokens.flow import Flow, carry, flow_of
from upop.tokens.layer import Merger, Place, Site, place_of, set_merging
from upop.tokens.losses import cross_loss, layer_by_layer, through
from upop.tokens.matching import removable

PUBLISHED = 13
"""Tokens removed per layer in the published models."""
CROSS_WEIGHT = 0.001
"""Weight of the cross loss; 0.1 was published for 13B."""

_NAMES = {
    "model.cross_text": "cross_text",
    "model.vision_tower.vision_tower.vision_model.encoder.cross_image": "cross_image",
}
_TEXT = object()  # marks passes through language models
_PUBLISHED_PARTS = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
)


class LlavaLosses(NamedTuple):
    """The losses of a batch, scalars: the language model's loss, and the cross loss without its weight."""

    language: Tensor
    cross: Tensor

    def total(self, weight: float = CROSS_WEIGHT) -> Tensor:
        """Return the training loss."""
        return self.language + weight * self.cross


def add_cross_tokens(model: Any, tensors: Mapping[str, Tensor], removed: int = PUBLISHED) -> int:
    """Add cross tokens to a LLaVA and turn on token merging in its vision tower, in place.

    Args:
        model: transformers' LlavaForConditionalGeneration, with CLIP's vision tower.
        tensors: of `cross_tokens.bin`, from `upop.checkpoints.read_weights`.
        removed: tokens removed per layer of the tower.

    Returns:
        The number of image tokens that are left, which prompts must have; it is the configuration's `image_seq_length`.

    Raises:
        CheckpointError: the tensors are not LLaVA's cross tokens, or belong to a model of other sizes.
    """
    encoder, language = model.model.vision_tower.encoder, model.model.language_model
    given = _checked(tensors, {"cross_image": encoder, "cross_text": language})
    for module, name in ((encoder, "cross_image"), (language, "cross_text")):
        like = next(module.parameters())
        module.register_parameter(name, nn.Parameter(given[name].to(like.device, like.dtype)))
    depth = len(encoder.layers)
    merger = Merger((removed,) * depth, guidance="attention", head_mean=True)
    for number, layer in enumerate(encoder.layers):
        set_merging(layer, Place(merger, Site(), number))
    encoder.register_forward_pre_hook(_start_images, with_kwargs=True)
    language.register_forward_pre_hook(_start_texts, with_kwargs=True)
    for layer in language.layers:
        layer.register_forward_pre_hook(_enter)
        layer.register_forward_hook(_leave)
    tokens: int = model.model.vision_tower.embeddings.num_positions + 1
    for _ in range(depth - 1):  # features are the inputs of the last layer
        tokens -= removable(tokens, 2, removed)
    model.config.image_seq_length = tokens - 1
    return tokens - 1


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of LLaVA's own checkpoints under transformers' names, without cross tokens."""
    result = {}
    for name, value in state.items():
        start, ours = next((pair for pair in _PUBLISHED_PARTS if name.startswith(pair[0])), ("", ""))
        if name not in _NAMES:
            result[ours + name.removeprefix(start)] = value
    return result


def llava_losses(model: Any, **batch: Any) -> LlavaLosses:
    """Return the losses of a LLaVA with cross tokens, for a batch with one image per text.

    Args:
        model: after `add_cross_tokens`.
        batch: arguments of its forward pass, with `labels`.
    """
    with _passes(model) as found:
        language = model(**batch).loss
    image, text = (flow.crosses for flow in found)
    first, second = (
        getattr(model.model.multi_modal_projector, name) for name in ("linear_1", "linear_2")
    )  # the projector gets no gradients from cross tokens
    projected = [through(second, F.gelu(through(first, each))) for each in image]
    crosses = (torch.cat(each) for each in layer_by_layer(projected, text))
    return LlavaLosses(language, cross_loss(*crosses))


@contextmanager
def _passes(model: Any) -> Iterator[list[Flow]]:
    """Yield a list that receives the passes through the vision tower and the language model."""
    found: list[Flow] = []
    layers = (model.model.vision_tower.encoder.layers[-1], model.model.language_model.layers[-1])

    def hook(layer: nn.Module, _args: Any, output: Tensor) -> None:
        place = place_of(layer)
        flow = flow_of(output, _TEXT if place is None else place.merger)
        assert flow is not None
        found.append(flow)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _checked(tensors: Mapping[str, Tensor], modules: Mapping[str, Any]) -> dict[str, Tensor]:
    given = {_NAMES[name]: value for name, value in tensors.items() if name in _NAMES}
    if set(tensors) != set(_NAMES):
        raise CheckpointError(
            f"LLaVA's cross tokens are {' and '.join(_NAMES)}, but the file holds {', '.join(sorted(tensors)[:4])}. "
            "Give cross_tokens.bin of a CrossGET model."
        )
    for name, module in modules.items():
        shape = (1, len(module.layers), module.config.hidden_size)
        if given[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(given[name].shape)}, and the model needs {shape}. Use the model's own file."
            )
    return given


def _start_images(
    encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Append a copy of the first token, the cross token."""
    place = place_of(encoder.layers[0])
    assert place is not None
    return args, {**kwargs, "inputs_embeds": place.merger.start(kwargs["inputs_embeds"], cross=encoder.cross_image)}


def _start_texts(
    language: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Mark the first token of every text in the first step; later steps use its cached keys and values."""
    cache, embeds, mask = kwargs.get("cache"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if embeds is None:
        embeds = language.embed_tokens(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        args, kwargs = args[1:], {**kwargs, "input_ids": None}
    if cache is None or cache.get_seq_length() == 0:
        # With padding on the left, the first token comes after it.
        first = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            first = mask.int().argmax(1)
        embeds = carry(embeds.view_as(embeds), Flow(_TEXT, guide=first, cross=language.cross_text))
    return args, {**kwargs, "inputs_embeds": embeds}


def _enter(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    tokens = args[0]
    flow = flow_of(tokens, _TEXT)
    if flow is None or flow.guide is None or flow.cross is None or flow.layer >= flow.cross.shape[1]:
        return None
    places = torch.arange(tokens.shape[1], device=tokens.device) == flow.guide.unsqueeze(1)
    first = tokens.gather(1, flow.guide[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)
    cross = first.detach() + flow.cross[:, flow.layer]
    tokens = torch.where(places.unsqueeze(2), cross.unsqueeze(1), tokens)
    return (carry(tokens, flow.with_cross(cross)), *args[1:])


def _leave(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    flow = flow_of(args[0], _TEXT)
    if flow is not None:
        carry(output, flow.after(None, None))
