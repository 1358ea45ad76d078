"""Tiny dual encoders of libraries with their processors, on disk, and images with captions and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from upop.demo.vocabulary import vocabulary

SIDE, WORDS = 16, 12
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "yellow": (230, 220, 40)}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGES: dict[str, Any] = {**_TOWER, "image_size": SIDE, "patch_size": 8}
_TEXTS: dict[str, Any] = {**_TOWER, "max_position_embeddings": WORDS, "vocab_size": len(vocabulary())}


def tokenizer(*, masked: bool = True) -> Any:
    """A word-level tokenizer of the generated sentences."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    places = {word: number for number, word in enumerate(vocabulary())}
    made = Tokenizer(models.WordLevel(places, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", places["[SEP]"])])
    names = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        model_max_length=WORDS,
        model_input_names=names,
    )


def clip_model() -> Any:
    """A CLIP of transformers."""
    end = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    texts = {**_TEXTS, **end}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=texts, vision_config=IMAGES, projection_dim=16))


def siglip_model() -> Any:
    """A SigLIP of transformers."""
    end = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**_TEXTS, **end}, vision_config={**IMAGES, "attention_dropout": 0.0})
    )
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-4.0)
    return model


def siglip2_model() -> Any:
    """A SigLIP 2 of transformers, of images in patches."""
    end = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = transformers.Siglip2Model(
        transformers.Siglip2Config(
            text_config={**_TEXTS, **end}, vision_config={**_TOWER, "patch_size": 8, "num_patches": 4}
        )
    )
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-4.0)
    return model


def vit_bert_model() -> Any:
    """A VisionTextDualEncoder of a ViT and a BERT."""
    vision = transformers.ViTConfig(**IMAGES)
    text = transformers.BertConfig(**_TEXTS)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    return transformers.VisionTextDualEncoderModel(config)


def image_processor(model: str) -> Any:
    """The image processor of a kind of model."""
    size = {"height": SIDE, "width": SIDE}
    if model == "clip":
        return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    if model == "siglip2":
        return transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=4)
    return {"siglip": transformers.SiglipImageProcessor}.get(model, transformers.ViTImageProcessor)(size=size)


_DUAL = {
    "clip": (clip_model, "CLIPProcessor"),
    "siglip": (siglip_model, "SiglipProcessor"),
    "siglip2": (siglip2_model, "Siglip2Processor"),
    "vision-text": (vit_bert_model, "VisionTextDualEncoderProcessor"),
}
DUAL = (*_DUAL, "open_clip")


def randomise(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give a model weights with which its outputs differ from image to image and from text to text."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() and not name.startswith("logit_"):
            nn.init.normal_(parameter, std=0.2)
            if ("norm" in name and name.endswith("weight")) or (".ln_" in name and name.endswith("weight")):
                nn.init.ones_(parameter)
    return model.eval()


def save_dual(kind: str, folder: Path) -> Path:
    """Save a dense dual encoder with its processor as its library does."""
    if kind == "open_clip":
        return _save_open_clip(folder)
    build, name = _DUAL[kind]
    randomise(build()).save_pretrained(folder)
    words = tokenizer(masked=not kind.startswith("siglip"))
    getattr(transformers, name)(image_processor(kind), words).save_pretrained(folder)
    return folder


def _save_open_clip(folder: Path) -> Path:
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    model = randomise(open_clip.CLIP(**config))
    preprocess = {
        "size": SIDE,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def write_pairs(folder: Path, count: int = 24) -> Path:
    """Write images of two colours with two captions each; return the file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    names, rows = list(COLOURS), []
    for number in range(count):
        left, right = names[number % 4], names[(number // 4) % 4]
        image = Image.new("RGB", (20, 20), COLOURS[left])
        image.paste(Image.new("RGB", (10, 20), COLOURS[right]), (10, 0))
        image.save(folder / f"{number}.png")
        captions = [f"{left} left of {right}", f"there is {right} right of {left}"]
        rows.append({"image": f"{number}.png", "caption": captions})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def write_classes(folder: Path, count: int = 6) -> Path:
    """Write folders of images of one colour, one folder per class; return the folder."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shade = tuple(max(0, each - 5 * number) for each in colour)
            Image.new("RGB", (20, 20), shade).save(folder / name / f"{number}.png")
    return folder
