"""`upop demo`: the whole workflow on generated images, in minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from upop.cli import options as o
from upop.cli.report import PAGE
from upop.cli.shapes import write_with_progress
from upop.plain import as_text
from upop.starting import starting

if TYPE_CHECKING:
    from torch import nn

    from upop.examples import Examples
    from upop.runs.run import Metrics

CONFIG = Path("configs/shapes/nlvr.yaml")
DENSE = Path("assets/shapes-nlvr")
_TASK = "nlvr"
_SEED, _SIZE = 0, 20_000
_METHODS = ("upop", "magnitude")


def demo(
    output_dir: o.OutputDir = Path("output/demo"),
    device: o.DeviceName = None,
    ratio: o.Ratio = None,
    target: o.Target = None,
    p: o.OldRatio = None,
) -> None:
    """Compress a small visual reasoning model, and compare it with the dense one.

    The demo generates images with true and false sentences. It then compresses the dense model in the package twice,
    with equally many training steps: with the default method, and with one cut by weight magnitude.
    """
    with starting():
        import torch

        from upop.checkpoints import load
        from upop.ownership import wrote_page
        from upop.report.page import write_comparison_page
        from upop.report.results import results_table
        from upop.report.run import read_run
        from upop.runs.devices import make_accelerator
        from upop.runs.examples import write_examples
        from upop.runs.run import measure
        from upop.runs.verbs import compress, method_name
        from upop.settings import read_settings
        from upop.shared_folder import SharedFolder
        from upop.tasks import find_task

    assert output_dir is not None
    console = Console()
    folder = SharedFolder(output_dir, "demo", ("examples",), lambda name, path: name == PAGE and wrote_page(path))
    folder.check()
    page, table = folder.claim(PAGE), folder.claim("results.json")
    task = find_task(_TASK)
    given = o.overrides({"ratio": ratio if p is None else p, "target": target, "device": device})
    # Settings and device are checked before any image is drawn.
    checked = read_settings(task.settings, CONFIG, given, {name: f"from --{name}" for name in given})
    make_accelerator(checked)
    workers = checked.num_workers
    # On few cores, more threads of so small a model would only wait for the workers.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - workers))
    data = write_with_progress(_TASK, output_dir / "data", seed=_SEED, size=_SIZE)
    shared: dict[str, Any] = {
        "image_root": data.image_root,
        "ann_root": data.annotation,
        "tokenizer": str(data.tokenizer),
        "pretrained": str(DENSE),
        **given,
    }
    models: dict[str, tuple[nn.Module, Metrics]] = {}
    for method in _METHODS:
        run = output_dir / method
        # An interrupted demo is resumed; a finished one starts again.
        values = {**shared, "method": method, "output_dir": run}
        values["resume"] = "no" if (run / "results.json").exists() else "auto"
        settings = read_settings(task.settings, CONFIG, o.overrides(values))
        console.rule(as_text(f"{method_name(settings)} -> {run}"))
        results = compress(task, settings)
        if results is None:
            return
        measured = {model.name: {split: dict(of) for split, of in model.metrics.items()} for model in results.models}
        models.setdefault("dense", (load(DENSE), measured["dense"]))
        name = results.models[-1].name
        models[name] = (load(run / "best"), measured[name])
    console.rule("comparison")
    together = measure(task, models, torch.device("cpu"), settings.latency_batch)
    together.write_json(table, overwrite=True)
    shown = {name: model for name, (model, _) in models.items()}
    samples = task.dataset(settings, "test")
    console.print(answers_table(write_examples(task, shown, samples, settings, "test", output_dir / "examples")))
    console.print(results_table(together))
    write_comparison_page([read_run(output_dir / method) for method in _METHODS], page, overwrite=True)
    console.print(as_text(f"HTML report with kept channels, curves and examples: {page}"))
    console.print(as_text(f"Compressed model, for upop.load or upop evaluate: {output_dir}/upop/best"))


def answers_table(examples: Examples) -> Table:
    """Return a table of sentences, truth values and the answers of every model; wrong ones are red."""
    models = list(examples.samples[0].answers)
    table = Table("sentence", "true?", title="Some test sentences, before and after", title_justify="left")
    for model in models:
        table.add_column(as_text(model))
    for sample in examples.samples:
        answers = (as_text(answer.text or "", "" if answer.right else "red") for answer in sample.answers.values())
        truth = sample.truth.text if sample.truth is not None else None
        table.add_row(as_text(sample.prompt or ""), as_text(truth or ""), *answers)
    return table
