"""The tables of README.md and docs/ that show measurements, written from the files of benchmarks/results/.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Write all of them again with

    python docs/tables.py
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def models(file: str, first: str, *columns: Column) -> str:
    """Return a table of the models in a results file, dense first, then ratio by ratio."""
    rows = {row["name"]: row for row in read(file)["models"]}
    names = [name for name in _ORDER if name in rows]
    assert len(names) == len(rows), f"{file} has models that the table does not know: {list(rows)}"
    return markdown(
        [first, *(heading for heading, _ in columns)],
        [[name, *(value(rows[name]) for _, value in columns)] for name in names],
    )


def demo() -> str:
    """Return the demo's table."""
    found = {row["name"]: row for row in read("demo_cpu")["models"]}
    called = {"dense": "dense", "UPop 2x": "UPop 2x", "magnitude 2x": "cut by weight magnitude, 2x"}

    def latency(row: Row) -> str:
        faster = f" ({row['compared']['faster']:.2f}x faster)" if row["name"] != "dense" else ""
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
    return markdown(["generated data", *_ORDER], rows)


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


TABLES: dict[str, Callable[[], str]] = {
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
    "search-step": search_step,
    "costs": lambda: (RESULTS / "costs.md").read_text(),
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
