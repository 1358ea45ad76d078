"""Measurements that need a GPU, in at most twelve minutes: correctness, speed, memory and quality.

    make gpu                                          # or: python benchmarks/gpu/run.py
    python benchmarks/gpu/run.py --device cpu --small --minutes 2

It needs only torch, timm and transformers. The report is rewritten after every measurement, as JSON and as Markdown,
so that a stopped run keeps its measurements. The report names what does not fit into the time or the memory, with the
reason, and what fails, with the error; then the command exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import correctness, quality, speed
from gpu.models import models
from gpu.sections import Measurement, Section, markdown
from upop.machine import machine

RESULTS = Path(__file__).parents[1] / "results"


def plan(device: torch.device, small: bool) -> list[tuple[Section, float, Iterator[Measurement]]]:
    """Return the sections, each with its share of the time and its measurements."""
    all_models = models(small)
    vit = all_models["DeiT-S"]
    some = {name: all_models[name] for name in ("DeiT-S", "CLIP B/16")}
    dtype = torch.bfloat16
    batches, repeats = ((1, 2), 1) if small else ((1, 64, 256), 10)
    batch = 2 if small else 128
    on_gpu = device.type == "cuda"
    return [
        (
            Section("Cut models compute what masked ones do", correctness.SAYS),
            0.2,
            correctness.agreements(all_models, device, compiled=on_gpu or small),
        ),
        (Section("Attention kernels", correctness.KERNELS_SAY), 0.05, correctness.kernels(vit, device, dtype)),
        (Section("Going on elsewhere", correctness.RESUMED_SAYS), 0.05, correctness.resumed(vit, device)),
        (Section("Training steps", speed.STEPS_SAY), 0.1, speed.steps(vit, batch, repeats, device)),
        (
            Section("Quality", quality.SAYS),
            0.25,
            quality.accuracies(quality.SMALL if small else quality.Size(), device),
        ),
        (
            Section("Latency", speed.LATENCY_SAYS),
            0.2,
            speed.latencies(some, batches, repeats, device, compiled=False),
        ),
        (
            Section("Latency, compiled", speed.LATENCY_SAYS),
            0.15,
            speed.latencies({"DeiT-S": vit}, batches[1:2], repeats, device, compiled=True),
        ),
    ]


def write(folder: Path, about: dict[str, Any], sections: Sequence[Section]) -> Path:
    """Write the report as JSON and Markdown beside each other; return the JSON file."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in str(about["device"]).lower()).split())
    content = {"machine": about, "sections": [vars(section) for section in sections]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{slug}.json"
    for target, text in (
        (path, json.dumps(content, indent=1) + "\n"),
        (path.with_suffix(".md"), markdown(about, list(sections))),
    ):
        part = target.with_suffix(target.suffix + f".{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what fits, write the report, and return 1 where something failed."""
    parser = argparse.ArgumentParser(description="Correctness, speed, memory and quality on a GPU, in one report.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--minutes", type=float, default=11.0, help="when to stop measuring")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the command on a CPU")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="sections with such a word in the title"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --small tries the command without one")
    start = time.monotonic()
    about: dict[str, Any] = machine(options.device)
    about |= {"timm": timm.__version__, "transformers": transformers.__version__, "small": options.small}
    sections: list[Section] = []
    planned = [
        each
        for each in plan(options.device, options.small)
        if any(word.lower() in each[0].title.lower() for word in options.only)
    ]
    given, total = 0.0, sum(share for _, share, _ in planned)
    for section, share, measurements in planned:
        sections.append(section)
        given += share / total  # time that a section leaves goes to the next one
        until = start + 60 * options.minutes * given
        section.run(_kept(measurements, lambda: write(options.out, about, sections)), until, _tell(start))
    path = write(options.out, about, sections)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"Written to {path} and {path.with_suffix('.md')} after {time.monotonic() - start:.0f} s.")
    return 1 if any(section.failed for section in sections) else 0


def _kept(measurements: Iterator[Measurement], save: Callable[[], Any]) -> Iterator[Measurement]:
    """Yield the measurements, and save the report after each."""
    for measurement in measurements:
        yield measurement
        save()


def _tell(start: float) -> Callable[[str], None]:
    return lambda text: print(f"{time.monotonic() - start:5.0f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
