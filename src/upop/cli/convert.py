"""`upop convert`: converts between published files, folders of upop, and transformers models."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

from upop.checkpoints import save
from upop.checkpoints.convert import check_target, read_model, write_model
from upop.checkpoints.loading import load_named
from upop.cli import options as o
from upop.data.tokenizer import load_tokenizer
from upop.errors import SettingError
from upop.models.blip import BlipConfig
from upop.plain import as_text
from upop.pruning import count_parameters


class Form(StrEnum):
    """The output form of a model."""

    official = "official"
    upop = "upop"
    hugging_face = "hugging-face"


Source = Annotated[str, typer.Argument(help="A published .pth or .safetensors, a folder, or a name on the hub.")]


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="File (.pth) or folder to write; an older one of upop is replaced.")],
    to: Annotated[
        Form | None,
        typer.Option(help="What to write. [default: official for a .pth, else upop]"),
    ] = None,
    task: o.TaskOfFile = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="Texts, one in a line, or a JSON list of token numbers: all other words are dropped."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Of the model, for --vocabulary: a folder, or a name on the hub. [default: the source's]"),
    ] = None,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Write a BLIP, CLIP, DeiT or Segmenter model, dense or compressed, in another form; its outputs stay the same.

    With `--vocabulary`, a BLIP model or one of transformers loses the words that a task never uses, and is written
    with its smaller tokenizer.

    `--set vision_heads=6` and the like say what the shapes in a published file do not tell: numbers of heads, and MLP
    widths before pruning, where they are not the published ones.
    """
    if vocabulary is not None:
        _with_fewer_words(source, target, vocabulary, tokenizer, to, task, assign, overwrite)
        return
    form = to or (Form.official if target.suffix == ".pth" else Form.upop)
    check_target(target, form.value, overwrite=overwrite)
    model = read_model(source, task, **o.overrides({}, assign))
    write_model(model, target, form.value, overwrite=overwrite)
    console = Console(soft_wrap=True, highlight=False)
    size = f"{count_parameters(model) / 1e6:.1f} M parameters"
    console.print(as_text(f"{source} -> {target}: {type(model).__name__}, {size}"))
    if form is Form.hugging_face:
        console.print(
            "Load it with from_pretrained, after `import upop` if it is compressed. Tokenizer and processor are "
            "no part of it: save them into the same folder."
        )


def _with_fewer_words(
    source: str,
    target: Path,
    vocabulary: Path,
    tokenizer: str | None,
    to: Form | None,
    task: str | None,
    assign: list[str] | None,
    overwrite: bool,
) -> None:
    from upop.checkpoints.configs.fewer_words import with_fewer_words

    if to not in (None, Form.upop) or target.suffix == ".pth":
        raise SettingError(
            "--vocabulary writes a folder of upop, with its tokenizer beside the weights. Leave --to out, and name a "
            "folder; convert that again for another form."
        )
    check_target(target, Form.upop.value, overwrite=overwrite)
    model = load_named(source, task, **o.overrides({}, assign))
    before = count_parameters(model)
    model, found = with_fewer_words(model, vocabulary, _tokenizer(model, tokenizer or source))
    save(model, target, tokenizer=found.tokenizer, overwrite=overwrite)
    Console(soft_wrap=True, highlight=False).print(
        as_text(
            f"{source} -> {target}: {len(found.kept):,} of {found.size:,} words stay, {count_parameters(model):,} of "
            f"{before:,} parameters. Its tokenizer is in the folder: --set tokenizer={target} for tasks that ask."
        )
    )


def _tokenizer(model: nn.Module, place: str) -> Any:
    """Return the tokenizer in a folder, or of a name on the hub, as the model's task loads it."""
    if isinstance(getattr(model, "config", None), BlipConfig):
        return load_tokenizer(Path(place) if Path(place).exists() else place)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:  # each of its many parsers has its own errors
        raise SettingError(f"No tokenizer was found in {place}: {error}. Name one: --tokenizer FOLDER.") from error
