"""The tables of README.md and docs/ that show measurements, written from the files of benchmarks/results/.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Write all of them again with

    python docs/tables.py

Settings and public names are listed as their classes and docstrings describe them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import quality_markdown as quality

import tokens_tables
import upop
from upop.published_data import PUBLISHED_DATA
from upop.recipes import read_recipes
from upop.report.results import times
from upop.settings import RunSettings
from upop.tasks import TASKS
from upop.tasks.blip import BlipSettings
from upop.tasks.library import LibrarySettings
from upop.tasks.row_settings import RowSettings
from upop.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def read(name: str) -> Any:
    """Return the content of a file of benchmarks/results/, named without its ending."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def metric(split: str, name: str, heading: str = "") -> Column:
    """Return the column of a metric on a split, in percent with one decimal."""
    return heading or name, lambda row: f"{row['metrics'][split][name]:.1f}"


def parameters(digits: int = 2) -> Column:
    """Return the column of parameters, in millions."""
    return "parameters (M)", lambda row: f"{row['parameters'] / 1e6:.{digits}f}"


GMACS: Column = ("GMACs", lambda row: f"{row['gmacs']:.4f}")

_ORDER = ("dense", "UPop 2x", "magnitude 2x", "UPop 4x", "magnitude 4x")
_PUBLISHED = ["dense", "reference 2x", "magnitude 2x", "reference 4x", "magnitude 4x"]
"""What the rows of `_ORDER` are called that were measured when the published search was the default."""


def models(file: str, first: str, *columns: Column) -> str:
    """Return a table of the models of a task, by the published search and by magnitude, dense first."""
    rows = {row["name"]: row for row in read(file)["models"]}
    names = [name for name in _ORDER if name in rows]
    assert len(names) == len(rows), f"{file} has models that the table does not know: {list(rows)}"
    return markdown(
        [first, *(heading for heading, _ in columns)],
        [[_PUBLISHED[_ORDER.index(name)], *(value(rows[name]) for _, value in columns)] for name in names],
    )


def published_runs() -> str:
    """Return what the published runs need, cost and reach."""
    costs = {row["name"]: row for row in read("costs")["recipes"]}
    rows = []
    for recipe in read_recipes().values():
        hours = costs[recipe.name]["gpu_hours"]["A100"]
        rows.append([recipe.name, f"`{recipe.pretrained}`", f"{hours:.2g}", recipe.paper or "-"])
    return markdown(["run", "dense checkpoint", "A100 hours, estimated", "the paper's result"], rows)


def published_counts() -> str:
    """Return how many samples the published data sets have."""
    rows = read_yaml(ROOT / PUBLISHED_DATA, "The file of published data sets")
    counts = [
        [name, *(f"{row[split]:,}" for split in ("train", "val", "test")), row["source"]] for name, row in rows.items()
    ]
    return markdown(["data", "training", "validation", "test", "source"], counts)


def demo() -> str:
    """Return the demo's table."""
    found = {row["name"]: row for row in read("demo_cpu")["models"]}
    # Named there by the share of what can go; a title is true of the whole model.
    fewer = {name: f"{found['dense']['parameters'] / row['parameters']:.3g}x" for name, row in found.items()}
    called = {
        "dense": "dense",
        "UPop 2x": f"UPop {fewer['UPop 2x']}",
        "magnitude 2x": f"cut by weight magnitude, {fewer['magnitude 2x']}",
    }

    def latency(row: Row) -> str:
        faster = f" ({times(row['compared']['faster'], 'faster')})" if row["name"] != "dense" else ""
        return f"{row['latency_ms']:.1f}{faster}"

    columns: list[Column] = [
        metric("dev", "accuracy", "dev accuracy (%)"),
        metric("test", "accuracy", "test accuracy (%)"),
        parameters(),
        GMACS,
        (f"latency, batch {read('demo_cpu')['batch_size']} (ms)", latency),
    ]
    rows = [[title, *(value(found[name]) for _, value in columns)] for name, title in called.items()]
    return markdown(["model", *(heading for heading, _ in columns)], rows)


def together() -> str:
    """Return the table of all tasks on generated data: the metric that decides, of every model."""
    rows = []
    for title, file, split, name in (
        ("captioning", "shapes_caption_cpu", "test", "exact"),
        ("question answering", "shapes_vqa_cpu", "val", "accuracy"),
        ("retrieval, BLIP", "shapes_retrieval_cpu", "test", "TR@1"),
        ("retrieval, CLIP", "shapes_retrieval-clip_cpu", "test", "TR@1"),
        ("classification", "shapes_classification_cpu", "test", "acc@1"),
        ("segmentation", "shapes_segmentation_cpu", "validation", "mIoU"),
    ):
        found = {row["name"]: row["metrics"][split][name] for row in read(file)["models"]}
        label = "exact captions" if name == "exact" else name
        rows.append([f"{title}: {label} (%)", *(f"{found[model]:.1f}" for model in _ORDER)])
    return markdown(["generated data", *_PUBLISHED], rows)


def search_step() -> str:
    """Return the table of what a search step costs beside a plain one."""
    rows = []
    ways = {"ours": "weight space (ours)", "activations": "activations, as published"}
    titles = {"deit-s": "DeiT-S, batch 16", "blip-nlvr": "BLIP NLVR, 384 pixels, batch 1"}
    for model, measured in read("search_step_amd-epyc")["models"].items():
        for way, called in ways.items():
            found = measured[way]
            low, high = found["time_ratio_quartiles"]
            rows.append(
                [
                    titles[model] if way == "ours" else "",
                    called,
                    f"{found['time_ratio_total']:.3f}",
                    f"{found['time_ratio']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{found['memory_ratio']:.3f}",
                ]
            )
    return markdown(["model", "masks", "time of all steps", "median step", "quartiles", "peak memory"], rows)


def latency() -> str:
    """Return the table of speed-ups, each with the share of what the saved multiply-adds promise."""
    titles = {"deit-s": "DeiT-S", "clip-b16": "CLIP ViT-B/16", "blip-b": "BLIP ViT-B, captioning"}
    rows = []
    for row in read("latency_amd-epyc")["rows"]:
        forms = dict(row["variants"])
        dense = forms.pop("dense")
        cells = [f"{form['speed_up']:.2f} ({form['realised']:.2f})" for form in forms.values()]
        mode = "compiled" if row["compiled"] else "eager"
        rows.append([titles[row["model"]], str(row["batch"]), mode, f"{dense['milliseconds']:,.0f}", *cells])
    return markdown(["model", "batch", "mode", "dense (ms)", "2x", "2x, align 8", "4x", "4x, align 8"], rows)


def loader() -> str:
    """Return the table of images that one core decodes and transforms in a second."""
    rows = []
    for title, way in read("loader_amd-epyc")["ways"].items():
        rates = way["per_second_and_core"]
        rows.append([title, f"{rates['plain']:.0f}", f"{rates['ours']:.0f}", f"{way['times_plain']:.2f}"])
    return markdown(["images per second and core", "plain", "ours", "ours / plain"], rows)


def calibrate() -> str:
    """Return the table of cuts without training."""
    content = read("calibrate_cpu")
    others = ("metric", "split", "dense", "dense_of_calibrate", "parameters")
    ways = [name for name in next(iter(content["tasks"].values())) if name not in others]
    rows = [
        [f"{task}, {found['metric']}", f"{100 * float(ratio):g} %", f"{found['dense']:.1f}"]
        + [f"{found[way][ratio]['quality']:.1f}" if way in found else "-" for way in ways]
        for task, found in content["tasks"].items()
        for ratio in found[ways[0]]
    ]
    return markdown(["task, metric", "removed", "dense", *ways], rows)


def calibrate_ranking() -> str:
    """Return the table of how scores were ranked before `calibrate` had its defaults."""
    tasks = read("earlier/calibrate_choices")["ranking"]
    ways = next(iter(tasks.values()))["0.5"]
    return markdown(
        ["half removed, no training", *tasks],
        [[way, *(f"{of['0.5'][way]:.1f}" for of in tasks.values())] for way in ways],
    )


def real(model: str, steps: int = 0) -> str:
    """Return the table of the ways to cut a pretrained model, mean and standard deviation over seeds.

    Args:
        model: as benchmarks/real/compare.py calls it.
        steps: of training after the cut.
    """
    cells = read(f"real_compare_{model}_cpu")["cells"]
    every = statistics.mode(cell["every"] for cell in cells)  # other test samples are another table
    cells = [cell for cell in cells if cell["every"] == every]
    dense = next(cell for cell in cells if cell["way"] == "dense")
    cut = [cell for cell in cells if cell.get("steps") == steps]
    ratios = sorted({cell["ratio"] for cell in cut})
    usual = statistics.mode(cell["batches"] for cell in cut)

    def value(way: str, batches: int, ratio: float) -> str:
        asked = way, batches, ratio
        found = [cell["quality"] for cell in cut if (cell["way"], cell["batches"], cell["ratio"]) == asked]
        if not found or None in found:
            return "-"
        if len(found) == 1:
            return f"{found[0]:,.1f}"
        return f"{statistics.mean(found):,.1f} ± {statistics.stdev(found):.1f} ({len(found)})"

    def order(cell: dict[str, Any]) -> tuple[bool, bool, bool]:
        way = str(cell["way"])
        return not way.startswith("upop"), way != "upop, calibrate", cell["batches"] != usual

    rows = dict.fromkeys((cell["way"], cell["batches"]) for cell in sorted(cut, key=order))
    described = {(way, batches): way + ("" if batches == usual else f", {batches} batches") for way, batches in rows}
    return markdown(
        [f"{dense['metric']}, dense {dense['quality']:.1f}", *(f"{100 * ratio:g} % removed" for ratio in ratios)],
        [[_titled(name), *(value(*row, ratio) for ratio in ratios)] for row, name in described.items()],
    )


def _titled(method: str) -> str:
    """Return what tables call a method of the result files."""
    return method.replace("MLPs alone", "MLPs only")


def easyvqa() -> str:
    """Return the table of easy-VQA: accuracy on the package's test questions."""
    parts = {"all": "accuracy", "yes or no": "accuracy_yes_no", "other": "accuracy_other"}
    rows = []
    for cell in read("real_easyvqa_cpu")["cells"]:
        accuracies = (f"{cell[f'test {part}']:.1f}" for part in parts.values())
        rows.append([cell["name"], *accuracies, f"{cell['parameters'] / 1e6:.2f}"])
    return markdown(["accuracy (%), test questions", *parts, "parameters (M)"], rows)


def quality_short() -> str:
    """Return the table of all methods at 4x and 2x, at equal parameters and the middle budget."""
    return markdown(*quality.short(read("quality_cpu"), ["4x", "2x"]))


def quality_whole(cost: str) -> str:
    """Return a table for every budget and reduction that was measured at equal `cost`, with sizes and times."""
    found = quality.whole(read("quality_cpu"), cost)
    return "\n".join(f"**{title}**\n\n{markdown(*shown)}" for title, shown in found) or "Not measured yet.\n"


def api() -> str:
    """Return the table of the public names, each with the first sentence of its docstring."""
    rows = []
    for name in upop.__all__:
        first = " ".join((getattr(upop, name).__doc__ or "").split("\n\n")[0].split())
        rows.append([f"`upop.{name}`", first.replace("|", "\\|")])
    return markdown(["name", "what it is or does"], rows)


def search_steps() -> str:
    """Return the table of all measurements of a search step, in the order of time."""
    files = {
        "first version, Xeon": "earlier/search_step_first",
        "as now, Xeon, a busy machine": "earlier/search_step_busy_machine",
        "as now, AMD EPYC, a quiet one": "search_step_amd-epyc",
    }
    rows = []
    for title, file in files.items():
        models = read(file)["models"]
        cells = [
            f"{models[model][way]['time_ratio']:.3f} ({low:.3f} to {high:.3f})"
            for model in ("deit-s", "blip-nlvr")
            for way in ("ours", "activations")
            for low, high in [models[model][way]["time_ratio_quartiles"]]
        ]
        rows.append([title, *cells])
    headings = [f"{model}, {way}" for model in ("DeiT-S", "BLIP NLVR") for way in ("weights", "activations")]
    return markdown(["median time beside a plain step (quartiles)", *headings], rows)


def demos() -> str:
    """Return the table of the demo with its first dense model, and with the one it has."""
    rows = []
    for title, file in (
        ("first dense model", "earlier/demo_first_dense_model"),
        ("today's, Xeon", "earlier/demo_other_machine"),
        ("today's, AMD EPYC", "earlier/demo_published_search"),
    ):
        found = {row["name"]: row["metrics"]["test"] for row in read(file)["models"]}
        values = [of["accuracy"] if isinstance(of, dict) else of for of in found.values()]
        assert list(found) == list(_ORDER[:3])
        rows.append([title, *(f"{value:.1f}" for value in values)])
    return markdown(["test accuracy (%)", *_PUBLISHED[:3]], rows)


def compiled() -> str:
    """Return the table of DeiT-S dense in batches of one, eager and compiled, in two runs."""
    rows = []
    for title, file in (("first run", "earlier/latency_stopped"), ("second run", "latency_amd-epyc")):
        found = {row["compiled"]: row for row in read(file)["rows"] if row["model"] == "deit-s" and row["batch"] == 1}
        cells = [f"{found[mode]['variants']['dense']['milliseconds']:.0f}" for mode in (False, True)]
        rows.append([title, *cells])
    return markdown(["DeiT-S, batch 1, dense (ms)", "eager", "compiled"], rows)


_PLAIN = {
    "image_size": "side of images in pixels",
    "weight_decay": "weight decay of the optimizer",
    "min_lr": "final learning rate",
    "batch_size_test": "samples per process and forward pass of evaluation",
    "classes": "number of classes",
    "cost": "what the budget counts: params, macs or reference",
    "w_sp_mlp": "the same for MLP masks",
    "output_dir": "the run directory",
    "device": "auto, cuda, mps or cpu",
    "seed": "random seed",
    "vit": "base or large",
    "schedule": "how the rate falls to min_lr: epoch or step (a cosine), or polynomial",
    "train_interpolation": "bicubic, bilinear or random",
    "remode": "content of an erased rectangle: const, rand or pixel",
    "recount": "maximum number of rectangles",
    "cutmix_minmax": "smallest and largest side of the cut region, as shares",
    "mixup_prob": "probability that a batch is mixed",
    "mixup_mode": "batch, pair or elem",
    "backbone": "encoder, as timm names it",
    "decoder": "mask_transformer or linear",
    "max_epoch": "epochs of retraining (and of `train`)",
    "search_epochs": "epochs of the search",
    "interval": "masks move every so many search steps",
    "num_workers": "processes that decode images",
    "batch_size_train": "samples per process and forward pass",
    "init_lr": "where retraining begins",
    "dropout": "dropout of the model, in training",
    "ema_decay": "of the moving average of the weights",
}
"""What settings mean whose classes do not say it."""


def settings(kind: type[RunSettings], *beside: type[RunSettings]) -> str:
    """Return the table of a class's settings, without those that `beside` has with the same default."""
    rows = []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        known = [other.model_fields[name] for other in beside if name in other.model_fields]
        if any(other.get_default(call_default_factory=True) == default for other in known):
            continue
        meaning = field.description or next((other.description for other in known if other.description), None)
        rows.append([f"`{name}`", f"`{_yaml(default)}`", (meaning or _PLAIN[name]).replace("|", "\\|")])
    return markdown(["key", "default", "meaning"], rows)


SIZES = ("1.25x", "1.5x", "2x", "4x")


def recovered(file: str, score: str, recovery: str) -> str:
    """Return what a small model keeps at all sizes, by method, after one kind of recovery.

    Args:
        file: of `benchmarks/recovered.py`.
        score: which of its figures.
        recovery: "none", "full" or "LoRA".
    """
    cells = read(file)["rows"]
    dense = next(row for row in cells if row["method"] == "dense")
    chosen = [row for row in cells if row["recovery"] == recovery and row["method"] != "dense"]

    def shown(method: str, size: str) -> str:
        found = [row for row in chosen if (row["method"], row["reduction"]) == (method, size)]
        good = [row for row in found if score in row]
        if not good:
            return "not reached" if found else "-"
        values = [row[score] for row in good]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        # Whole layers come near a size, no more.
        about = f", {statistics.mean(row['parameters'] for row in good) / 1e6:.3f} M" if "depth" in method else ""
        return f"{statistics.mean(values):.1f}{spread} ({len(values)}{about})"

    sizes = [
        statistics.mean(row["parameters"] for row in cells if row["reduction"] == size and row["method"] == _OURS) / 1e6
        for size in SIZES
    ]
    names = {row["method"] for row in chosen}
    methods = sorted(names, key=lambda name: (not name.startswith("upop"), "language" in name, name))
    return markdown(
        ["method", *(f"{size} ({left:.3f} M)" for size, left in zip(SIZES, sizes, strict=True))],
        [
            ["dense", *(f"{dense[score]:.1f}" for _ in SIZES)],
            *([_titled(method), *(shown(method, size) for size in SIZES)] for method in methods),
        ],
    )


_OURS = "upop, one-shot"


def _beside(kind: type[RunSettings]) -> tuple[type[RunSettings], ...]:
    """Return the classes whose settings have tables of their own, nearest first."""
    shared = [LibrarySettings, RowSettings] if issubclass(kind, RowSettings) else [BlipSettings]
    return (*(each for each in shared if issubclass(kind, each) or each is BlipSettings), RunSettings)


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value)


def quantized() -> str:
    """Return what 8 bits cost a dense encoder and a pruned one."""
    headings = ["model", "run by", "parameters (M)", "Spearman x 100", "MB", "ms for a sentence"]
    rows = [
        [
            row["model"],
            row["way"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['quality']:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['ms']:.1f}",
        ]
        for row in read("real_quantized_cpu")["rows"]
    ]
    return markdown(headings, rows)


def serving() -> str:
    """Return what 8 bits cost a dense decoder and a pruned one, as graphs that generate."""
    headings = ["model", "parameters (M)", "perplexity", "next tokens right (%)", "MB"]
    headings += ["ms for a prompt of 64 tokens", "ms for a token"]
    names = {"dense": "dense", "quantized": "dense, int8", "pruned": "pruned", "both": "pruned, int8"}
    found = read("real_serving_cpu")["rows"]
    rows = [
        [
            name,
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['perplexity']:.1f}",
            f"{row['accuracy']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['prompt_ms']:.0f}",
            f"{row['token_ms']:.1f}",
        ]
        for name, row in ((names[key], found[key]) for key in names if key in found)
    ]
    return markdown(headings, rows)


def vlms() -> str:
    """Return what a small model of images and texts answers after a cut, without training and with recovery."""
    rows = [row for row in read("vlms") if "test" in row]

    def name_of(row: Row) -> str:
        if row["how"] == "one-shot":
            return f"one-shot, {'all towers' if row['towers'] == 'all' else 'language tower'}"
        teacher = "no teacher" if row["teacher"] == "nobody" else f"teacher: {row['teacher']}"
        return f"upop, {row['epochs']} epochs, {teacher}"

    def line(name: str, target: str, parameters: int, found: list[Row]) -> list[str]:
        def shown(metric: str, digits: int) -> str:
            values = [each[metric] for each in found]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{spread}"

        scores = shown("exact_match", 1), shown("token_acc", 1), shown("perplexity", 2)
        return [name, target, f"{parameters / 1e6:.3f}", *scores]

    seeds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        seeds.setdefault((name_of(row), row["target"]), []).append(row)
    dense = line("dense", "-", rows[0]["dense_parameters"], [rows[0]["dense"]])
    cut = [
        line(*described, round(statistics.mean(row["parameters"] for row in found)), [row["test"] for row in found])
        for described, found in seeds.items()
    ]
    headings = ["model", "target", "parameters (M)", "exact answers (%)", "tokens right (%)", "perplexity"]
    return markdown(headings, [dense, *cut])


def vlm_kinds() -> str:
    """Return how many questions of each kind the dense small model answers."""
    (found,) = (row for row in read("vlms") if row["how"] == "dense")
    kinds = found["kinds"]
    return markdown(["all", *kinds], [[f"{found['all']:.1f}", *(f"{share:.1f}" for share in kinds.values())]])


def uniform() -> str:
    """Return what layers of equal size cost, at equal parameters."""
    cells = read("real_uniform_cpu")["cells"]
    shares = sorted({cell["ratio"] for cell in cells if "ratio" in cell})
    dense = next(cell["quality"] for cell in cells if cell["way"] == "dense")
    ways = list(dict.fromkeys(cell["way"] for cell in cells if "ratio" in cell))

    def shown(way: str, share: float) -> str:
        found = [cell["quality"] for cell in cells if cell["way"] == way and cell.get("ratio") == share]
        return f"{statistics.mean(found):.1f}" if found else "-"

    rows = [
        ["dense", *(f"{dense:.1f}" for _ in shares)],
        *([way, *(shown(way, each) for each in shares)] for way in ways),
    ]
    return markdown(["layers", *(f"{100 * share:g} % removed" for share in shares)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "tokens": lambda: tokens_tables.table(read("tokens_quality_cpu")["groups"]),
    "demo": demo,
    "together": together,
    "caption": lambda: models(
        "shapes_caption_cpu",
        "captioning",
        metric("test", "exact", "exact captions (%)"),
        metric("test", "bleu4", "BLEU-4"),
        parameters(),
        GMACS,
    ),
    "vqa": lambda: models(
        "shapes_vqa_cpu",
        "question answering",
        metric("val", "accuracy", "all"),
        metric("val", "accuracy_yes_no", "yes/no"),
        metric("val", "accuracy_number", "number"),
        metric("val", "accuracy_other", "other"),
        parameters(),
    ),
    "retrieval": lambda: models(
        "shapes_retrieval_cpu",
        "retrieval, BLIP",
        *(metric("test", name) for name in ("TR@1", "TR@5", "IR@1", "IR@5")),
        parameters(),
        GMACS,
    ),
    "retrieval-clip": lambda: models(
        "shapes_retrieval-clip_cpu",
        "retrieval, CLIP",
        *(metric("test", name) for name in ("TR@1", "TR@5", "IR@1", "IR@5")),
        parameters(),
        GMACS,
    ),
    "classification": lambda: models(
        "shapes_classification_cpu", "classification", metric("test", "acc@1", "test acc@1 (%)"), parameters(3), GMACS
    ),
    "segmentation": lambda: models(
        "shapes_segmentation_cpu",
        "segmentation",
        metric("validation", "mIoU", "mIoU (%)"),
        metric("validation", "pixel accuracy", "pixel accuracy (%)"),
        parameters(3),
        GMACS,
    ),
    "latency": latency,
    "quality": quality_short,
    "quality-params": lambda: quality_whole("params"),
    "quality-macs": lambda: quality_whole("macs"),
    "log-quality": lambda: markdown(*quality.levers(read("quality_levers_val_cpu"))),
    "log-quality-nlvr": lambda: markdown(*quality.levers(read("quality_levers_nlvr_val_cpu"))),
    "log-quality-sketch": lambda: markdown(*quality.sketch(read("earlier/quality_sketch"))),
    "search-step": search_step,
    "loader": loader,
    "memory": lambda: (RESULTS / "memory.md").read_text(),
    "calibrate": calibrate,
    "log-calibrate": calibrate_ranking,
    "real-minilm": lambda: real("minilm"),
    "real-minilm-recovered": lambda: real("minilm", 200),
    "real-smollm2": lambda: real("smollm2"),
    "real-dinov2": lambda: real("dinov2"),
    "real-easyvqa": easyvqa,
    "api": api,
    "log-search-step": search_steps,
    "log-demo": demos,
    "log-compiled": compiled,
    "settings": lambda: settings(RunSettings),
    "settings-blip": lambda: settings(BlipSettings, RunSettings),
    **{
        f"settings-{name}": lambda task=task: settings(task.settings, *_beside(task.settings))  # type: ignore[misc]
        for name, task in TASKS.items()
    },
    **{
        f"{name}-{recovery.lower()}": lambda file=file, score=score, recovery=recovery: recovered(file, score, recovery)  # type: ignore[misc]
        for name, file, score in (("vlm", "vlm_methods_cpu", "exact"), ("dual", "dual_encoder_cpu", "r_mean"))
        for recovery in ("none", "full", "LoRA")
    },
    "quantized": quantized,
    "serving": serving,
    "uniform": uniform,
    "vlms": vlms,
    "vlm-kinds": vlm_kinds,
    "settings-rows": lambda: settings(RowSettings, RunSettings),
    "settings-library": lambda: settings(LibrarySettings, RowSettings, RunSettings),
    "costs": lambda: (RESULTS / "costs.md").read_text(),
    "published-runs": published_runs,
    "published-data": published_counts,
}
"""Name -> what makes the table."""


def rewritten(text: str) -> str:
    """Return a page with all its tables made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def names(text: str) -> list[str]:
    """Return the names of a page's tables."""
    return [name for _, name, _ in _MARKED.findall(text)]


def main() -> None:
    """Write the tables of all pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        text = page.read_text()
        if text != rewritten(text):
            page.write_text(rewritten(text))


if __name__ == "__main__":
    main()
