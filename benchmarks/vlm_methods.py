"""The small SmolVLM-shaped model, pruned by several methods: without recovery, with recovery, and by LoRA.

    python benchmarks/vlms.py prepare output/vlms
    upop train chat --config output/vlms/train.yaml
    python benchmarks/vlm_methods.py output/vlms --rows output/vlms/methods.jsonl

Every cell is written as soon as it is measured, and is not measured again. Metrics are on the test questions: `exact`,
in percent, counts answers in which every token is the likeliest after those before it, as in greedy decoding;
benchmarks/recovered.py describes the comparison.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dense_tasks import DenseTask
from quality_methods import Bench
from recovered import Subject, cells, options, remembering, run
from upop.data.chat import IGNORED
from upop.pruning.groups import Group
from upop.runs.devices import make_accelerator
from upop.runs.loaders import make_loader
from upop.tasks import find_task
from upop.tasks.chat import token_losses
from vlms import settings_of

_RESULTS = Path(__file__).parent / "results"
_STACKS = ("model.vision_model.encoder.layers", "model.text_model.layers")


def read(given: argparse.Namespace) -> Subject:
    """Return the dense model with batches of training samples and the held-out questions, all processed once."""
    task = find_task("chat")
    settings = settings_of(given.out_of, 0, rows=given.pool, batch_size_train=given.batch, init_lr=given.rate)
    accelerator = make_accelerator(settings)
    model = task.load(Path(str(settings.pretrained)), settings).train()
    loader = make_loader(task, settings, "train")
    collate, samples = loader.collate_fn, loader.dataset
    assert collate is not None
    bench = Bench(
        DenseTask(task, settings, accelerator, model, given.out_of),
        [samples[number] for number in range(len(samples))],  # type: ignore[arg-type]
        remembering(collate),
    )
    asked: Any = task.dataset(settings, "test" if given.split == "test" else "val")
    size = settings.batch_size_test
    held = [
        collate([asked[n] for n in range(start, min(start + size, len(asked)))]) for start in range(0, len(asked), size)
    ]
    return Subject(
        bench,
        lambda small: score(small, held),
        _counted,
        _STACKS,
        calibration=given.calibration,
        lora_rate=given.lora_rate,
        towers=True,
    )


def _counted(batch: Mapping[str, Tensor], group: Group) -> Tensor | None:
    return batch["attention_mask"].flatten().bool() if group.modality == "text" else None


@torch.no_grad()
def score(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """Return how many answers, and how many of their tokens, are right, in percent, and the perplexity."""
    model.eval()
    exact = tokens = right = answers = 0
    loss = 0.0
    for batch in batches:
        nll, labels, likeliest = token_losses(model, batch)
        counted = labels != IGNORED
        exact += int(((likeliest == labels) | ~counted).all(1).sum())
        answers, tokens = answers + len(labels), tokens + int(counted.sum())
        right, loss = right + int(((likeliest == labels) & counted).sum()), loss + float(nll.double().sum())
    return {
        "exact": 100 * exact / answers,
        "token_acc": 100 * right / tokens,
        "perplexity": math.exp(min(30.0, loss / tokens)),
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_of", type=Path, metavar="FOLDER", help="of benchmarks/vlms.py, with the dense model")
    options(parser, Path("output/vlms/methods.jsonl"), _RESULTS / "vlm_methods_cpu.json")
    parser.add_argument("--pool", type=int, default=2000, help="training samples to draw from")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=8, help="batches that a cut is chosen by")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="val is for choices")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = {name: getattr(given, name) for name in ("pool", "batch", "calibration", "split")}
    run(lambda: read(given), [*cells(True, given.seeds)], given, **about)


if __name__ == "__main__":
    main()
