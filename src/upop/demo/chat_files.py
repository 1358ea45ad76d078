"""Writes questions about generated images as chat data: JSON lines, with one or two images per row.

`{train,val,test}.jsonl` have a question and an answer; `train-conversations.jsonl` has the same rows in LLaVA's format,
`train-messages.jsonl` in OpenAI's. Questions ask for the number of shapes, the presence of a shape, its colour or kind,
a description, and a comparison of two images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from upop.demo.layout import SetFormat, Sink, held_out
from upop.demo.scenes import COLOURS, KINDS, Noun, Scene, sample_scene
from upop.demo.singles import sample_scenes

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
"""Share of all possible scenes in each split."""
SORTS = ("count", "there", "colour", "kind", "describe", "both")
"""Sorts of questions, in turn; "both" is about two images."""
_DESCRIBED = 2
"""Maximum number of shapes in a described image."""
FEWEST_HELD_OUT = 100


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question about one scene or two, and its answer."""

    scenes: tuple[Scene, ...]
    question: str
    answer: str


def ask(rng: Random, scenes: Iterator[Scene], sort: str) -> AnsweredQuestion:
    """Draw a question of a sort of `SORTS`; yes and no are equally frequent."""
    wanted = rng.random() < 0.5
    while True:
        scene = next(scenes)
        if sort == "count":
            return AnsweredQuestion((scene,), "how many shapes are there?", str(len(scene.shapes)))
        if sort == "describe" and len(scene.shapes) <= _DESCRIBED:
            shapes = sorted(scene.shapes, key=lambda shape: (shape.row, shape.column))
            return AnsweredQuestion(
                (scene,), "describe the image.", " and ".join(f"a {each.colour} {each.kind}" for each in shapes)
            )
        if sort == "there":
            noun = Noun(colour=rng.choice(COLOURS), kind=rng.choice(KINDS))
            if scene.has(noun) == wanted:
                return AnsweredQuestion((scene,), f"is there a {noun.singular}?", "yes" if wanted else "no")
        if sort == "both":
            other, kind = next(scenes), rng.choice(KINDS)
            if (scene.has(Noun(kind=kind)) and other.has(Noun(kind=kind))) == wanted:
                return AnsweredQuestion((scene, other), f"do both images show a {kind}?", "yes" if wanted else "no")
        if sort in ("colour", "kind"):
            shape = rng.choice(scene.shapes)
            noun = Noun(kind=shape.kind) if sort == "colour" else Noun(colour=shape.colour)
            if scene.count(noun) == 1:
                asked = "color" if sort == "colour" else "kind"
                return AnsweredQuestion((scene,), f"what {asked} is the {noun.singular}?", str(getattr(shape, sort)))


def _write(sink: Sink, seed: int, records: Mapping[str, int]) -> None:
    for split, wanted in records.items():
        rng = Random(f"{seed}/chat/{split}")
        scenes = sample_scenes(rng, seed, split, SHARES, sample_scene)
        rows: list[dict[str, Any]] = []
        for number in range(wanted):
            asked = ask(rng, scenes, SORTS[number % len(SORTS)])
            names = [f"{split}/{number:06d}-{place}.{sink.suffix}" for place in range(len(asked.scenes))]
            for name, scene in zip(names, asked.scenes, strict=True):
                sink.scene_image("images", name, scene)
            images = [f"images/{name}" for name in names]
            rows.append({"images": images, "question": asked.question, "answer": asked.answer})
        sink.text(f"{split}.jsonl", _lines(rows))
        if split == "train":
            sink.text(f"{split}-conversations.jsonl", _lines([_conversation(row) for row in rows]))
            sink.text(f"{split}-messages.jsonl", _lines([_messages(row) for row in rows]))


def _conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    question = "<image>\n" * len(row["images"]) + row["question"]
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row["answer"]}]
    return {"image": row["images"], "conversations": turns}


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": row["question"]}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": row["answer"]}]
    return {"images": row["images"], "messages": turns}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _records(size: int) -> dict[str, int]:
    others = held_out(size, FEWEST_HELD_OUT)
    return {"train": size, "val": others, "test": others}


CHAT = SetFormat(
    roots={"image_root": "."},
    records=_records,
    images=lambda records: sum(count + count // len(SORTS) for count in records.values()),
    write=_write,
    texts=False,
)
