"""Teach the small NLVR model to look, before it is asked for yes or no.

One bit per sentence is too little to learn from nothing what red, above and left mean. So the model first answers,
for freshly drawn pairs of images: what lies in every cell, and in which cell a patch lies (its vision alone); which
words of a text about the images are wrong, and which were hidden (every word by itself); and whether the whole text
is true. Its vision, its twin cross-attention and its head then start `upop train nlvr` from something that sees.

    python assets/pretrain_shapes.py --config configs/shapes/nlvr.yaml --output-dir output/shapes-pretrained
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from descriptions import IGNORED, Description, describe
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

import upop
from upop.data.tokenizer import load_tokenizer
from upop.data.transforms import MEAN, STD
from upop.demo.draw import draw_scene
from upop.demo.scenes import COLOURS, GRID, KINDS, SIZES, Scene, sample_palette, sample_scene
from upop.errors import SettingError
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tasks.nlvr import NlvrSettings

SCENES = 12_000
CELLS = GRID * GRID
CONTENTS = 1 + len(KINDS) * len(COLOURS) * len(SIZES)
"""What a cell can hold: nothing, or one of the shapes."""


def draw_pairs(rng: Random, count: int, image_size: int) -> tuple[list[tuple[Scene, Scene]], Tensor, Tensor]:
    """Return pairs of scenes, images [count, 2, 3, S, S] (uint8), and the contents of cells [count, 2, CELLS]."""
    pairs = []
    for _ in range(count):
        palette = sample_palette(rng)
        second = palette if rng.random() < 0.5 else sample_palette(rng)
        pairs.append((sample_scene(rng, palette), sample_scene(rng, second)))
    images = [[pil_to_tensor(draw_scene(scene, image_size)) for scene in pair] for pair in pairs]
    contents = torch.tensor([[_contents(scene) for scene in pair] for pair in pairs])
    return pairs, torch.stack([torch.stack(pair) for pair in images]), contents


def _contents(scene: Scene) -> list[int]:
    cells = [0] * CELLS
    for shape in scene.shapes:
        number = (KINDS.index(shape.kind) * len(COLOURS) + COLOURS.index(shape.colour)) * len(SIZES)
        cells[shape.row * GRID + shape.column] = 1 + number + SIZES.index(shape.size)
    return cells


def initialise(model: nn.Module) -> None:
    """Start with larger weights than the libraries do: theirs suit widths of 768, and leave small models asleep."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    nn.init.normal_(model.visual_encoder.pos_embed, std=1.0)  # type: ignore[union-attr, arg-type]


class Losses(nn.Module):
    """The losses of a batch of descriptions, and the heads that only this script needs."""

    def __init__(self, model: nn.Module, words: int) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.wrong, self.hidden = nn.Linear(config.text_width, 2), nn.Linear(config.text_width, words)  # type: ignore[union-attr, arg-type]
        self.seen = nn.Linear(config.vision_width, CONTENTS)  # type: ignore[union-attr, arg-type]
        self.where = nn.Linear(config.vision_width, CELLS)  # type: ignore[union-attr, arg-type]

    def forward(self, images: Tensor, contents: Tensor, texts: list[Description]) -> tuple[Tensor, float]:
        """Return the summed loss, and the share of descriptions judged rightly."""
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        pixels = (torch.cat([images[:, 0], images[:, 1]]).float() / 255 - mean) / std
        ids = _padded([text.ids for text in texts], 0)
        patches, states = self.model.encode(pixels, ids, (ids > 0).long())  # type: ignore[operator]
        patches = patches[:, 1:]
        truth = torch.tensor([text.true for text in texts])
        judged = self.model.cls_head(states[:, 0])  # type: ignore[operator]
        wrong, hidden = _padded([text.wrong for text in texts], IGNORED), _padded([t.hidden for t in texts], IGNORED)
        loss = (
            F.cross_entropy(self.wrong(states).flatten(0, 1), wrong.flatten(), weight=torch.tensor([1.0, 3.0]))
            + F.cross_entropy(self.hidden(states).flatten(0, 1), hidden.flatten())
            + F.cross_entropy(judged, truth)
            + F.cross_entropy(self.where(patches).flatten(0, 1), torch.arange(CELLS).repeat(len(patches)))
            + F.cross_entropy(self.seen(patches).flatten(0, 1), contents.transpose(0, 1).flatten())
        )
        return loss, float((judged.argmax(1) == truth).float().mean())


def _padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def main() -> None:
    """Pre-train, saying how it goes, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/shapes/nlvr.yaml"))
    parser.add_argument("--output-dir", type=Path, default=Path("output/shapes-pretrained"))
    parser.add_argument("--tokenizer", help="folder of vocab.txt; the config's if not given")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    task = find_task("nlvr")
    given = {"tokenizer": arguments.tokenizer} if arguments.tokenizer else {}
    settings = read_settings(NlvrSettings, arguments.config, given)
    if settings.image_size != GRID * settings.model.get("patch_size", 16):
        raise SettingError(
            f"Cells must be patches here: image_size has to be {GRID} patches, and it is {settings.image_size} pixels."
        )
    torch.manual_seed(arguments.seed)
    rng = Random(arguments.seed)
    tokenizer = load_tokenizer(settings.tokenizer)
    model = task.build(settings)
    initialise(model)
    losses = Losses(model, len(tokenizer))
    pairs, images, contents = draw_pairs(rng, SCENES, settings.image_size)
    optimizer = torch.optim.AdamW(losses.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.02)
    warmup, started, recent = 200, time.monotonic(), []
    vocabulary = tokenizer.get_vocab()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / arguments.steps)) / 2
            group["lr"] = arguments.lr * min(1, (step + 1) / warmup) * cosine
        chosen = [rng.randrange(len(pairs)) for _ in range(arguments.batch_size)]
        texts = [describe(rng, pairs[index], vocabulary) for index in chosen]
        loss, right = losses(images[chosen], contents[chosen], texts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(losses.parameters(), 1.0)
        optimizer.step()
        recent.append((float(loss.detach()), right))
        if (step + 1) % 250 == 0:
            mean = torch.tensor(recent[-250:]).mean(0).tolist()
            rate = (time.monotonic() - started) / (step + 1)
            left = rate * (arguments.steps - step - 1) / 60
            print(f"step {step + 1}/{arguments.steps}  loss {mean[0]:.3f}  right {mean[1]:.3f}  {left:.0f} min left")
            upop.save(model, arguments.output_dir)
    upop.save(model, arguments.output_dir)


if __name__ == "__main__":
    main()
