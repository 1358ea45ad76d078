"""What re-ranking costs: upop's batches over many queries against one query at a time.

Images and captions are random; captions have 9 to 15 tokens, as COCO's do. Each image asks for its `--candidates`
nearest captions and each caption for its nearest images, and the matching head scores all of them, twice:

- one query: as published. A query's candidates make one pass: an image's states are repeated for each of its captions,
  so that their keys and values are computed as often; captions are padded to 35 tokens; a pair that both directions
  propose is computed twice.
- ours: `upop.models.rerank.match_pairs`. Every pair once, captions of one image together, which share its keys and
  values, and little padding.

Both take turns in one run, so that a drift of the machine affects both; the ratio is that of medians. Both give the
same scores, and the largest difference is part of the result. Features of images are made beforehand in both: they are
not timed. On CUDA the states lie on the device for both.

    python benchmarks/rerank.py --images 8 --candidates 16 --repeats 3 --threads 1
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from upop.data.retrieval import TEXT_TOKENS
from upop.files import write_json
from upop.machine import machine
from upop.models.rerank import candidates, match_pairs
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.report.results import times

RESULTS = Path(__file__).parent / "results"
CAPTIONS = 5
SHORTEST, LONGEST = 9, 15

TINY: dict[str, Any] = {
    "image_size": 48,
    "vocab_size": 200,
    "max_positions": 40,
    "embed_dim": 32,
    "vision_width": 96,
    "vision_depth": 2,
    "vision_heads": 3,
    "vision_mlp": 192,
    "text_width": 96,
    "text_depth": 2,
    "text_heads": 3,
    "text_mlp": 192,
}
MODELS: dict[str, Callable[[], RetrievalConfig]] = {
    "base": lambda: RetrievalConfig.vit("base", queue_size=64),
    "large": lambda: RetrievalConfig.vit("large", queue_size=64),
    "tiny": lambda: RetrievalConfig.vit("base", **TINY, queue_size=64),
}


@dataclass(frozen=True)
class Search:
    """Images, captions, and which of them are to be compared.

    Attributes:
        model: in evaluation mode, on its device.
        states: of the images, [N, tokens, width].
        words: input_ids and attention_mask of the captions, [N * 5, 35].
        texts: candidates of each image, [N, k].
        images: candidates of each caption, [N * 5, l].
        batch: pairs per pass of ours.
    """

    model: BlipRetrieval
    states: Tensor
    words: tuple[Tensor, Tensor]
    texts: Tensor
    images: Tensor
    batch: int


@torch.no_grad()
def prepare(name: str, image_count: int, count: int, batch: int, device: torch.device) -> Search:
    """Draw a model, images and captions, and find `count` candidates for each of them."""
    torch.manual_seed(0)
    config = MODELS[name]()
    model = BlipRetrieval(config).to(device).eval()
    lengths = torch.randint(SHORTEST, LONGEST + 1, (image_count * CAPTIONS, 1))
    mask = (torch.arange(TEXT_TOKENS) < lengths).long()
    words = torch.randint(1, config.vocab_size - 2, mask.shape) * mask
    images = torch.randn(image_count, 3, config.image_size, config.image_size)
    encoded = [model.encode_image(part.to(device)) for part in images.split(8)]
    states, image = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    text = model.encode_text(words.to(device), mask.to(device))[1]
    found = candidates(image, text, count)[0].cpu(), candidates(text, image, count)[0].cpu()
    return Search(model, states, (words.to(device), mask.to(device)), *found, batch)


@torch.no_grad()
def one_query(search: Search) -> tuple[Tensor, Tensor]:
    """Return the logits of all candidates of images and of captions, a query at a time."""
    ids, mask = search.words
    by_image = [
        search.model.match(state.repeat(len(chosen), 1, 1), ids[chosen], mask[chosen])[:, 1]
        for state, chosen in zip(search.states, search.texts, strict=True)
    ]
    by_text = [
        search.model.match(search.states[chosen], ids[text].repeat(len(chosen), 1), mask[text].repeat(len(chosen), 1))
        for text, chosen in enumerate(search.images)
    ]
    return torch.stack(by_image).cpu(), torch.stack(by_text)[..., 1].cpu()


@torch.no_grad()
def ours(search: Search) -> tuple[Tensor, Tensor]:
    """Return the same logits, all pairs in batches."""
    count = len(search.images)
    by_image = torch.arange(len(search.texts)).unsqueeze(1) * count + search.texts
    by_text = search.images * count + torch.arange(count).unsqueeze(1)
    pairs, places = torch.unique(torch.cat([by_image.flatten(), by_text.flatten()]), return_inverse=True)
    logits = match_pairs(
        search.model.match, search.states, *search.words, pairs // count, pairs % count, batch=search.batch
    )[places]
    return logits[: by_image.numel()].view(by_image.shape), logits[by_image.numel() :].view(by_text.shape)


WAYS: dict[str, Callable[[Search], tuple[Tensor, Tensor]]] = {"one query": one_query, "ours": ours}


def measure(search: Search, repeats: int, device: torch.device) -> dict[str, Any]:
    """Return seconds and multiply-adds of both ways, their ratios, and the largest difference of their scores."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats):
        for way in list(WAYS) if turn % 2 else reversed(WAYS):
            _wait(device)
            start = time.perf_counter()
            WAYS[way](search)
            _wait(device)
            seconds[way].append(time.perf_counter() - start)
    macs, scores = {}, {}
    for way, run in WAYS.items():
        with FlopCounterMode(display=False) as counter:
            scores[way] = run(search)
        macs[way] = counter.get_total_flops() // 2
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    differences = [
        float((first - second).abs().max()) for first, second in zip(scores["one query"], scores["ours"], strict=True)
    ]
    return {
        "pairs_asked": search.texts.numel() + search.images.numel(),
        "seconds": seconds,
        "median_seconds": medians,
        "speed_up": medians["one query"] / medians["ours"],
        "multiply_adds": macs,
        "fewer_multiply_adds": macs["one query"] / macs["ours"],
        "largest_difference": max(differences),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description="Re-ranking in batches beside one query at a time.")
    parser.add_argument("--model", choices=list(MODELS), default="base")
    parser.add_argument("--images", type=int, default=8, help="images; each has 5 captions")
    parser.add_argument("--candidates", type=int, default=16, help="per query")
    parser.add_argument("--batch", type=int, default=64, help="pairs per pass of ours")
    parser.add_argument("--repeats", type=int, default=3, help="turns of both ways")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    search = prepare(options.model, options.images, options.candidates, options.batch, options.device)
    found = measure(search, options.repeats, options.device)
    table = Table("way", "seconds", "multiply-adds (G)", title=f"Re-ranking {found['pairs_asked']} candidates")
    for way in WAYS:
        table.add_row(way, f"{found['median_seconds'][way]:.3f}", f"{found['multiply_adds'][way] / 1e9:.1f}")
    console = Console(width=110)
    console.print(table)
    speed, work = times(found["speed_up"], "faster"), times(found["fewer_multiply_adds"], "fewer")
    console.print(f"{speed}, {work} multiply-adds")
    about = machine(options.device)
    slug = "-".join("".join(c if c.isalnum() else " " for c in str(about["device"]).lower()).split())
    settings = {name: getattr(options, name) for name in ("model", "images", "candidates", "batch", "repeats")}
    content = {"machine": about, "command": shlex.join(["python", *sys.argv]), **settings, **found}
    write_json(options.out / f"rerank_{slug}.json", content)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
