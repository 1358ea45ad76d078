"""Teach the small NLVR model to look, before it is asked for yes or no.

One bit per sentence is too little to learn from nothing what red, above and left mean. So the model first reads
short descriptions of freshly drawn pairs of pictures, in half of which one word is wrong, and answers for every word:
is it the wrong one, which word was masked; and for the whole: is it all true. Its vision, its twin cross-attention and
its head then start `upop train nlvr` from something that sees.

    python assets/pretrain_shapes.py --config configs/shapes/nlvr.yaml --output-dir output/shapes-pretrained
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

import upop
from upop.data.shapes.draw import draw_scene
from upop.data.shapes.scenes import COLOURS, KINDS, SIZES, Noun, Scene, Shape, sample_palette, sample_scene
from upop.data.tokenizer import load_tokenizer
from upop.data.transforms import MEAN, STD
from upop.settings import read_settings
from upop.tasks import find_task

NUMBERS = ("one", "two", "three", "four")
ENDS = {"top": 0, "bottom": 2}
PLURALS = tuple(f"{kind}s" for kind in KINDS)
_GROUPS = (KINDS, COLOURS, SIZES, NUMBERS, tuple(ENDS), ("above", "below"), PLURALS)
OTHERS = {word: [other for other in group if other != word] for group in _GROUPS for word in group}
IGNORED = -100
MASKED_SHARE = 0.15
SCENES = 12_000

Truth = Callable[[list[str]], bool]


@dataclass(frozen=True)
class Fact:
    """A few words about a scene, and a function that says whether words of the same form are true of it."""

    words: list[str]
    holds: Truth


def noun_words(shape: Shape, parts: str) -> list[str]:
    """Return the words of a shape with the attributes in `parts` (z, c, k)."""
    words = [word for part, word in (("z", shape.size), ("c", shape.colour), ("k", shape.kind)) if part in parts]
    return words if "k" in parts else [*words, "shape"]


def noun(words: list[str]) -> Noun:
    """Return the description that the words make."""
    return Noun(
        kind=next((kind for kind in KINDS if words[-1] in (kind, f"{kind}s")), None),
        colour=next((word for word in words if word in COLOURS), None),
        size=next((word for word in words if word in SIZES), None),
    )


def draw_fact(rng: Random, scene: Scene) -> Fact:
    """Return a true fact about the scene: something is there, at an end, above something, or so many."""
    shape = rng.choice(scene.shapes)
    parts = rng.choice(("k", "c", "ck", "ck", "zk", "zck"))
    form = rng.random()
    if form < 0.35:
        return Fact(["a", *noun_words(shape, parts)], lambda words: scene.has(noun(words[1:])))
    if form < 0.65 and shape.row != 1:
        return _at_end(rng, scene, shape, noun_words(shape, parts))
    others = [other for other in scene.shapes if other.row != shape.row]
    if form < 0.8 and others:
        return _relation(rng, scene, shape, rng.choice(others))
    counted = noun_words(shape, rng.choice(("k", "c", "")))
    number = scene.count(noun(counted))
    if number > 1:
        counted[-1] += "s"
    return Fact(
        [NUMBERS[number - 1], *counted], lambda words: scene.count(noun(words[1:])) == 1 + NUMBERS.index(words[0])
    )


def _at_end(rng: Random, scene: Scene, shape: Shape, words: list[str]) -> Fact:
    place, described = ["at", "the", "top" if shape.row == 0 else "bottom"], ["a", *words]
    if rng.random() < 0.5:
        return Fact([*place, *described], lambda said: scene.any_in_row(noun(said[4:]), ENDS[said[2]]))
    return Fact([*described, *place], lambda said: scene.any_in_row(noun(said[1:-3]), ENDS[said[-1]]))


def _relation(rng: Random, scene: Scene, shape: Shape, other: Shape) -> Fact:
    part = rng.choice("kc")
    first, second = noun_words(shape, part), noun_words(other, part)
    place = 1 + len(first)

    def holds(words: list[str]) -> bool:
        upper, lower = noun(words[1:place]), noun(words[place + 2 :])
        return scene.any_above(upper, lower) if words[place] == "above" else scene.any_above(lower, upper)

    return Fact(["a", *first, "above" if shape.is_above(other) else "below", "a", *second], holds)


def spoilt(rng: Random, fact: Fact) -> tuple[list[str], int | None]:
    """Return the fact's words with one of them changed so that they are false, and its place; None if none does."""
    places = [place for place, word in enumerate(fact.words) if word in OTHERS]
    rng.shuffle(places)
    for place in places:
        words = list(fact.words)
        words[place] = rng.choice(OTHERS[words[place]])
        if not fact.holds(words):
            return words, place
    return fact.words, None


@dataclass(frozen=True)
class Description:
    """A text about two pictures: token ids; per token whether it is wrong, and what was masked; whether all is true."""

    ids: list[int]
    wrong: list[int]
    hidden: list[int]
    true: int


def describe(rng: Random, pair: tuple[Scene, Scene], vocabulary: dict[str, int]) -> Description:
    """Return one to three facts about the pictures, in half of the cases with one wrong word."""
    facts = rng.choice((1, 1, 2, 2, 3))
    spoil = rng.randrange(facts) if rng.random() < 0.5 else None
    words, wrong = ["[CLS]"], [IGNORED]
    found_wrong = False
    for number in range(facts):
        side = rng.randrange(2)
        fact = draw_fact(rng, pair[side])
        said, place = spoilt(rng, fact) if number == spoil else (fact.words, None)
        found_wrong |= place is not None
        words += ["the", ("left", "right")[side], "image", "shows", *said]
        wrong += [IGNORED] * 4 + [int(at == place) if word in OTHERS else IGNORED for at, word in enumerate(said)]
    words.append("[SEP]")
    wrong.append(IGNORED)
    ids, hidden = [vocabulary[word] for word in words], [IGNORED] * len(words)
    for at, flag in enumerate(wrong):
        if flag == 0 and rng.random() < MASKED_SHARE:
            hidden[at], ids[at], wrong[at] = ids[at], vocabulary["[MASK]"], IGNORED
    return Description(ids, wrong, hidden, int(not found_wrong))


def draw_pairs(rng: Random, count: int, image_size: int) -> tuple[list[tuple[Scene, Scene]], Tensor]:
    """Return pairs of scenes and their pictures, uint8 [count, 2, 3, S, S]."""
    pairs = []
    for _ in range(count):
        palette = sample_palette(rng)
        second = palette if rng.random() < 0.5 else sample_palette(rng)
        pairs.append((sample_scene(rng, palette), sample_scene(rng, second)))
    pictures = [[pil_to_tensor(draw_scene(scene, image_size)) for scene in pair] for pair in pairs]
    return pairs, torch.stack([torch.stack(pair) for pair in pictures])


def initialise(model: nn.Module) -> None:
    """Start with larger weights than the libraries do: theirs suit widths of 768, and leave small models asleep."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    nn.init.normal_(model.visual_encoder.pos_embed, std=0.3)  # type: ignore[union-attr, arg-type]


class Losses(nn.Module):
    """The three losses of a batch of descriptions, and the heads that only this script needs."""

    def __init__(self, model: nn.Module, width: int, words: int) -> None:
        super().__init__()
        self.model = model
        self.wrong, self.hidden = nn.Linear(width, 2), nn.Linear(width, words)

    def forward(self, pictures: Tensor, texts: list[Description]) -> tuple[Tensor, float]:
        """Return the summed loss, and the share of descriptions judged rightly."""
        length = max(len(text.ids) for text in texts)

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        ids = padded([text.ids for text in texts], 0)
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        images = (torch.cat([pictures[:, 0], pictures[:, 1]]).float() / 255 - mean) / std
        states = self.model.encode(images, ids, (ids > 0).long())[1]  # type: ignore[operator]
        wrong, hidden = (
            padded([text.wrong for text in texts], IGNORED),
            padded([text.hidden for text in texts], IGNORED),
        )
        truth = torch.tensor([text.true for text in texts])
        judged = self.model.cls_head(states[:, 0])  # type: ignore[operator]
        loss = (
            F.cross_entropy(self.wrong(states).flatten(0, 1), wrong.flatten(), weight=torch.tensor([1.0, 3.0]))
            + 0.5 * F.cross_entropy(self.hidden(states).flatten(0, 1), hidden.flatten())
            + F.cross_entropy(judged, truth)
        )
        return loss, float((judged.argmax(1) == truth).float().mean())


def main() -> None:
    """Pre-train, saying how it goes, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/shapes/nlvr.yaml"))
    parser.add_argument("--output-dir", type=Path, default=Path("output/shapes-pretrained"))
    parser.add_argument("--tokenizer", help="folder of vocab.txt; the config's if not given")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    task = find_task("nlvr")
    given = {"tokenizer": arguments.tokenizer} if arguments.tokenizer else {}
    settings = read_settings(task.settings, arguments.config, given)
    torch.manual_seed(arguments.seed)
    rng = Random(arguments.seed)
    tokenizer = load_tokenizer(settings.tokenizer)
    model = task.build(settings)
    initialise(model)
    losses = Losses(model, model.config.text_width, len(tokenizer))  # type: ignore[union-attr, arg-type]
    pairs, pictures = draw_pairs(rng, SCENES, settings.image_size)
    optimizer = torch.optim.AdamW(losses.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.02)
    warmup, started, recent = 200, time.monotonic(), []
    vocabulary = tokenizer.get_vocab()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / arguments.steps)) / 2
            group["lr"] = arguments.lr * min(1, (step + 1) / warmup) * cosine
        chosen = [rng.randrange(len(pairs)) for _ in range(arguments.batch_size)]
        loss, right = losses(pictures[chosen], [describe(rng, pairs[index], vocabulary) for index in chosen])
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
