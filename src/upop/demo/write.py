"""Writes generated data sets to disk in the published formats, either completely or not at all.

`OUT/annotation/...`          annotation files (ann_root), with the published names and formats
`OUT/images/...`              images; the settings' roots (image_root, or vqa_root and vg_root) are in here
`OUT/tokenizer/vocab.txt`     a small WordPiece vocabulary
`OUT/ade20k/...`              segmentation, instead of these: images and label maps, in ADE20K's layout
`OUT/{train,val,test}/CLASS/` classification: images, in ImageNet's layout
`OUT/{train,val,test}.jsonl`  chat: questions and answers
`OUT/shapes.json`             the arguments; a folder with the same set is kept
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from upop.demo.caption_files import CAPTION, RETRIEVAL, RETRIEVAL_FLICKR
from upop.demo.chat_files import CHAT
from upop.demo.classification_files import CLASSIFICATION
from upop.demo.draw import ImageFormat
from upop.demo.layout import ANNOTATION, TOKENIZER, SetFormat, Sink
from upop.demo.nlvr_files import NLVR
from upop.demo.segmentation_files import SEGMENTATION
from upop.demo.vocabulary import vocabulary
from upop.demo.vqa_files import VQA
from upop.errors import DataError, RunFolderError, SettingError, nearest
from upop.files import replacing_folder
from upop.reading import read_json

VERSION = 1
"""Increased whenever the same seed gives different files."""
MANIFEST = "shapes.json"

FORMATS: dict[str, SetFormat] = {
    "nlvr": NLVR,
    "caption": CAPTION,
    "vqa": VQA,
    "retrieval": RETRIEVAL,
    "retrieval-flickr": RETRIEVAL_FLICKR,
    "classification": CLASSIFICATION,
    "segmentation": SEGMENTATION,
    "chat": CHAT,
}
"""Task -> format of its set."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of `write_shapes`: task, folder, samples per split, images, and whether they are new."""

    task: str
    folder: Path
    records: dict[str, int]
    images: int
    written: bool

    @property
    def settings(self) -> dict[str, str]:
        """The settings that point a run of the task at this set."""
        layout = FORMATS[self.task]
        roots = {name: str(self.folder / place) for name, place in layout.roots.items()}
        texts = {"ann_root": str(self.annotation), "tokenizer": str(self.tokenizer)}
        return {**roots, **(texts if layout.texts else {})}

    @property
    def annotation(self) -> Path:
        """The folder of the annotation files (ann_root)."""
        return self.folder / ANNOTATION

    @property
    def image_root(self) -> Path:
        """The folder that image paths are relative to; the first one, if there are several."""
        return self.folder / next(iter(FORMATS[self.task].roots.values()))

    @property
    def tokenizer(self) -> Path:
        """The folder of vocab.txt."""
        return self.folder / TOKENIZER


@dataclass(frozen=True, slots=True)
class _Manifest:
    version: int
    task: str
    seed: int
    size: int
    image_size: int
    image_format: str
    records: dict[str, int]


def write_shapes(
    task: str,
    out: Path | str,
    *,
    seed: int,
    size: int,
    image_size: int = 64,
    image_format: ImageFormat = "png",
    progress: Progress | None = None,
) -> Summary:
    """Write a generated data set of a task with `size` training samples.

    The same arguments give the same bytes. Samples of a smaller size are the first ones of a larger size, in every
    split. No image (nlvr: no pair of images) has the same content as one in another split.

    Args:
        task: a name in `FORMATS`.
        out: the folder to write: new, empty, or with the same set, which is then kept.
        seed: any integer.
        size: training samples (caption and retrieval: captions); the other splits have about a tenth.
        image_size: side of the images in pixels.
        image_format: png or jpeg.
        progress: called with the number of images so far, and of all images.

    Raises:
        SettingError: an argument is out of range.
        DataError: `out` holds anything else, or cannot be written; nothing is left behind.
    """
    _check_settings(task, seed, size, image_size, image_format)
    layout = FORMATS[task]
    out = Path(out)
    records = layout.records(size)
    manifest = _Manifest(VERSION, task, seed, size, image_size, image_format, records)
    images = layout.images(records)
    written = not _already_there(out, manifest)
    if written:
        try:
            # The manifest moves last: without it the folder does not count as a generated set.
            with replacing_folder(out, last=MANIFEST) as folder:
                _fill(folder, manifest, image_format, images, progress)
        except RunFolderError as error:
            raise DataError(f"The generated data was not written: {error}") from error
    return Summary(task, out, records, images, written)


def _check_settings(task: str, seed: int, size: int, image_size: int, image_format: str) -> None:
    if task not in FORMATS:
        raise SettingError(
            f"There are no generated data for task {task!r}{nearest(task, list(FORMATS))}; known are "
            f"{', '.join(FORMATS)}."
        )
    if not isinstance(seed, int):
        raise SettingError(f"seed must be a whole number, not {seed!r}.")
    if size < 1:
        raise SettingError(f"size is the number of training samples and must be at least 1, not {size}.")
    if not 16 <= image_size <= 2048:
        raise SettingError(f"image_size must be 16 to 2048 pixels, not {image_size}.")
    if image_format not in get_args(ImageFormat):
        raise SettingError(f"image_format must be 'png' or 'jpeg', not {image_format!r}.")


def _already_there(out: Path, manifest: _Manifest) -> bool:
    """Whether `out` holds the same set.

    Raises:
        DataError: it holds anything else, or is not a folder.
    """
    try:
        if not out.exists():
            return False
        if not out.is_dir():
            raise DataError(f"{out} is a file. Give a folder to write the generated data to.")
        inside = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise DataError(f"{out} cannot be read: {error}.") from error
    if not inside:
        return False
    if MANIFEST not in inside:
        raise DataError(
            f"{out} is not empty (it holds {', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}) "
            f"and has no {MANIFEST}, so it is not a generated set. Give a new or empty folder."
        )
    found = read_json(out / MANIFEST, DataError, "Give a new or empty folder.")
    wanted = asdict(manifest)
    if found == wanted:
        return True
    found = found if isinstance(found, dict) else {}
    differing = [f"{key} {found.get(key)!r}, not {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    raise DataError(
        f"{out} holds another generated set ({'; '.join(differing)}). Give another folder, or delete this one first."
    )


def _fill(folder: Path, manifest: _Manifest, image_format: ImageFormat, images: int, progress: Progress | None) -> None:
    done = 0

    def drawn() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, images)

    sink = Sink(folder, manifest.image_size, image_format, drawn)
    layout = FORMATS[manifest.task]
    if layout.texts:
        sink.text(f"{TOKENIZER}/vocab.txt", "".join(f"{entry}\n" for entry in vocabulary()))
    layout.write(sink, manifest.seed, manifest.records)
    sink.text(MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
