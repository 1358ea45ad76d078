"""The figures of docs/method.md, from one real search as published (soft masks) on the demo's small model.

Writes docs/figures/*.svg, and docs/figures/figures.json with the numbers that the page tells:

    python docs/figures.py

The model is the one in assets/shapes-nlvr; its data is generated. It takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import upop
from upop.demo.write import write_shapes
from upop.files import make_folder, replacing_file, write_json
from upop.pruning.budget import progress, standardise
from upop.pruning.masks import Masks
from upop.runs.loaders import first_samples, make_loader, set_epoch
from upop.settings import read_settings
from upop.tasks import find_task

OUT = Path(__file__).parent / "figures"
CONFIG = Path(__file__).parents[1] / "configs" / "shapes" / "nlvr.yaml"
DENSE = Path(__file__).parents[1] / "assets" / "shapes-nlvr"

_COLOURS = {"vision": "#0072B2", "text": "#D55E00", "attention": "#009E73", "mlp": "#CC79A7"}
_INK, _FAINT = "#222222", "#8a8a8a"
_PROBED = 16  # samples on which outputs are compared


@dataclass
class Search:
    """What one search left.

    Attributes:
        model: the dense model, as the last search step left it, with the masks off.
        pruner: after its last step.
        plan: what it keeps.
        batch: the model's inputs for comparisons.
        steps: how many steps it took.
        ratio: the share of the cost that it was asked for.
        asked: p_t after every step.
        marked: the share of the cost that was marked after every step.
        masks: group -> one row per step, [steps, size].
        apart: (step, relative difference between the masked model and the one cut to its unmarked channels).
    """

    model: nn.Module
    pruner: upop.Pruner
    plan: upop.Plan
    batch: dict[str, Tensor]
    steps: int
    ratio: float
    asked: list[float] = field(default_factory=list)
    marked: list[float] = field(default_factory=list)
    masks: dict[str, list[Tensor]] = field(default_factory=dict)
    apart: list[tuple[int, float]] = field(default_factory=list)


def search(ratio: float, samples: int, interval: int, folder: Path) -> Search:
    """Search the demo's model for one epoch over generated data, and note everything that the figures show."""
    data = write_shapes("nlvr", folder, seed=0, size=samples)
    task = find_task("nlvr")
    settings: Any = read_settings(task.settings, CONFIG, {**data.settings, "device": "cpu", "num_workers": 0})
    torch.manual_seed(settings.seed)
    dense = task.load(DENSE, settings)
    model = copy.deepcopy(dense)
    loader = make_loader(task, settings, "train")
    set_epoch(loader, 0)
    probe = task.inputs(first_samples(loader, _PROBED))
    steps = len(loader)
    pruner = upop.Pruner(model, ratio, steps, interval, progress="soft")
    found = Search(model, pruner, upop.Plan({}, {}), probe, steps, ratio)
    optimizer = task.optimizer(model, settings)
    for step, batch in enumerate(loader):
        model.train()
        loss = task.loss(model, batch, settings, step / steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
        found.asked.append(pruner.current_ratio)
        found.marked.append(1 - pruner.kept_share())
        for name, mask in pruner.masks.items():
            found.masks.setdefault(name, []).append(mask)
        if step % interval == 0 or step == steps - 1:
            found.apart.append((step + 1, _apart(dense, model, pruner, probe)))
    found.plan = pruner.plan()
    pruner.remove()
    return found


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's outputs in evaluation mode."""
    with torch.no_grad():
        result: Tensor = model.eval()(**inputs)
    return result


def difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest element of the first."""
    return float((expected - found).abs().max() / expected.abs().max())


def _apart(dense: nn.Module, model: nn.Module, pruner: upop.Pruner, inputs: dict[str, Tensor]) -> float:
    """Return how much the outputs would jump if the marked channels were cut off now."""
    masked = outputs(model, inputs)
    cut = copy.deepcopy(dense)
    cut.load_state_dict(model.state_dict())
    kept = {name: (mask == 1).nonzero().flatten().tolist() for name, mask in pruner.masks.items()}
    return difference(masked, outputs(upop.shrink(cut, kept), inputs))


def cut_differences(found: Search) -> dict[str, float]:
    """Return how far outputs are from the masked model's after a cut: ours in both precisions, and with what it skips.

    "no scale folded" leaves the queries as they are, so that softmax divides by the root of fewer dimensions;
    "qkv biases drawn anew" gives the vision transformer's query, key and value layers fresh biases.
    """
    result = {}
    for name, dtype in (("ours, float64", torch.float64), ("ours, float32", torch.float32)):
        model, inputs = _as(found, dtype)
        expected = _masked(model, found, inputs)
        result[name] = difference(expected, outputs(upop.shrink(model, found.plan), inputs))
    model, inputs = _as(found, torch.float64)
    expected = _masked(model, found, inputs)
    result["no scale folded"] = difference(expected, outputs(upop.shrink(model, found.plan, fold=False), inputs))
    model, inputs = _as(found, torch.float64)
    upop.shrink(model, found.plan)
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith("attn.qkv") and isinstance(module, nn.Linear) and module.bias is not None:
            bound = module.in_features**-0.5  # as torch draws the biases of a new layer
            nn.init.uniform_(module.bias, -bound, bound)
    result["qkv biases drawn anew"] = difference(expected, outputs(model, inputs))
    return result


def _as(found: Search, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.batch.items()}
    return copy.deepcopy(found.model).to(dtype), inputs


def _masked(model: nn.Module, found: Search, inputs: dict[str, Tensor]) -> Tensor:
    """Return the outputs of a model whose channels are masked as the plan says."""
    masked = copy.deepcopy(model)
    masks = Masks(masked, found.pruner.groups)
    masks.set(found.pruner.masks)
    return outputs(masked, inputs)


def schedule_figure(found: Search) -> Figure:
    """Draw p_t, and the share of the cost that was marked."""
    figure, axes = _axes(7, 3.2)
    steps = range(1, found.steps + 1)
    axes.plot(steps, [100 * share for share in found.asked], color=_FAINT, linewidth=2, label="asked: $p_t$")
    axes.step(
        steps, [100 * share for share in found.marked], where="post", color=_COLOURS["vision"], label="marked (by cost)"
    )
    axes.axhline(100 * found.ratio, color=_INK, linestyle=":", linewidth=1)
    axes.set(xlabel="search step", ylabel="share of the cost (%)", ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
    return figure


def masks_figure(found: Search) -> Figure:
    """Draw the mask of every channel of two groups over time, the first to go at the top."""
    names = list(found.masks)
    first_attention = next(name for name in names if name.endswith("attn"))
    last_mlp = [name for name in names if "intermediate" in name][-1]
    figure, all_axes = _axes(9, 3.6, columns=2)
    for axes, name in zip(all_axes, (first_attention, last_mlp), strict=True):
        values = torch.stack(found.masks[name]).T  # [size, steps]
        image = axes.imshow(
            values[values.mean(1).argsort(stable=True)],
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            vmin=0,
            vmax=1,
            extent=(0, found.steps, len(values), 0),
        )
        stay = int((values[:, -1] > 0).sum())
        axes.set_title(f"{name}\n{stay} of {len(values)} channels stay", fontsize=9, color=_INK)
        axes.set(xlabel="search step", ylabel="entry")
    figure.colorbar(image, ax=list(all_axes), label="mask")
    return figure


def scores_figure(found: Search) -> Figure:
    """Draw the standardised scores of the last step, by structure, with the threshold."""
    figure, axes = _axes(7, 3.2)
    ranked = standardise(found.pruner.groups, found.pruner.scores)
    edges = torch.linspace(-4, 4, 65).tolist()
    for kind in ("attention", "mlp"):
        values = torch.cat([ranked[group.name] for group in found.pruner.groups if group.kind == kind])
        label = f"{'attention dimensions' if kind == 'attention' else 'MLP neurons'} ({len(values):,})"
        axes.hist(values.clamp(-4, 4), edges, density=True, color=_COLOURS[kind], alpha=0.55, label=label)
    assert found.pruner.threshold is not None
    axes.axvline(found.pruner.threshold, color=_INK, linestyle="--", linewidth=1)
    axes.annotate(" these go", (found.pruner.threshold, 0.95), xycoords=("data", "axes fraction"), va="top", fontsize=9)
    axes.set(xlabel="standardised score", ylabel="density")
    axes.legend(frameon=False, loc="upper left")
    return figure


def kept_figure(found: Search) -> Figure:
    """Draw the share of channels that every group keeps, by structure over the layers."""
    figure, all_axes = _axes(9, 3.0, columns=2)
    for axes, kind in zip(all_axes, ("attention", "mlp"), strict=True):
        for modality in ("vision", "text"):
            groups = [group for group in found.pruner.groups if group.kind == kind and group.modality == modality]
            shares = [100 * len(found.plan[group.name]) / group.size for group in groups]
            places = range(1, len(groups) + 1)
            axes.plot(places, shares, marker="o", markersize=4, color=_COLOURS[modality], label=modality)
            axes.set_xticks(places)
        title = "attention" if kind == "attention" else "MLP"
        axes.set(title=title, ylim=(0, 103), xlabel="group, from input to output")
    all_axes[0].set_ylabel("channels kept (%)")
    all_axes[1].legend(frameon=False, loc="lower right")
    return figure


def error_figure(found: Search, differences: dict[str, float]) -> Figure:
    """Draw what a cut would change at every update, and what the last one changes if something is left out."""
    figure, (left, right) = _axes(9, 3.2, columns=2)
    steps, values = zip(*found.apart, strict=True)
    left.semilogy(steps, values, color=_COLOURS["vision"], marker="o", markersize=3)
    left.set(xlabel="search step", ylabel="relative change of the outputs", title="if the marked channels were cut now")
    names = list(differences)
    right.barh(names, list(differences.values()), color=[_COLOURS["vision"]] * 2 + [_COLOURS["text"]] * 2)
    for place, value in enumerate(differences.values()):
        right.annotate(f" {value:.0e}", (value, place), va="center", fontsize=8)
    right.set(xscale="log", xlabel="relative change of the outputs", title="the last cut", xlim=(1e-18, 1e3))
    right.invert_yaxis()
    return figure


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for each in [axes] if isinstance(axes, Axes) else axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8, colors=_INK)
    return figure, axes


def main() -> None:
    """Search once, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6400, help="training samples; a step takes 64")
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    # The same file for the same numbers: no date, and no names of parts that are drawn at random.
    matplotlib.rcParams.update({"svg.hashsalt": "upop", "svg.fonttype": "none", "font.size": 9})
    with tempfile.TemporaryDirectory() as folder:
        found = search(arguments.ratio, arguments.samples, arguments.interval, Path(folder) / "data")
    differences = cut_differences(found)
    figures = {
        "schedule": schedule_figure(found),
        "masks": masks_figure(found),
        "scores": scores_figure(found),
        "kept": kept_figure(found),
        "error": error_figure(found, differences),
    }
    make_folder(arguments.out)
    for name, figure in figures.items():
        with replacing_file(arguments.out / f"{name}.svg", _is_drawn) as part:
            figure.savefig(part, format="svg", facecolor="white", metadata={"Date": None})
    kept = {
        f"{modality} {kind}": found.pruner.kept_share(modality, kind)
        for modality in ("vision", "text")
        for kind in ("attention", "mlp")
    }
    numbers = {
        "ratio": found.ratio,
        "steps": found.steps,
        "interval": found.pruner.interval,
        "half_asked_after": next(step for step, share in enumerate(found.asked, 1) if share >= found.ratio / 2),
        "asked_matches_formula": all(
            share == progress(step, found.steps, found.ratio) for step, share in enumerate(found.asked)
        ),
        "marked_at_the_end": found.marked[-1],
        "entry_costs": {
            group.name: found.pruner.costs[group.name] for group in found.pruner.groups if ".0." in group.name
        },
        "kept": kept,
        "change_by_cutting": dict(found.apart),
        "change_by_last_cut": differences,
    }
    write_json(arguments.out / "figures.json", numbers)


def _is_drawn(path: Path) -> bool:
    return b"Matplotlib" in path.read_bytes()[:2048]


if __name__ == "__main__":
    main()
