"""Measures the latency of each kind of layer at several sizes, by timing the model with all layers of the kind cut."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from upop.defaults import POINTS, RUNTIMES
from upop.errors import SettingError
from upop.files import replacing_file
from upop.machine import machine
from upop.ownership import has_fields
from upop.pruning import Group
from upop.pruning.deprecated import renamed_arguments
from upop.pruning.depth import removable
from upop.pruning.groups import tensor_of
from upop.pruning.known import know_as
from upop.pruning.latency import Layers, Profile
from upop.pruning.plan import Plan
from upop.pruning.prunable import groups_to_search
from upop.pruning.shrink import apply_plan
from upop.reading import read_object
from upop.report.latency import Clock, measure_latency


@renamed_arguments(say="notify")
def profile_model(
    model: nn.Module,
    inputs: Any,
    *,
    runtime: str = "eager",
    points: int = POINTS,
    repeats: int = 15,
    clock: Clock = time.perf_counter,
    notify: Callable[[str], None] | None = None,
) -> Profile:
    """Measure the latency of a model's layers, by kind and size.

    The dense model and each cut one are timed in turns, so that a drift of the machine affects both alike; a saving is
    a share of the dense model's time in the same turns. Latency that grows in steps shows only at the measured sizes.

    Args:
        model: dense; left as it is.
        inputs: of one forward pass, on the model's device.
        runtime: "eager", "compile" for torch.compile, or "onnxruntime" and "openvino", on the CPU in float32.
        points: sizes of each kind besides the dense one, down to one channel; 0 if the branch may be empty.
        repeats: timed passes of each model; the fastest counts, which other programs disturbed least.
        clock: of `upop.report.latency.measure_latency`.
        notify: called with a line of progress per kind.

    Raises:
        SettingError: the runtime is unknown, or cannot run the model.
        MissingLibraryError: the runtime is not installed.
        LayoutError: the model has no groups.
    """
    if runtime not in RUNTIMES:
        raise SettingError(f"runtime={runtime!r} is not known. Use one of {', '.join(map(repr, RUNTIMES))}.")
    made = partial(in_runtime, inputs, runtime)
    timed = partial(measure_latency, repeats=repeats, warmup=min(3, repeats), clock=clock, summary=min)
    groups = groups_to_search(model, inputs)
    try:
        empty = removable(model, groups, [inputs])
    except SettingError:
        empty = frozenset()
    kinds: dict[Any, list[Group]] = {}
    for group in groups:
        kinds.setdefault(_kind(model, group), []).append(group)
    dense, found, times = made(model), [], []
    for number, alike in enumerate(kinds.values()):
        size = alike[0].size
        steps = sorted({max(1, round(size * point / points)) for point in range(points)} - {size})
        steps = [*([0] if empty.issuperset(group.name for group in alike) else []), *steps]
        saved = []
        for kept in steps:
            cut = copy.deepcopy(model)
            know_as(cut, model)
            plan = Plan.of(groups, {group.name: range(kept) for group in alike})
            apply_plan(cut, plan, verify=False)
            took = timed({"dense": dense, "cut": made(cut)}, inputs)
            saved.append((took["dense"] - took["cut"]) / took["dense"] / len(alike))
            times.append(took["dense"])
        if notify is not None:
            notify(f"{number + 1} of {len(kinds)} kinds: {len(alike)} x {alike[0].kind} of {size}")
        found.append((alike, size, steps, saved))
    whole = statistics.median(times) if times else timed({"dense": dense}, inputs)["dense"]
    layers = [
        Layers(tuple(group.name for group in alike), size, (*steps, size), (*_falling(saved, whole), 0.0))
        for alike, size, steps, saved in found
        if steps
    ]
    device = next(model.parameters()).device
    about = {"model": type(model).__name__, "runtime": runtime, "threads": torch.get_num_threads(), **machine(device)}
    return Profile(whole, tuple(layers), about)


def in_runtime(inputs: Any, runtime: str, model: nn.Module) -> nn.Module:
    """Return a module that runs a model in a runtime of `RUNTIMES`, on inputs of the given shapes.

    Raises:
        SettingError: the runtime cannot run the model, or not on its device.
        MissingLibraryError: the runtime is not installed.
    """
    if runtime == "eager":
        return model
    if runtime == "compile":
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        return compiled
    from upop.checkpoints.export.sessions import session  # which imports much

    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise SettingError(f"runtime={runtime!r} is measured on the CPU. Give device=cpu.")
    return session(model, inputs, runtime)


def batch_of(inputs: Any, size: int) -> Any:
    """Return inputs of one sample, repeated to a batch."""
    return tree_map(lambda each: torch.cat([each] * size) if isinstance(each, Tensor) else each, inputs)


def write_profile(profile: Profile, path: Path, *, overwrite: bool = False) -> None:
    """Write a profile as JSON.

    Raises:
        RunFolderError: there is another file of that name, or it cannot be written.
    """

    with replacing_file(path, overwrite or has_fields(("dense_ms", "layers"))) as part:
        part.write_text(json.dumps(profile.to_json(), indent=1) + "\n", encoding="utf-8")


def read_profile(path: Path) -> Profile:
    """Return what `write_profile` wrote.

    Raises:
        SettingError: it is no profile.
    """
    return Profile.from_json(read_object(path, SettingError, "Measure the model again: upop profile MODEL."))


def _kind(model: nn.Module, group: Group) -> Any:
    shapes = tuple((part.dim, part.inners, tuple(tensor_of(model, part.tensor).shape)) for part in group.slices)
    return group.modality, group.kind, group.channel, group.size, group.heads, shapes


def _falling(saved: list[float], whole: float) -> list[float]:
    """Return shares as milliseconds, falling: those that rise, by noise, become their mean (isotonic regression)."""
    blocks: list[list[float]] = []
    for each in saved:
        blocks.append([each])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) <= statistics.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [whole * max(0.0, statistics.mean(block)) for block in blocks for _ in block]
