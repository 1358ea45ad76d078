"""Writes generated images with captions, in the formats of COCO (captioning, retrieval) and Flickr30K."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from upop.demo.captions import CAPTIONS_PER_IMAGE, Caption, Style, draw_captions
from upop.demo.layout import ANNOTATION, SetFormat, Sink, held_out
from upop.demo.scenes import Scene, sample_scene
from upop.demo.singles import sample_scenes

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
"""Share of all possible images in each split."""
FEWEST_HELD_OUT = 50
GROUND_TRUTH = "coco_gt"

_NUMBERS = {"train": 1, "val": 2, "test": 3}
_Key = tuple[str | None, str | None, str | None, int | None]


@dataclass(frozen=True, slots=True)
class Flavour:
    """A variant of the set: captioning, retrieval, or retrieval in Flickr30K's format.

    Attributes:
        task: part of the random seed.
        files: prefix of the annotation files' names.
        draw: draws a scene.
        style: of the captions.
        apart: whether a caption in a held-out split must fit its own image only.
        ground_truth: whether to write COCO's ground truth files.
    """

    task: str
    files: str
    draw: Callable[[Random], Scene]
    style: Style
    apart: bool
    ground_truth: bool


@dataclass(frozen=True, slots=True)
class Captioned:
    """A scene with captions and their meanings."""

    scene: Scene
    captions: tuple[tuple[str, Caption], ...]


def _few_shapes(rng: Random) -> Scene:
    """Draw one to three shapes; single shapes are rarer, because there are few such images."""
    while True:
        scene = sample_scene(rng)
        if len(scene.shapes) <= 3 and (len(scene.shapes) > 1 or rng.random() < 0.3):
            return scene


def _many_shapes(rng: Random) -> Scene:
    """Draw three or four shapes, enough for a caption that fits no other image."""
    while True:
        scene = sample_scene(rng)
        if len(scene.shapes) >= 3:
            return scene


class Gallery:
    """The scenes and captions of a split in which every caption must fit its own image only."""

    def __init__(self) -> None:
        self._scenes: list[tuple[frozenset[_Key], Scene]] = []
        self._captions: list[tuple[frozenset[_Key], Caption]] = []

    def has_scene_for(self, caption: Caption) -> bool:
        """Whether the caption fits a scene of the gallery."""
        wanted = _described(caption)
        return any(wanted <= keys and caption.fits(scene) for keys, scene in self._scenes)

    def has_caption_for(self, scene: Scene) -> bool:
        """Whether a caption of the gallery fits the scene."""
        keys = _shown(scene)
        return any(wanted <= keys and caption.fits(scene) for wanted, caption in self._captions)

    def add(self, new: Captioned) -> None:
        """Add a scene and its captions."""
        self._scenes.append((_shown(new.scene), new.scene))
        self._captions.extend((_described(caption), caption) for _, caption in new.captions)


def _described(caption: Caption) -> frozenset[_Key]:
    """Return kind, colour, size and row of every mention; a scene that lacks one does not fit the caption."""
    return frozenset(
        (mention.noun.kind, mention.noun.colour, mention.noun.size, group.row)
        for group in caption.groups
        for mention in group.mentions
    )


def _shown(scene: Scene) -> frozenset[_Key]:
    return frozenset(
        (shape.kind, shape.colour, size, row)
        for shape in scene.shapes
        for size in (None, shape.size)
        for row in (None, shape.row)
    )


def sample_captioned(flavour: Flavour, seed: int, split: str) -> Iterator[Captioned]:
    """Yield captioned scenes of a split, without end."""
    rng = Random(f"{seed}/{flavour.task}/{split}")
    gallery = Gallery() if flavour.apart and split != "train" else None
    for scene in sample_scenes(rng, seed, split, SHARES, flavour.draw):
        if gallery is not None and gallery.has_caption_for(scene):
            continue
        captions = draw_captions(rng, scene, flavour.style, refused=gallery.has_scene_for if gallery else None)
        if len(captions) < CAPTIONS_PER_IMAGE:
            continue
        new = Captioned(scene, tuple(captions))
        if gallery is not None:
            gallery.add(new)
        yield new


def _records(size: int) -> dict[str, int]:
    others = held_out(size, FEWEST_HELD_OUT)
    return {"train": size, "val": others, "test": others}


def _images(records: Mapping[str, int]) -> int:
    return -(-records["train"] // CAPTIONS_PER_IMAGE) + records["val"] + records["test"]


def _write(flavour: Flavour, root: str, sink: Sink, seed: int, records: Mapping[str, int]) -> None:
    for split, wanted in records.items():
        each: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for number, example in enumerate(sample_captioned(flavour, seed, split)):
            if len(each) >= wanted:
                break
            # Unique in a set of any size.
            identity = 10 * number + _NUMBERS[split]
            image = _image(flavour, split, identity, sink.suffix)
            sink.scene_image(root, image, example.scene)
            captions = [caption for caption, _ in example.captions]
            if split == "train":
                name = f"{flavour.files.partition('_')[0]}_{identity}"
                each.extend(
                    {"image": image, "caption": caption, "image_id": name} for caption in captions[: wanted - len(each)]
                )
            else:
                each.append({"image": image, "caption": captions})
                annotations.extend({"image_id": identity, "caption": caption} for caption in captions)
        sink.records(f"{flavour.files}_{split}.json", each)
        if flavour.ground_truth and split != "train":
            _write_ground_truth(sink, f"{flavour.files}_{split}_gt.json", annotations)


def _image(flavour: Flavour, split: str, identity: int, suffix: str) -> str:
    if flavour.files.startswith("flickr"):
        return f"flickr30k-images/{identity}.{suffix}"
    # In Karpathy's splits, val and test come from COCO's val2014.
    folder = "train2014" if split == "train" else "val2014"
    return f"{folder}/COCO_{folder}_{identity:012d}.{suffix}"


def _write_ground_truth(sink: Sink, name: str, annotations: list[dict[str, object]]) -> None:
    images = [{"id": identity} for identity in dict.fromkeys(entry["image_id"] for entry in annotations)]
    numbered = [{**entry, "id": number} for number, entry in enumerate(annotations)]
    sink.text(f"{ANNOTATION}/{GROUND_TRUTH}/{name}", json.dumps({"annotations": numbered, "images": images}) + "\n")


def _format(flavour: Flavour, root: str) -> SetFormat:
    roots = {"image_root": root}
    if flavour.ground_truth:
        roots["coco_gt_root"] = f"{ANNOTATION}/{GROUND_TRUTH}"
    return SetFormat(roots, _records, _images, partial(_write, flavour, root))


CAPTION_FLAVOUR = Flavour(
    "caption",
    "coco_karpathy",
    _few_shapes,
    Style(sizes=0.6, places={"nothing": 0.4, "rows": 0.35, "order": 0.25}, one_in_full=True),
    apart=False,
    ground_truth=True,
)
_RETRIEVAL_STYLE = Style(sizes=0.8, places={"nothing": 0.5, "rows": 0.25, "order": 0.25}, one_in_full=False)
RETRIEVAL_FLAVOUR = Flavour(
    "retrieval", "coco_karpathy", _many_shapes, _RETRIEVAL_STYLE, apart=True, ground_truth=False
)
FLICKR_FLAVOUR = Flavour(
    "retrieval-flickr", "flickr30k", _many_shapes, _RETRIEVAL_STYLE, apart=True, ground_truth=False
)

CAPTION = _format(CAPTION_FLAVOUR, "images/coco")
RETRIEVAL = _format(RETRIEVAL_FLAVOUR, "images/coco")
RETRIEVAL_FLICKR = _format(FLICKR_FLAVOUR, "images/flickr30k")
