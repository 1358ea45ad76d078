"""torch.nn's own transformers, torchvision's, and open_clip's CLIP."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from pruning.registry.architecture import Architecture, Inputs, image

_TEXT = {"context_length": 7, "vocab_size": 99, "width": 24, "heads": 3, "layers": 2}
_SIZES = {"d_model": 24, "nhead": 3, "dim_feedforward": 40}


def _encoder(**settings: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**_SIZES, **settings), 2, enable_nested_tensor=False)


def _decoder(**settings: Any) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(**_SIZES, **settings), 2)


def _both(**settings: Any) -> nn.Module:
    return nn.Transformer(**_SIZES, num_encoder_layers=2, num_decoder_layers=2, **settings)


def _tokens(generator: torch.Generator, length: int) -> Tensor:
    return torch.randn(2, length, 24, generator=generator)


def _source(_model: nn.Module, generator: torch.Generator) -> Inputs:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return {"src": _tokens(generator, 6), "src_key_padding_mask": padding}


def _target(_model: nn.Module, generator: torch.Generator) -> Inputs:
    # Words first, texts second: what torch does where nothing else is said.
    return {
        "tgt": _tokens(generator, 5).transpose(0, 1),
        "memory": _tokens(generator, 6).transpose(0, 1),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
    }


def _pair(_model: nn.Module, generator: torch.Generator) -> Inputs:
    return {"src": _tokens(generator, 6), "tgt": _tokens(generator, 5)}


def _clip(quick_gelu: bool = False, **text: Any) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(  # type: ignore[no-any-return]
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8},
        text_cfg={**_TEXT, **text},
        quick_gelu=quick_gelu,
    )


def _siglip() -> nn.Module:
    from open_clip.model import CustomTextCLIP

    return CustomTextCLIP(  # type: ignore[no-any-return]
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8, "pool_type": "avg"},
        text_cfg={**_TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        init_logit_bias=-10.0,
    )


def _image_and_words(model: nn.Module, generator: torch.Generator) -> Inputs:
    words = torch.randint(5, 90, (2, 7), generator=generator)
    return {"image": image()(model, generator)["x"], "text": words}


OTHERS: tuple[Architecture, ...] = (
    Architecture("torch.nn", "TransformerEncoder", partial(_encoder, batch_first=True), _source),
    Architecture(
        "torch.nn",
        "TransformerEncoder, norm first, GELU",
        partial(_encoder, batch_first=True, norm_first=True, activation="gelu"),
        _source,
    ),
    Architecture("torch.nn", "TransformerDecoder", _decoder, _target),
    Architecture("torch.nn", "Transformer", partial(_both, batch_first=True), _pair),
    Architecture(
        "torchvision",
        "VisionTransformer",
        partial(
            VisionTransformer,
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=3,
            hidden_dim=24,
            mlp_dim=40,
            num_classes=7,
        ),
        image(),
    ),
    *(
        (
            Architecture("open_clip", "CLIP", _clip, _image_and_words),
            Architecture("open_clip", "CLIP, quick GELU", partial(_clip, True), _image_and_words),
            Architecture("open_clip", "CustomTextCLIP, as SigLIP", _siglip, _image_and_words),
        )
        if importlib.util.find_spec("open_clip")
        else ()
    ),
)
