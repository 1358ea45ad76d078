"""Model cards: README.md beside a compressed model, in the format of the Hugging Face hub.

A card describes what was cut and how to load the model, and for a model of a run its origin, data and metrics too.
Unknown facts are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.checkpoints.files.description import read_content
from upop.checkpoints.files.hub import is_hub_name
from upop.errors import CheckpointError
from upop.files import rewrite_text
from upop.plain import one_line, plain
from upop.pruning.goal import format_reached
from upop.pruning.round_to import format_round_to

FILE = "README.md"
_MEANING = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
"""Characters that Markdown interprets; an underscore within a word is a letter."""
_KINDS = {"attention": "attention", "mlp": "MLP", "residual": "residual stream"}
SERVERS = "vLLM, SGLang, TensorRT-LLM, llama.cpp, MLX"
Row = tuple[str, str, str]
"""Program, whether it runs the model, and how."""
_PAPER = """\
```bibtex
@InProceedings{pmlr-v202-shi23e,
  title     = {{UPop}: Unified and Progressive Pruning for Compressing Vision-Language Transformers},
  author    = {Shi, Dachuan and Tao, Chaofan and Jin, Ying and Yang, Zhendong and Yuan, Chun and Wang, Jiaqi},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning},
  year      = {2023}
}
```"""


@dataclass(frozen=True)
class Story:
    """The facts of a run for its model card.

    Attributes:
        name: the name in tables, such as "UPop 2x".
        task: the task's name.
        pipeline: the hub's name of the task, if it has one.
        base: origin of the dense model: a path, a URL or a name on the hub.
        facts: further facts, name -> text: data, epochs, seed.
        metrics: names of the metrics.
        columns: columns of the table of results, after the model's name.
        rows: its rows: the model's name, and one text per column.
        note: how the metrics were measured.
        command: the command as typed.
    """

    name: str
    task: str
    pipeline: str | None
    base: str | None
    facts: Mapping[str, str]
    metrics: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    note: str
    command: str


def write_card(folder: Path, story: Story) -> None:
    """Write the card of a compressed model in a folder of `save`, with the facts of its run.

    Raises:
        CheckpointError: the folder holds no model of `save`.
        RunFolderError: the card cannot be written.
    """
    path = folder / "upop.json"
    try:
        text = card(read_content(folder), story=story)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. Write the model again.") from error
    rewrite_text(folder, FILE, text)


def card(
    description: Mapping[str, Any],
    *,
    name: str | None = None,
    parameters: int | None = None,
    story: Story | None = None,
) -> str:
    """Return the text of a model card.

    Args:
        description: the content of `upop.json`.
        name: hub name of the dense model.
        parameters: their number.
        story: the facts of its run, if any.
    """
    kind = description["class"].rpartition(".")[2]
    kind = kind if kind.isidentifier() else "model"
    base = story.base if story is not None else name
    parts = [
        _front_matter(description, base, story),
        f"# {_cell(story.name)}, {story.task}" if story is not None else f"# {kind}, compressed",
        _opening(description, kind, base, story),
    ]
    if story is not None:
        rows = [[_cell(row), *map(_cell, cells)] for row, cells in story.rows]
        parts += ["## Results", _table(["model", *map(_cell, story.columns)], rows)]
        parts += [_cell(story.note)] if story.note else []
    parts += ["## How it was made", _made(description, base, parameters, story)]
    parts += ["## What it keeps", _kept(description["layout"])]
    parts += ["## How to load it", _loading(description, kind, story)]
    parts += ["## Where it runs", _table(["with", "runs", "how"], runtimes(description))]
    versions = ", ".join(_cell(f"{library} {version}") for library, version in description["versions"].items())
    parts += ["## Credit", f"Written with {versions}. The method is that of UPop (ICML 2023):", _PAPER]
    return "\n\n".join(parts) + "\n"


def _front_matter(description: Mapping[str, Any], base: str | None, story: Story | None) -> str:
    libraries = [name for name in ("timm", "transformers", "open_clip") if description.get(name)]
    data = {
        # The library whose own functions load the folder; timm does not load layers that differ in size.
        "library_name": "transformers" if description["transformers"] else "upop",
        "tags": [*dict.fromkeys(["upop", "pruning", "compression", *([story.task] if story else []), *libraries])],
        "base_model": base if base is not None and is_hub_name(base) else None,
        "pipeline_tag": story.pipeline if story is not None else None,
        "metrics": [*story.metrics] if story is not None else None,
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items() if value]  # is YAML too
    return "\n".join(["---", *lines, "---"])


def _opening(description: Mapping[str, Any], kind: str, base: str | None, story: Story | None) -> str:
    made = f", made from {_code(base)}" if base else ""
    task = f" for the task {story.task}" if story is not None else ""
    timm = description.get("timm")
    architecture = f" (timm's {_code(timm['architecture'])})" if timm else ""
    by_weight = _settings(description).get("method") == "magnitude"
    how = "by one cut of the smallest weights" if by_weight else "with unified and progressive pruning"
    known = by_weight or "interval" in _settings(description)  # otherwise the kept channels came from elsewhere
    method = f", {how}" if known else ""
    return (
        f"A compressed {_code(kind)}{architecture}{task}{made}{method}. "
        "It is an ordinary model with smaller layers: no masks, no sparse kernels."
    )


def _made(description: Mapping[str, Any], base: str | None, parameters: int | None, story: Story | None) -> str:
    settings = _settings(description)
    facts: dict[str, str] = {}
    if base:
        facts["dense model"] = _code(base)
    if "ratio" in settings:
        facts["share of the prunable cost removed"] = f"{settings['ratio']:g}"
    if "target" in settings:
        facts["target for the whole model"] = _cell(str(settings["target"]))
    if "reached" in settings:
        facts["left of the whole model"] = _cell(format_reached(settings))
    if "cost" in settings and "target" not in settings:
        facts["what the cost counts"] = _cell(str(settings["cost"]))
    round_to = settings.get("round_to", settings.get("align", 1))  # plans of earlier versions say "align"
    if round_to != 1:
        facts["kept sizes are multiples of"] = _cell(format_round_to(round_to))
    if "steps" in settings:
        facts["search steps"] = f"{settings['steps']:,}"
    if parameters is not None:
        facts["parameters"] = f"{parameters:,}"
    if story is not None:
        facts |= {name: _code(value) for name, value in story.facts.items()}
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    command = _block(story.command) if story is not None and story.command else ""
    # upop.json holds the plan in any case.
    lines.append("- which channels every layer keeps: the plan in `upop.json`")
    return "\n".join(lines) + (f"\n\n{command}" if command else "")


def _kept(layout: Mapping[str, Mapping[str, Any]]) -> str:
    groups = [group for group in layout.values() if group["of"] is not None]
    if not groups:
        return "The dense sizes were not recorded when the model was cut."
    modalities = list(dict.fromkeys(group["modality"] for group in groups))
    kinds = [kind for kind in _KINDS if any(group["kind"] == kind for group in groups)]

    def share(modality: str | None, kind: str | None) -> str:
        mine = [group for group in groups if modality in (None, group["modality"]) and kind in (None, group["kind"])]
        size = sum(group["of"] for group in mine)
        return f"{100 * sum(group['channels'] for group in mine) / size:.1f} %" if size else "-"

    columns = [*((_KINDS[kind], kind) for kind in kinds), *([("all", None)] if len(kinds) > 1 else [])]
    rows = [[_cell(modality), *(share(modality, kind) for _, kind in columns)] for modality in modalities]
    if len(modalities) > 1:
        rows.append(["all", *(share(None, kind) for _, kind in columns)])
    streams = " and channels of residual streams" if "residual" in kinds else ""
    return f"Share of the dense model's attention dimensions and MLP neurons{streams}:\n\n" + _table(
        ["modality", *(title for title, _ in columns)], rows
    )


def _loading(description: Mapping[str, Any], kind: str, story: Story | None) -> str:
    place = '"path/to/this/folder"'
    lines = ["import upop", ""]
    if description["transformers"]:
        lines = (
            []
            if description.get("plain")
            else [
                "import upop  # lets transformers read layers of odd sizes",
            ]
        )
        lines += [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({place})"]
    elif description.get("timm") and description.get("plain"):
        lines = ["import timm", "", 'model = timm.create_model("local-dir:path/to/this/folder", pretrained=True)']
    elif description["model"] or description.get("timm") or description.get("open_clip"):
        what = "an ordinary timm model" if description.get("timm") else "an ordinary module"
        lines.append(f"model = upop.load({place})  # {what}, in evaluation mode")
    else:
        lines.append(f"model = upop.load_into(dense_model, {place})  # the {kind} as it was before, built by you")
    text = "```python\n" + "\n".join(lines) + "\n```"
    if story is not None and description["model"]:
        text += (
            f"\n\nTo evaluate it: `upop evaluate {story.task} --pretrained path/to/this/folder`, with your `--config`."
        )
    return text


def runtimes(description: Mapping[str, Any]) -> Sequence[Row]:
    """Return which programs run the model of a folder of `upop.save`.

    Args:
        description: the content of `upop.json`.
    """
    plain = bool(description.get("plain"))
    how = "`upop export FOLDER --to onnx --out OUT`, `--to openvino` or `--to torch-export`"
    graphs = ("onnxruntime, OpenVINO, torch.export", "after an export", how)
    ours = ("Python with upop", "yes", "`upop.load(FOLDER)`")
    if description["transformers"]:
        return [*_in_transformers(plain), ours, graphs]
    if description.get("timm"):
        if plain:
            how = '`timm.create_model("local-dir:FOLDER", pretrained=True)`; the arguments are in `config.json`'
            return [("timm, without upop", "yes", how), ours, graphs]
        padded = "`upop export FOLDER --to padded --out OUT`: its layers differ in size; timm has one number for all"
        return [ours, ("timm, without upop", "after an export", padded), graphs]
    if description["model"]:
        form = "`upop convert FOLDER NEW --to hugging-face`, where it has a class for the task"
        return [ours, ("transformers", "after a conversion", form), graphs]
    return [("Python with upop", "yes", "`upop.load_into(dense_model, FOLDER)`")]


def _in_transformers(plain: bool) -> Sequence[Row]:
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
        ("transformers, without upop", "after an export", f"`upop export FOLDER --to padded --out OUT`; {uneven}"),
        (
            SERVERS,
            "after an export",
            "`upop export FOLDER --to padded --out OUT`; a decoder like Llama also `--to nemotron-nas`, by layer",
        ),
    ]


def _settings(description: Mapping[str, Any]) -> Mapping[str, Any]:
    plan: Mapping[str, Any] = description["plan"] or {}
    settings: Mapping[str, Any] = plan.get("settings", {})
    return settings


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Escape a text for Markdown and HTML, on one line."""
    return _MEANING.sub(r"\\\g<0>", one_line(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """Format any text as inline code, on one line."""
    marks = _fence(text, 1)
    space = " " if "`" in text else ""
    return f"{marks}{space}{one_line(text)}{space}{marks}"


def _block(text: str) -> str:
    """Format any text as a code block."""
    marks = _fence(text, 3)
    return f"{marks}\n{plain(text)}\n{marks}"


def _fence(text: str, least: int) -> str:
    """Return a run of backticks longer than any in a text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
