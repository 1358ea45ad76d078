"""Published checkpoints of BLIP: sizes from shapes, and the cross-attention branches of NLVR."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from upop.checkpoints.fitting.fit import resize_positions
from upop.checkpoints.published.clip import with_queues
from upop.checkpoints.published.vit import HEAD_DIM, State, count_layers, vit_sizes
from upop.models.blip import BlipConfig
from upop.models.retrieval import RetrievalConfig


def blip_sizes(state: State, text: str = "text_encoder") -> dict[str, Any]:
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


def nlvr_sizes(state: State) -> dict[str, Any]:
    """Return the sizes of an NLVR model, and from which layer on its two cross-attention branches are merged."""
    if "cls_head.0.weight" not in state:
        raise KeyError("cls_head.0.weight")
    config = blip_sizes(state)
    merged = [int(key.split(".")[3]) for key in state if key.endswith("crossattention.output.merge_layer.weight")]
    return {**config, "merge_from": min(merged, default=config["text_depth"])}


def resized_positions(state: State, config: BlipConfig) -> dict[str, Tensor]:
    """Resize the position embeddings of the image encoders to the configuration's image size."""
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    positions = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
    return {key: resize_positions(value, tokens) if key in positions else value for key, value in state.items()}


def with_two_branches(state: State) -> dict[str, Tensor]:
    """Copy every cross-attention of the text encoder to the two branches of an NLVR model."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        head, cross, tail = key.partition(".crossattention.")
        if cross and tail.startswith(("self.", "output.dense.")):
            for branch in "01":
                name = tail.replace("self.", f"self{branch}.").replace("dense.", f"dense{branch}.")
                result[head + cross + name] = value
        else:
            result[key] = value
    return result


def with_one_branch(state: State) -> dict[str, Tensor]:
    """Reduce NLVR's two cross-attention branches to the first, with its output as the merge layer takes it."""
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
DECODER_CROSS = re.compile(r"text_decoder\.bert\.encoder\.layer\.\d+\.crossattention\.self\.(key|value)\.weight")


def vqa_sizes(state: State) -> dict[str, Any]:
    """Return the sizes of a VQA model, whose decoder is sized as its question encoder."""
    if f"{_DECODER}.word_embeddings.weight" not in state:
        raise KeyError(f"{_DECODER}.word_embeddings.weight")
    return blip_sizes(state)


def vqa_start(state: State) -> dict[str, Tensor]:
    """Drop cross-attention projections of another width: with ViT-L, the pre-trained decoder attended to the image."""
    state = with_one_branch(state)
    widths = {value.shape[1] for key, value in state.items() if key == f"{_DECODER}.word_embeddings.weight"}
    return {key: value for key, value in state.items() if not DECODER_CROSS.fullmatch(key) or value.shape[1] in widths}


def retrieval_sizes(state: State) -> dict[str, Any]:
    """Return the sizes of a retrieval model, the length of its queues among them."""
    config = {**blip_sizes(state), "embed_dim": state["vision_proj.weight"].shape[0]}
    if "itm_head.weight" not in state:
        raise KeyError("itm_head.weight")
    return {**config, "queue_size": state["image_queue"].shape[1]} if "image_queue" in state else config


def with_new_queues(state: State, config: RetrievalConfig) -> dict[str, Tensor]:
    """Resize position embeddings; initialise queues that are missing or have another size."""
    return with_queues(resized_positions(state, config), config)
