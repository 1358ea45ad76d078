"""What a folder runs in: which programs take its model, which do not, and how; for its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SERVERS = "vLLM, SGLang, TensorRT-LLM, llama.cpp, MLX"
Row = tuple[str, str, str]
"""What runs it, whether, and how."""


def runtimes(description: Mapping[str, Any]) -> Sequence[Row]:
    """Return where the model of a folder that `upop.save` wrote runs.

    Args:
        description: what `upop.json` says.
    """
    plain = bool(description.get("plain"))
    graphs = ("onnxruntime, torch.export", "after an export", "`upop export FOLDER --to onnx` or `--to torch-export`")
    ours = ("Python with upop", "yes", "`upop.load(FOLDER)`")
    if description["transformers"]:
        return [*_transformers(plain), ours, graphs]
    if description.get("timm"):
        if plain:
            how = '`timm.create_model("local-dir:FOLDER", pretrained=True)`; the arguments are in `config.json`'
            return [("timm, without upop", "yes", how), ours, graphs]
        padded = "`upop export FOLDER --to padded`: its layers differ in size, and timm has one number for all"
        return [ours, ("timm, without upop", "after an export", padded), graphs]
    if description["model"]:
        form = "`upop convert FOLDER NEW --to hugging-face`, where it has a class for the task"
        return [ours, ("transformers", "after a conversion", form), graphs]
    return [("Python with upop", "yes", "`upop.load_into(dense_model, FOLDER)`")]


def _transformers(plain: bool) -> Sequence[Row]:
    if plain:
        return [
            (
                "transformers, without upop",
                "yes",
                "`from_pretrained(FOLDER)`: an ordinary configuration, for lm-eval too",
            ),
            (
                SERVERS,
                "as others of its class",
                "where they take the class, and read these sizes from its `config.json`",
            ),
        ]
    uneven = "its layers differ in size, which its class cannot say"
    return [
        ("transformers with upop", "yes", "`import upop`, then `from_pretrained(FOLDER)`"),
        (
            "programs that may run a folder's code (lm-eval)",
            "yes, where upop is installed",
            "`--trust_remote_code`: `configuration_upop.py` here imports upop",
        ),
        ("transformers, without upop", "after an export", f"`upop export FOLDER --to padded`; {uneven}"),
        (
            SERVERS,
            "after an export",
            "`upop export FOLDER --to padded`; a decoder like Llama also with `--to nemotron-nas`, layer by layer",
        ),
    ]
