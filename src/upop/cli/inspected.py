"""What `upop inspect` shows; apart, because it imports torch and the command's help does not."""

from __future__ import annotations

import inspect as signatures
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from upop.checkpoints.fitting.sizes import dense_meta_copy
from upop.checkpoints.loading import load_named
from upop.libraries import is_pretrained
from upop.meta import on_meta
from upop.models import MODELS, kind_of
from upop.plain import as_text
from upop.pruning import find_prunable
from upop.pruning.carried import plan_of
from upop.pruning.coverage import Coverage
from upop.pruning.goal import Goal
from upop.pruning.round_to import read_round_to
from upop.report.inspection import Inspection, after_budget, inspect_model
from upop.report.results import number
from upop.report.shares import Panel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_WORDS = 128  # maximum tokens of the text for which multiply-adds are counted
_SHOWN_REASONS = 5


def show(
    source: str,
    task: str | None,
    *,
    ratio: float | None,
    target: str | None,
    round_to: str,
    as_json: bool,
    overrides: Mapping[str, Any],
) -> None:
    """Print the groups, sizes and coverage of a model.

    Args:
        source: a folder, a file, or a name.
        task: of a published file.
        ratio: also preview the sizes after this share of the cost is removed,
        target: or at this target.
        round_to: kept channels are multiples of this.
        as_json: print JSON in place of tables.
        overrides: settings of the model.
    """
    goal = Goal(ratio, target) if ratio is not None or target is not None else None
    rounded = read_round_to(round_to)
    # Weights that do not fit do not change the sizes, which are all that is shown.
    model = load_named(source, task, strict=False, **overrides)
    inputs, note = example_of(model)
    try:
        found = inspect_model(model, inputs, _dense_sizes(model))
    except Exception as error:  # the model rejects the inputs, with an error of any type
        if inputs is None:
            raise
        note = f"not counted: the model rejects the example inputs ({' '.join(str(error).split())[:120]})"
        inputs, found = None, inspect_model(model, None, _dense_sizes(model))
    smaller = None
    if goal is not None and found.panels:
        shrunken, plan = after_budget(model, goal, rounded, inputs)
        smaller = inspect_model(shrunken, inputs, plan.sizes)
    if as_json:
        print(json.dumps(_content(model, found, smaller, note), indent=1))
        return
    console = Console(highlight=False)
    console.print(as_text(f"{source}: {type(model).__name__}"))
    if found.panels:
        console.print(_groups_table(found, smaller))
    else:
        console.print("No part of it can be pruned.")
    console.print(_parts_table(found, smaller, goal if found.panels else None))
    console.print(_coverage_table(found.coverage))
    console.print(as_text(f"GMACs: {note}"), soft_wrap=True)
    if smaller is not None:
        console.print(
            "The preview removes the same share of every group. A search decides which channels are removed, and from "
            "which groups; the result has the same number of parameters, and about as many GMACs.",
            soft_wrap=True,
        )
    if found.skipped:
        reasons = list(dict.fromkeys(part.reason for part in found.skipped))
        console.print(f"Skipped: {len(found.skipped)} structures.")
        for reason in reasons[:_SHOWN_REASONS]:
            first = next(part.name for part in found.skipped if part.reason == reason)
            console.print(as_text(f"  {first}: {reason}"), soft_wrap=True)


def example_of(model: nn.Module) -> tuple[Any, str]:
    """Return inputs for a forward pass of one sample, and a description; (None, reason) if unknown."""
    if kind_of(model) is not None:
        from upop.tasks import TASKS

        for task in TASKS.values():
            if getattr(task, "config", None) is type(model.config):
                return task.example(model, 1), "of one sample of the published size"
    if is_pretrained(model):
        return _transformers_example(model)
    settings = getattr(model, "pretrained_cfg", None)
    if isinstance(settings, Mapping):
        size = tuple(settings.get("input_size", (3, 224, 224)))
        grid = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = (size[0], *grid) if grid else size
        return torch.zeros(1, *size), f"of one image of {size[1]} x {size[2]} pixels"
    side, words = getattr(getattr(model, "visual", None), "image_size", None), getattr(model, "context_length", None)
    if side and words:  # open_clip
        height, width = (side, side) if isinstance(side, int) else side
        inputs = (torch.zeros(1, 3, height, width), torch.zeros(1, words, dtype=torch.long))
        return inputs, f"of one image of {height} x {width} pixels and one text of {words} tokens"
    return None, f"not counted: the inputs of a {type(model).__name__} are not known"


def _transformers_example(model: PreTrainedModel) -> tuple[Any, str]:
    config: Any = model.config
    text = config.get_text_config()
    takes = signatures.signature(model.forward).parameters
    most = getattr(text, "max_position_embeddings", None) or _MOST_WORDS
    length = min(_MOST_WORDS, most if isinstance(most, int) and most > 1 else _MOST_WORDS)
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None)
    inputs: dict[str, Tensor] = {}
    parts = []
    if "pixel_values" in takes and side:
        height, width = (side, side) if isinstance(side, int) else side
        inputs["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width).to(model.dtype)
        parts.append(f"one image of {height} x {width} pixels")
    if "input_ids" in takes and getattr(text, "vocab_size", None):
        inputs["input_ids"] = torch.ones(1, length, dtype=torch.long)
        parts.append(f"one text of {length} tokens")
        if config.is_encoder_decoder or "decoder_input_ids" in takes:
            inputs["decoder_input_ids"] = inputs["input_ids"]
    if not inputs:
        return None, f"not counted: the inputs of a {type(model).__name__} are not known"
    return inputs, f"of {' and '.join(parts)}"


def _dense_sizes(model: nn.Module) -> dict[str, int]:
    """Return group -> channels before compression, from the model's configuration or plan; {} if neither has them."""
    kind, plan = kind_of(model), plan_of(model)
    if kind is not None:
        built, _ = MODELS[kind]
        return {group.name: group.size for group in find_prunable(on_meta(lambda: built(model.config))).groups}
    if is_pretrained(model):
        return {group.name: group.size for group in find_prunable(dense_meta_copy(model)).groups}
    return dict(plan.sizes) if plan is not None else {}


def _groups_table(found: Inspection, smaller: Inspection | None) -> Table:
    table = Table(title="Prunable groups", title_justify="left")
    for heading in ("modality", "structure", "layers", "channels per layer", "parameters (M)"):
        table.add_column(heading, justify="left" if heading in ("modality", "structure") else "right")
    after = {panel.title + panel.modality: panel for panel in smaller.panels} if smaller is not None else {}
    for panel in found.panels:
        left = after.get(panel.title + panel.modality)
        count = sum(found.group_parameters[group.name] for group in panel.layers)
        table.add_row(
            as_text(panel.modality),
            as_text(panel.title),
            str(len(panel.layers)),
            _channels(panel) + (f" -> {_range(group.kept for group in left.layers)}" if left else ""),
            number(count / 1e6),
        )
    return table


def _coverage_table(covered: Coverage) -> Table:
    table = Table(title="Coverage", title_justify="left")
    table.add_column("where")
    for heading in ("parameters (M)", "share", "GMACs", "share"):
        table.add_column(heading, justify="right")
    shares = covered.shares
    whole = sum(each.parameters for each in shares.values())
    run = sum(each.macs or 0 for each in shares.values())
    names = {
        "groups": "in groups",
        "skipped": "skipped, with a reason",
        "outside": "outside: embeddings, heads",
    }
    for place, each in shares.items():
        macs = None if each.macs is None else number(each.macs / 1e9)
        table.add_row(
            names[place],
            number(each.parameters / 1e6),
            f"{100 * each.parameters / max(1, whole):.1f} %",
            macs or "-",
            "-" if each.macs is None else f"{100 * each.macs / max(1, run):.1f} %",
        )
    return table


def _content(model: nn.Module, found: Inspection, smaller: Inspection | None, note: str) -> dict[str, Any]:
    """Return the content of the tables as JSON values."""
    return {
        "class": type(model).__name__,
        "parameters": found.parameters,
        "macs": found.macs,
        "note": note,
        "parts": [asdict(part) for part in found.parts],
        "groups": [
            {**asdict(group), "parameters": found.group_parameters[group.name]}
            for panel in found.panels
            for group in panel.layers
        ],
        "coverage": found.coverage.to_json(),
        "skipped": [asdict(part) for part in found.skipped],
        "after": None if smaller is None else {"parameters": smaller.parameters, "macs": smaller.macs},
    }


def _channels(panel: Panel) -> str:
    kept, size = _range(group.kept for group in panel.layers), _range(group.size for group in panel.layers)
    return size if kept == size else f"{kept} of {size}"


def _range(values: Any) -> str:
    listed = sorted(values)
    return str(listed[0]) if listed[0] == listed[-1] else f"{listed[0]} to {listed[-1]}"


def _parts_table(found: Inspection, smaller: Inspection | None, goal: Goal | None) -> Table:
    title = "Sizes"
    if goal is not None and smaller is not None:
        budget = f"with {goal}" if goal.ratio is None else f"without {100 * goal.ratio:g} % of the prunable parameters"
        title += f", before and after: {budget} ({found.parameters / smaller.parameters:.3g}x of the whole model)"
    table = Table(title=title, title_justify="left")
    table.add_column("modality")
    for heading in ("parameters (M)", "prunable (M)", "GMACs"):
        table.add_column(heading, justify="right")
    after = {part.modality: part for part in smaller.parts} if smaller is not None else {}
    for part in found.parts:
        left = after.get(part.modality)
        table.add_row(
            as_text(part.modality),
            _change(part.parameters, None if left is None else left.parameters, 1e6),
            _change(part.prunable, None if left is None else left.prunable, 1e6),
            _change(part.macs, None if left is None else left.macs, 1e9),
        )
    whole = [_change(read(found), None if smaller is None else read(smaller), group) for read, group in _TOTALS]
    table.add_section()
    table.add_row("all", *whole)
    return table


_TOTALS: tuple[tuple[Callable[[Inspection], int | None], float], ...] = (
    (lambda found: found.parameters, 1e6),
    (lambda found: sum(part.prunable for part in found.parts), 1e6),
    (lambda found: found.macs, 1e9),
)


def _change(before: int | None, after: int | None, group: float) -> str:
    if before is None:
        return "-"
    return number(before / group) + ("" if after is None else f" -> {number(after / group)}")
