"""Writes generated pairs of images in NLVR2's format: nlvr_{train,dev,test}.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from upop.demo.layout import MOST_HELD_OUT, SetFormat, Sink, held_out
from upop.demo.nlvr import SENTENCES_PER_PAIR, Example, sample_split

IMAGES = "images/NLVR2"
FEWEST_HELD_OUT = 200
_PAIRS_PER_FOLDER = 1000


def _records(size: int) -> dict[str, int]:
    others = held_out(size, FEWEST_HELD_OUT)
    return {"train": size, "dev": others, "test": others}


def _images(records: Mapping[str, int]) -> int:
    return sum(2 * -(-count // SENTENCES_PER_PAIR) for count in records.values())


def _write(sink: Sink, seed: int, records: Mapping[str, int]) -> None:
    for split, examples in _splits(seed, records["train"]):
        _write_split(sink, split, examples, records[split])


def _splits(seed: int, size: int) -> Iterator[tuple[str, Iterator[Example]]]:
    """Yield the examples of test, dev and train; later splits leave out pairs of earlier ones.

    Training leaves out the pairs of the largest possible dev and test, so that its samples do not depend on the size.
    """
    taken: set[object] = set()
    for split in ("test", "dev"):
        largest = list(sample_split(seed, split, MOST_HELD_OUT, taken))
        yield split, iter(largest)
        taken.update(example.pair.content for example in largest)
    yield "train", sample_split(seed, "train", size, taken)


def _write_split(sink: Sink, split: str, examples: Iterator[Example], wanted: int) -> None:
    found: list[dict[str, object]] = []
    for number, example in enumerate(examples):
        if len(found) >= wanted:
            break
        place = f"{split}/{number // _PAIRS_PER_FOLDER:03d}"
        images = [f"{place}/{split}-{number:06d}-img{side}.{sink.suffix}" for side in (0, 1)]
        for image, scene in zip(images, (example.pair.left, example.pair.right), strict=True):
            sink.scene_image(IMAGES, image, scene)
        found.extend(
            {"sentence": s.sentence, "label": str(s.label), "images": images}
            for s in example.statements[: wanted - len(found)]
        )
    sink.records(f"nlvr_{split}.json", found)


NLVR = SetFormat(roots={"image_root": IMAGES}, records=_records, images=_images, write=_write)
