"""Writes a cut model for programs without upop: padded to an ordinary model, or in the format of nemotron-nas."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from upop.checkpoints.export import nemotron_nas
from upop.checkpoints.export.padded import pad
from upop.checkpoints.files.description import WEIGHTS
from upop.checkpoints.files.weights import write_weights
from upop.checkpoints.saving.card import SERVERS
from upop.errors import SettingError, nearest
from upop.files import check_folder, replacing_folder
from upop.libraries import is_pretrained
from upop.models import kind_of
from upop.pruning.masks import unwrapped

PlainFormat = Literal["padded", "nemotron-nas"]

_CARD = "README.md"
_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
"""Files beside a model's weights that servers need: tokenizer, chat template, generation settings."""


def write_plain(
    model: nn.Module,
    folder: str | Path,
    format: PlainFormat,
    *,
    beside: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Write a cut model for use without upop, verified; return how much of the reduction remains, as a sentence.

    The folder holds the weights, `config.json` and a model card. It is written under another name and renamed; only a
    model folder of upop that holds nothing else is replaced.

    Args:
        model: a model of transformers or timm, or one of upop's with a counterpart in transformers.
        folder: the folder to write.
        format: "padded", or "nemotron-nas" for decoders like Llama's.
        beside: the model's own folder; its tokenizer, chat template and the like are copied.
        overwrite: whether a folder of upop may be replaced though its files were changed since.

    Raises:
        SettingError: the format is unknown, or does not support the model; the message names alternatives.
        VerificationError: the written model would give other outputs; nothing was written.
        RunFolderError: the folder holds files of others, or cannot be written; nothing was changed.
    """
    if format not in get_args(PlainFormat):
        raise SettingError(
            f"format={format!r} is not known{nearest(format, get_args(PlainFormat))}; known are "
            f"{' and '.join(get_args(PlainFormat))}. For graphs, use upop.export."
        )
    folder = Path(folder)
    check_folder(folder, "model", overwrite=overwrite)
    model = unwrapped(model)
    if kind_of(model):
        from upop.checkpoints.convert import to_transformers  # imports timm, which transformers models do not need

        model = to_transformers(model)
    if format == "nemotron-nas":
        written = nemotron_nas.convert(model)
        with replacing_folder(folder, "model", overwrite=overwrite) as fresh:
            write_weights(written.state, fresh / WEIGHTS)
            (fresh / "config.json").write_text(json.dumps(written.config, indent=1) + "\n", encoding="utf-8")
            (fresh / nemotron_nas.CODE).write_text(nemotron_nas.code(), encoding="utf-8")
            rows = [
                ("vLLM, TensorRT-LLM, MLX, llama.cpp's converter, optimum-intel", "as DeciLM (nemotron-nas)"),
                ("vLLM", "with `--trust-remote-code`: `configuration_decilm.py` here reads the configuration"),
                ("SGLang", "as above; some of its versions want equally many groups in all layers"),
                ("transformers", "no: it has no such class. `upop export --to padded` writes one that it has"),
            ]
            _copy_beside(beside, fresh)
            _write_card(fresh, type(model).__name__, written.described(), rows)
        return written.described()
    found = pad(model)
    with replacing_folder(folder, "model", overwrite=overwrite) as fresh:
        if is_pretrained(found.model):
            found.model.save_pretrained(fresh)
            rows = [
                ("transformers", "`from_pretrained(FOLDER)`, without upop"),
                (SERVERS, "as others of its class, where they take the class with these sizes"),
            ]
        else:
            write_weights(found.model.state_dict(), fresh / WEIGHTS)
            from upop.checkpoints.libraries.timm_models import hub_config

            config = hub_config(found.model, found.architecture, found.settings)
            (fresh / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            rows = [("timm", '`timm.create_model("local-dir:FOLDER", pretrained=True)`, without upop')]
        _copy_beside(beside, fresh)
        _write_card(fresh, type(model).__name__, found.described(), rows)
    return found.described()


def _copy_beside(source: Path | None, folder: Path) -> None:
    if source is None:
        return
    for name in _BESIDE:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write_card(folder: Path, kind: str, described: str, rows: Sequence[tuple[str, str]]) -> None:
    table = "\n".join(f"| {' | '.join(row)} |" for row in [("with", "how"), ("---", "---"), *rows])
    text = (
        "---\ntags:\n- upop\n- pruning\n- compression\n---\n\n"
        f"# {kind}, compressed, for programs without upop\n\n{described[0].upper()}{described[1:]}. Some weights are "
        "zeros, which pad layers to sizes that the configuration can express; the outputs are those of the cut "
        "model.\n\n"
        f"## Where it runs\n\n{table}\n"
    )
    (folder / _CARD).write_text(text, encoding="utf-8")
