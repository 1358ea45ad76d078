"""Memory of training: full-size models at their published image sizes, and the batches that fit.

- Computed, exactly: parameters, buffers (queues), gradients, what the optimizer keeps, and the moving average of the
  weights. Momentum encoders are parameters without gradients.
- Traced: forward, loss and backward of the task run with torch's fake tensors, which have shapes and sizes but no
  content, and all tensors are tracked: the most bytes at once, with gradients already allocated, for 16 and for 32
  samples. The difference is the memory of 16 samples; the rest is independent of the batch. In
  float32 and with bfloat16 autocast, with and without gradient checkpointing (of all blocks). Samples are grey images
  with texts of the published length; a question has one answer.
- Measured: `--check` takes the same steps on the CPU with real tensors, on few samples, and writes both numbers down.
- Estimated: the batch that fits on a GPU of 24, 40 or 80 GiB: nine tenths of it, without 1 GiB for CUDA itself, hold
  what is fixed, and samples fill the rest. It is for one process; data-parallel training keeps the gradients once more.

Memory inside of kernels is not counted, and operations are those of the CPU: a GPU runs other kernels for some,
and keeps other sums and norms in float32 under autocast.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
    OMP_NUM_THREADS=1 python benchmarks/memory.py --models DeiT-S --check    # adds to the files that are there
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from upop.files import write_json, write_table
from upop.machine import machine
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.checkpointing import checkpoint_blocks
from upop.models.classifier import ClassifierConfig, build_classifier
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig
from upop.runs.memory import peak_bytes
from upop.settings import read_settings
from upop.tasks import find_task

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
CARDS = (24, 40, 80)
SAMPLES = (16, 32)
_FILLED, _CUDA = 0.9, 1.0


@dataclass(frozen=True)
class Case:
    """A published model.

    Attributes:
        task: name of its task.
        build: makes it with fresh weights, or on the meta device.
        image_size: side of its images in pixels.
        batch: published samples per process.
        few: samples of a check with real tensors.
    """

    task: str
    build: Callable[[], nn.Module]
    image_size: int
    batch: int
    few: int = 1


CASES = {
    "BLIP NLVR2": Case("nlvr", lambda: BlipNlvr(NlvrConfig.vit("base")), 384, 32),
    "BLIP caption": Case("caption", lambda: BlipCaption(CaptionConfig.vit("base")), 384, 32),
    "BLIP VQA": Case("vqa", lambda: BlipVqa(VqaConfig.vit("base")), 480, 32),
    "BLIP retrieval": Case("retrieval", lambda: BlipRetrieval(RetrievalConfig.vit("base")), 384, 32),
    "CLIP retrieval": Case("retrieval-clip", lambda: ClipRetrieval(ClipConfig.model_validate({})), 336, 32),
    "DeiT-S": Case("classification", lambda: build_classifier(ClassifierConfig.model_validate({})), 224, 512, 4),
    "Segmenter ViT-S": Case("segmentation", lambda: Segmenter(SegmenterConfig.model_validate({})), 512, 16, 2),
}
WAYS = {
    "float32": (False, False),
    "float32, checkpointed": (False, True),
    "bfloat16": (True, False),
    "bfloat16, checkpointed": (True, True),
}


def training_batch(case: Case, model: nn.Module, samples: int) -> dict[str, Any]:
    """Return what the task's loss takes: its example inputs, and something to learn."""
    inputs: dict[str, Any] = dict(find_task(case.task).example(model, samples))
    labels = torch.zeros(samples, dtype=torch.long)
    extra: dict[str, Callable[[], dict[str, Any]]] = {
        "nlvr": lambda: {"labels": labels},
        "caption": lambda: {"labels": inputs["input_ids"]},
        "vqa": lambda: {"weights": torch.ones(samples)},
        "retrieval": lambda: {"ids": torch.arange(samples)},
        "retrieval-clip": lambda: {"ids": torch.arange(samples)},
        "classification": lambda: {"images": inputs["x"], "labels": labels},
        "segmentation": lambda: {"labels": torch.zeros_like(inputs["images"][:, 0], dtype=torch.long)},
    }
    return {**inputs, **extra[case.task]()}


def fixed_bytes(case: Case) -> dict[str, int]:
    """Return the bytes of parameters, buffers, gradients, optimizer and average, computed on the meta device."""
    task = find_task(case.task)
    settings = read_settings(task.settings, None, {})
    with torch.device("meta"):
        model = case.build()
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    sgd = isinstance(task.optimizer(model, settings), torch.optim.SGD)
    return {
        "parameters": parameters,
        "buffers": sum(buffer.nbytes for buffer in model.buffers()),
        "gradients": trained,
        "optimizer": trained * (1 if sgd else 2),  # momentum, or the two moments of AdamW
        "average": parameters if settings.ema_decay is not None else 0,
    }


def peak(case: Case, model: nn.Module, samples: int, *, amp: bool) -> int:
    """Return the most bytes of tensors at once in forward and backward, besides the model and its gradients."""
    task = find_task(case.task)
    settings = read_settings(task.settings, None, {})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        batch = training_batch(case, model, samples)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss: Tensor = task.loss(model, batch, settings, 1.0)
        loss.backward()

    return peak_bytes(step)


def traced(case: Case, counts: Sequence[int]) -> dict[str, dict[int, int]]:
    """Return the peaks of fake steps: way -> samples -> bytes."""
    with torch.device("meta"):
        model = case.build().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return _peaks(case, model, counts)


def real(case: Case, counts: Sequence[int]) -> dict[str, dict[int, int]]:
    """Return the peaks of real steps: way -> samples -> bytes."""
    torch.manual_seed(0)
    return _peaks(case, case.build().train(), counts)


def _peaks(case: Case, model: nn.Module, counts: Sequence[int]) -> dict[str, dict[int, int]]:
    if isinstance(model, BlipRetrieval):
        model._warned = True  # a warning about the batch would read its content
    found: dict[str, dict[int, int]] = {}
    for name, (amp, checkpointed) in sorted(WAYS.items(), key=lambda way: way[1][1]):  # it is not taken back
        if checkpointed:
            checkpoint_blocks(model)
        found[name] = {count: peak(case, model, count, amp=amp) for count in counts}
    return {name: found[name] for name in WAYS}


def measure(case: Case) -> dict[str, Any]:
    """Return all numbers of one model but those of a check."""
    fixed = fixed_bytes(case)
    ways: dict[str, Any] = {}
    for name, peaks in traced(case, SAMPLES).items():
        few, more = (peaks[count] for count in SAMPLES)
        per_sample = (more - few) // (SAMPLES[1] - SAMPLES[0])
        found = {"per_record": per_sample, "start": max(0, more - SAMPLES[1] * per_sample)}
        ways[name] = {**found, "batch_that_fits": {str(card): fitting(fixed, found, card) for card in CARDS}}
    return {"image_size": case.image_size, "published_batch": case.batch, "fixed": fixed, "traced": ways}


def check(case: Case) -> dict[str, Any]:
    """Return the peaks of real and of fake steps on few samples, by way."""
    counts = (case.few, 2 * case.few)
    found, expected = real(case, counts), traced(case, counts)
    return {
        name: {"records": counts, "real": list(found[name].values()), "traced": list(expected[name].values())}
        for name in WAYS
    }


def fitting(fixed: dict[str, int], found: dict[str, int], card: int) -> int:
    """Return the estimated number of samples that fit on a GPU of so many GiB."""
    room = (_FILLED * card - _CUDA) * GIB - sum(fixed.values()) - found["start"]
    return max(0, int(room // found["per_record"]))


def table(models: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    heads = "model", "pixels", "fixed (GiB)", "precision", "per sample (GiB)", "published batch (GiB)"
    lines = [
        f"| {' | '.join(heads)} | batch that fits in {' / '.join(map(str, CARDS))} GiB |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, model in models.items():
        total = sum(model["fixed"].values())
        for way, found in model["traced"].items():
            whole = (total + found["start"] + model["published_batch"] * found["per_record"]) / GIB
            fits = " / ".join(str(found["batch_that_fits"][str(card)]) for card in CARDS)
            lines.append(
                f"| {name} | {model['image_size']} | {total / GIB:.2f} | {way} | {found['per_record'] / GIB:.3f} "
                f"| {model['published_batch']}: {whole:.1f} | {fits} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Compute, measure, and write JSON and Markdown after every model."""
    parser = argparse.ArgumentParser(description="Memory of training at full size.")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--check", action="store_true", help="take real steps on few samples, and compare")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = options.out / "memory.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    known: dict[str, Any] = before.get("models", {})
    commands = {**before.get("commands", {}), "check" if options.check else "trace": shlex.join(["python", *sys.argv])}
    for name in options.models:
        if options.check:
            known[name]["checked"] = check(CASES[name])
        else:
            checked = {key: value for key, value in known.get(name, {}).items() if key == "checked"}
            known[name] = {**measure(CASES[name]), **checked}
        models = {each: known[each] for each in CASES if each in known}
        content = {
            "machine": machine("cpu"),
            "commands": commands,
            "computed": "fixed: bytes, exactly",
            "traced": f"per_record and start: bytes of fake tensors at once in forward and backward, {SAMPLES} samples",
            "estimated": f"batch_that_fits: ({_FILLED} x GPU - {_CUDA:.0f} GiB - fixed - start) / per_record",
            "measured": "checked: the same bytes with real tensors on the CPU, and with fake ones, for few samples",
            "models": models,
        }
        write_json(path, content)
        write_table(options.out / "memory.md", table(models))
        print(table({name: known[name]}), flush=True)


if __name__ == "__main__":
    main()
