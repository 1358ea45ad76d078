"""What the published runs cost: GPU hours of every recipe, from counted operations and a stated rate.

For every recipe the full-size model is built without memory for its weights (torch's fake tensors), and torch's counter
adds up the floating-point operations of one training step (loss and backward pass, with recomputed activations and
momentum encoders) and of one evaluation, per sample: dense for the search, cut evenly to the recipe's ratio for the
retraining. With the samples of the published data sets and the epochs of the recipe, this gives the operations of the
run as published (method: reference). Method upop takes as many epochs, most of them on the cut model, which costs less,
and has a teacher, which costs more; neither is counted here.

GPU hours follow by dividing by a rate. The rate is an assumption, not a measurement: a share of the
vendor's peak. Write benchmarks/results/costs.json and costs.md:

    python benchmarks/cost_estimate.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from upop.files import write_json, write_table
from upop.models.blip import checkpoint_last_blocks
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.packaged import located
from upop.pruning.costs import count_macs
from upop.pruning.goal import Goal
from upop.published_data import PUBLISHED_DATA, published_data
from upop.recipes import Recipe, read_recipes
from upop.report.inspection import after_budget
from upop.runs.task import Task
from upop.settings import RunSettings, read_settings
from upop.tasks import find_task
from upop.tasks.blip import BlipTask
from upop.yaml_files import read_yaml

RESULTS = Path(__file__).parent / "results"
NAME = "costs"
ROUND_TO = 8
"""What kept sizes are multiples of on a GPU."""

UTILISATION = 0.35
"""The assumed share of the peak."""
GPUS = {"A100": 312e12, "H100 SXM": 989e12}
"""The makers' dense bfloat16 peaks, in floating-point operations per second."""


# What is assumed where the data decides.
_BATCH = 4  # samples that a step is counted on; losses over pairs need several
_VQA_QUESTIONS, _VQA_ANSWERS = 32, 47  # in the batch that the published multiply-adds were counted on
_ANSWER_TOKENS = 5
_CAPTIONS = 20  # tokens of a caption at most
_WINDOWS = 2  # of 512 pixels that cover an image whose short side is 512, and its long side at most twice that


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one sample, in units of 1e9.

    Attributes:
        forward: of one forward pass of the published size; half as many multiply-adds.
        train: of a loss and its backward pass.
        evaluate: of one evaluated sample, in the groups of `PublishedData.val`.
    """

    forward: float
    train: float
    evaluate: float


@dataclass(frozen=True)
class Cost:
    """What a recipe costs; all operations in units of 1e18."""

    name: str
    p: float
    epochs: str
    samples: int
    dense: Work
    compressed: Work
    search: float
    retrain: float
    evaluate: float

    @property
    def total(self) -> float:
        """Of search, retraining and evaluation."""
        return self.search + self.retrain + self.evaluate

    def gpu_hours(self, peak: float) -> float:
        """Return the hours of one GPU of that peak."""
        return self.total * 1e18 / (peak * UTILISATION) / 3600


def operations(model: nn.Module, inputs: Any, *, backward: bool) -> float:
    """Return the floating-point operations of a forward pass and, if asked, its backward pass, in units of 1e9."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        outputs = inputs(model) if callable(inputs) else model(**inputs)
        if backward:
            total: Tensor = sum(value.sum() for value in _tensors(outputs) if value.requires_grad)  # type: ignore[assignment]
            total.backward()
    model.zero_grad()
    return float(counter.get_total_flops()) / 1e9


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = vars(outputs).values() if hasattr(outputs, "__dict__") else outputs
    return [tensor for part in parts for tensor in _tensors(part)]


def build(task: Task[Any], settings: Any) -> nn.Module:
    """Return the dense full-size model of a task, as its settings describe it."""
    if isinstance(task, BlipTask):
        model = task.model(task.config.vit(settings.vit, **task.sizes(settings)))
        if settings.vit_grad_ckpt:
            checkpoint_last_blocks(model.visual_encoder, settings.vit_ckpt_layer)  # type: ignore[arg-type]
        return model
    if task.name == "retrieval-clip":
        return ClipRetrieval(ClipConfig(**task.sizes(settings)))  # type: ignore[attr-defined]
    return task.build(settings)


def training_inputs(task: Task[Any], model: nn.Module) -> tuple[dict[str, Any], int]:
    """Return the inputs of a training step's forward pass, and how many samples they are."""
    inputs: dict[str, Any] = dict(task.example(model, _BATCH))
    count = _BATCH
    if task.name in ("retrieval", "retrieval-clip"):
        inputs["ids"] = torch.arange(count)
    if task.name == "retrieval":
        inputs["draws"] = torch.zeros(2 * count, dtype=torch.long)
    if task.name == "vqa":
        count = _VQA_QUESTIONS
        inputs = dict(task.example(model, count))
        for name in ("answer_ids", "answer_mask"):
            inputs[name] = torch.ones(_VQA_ANSWERS, _ANSWER_TOKENS, dtype=torch.long)
        inputs["answer_counts"] = torch.tensor([2] * (_VQA_ANSWERS - count) + [1] * (2 * count - _VQA_ANSWERS))
    return inputs, count


def evaluation(task: Task[Any], settings: Any, model: Any) -> float:
    """Return the operations of evaluating one sample, in units of 1e9."""

    def one(inputs: Any) -> float:
        return operations(model, inputs, backward=False)

    example = task.example(model, 1)
    if task.name == "caption":
        # With its cache, a beam goes through the decoder once for every token; the image is encoded once for all.
        beams = {"images": example["images"].repeat(settings.num_beams, 1, 1, 1)}
        for name in ("input_ids", "attention_mask"):
            beams[name] = torch.ones(settings.num_beams, _CAPTIONS, dtype=torch.long)
        again: float = (settings.num_beams - 1) * one(lambda model: model.visual_encoder(example["images"]))
        return one(beams) - again
    if task.name == "vqa":

        def rank(model: Any) -> Tensor:
            mask = example["question_mask"]
            _, states = model.encode(example["images"], example["question_ids"], mask)
            count = settings.k_test
            answers = torch.ones(count, _ANSWER_TOKENS, dtype=torch.long)
            logits: Tensor = model.decode(answers, answers, states.repeat(count, 1, 1), mask.repeat(count, 1))
            return logits

        return one(rank)
    if task.name in ("retrieval", "retrieval-clip"):
        return _retrieval_evaluation(task, settings, model, example)
    if task.name == "segmentation":
        return _WINDOWS * one(example)
    return one(example)


def _retrieval_evaluation(task: Task[Any], settings: Any, model: Any, example: Mapping[str, Tensor]) -> float:
    """Return the operations per image: it and its texts are encoded, and their candidates re-ranked."""
    words = {name: value for name, value in example.items() if name != "images"}
    texts = published_data(task.name, settings).texts
    image = operations(model, lambda model: model.encode_image(example["images"]), backward=False)
    text = operations(model, lambda model: model.encode_text(**words), backward=False)
    total = image + texts * text
    if task.name == "retrieval":
        # As many pairs as the images and the texts of a split propose; an image's keys and values are computed once.
        states = torch.zeros(1, (settings.image_size // 16) ** 2 + 1, model.config.vision_width)
        count = settings.k_test
        pairs = [value.repeat(count, 1) for value in words.values()]
        total += (1 + texts) * operations(model, lambda model: model.match(states, *pairs), backward=False)
    return total


def work(task: Task[Any], settings: RunSettings, p: float | None) -> Work:
    """Count one sample of a task, of the dense model or of one that is cut evenly by p."""
    with torch.device("meta"):
        model = build(task, settings)
    if p is not None:
        model, _ = after_budget(model, Goal(p, None), ROUND_TO)
    # Fake tensors, since transformers inspects masks, which fails on the meta device.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        forward = 2 * count_macs(model, task.example(model, 1)) / 1e9
        inputs, count = training_inputs(task, model)
        # In training the towers of images compute anew what checkpointing did not keep. The rest need not train: the
        # losses of pairs then leave the queues alone, which have no numbers here.
        model.eval()
        if hasattr(model, "visual_encoder"):
            model.get_submodule("visual_encoder").train()
        train = operations(model, inputs, backward=True) / count
        return Work(forward, train, evaluation(task, settings, model))


def cost(recipe: Recipe, settings: RunSettings, dense: Work, compressed: Work) -> Cost:
    """Return what a recipe costs: search on the dense model, retraining on the cut one, and every evaluation."""
    data = published_data(recipe.task, settings)
    searched, retrained = settings.searching_epochs, settings.retraining_epochs
    evaluated = (searched * dense.evaluate + retrained * compressed.evaluate) * data.val
    evaluated += (dense.evaluate + compressed.evaluate) * (data.val + data.test)
    # While it is retrained, the average of the weights is evaluated as well.
    evaluated += retrained * compressed.evaluate * data.val if settings.ema_decay is not None else 0
    return Cost(
        name=recipe.name,
        p=recipe.ratio,
        epochs=f"{searched} + {retrained}",
        samples=data.train,
        dense=dense,
        compressed=compressed,
        search=searched * data.train * dense.train / 1e9,
        retrain=retrained * data.train * compressed.train / 1e9,
        evaluate=evaluated / 1e9,
    )


def count_all(names: list[str]) -> list[Cost]:
    """Count the recipes of these names; all if there are none."""
    dense: dict[str, Work] = {}
    costs = []
    for recipe in read_recipes().values():
        if names and recipe.name not in names:
            continue
        task = find_task(recipe.task)
        classes = {"classes": 1000} if recipe.task == "classification" else {}
        settings = read_settings(task.settings, recipe.config, {**recipe.overrides, **classes})
        key = str(recipe.config)
        if key not in dense:
            dense[key] = work(task, settings, None)
        costs.append(cost(recipe, settings, dense[key], work(task, settings, recipe.ratio)))
        print(f"{costs[-1].name}: {costs[-1].total:.3g} EFLOP")
    return costs


def table(costs: list[dict[str, Any]]) -> str:
    """Return the page: assumptions, and a row per recipe."""
    gpus = list(GPUS)
    columns = ["recipe", "epochs", "training samples", "GMACs, dense -> cut", "search (EFLOP)", "retraining (EFLOP)"]
    columns += ["evaluation (EFLOP)", *(f"{gpu} hours" for gpu in gpus)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in costs:
        macs = f"{row['dense']['forward'] / 2:.1f} -> {row['compressed']['forward'] / 2:.1f}"
        parts = " | ".join(_number(row[part]) for part in ("search", "retrain", "evaluate"))
        hours = " | ".join(_number(row["gpu_hours"][gpu]) for gpu in gpus)
        lines.append(f"| {row['name']} | {row['epochs']} | {row['records']:,} | {macs} | {parts} | {hours} |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Return a number with two significant digits: an estimate has no more."""
    digits = max(0, 1 - math.floor(math.log10(value))) if value else 0
    return f"{round(value, 1 - math.floor(math.log10(value))):,.{digits}f}" if value else "0"


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names; all if none is given")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [
        {**asdict(found), "total": found.total, "gpu_hours": {gpu: found.gpu_hours(peak) for gpu, peak in GPUS.items()}}
        for found in count_all(arguments.recipes)
    ]
    content = {
        "command": "python benchmarks/cost_estimate.py",
        "utilisation": UTILISATION,
        "peak_flops": GPUS,
        "align": ROUND_TO,
        "data": read_yaml(located(PUBLISHED_DATA), "The file of published data sets"),
        "recipes": rows,
    }
    write_json(arguments.out / f"{NAME}.json", content)
    write_table(arguments.out / f"{NAME}.md", table(rows))


if __name__ == "__main__":
    main()
