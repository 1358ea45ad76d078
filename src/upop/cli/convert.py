"""`upop convert`: converts between published files, folders of upop, and transformers models."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from upop.cli import options as o
from upop.plain import as_text
from upop.starting import starting

if TYPE_CHECKING:
    from torch import nn


class Form(StrEnum):
    """Output format of a model."""

    official = "official"
    upop = "upop"
    hugging_face = "hugging-face"


Source = Annotated[str, typer.Argument(help="A published .pth or .safetensors, a folder, or a name on the hub.")]


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="File (.pth) or folder to write; an older one of upop is replaced.")],
    to: Annotated[
        Form | None,
        typer.Option(help="Format to write. [default: official for a .pth, else upop]"),
    ] = None,
    task: o.TaskOfFile = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="Texts, one per line, or a JSON list of token ids: all other words are removed."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer for --vocabulary: a folder, or a name on the hub. [default: the source's]"),
    ] = None,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Convert a BLIP, CLIP, DeiT or Segmenter model, dense or compressed, to another format.

    The outputs stay the same. With `--vocabulary`, a model of BLIP or transformers drops the words that a task never
    uses, and is written with its smaller tokenizer.

    The shapes in a published file do not determine numbers of heads, and MLP widths before pruning: if they are not the
    published ones, set them, as in `--set vision_heads=6`.
    """
    with starting():
        from upop.checkpoints.convert import check_target, read_model, write_model
        from upop.pruning import count_parameters

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
            "Load it with from_pretrained, after `import upop` if it is compressed. Save tokenizer and processor to "
            "the same folder: they are not part of the model."
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
    with starting():
        from upop.checkpoints import save
        from upop.checkpoints.configs.fewer_words import with_fewer_words
        from upop.checkpoints.convert import check_target
        from upop.checkpoints.loading import load_named
        from upop.errors import SettingError
        from upop.pruning import count_parameters

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
    from upop.data.tokenizer import load_tokenizer
    from upop.errors import SettingError
    from upop.models.blip import BlipConfig

    if isinstance(getattr(model, "config", None), BlipConfig):
        return load_tokenizer(Path(place) if Path(place).exists() else place)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:  # each of its many parsers has its own errors
        raise SettingError(f"No tokenizer was found in {place}: {error}. Name one: --tokenizer FOLDER.") from error
