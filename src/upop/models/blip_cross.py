"""Cross tokens for BLIP: image and text guide each other's merging, as in CrossGET for CLIP.

No published code has CrossGET for BLIP. What CLIP and LLaVA have is carried over: in the image encoder a copy of the
class token goes along behind the others, becomes the class token plus a learned offset before every layer, leads the
matching, and is seen by the text like an image token. The text keeps all of its tokens; what its first one holds before
each layer, plus an offset, is that layer's cross token, which nothing but the loss reads. The loss compares both in the
space of the text, into which each layer's cross-attention takes an image token (value and output projection).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from upop.pruning.traits import momentum_encoders
from upop.tokens.cross import cross_token_of, give_cross_token, has_cross_tokens
from upop.tokens.flow import flow_of
from upop.tokens.layer import first_of, place_of
from upop.tokens.losses import cross_loss, layer_by_layer, through

__all__ = ["Crossing", "add_cross_tokens", "crossing", "has_cross_tokens"]


def add_cross_tokens(model: nn.Module) -> None:
    """Give all layers of a BLIP model's image encoder, and of the text model that looks at images, a cross token.

    They are zero at first. Momentum copies get theirs too.
    """
    for layers in _towers(model):
        for path, layer in layers:
            give_cross_token(layer, _width(layer))
            for name, copy in momentum_encoders(model).items():
                if path.startswith(f"{name}."):
                    twin = model.get_submodule(copy + path.removeprefix(name))
                    give_cross_token(twin, _width(twin))


class _TextLayer(NamedTuple):
    """A layer of the text model, and what went into it first."""

    layer: nn.Module
    cross: Tensor


class Crossing:
    """The cross tokens of one forward pass.

    Attributes:
        images: of the layers of the image encoder, [images, C] each.
        texts: the layers of the text model, each with its cross token [batch, C].
    """

    def __init__(self) -> None:
        self.images: Sequence[Tensor] = ()
        self.texts: list[_TextLayer] = []

    def loss(self) -> Tensor | None:
        """Return what brings them together, a scalar; None if no tokens were merged. Only cross tokens learn by it."""
        if not self.images or not self.texts:
            return None
        image, text = layer_by_layer(self.images, self.texts)
        seen = [_into_text(one, other.layer) for one, other in zip(image, text, strict=True)]
        several = len(seen[0]) // len(text[0].cross)  # images of each text, those of one place together
        return cross_loss(torch.cat(seen), torch.cat([each.cross.repeat(several, 1) for each in text]))


@contextmanager
def crossing(model: nn.Module) -> Iterator[Crossing]:
    """Note the cross tokens of the first pass through each layer within the block."""
    found = Crossing()
    images, texts = _towers(model)

    def from_images(layer: nn.Module, _args: Any, output: Any) -> None:
        place, tokens = place_of(layer), first_of(output)
        flow = None if place is None else flow_of(tokens, place.merger)
        if flow is not None and not found.images:
            found.images = flow.crosses

    def from_texts(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = cross_token_of(layer)
        if own is not None and all(each.layer is not layer for each in found.texts):
            states = args[0] if args else kwargs["hidden_states"]
            found.texts.append(_TextLayer(layer, states[:, 0].detach() + own))

    handles = [images[-1][1].register_forward_hook(from_images)]
    handles += [layer.register_forward_pre_hook(from_texts, with_kwargs=True) for _, layer in texts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _towers(model: Any) -> list[list[tuple[str, nn.Module]]]:
    """Return path and module of the layers of the image encoder, and of the text model that looks at images."""
    text = "text_encoder.encoder.layer" if hasattr(model, "text_encoder") else "text_decoder.bert.encoder.layer"
    paths = ("visual_encoder.blocks", text)
    return [[(f"{path}.{name}", layer) for name, layer in model.get_submodule(path).named_children()] for path in paths]


def _width(layer: Any) -> int:
    norm = layer.norm1 if hasattr(layer, "norm1") else layer.attention.output.LayerNorm
    return int(norm.weight.shape[0])


def _into_text(image: Tensor, layer: Any) -> Tensor:
    """Return what a text layer's cross-attention takes from image tokens, [images, C] -> [images, text_width]."""
    attention = layer.crossattention
    if hasattr(attention, "self0"):  # one for each image of a pair
        ways = [(attention.self0.value, attention.output.dense0), (attention.self1.value, attention.output.dense1)]
    else:
        ways = [(attention.self.value, attention.output.dense)]
    parts = zip(image.chunk(len(ways)), ways, strict=True)
    return torch.cat([through(dense, through(value, part)) for part, (value, dense) in parts])
