"""Measured speed-up of compressed models: dense, 2x and 4x, with arbitrary kept sizes and with multiples.

The models have random weights, since time does not depend on them. Kept channels are drawn: each layer's scores vary
around a level of their own, and are ranked under one budget as in a search, so that layers keep uneven sizes. All
variants of a model take turns in one process (dense, 2x, ... dense, 2x, ...); ratios are those of medians.

- speed-up: time of the dense model over that of the compressed one;
- ideal: the same of their multiply-adds;
- realised: speed-up over ideal; 1 if time falls as much as the multiply-adds.

    python benchmarks/latency.py --models deit-s clip-b16 blip-b --batches 1 16 --repeats 5
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from random_cut import attention_kernel, compressed
from upop.files import write_json
from upop.machine import machine
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.clip import ClipConfig, ClipRetrieval

RESULTS = Path(__file__).parent / "results"
TARGET = 0.9


class _ClipFeatures(nn.Module):
    """CLIP as it is deployed: without momentum encoders and queues."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.clip = ClipRetrieval(config)
        for momentum_encoder in ClipRetrieval.momentum_encoders.values():
            delattr(self.clip, momentum_encoder)

    def forward(self, images: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.clip.encode_image(images), self.clip.encode_text(input_ids)


def deit_s() -> tuple[nn.Module, Callable[[int], Any]]:
    """Return DeiT-S, and what makes a batch of 224-pixel images."""
    return timm.create_model("deit_small_patch16_224"), lambda batch: {"x": torch.randn(batch, 3, 224, 224)}


def clip_b16() -> tuple[nn.Module, Callable[[int], Any]]:
    """Return CLIP ViT-B/16, and what makes a batch of 224-pixel images and as many texts of 77 tokens."""
    sizes = {"vision_width": 768, "vision_depth": 12, "vision_heads": 12, "vision_mlp": 3072}
    text = {"text_width": 512, "text_heads": 8, "text_mlp": 2048, "embed_dim": 512}
    config = ClipConfig(image_size=224, patch_size=16, queue_size=1, **sizes, **text)
    return _ClipFeatures(config), lambda batch: {
        "images": torch.randn(batch, 3, 224, 224),
        "input_ids": torch.full((batch, 77), config.vocab_size - 1),
    }


def blip_b() -> tuple[nn.Module, Callable[[int], Any]]:
    """Return BLIP ViT-B for captioning, and what makes a batch of 384-pixel images and captions of 15 tokens."""
    return BlipCaption(CaptionConfig.vit("base")), lambda batch: {
        "images": torch.randn(batch, 3, 384, 384),
        "input_ids": torch.ones(batch, 15, dtype=torch.long),
        "attention_mask": torch.ones(batch, 15, dtype=torch.long),
    }


def decoder() -> tuple[nn.Module, Callable[[int], Any]]:
    """Return a decoder of the sizes of SmolLM2-135M, and what makes a batch of texts of 128 tokens."""
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    }
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    return model, lambda batch: {"input_ids": torch.randint(100, 40000, (batch, 128))}


MODELS = {"deit-s": deit_s, "clip-b16": clip_b16, "blip-b": blip_b, "decoder": decoder}
VARIANTS = {"dense": None, "2x": (0.5, 1), "2x align 8": (0.5, 8), "4x": (0.75, 1), "4x align 8": (0.75, 8)}
"""Name -> (share of the parameters to remove, what kept sizes are multiples of)."""


def measure(
    name: str, batch: int, compiled: bool, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return milliseconds, speed-ups and the attention kernel of every variant of a model."""
    torch.manual_seed(0)
    dense, make = MODELS[name]()
    models = {
        variant: (dense if how is None else compressed(dense, *how)).eval().to(device, dtype)
        for variant, how in VARIANTS.items()
    }
    inputs = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in make(batch).items()}
    one = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in make(1).items()}
    macs = {variant: upop.count_macs(model, one) for variant, model in models.items()}
    kernel = attention_kernel(dense, one)
    runs: dict[str, Callable[..., Any]] = {
        variant: torch.compile(model) if compiled else model for variant, model in models.items()
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for variant, run in runs.items():
                _wait(device)
                start = time.perf_counter()
                run(**inputs)
                _wait(device)
                if turn:
                    seconds[variant].append(time.perf_counter() - start)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    return {
        "model": name,
        "batch": batch,
        "compiled": compiled,
        "attention": kernel,
        "variants": {
            variant: {
                "milliseconds": 1000 * medians[variant],
                "gmacs": macs[variant] / 1e9,
                "speed_up": medians["dense"] / medians[variant],
                "ideal": macs["dense"] / macs[variant],
                "realised": medians["dense"] / medians[variant] / (macs["dense"] / macs[variant]),
            }
            for variant in runs
        },
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the measurements as a table for the terminal."""
    result = Table(title=f"Compressed beside dense (target: {TARGET} of the ideal with align 8 at batch 16)")
    for column in ("model", "batch", "mode", "variant", "ms", "GMACs", "speed-up", "ideal", "realised"):
        result.add_column(column, justify="left" if column in ("model", "mode", "variant") else "right")
    for row in rows:
        for variant, found in row["variants"].items():
            result.add_row(
                row["model"],
                str(row["batch"]),
                "compiled" if row["compiled"] else "eager",
                variant,
                f"{found['milliseconds']:.1f}",
                f"{found['gmacs']:.2f}",
                f"{found['speed_up']:.2f}",
                f"{found['ideal']:.2f}",
                f"{found['realised']:.2f}",
                end_section=variant == list(VARIANTS)[-1],
            )
    return result


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description="Latency of dense and compressed models, side by side.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["deit-s", "clip-b16", "blip-b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each variant")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    about = machine(options.device)
    slug = "-".join("".join(c if c.isalnum() else " " for c in str(about["device"]).lower()).split())
    content: dict[str, Any] = {
        "machine": about,
        "command": shlex.join(["python", *sys.argv]),
        "dtype": options.dtype,
        "rows": [],
    }
    for name in options.models:
        for batch in options.batches:
            for mode in options.modes:
                torch.compiler.reset()
                row = measure(name, batch, mode == "compiled", options.repeats, options.device, dtype)
                content["rows"].append(row)
                # After every row, so that a run that is stopped leaves what it measured.
                write_json(options.out / f"latency_{slug}.json", content)
    Console(width=110).print(table(content["rows"]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
