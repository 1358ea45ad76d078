"""Writes generated data sets to disk in the published formats, all of a set or nothing of it.

`OUT/annotation/nlvr_{train,dev,test}.json`   the records, as NLVR2's annotation files lay them out
`OUT/images/NLVR2/...`                        the pictures; this folder is the records' image_root
`OUT/tokenizer/vocab.txt`                     a small WordPiece vocabulary
`OUT/shapes.json`                             what was asked for: a folder with the same set is kept
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from upop.data.shapes.draw import ImageFormat, draw_scene, encode_image
from upop.data.shapes.nlvr import SENTENCES_PER_PAIR, Example, sample_split
from upop.data.shapes.vocabulary import vocabulary
from upop.errors import DataError, SettingError

VERSION = 1
"""Goes up whenever the same seed would give other files."""
MANIFEST = "shapes.json"
ANNOTATION = "annotation"
IMAGES = "images/NLVR2"
TOKENIZER = "tokenizer"

HELD_OUT = (200, 1000)
"""Fewest and most records of dev and of test."""
_PAIRS_PER_FOLDER = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Summary:
    """What `write_nlvr` left: where, records per split, pictures, and whether they had to be written."""

    folder: Path
    records: dict[str, int]
    pictures: int
    written: bool

    @property
    def annotation(self) -> Path:
        """Folder of the annotation files (ann_root)."""
        return self.folder / ANNOTATION

    @property
    def image_root(self) -> Path:
        """Folder that the records' image paths start from."""
        return self.folder / IMAGES

    @property
    def tokenizer(self) -> Path:
        """Folder of vocab.txt."""
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


def held_out(size: int) -> int:
    """Records of dev, and of test, for that many training records: a tenth, but 200 to 1000."""
    fewest, most = HELD_OUT
    return min(max(size // 10, fewest), most)


def write_nlvr(
    out: Path | str,
    *,
    seed: int,
    size: int,
    image_size: int = 64,
    image_format: ImageFormat = "png",
    progress: Progress | None = None,
) -> Summary:
    """Write a generated NLVR2: `size` training records, `held_out(size)` records each in dev and test.

    The same arguments give the same bytes. The training records of a smaller size are the first ones of a
    larger size, and so are dev and test. No pair of pictures comes up twice, in one split or across splits.
    `image_size` is in pixels; `progress` is called with the pictures done and the pictures in all.

    Raises SettingError for an argument out of its range, and DataError where `out` holds anything but this
    very set or cannot be written; then nothing is left behind.
    """
    _check_settings(seed, size, image_size, image_format)
    out = Path(out)
    records = {"train": size, "dev": held_out(size), "test": held_out(size)}
    manifest = _Manifest(VERSION, "nlvr", seed, size, image_size, image_format, records)
    pictures = sum(2 * -(-count // SENTENCES_PER_PAIR) for count in records.values())
    if _already_there(out, manifest):
        return Summary(out, records, pictures, written=False)
    with _all_or_nothing(out) as folder:
        _fill(folder, manifest, pictures, progress)
    return Summary(out, records, pictures, written=True)


def _check_settings(seed: int, size: int, image_size: int, image_format: str) -> None:
    if not isinstance(seed, int):
        raise SettingError(f"seed must be a whole number, not {seed!r}.")
    if size < 1:
        raise SettingError(f"size is the number of training records and must be at least 1, not {size}.")
    if not 16 <= image_size <= 2048:
        raise SettingError(f"image_size must be 16 to 2048 pixels, not {image_size}.")
    if image_format not in get_args(ImageFormat):
        raise SettingError(f"image_format must be 'png' or 'jpeg', not {image_format!r}.")


def _already_there(out: Path, manifest: _Manifest) -> bool:
    """Whether `out` holds this very set. DataError if it holds anything else or is no folder."""
    try:
        if not out.exists():
            return False
        if not out.is_dir():
            raise DataError(f"{out} is a file. Name a folder to write the generated data to.")
        inside = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise DataError(f"{out} cannot be read: {error}.") from error
    if not inside:
        return False
    if MANIFEST not in inside:
        raise DataError(
            f"{out} is not empty (it holds {', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}) "
            f"and has no {MANIFEST}, so it is no generated set. Name a new or empty folder."
        )
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{out / MANIFEST} cannot be read: {error}. Name a new or empty folder.") from error
    wanted = asdict(manifest)
    if found == wanted:
        return True
    found = found if isinstance(found, dict) else {}
    differing = [f"{key} {found.get(key)!r}, asked {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    raise DataError(
        f"{out} holds another generated set ({'; '.join(differing)}). Name another folder, or delete this one first."
    )


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` when the block ends well and goes when it does not."""
    existed = out.exists()
    holder: Path | None = None
    try:
        # Beside a new folder, so that one rename finishes it; inside an empty one that is there already,
        # because such a folder may be a mount point, or the working directory, which cannot be replaced.
        parent = out if existed else out.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=".shapes-", dir=parent))
        folder = holder / "set"
        folder.mkdir()
        yield folder
        if existed:
            # The manifest moves last: without it the folder does not count as a generated set.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
                path.rename(out / path.name)
        else:
            folder.rename(out)
    except OSError as error:
        raise DataError(
            f"The generated data cannot be written to {out}: {error}. Check that the folder is writable "
            "and that the disk has space."
        ) from error
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def _fill(folder: Path, manifest: _Manifest, pictures: int, progress: Progress | None) -> None:
    (folder / ANNOTATION).mkdir()
    (folder / TOKENIZER).mkdir()
    _write_text(folder / TOKENIZER / "vocab.txt", "".join(f"{entry}\n" for entry in vocabulary()))
    done = 0

    def count() -> None:
        nonlocal done
        done += 2
        if progress is not None:
            progress(done, pictures)

    for split, examples in _splits(manifest):
        _write_split(folder, split, examples, manifest, count)
    _write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def _splits(manifest: _Manifest) -> Iterator[tuple[str, Iterator[Example]]]:
    """The examples of test, dev and train; a later split yields to the earlier ones where pairs repeat.

    It yields to the largest dev and test there can be, not to the ones written: the training records must not
    depend on the size.
    """
    taken: set[object] = set()
    for split in ("test", "dev"):
        largest = list(sample_split(manifest.seed, split, HELD_OUT[1], taken))
        yield split, iter(largest)
        taken.update(example.pair.content for example in largest)
    yield "train", sample_split(manifest.seed, "train", manifest.size, taken)


def _write_split(
    folder: Path, split: str, examples: Iterator[Example], manifest: _Manifest, count: Callable[[], None]
) -> None:
    wanted = manifest.records[split]
    suffix = "jpg" if manifest.image_format == "jpeg" else "png"
    lines: list[str] = []
    for number, example in enumerate(examples):
        if len(lines) >= wanted:
            break
        place = f"{split}/{number // _PAIRS_PER_FOLDER:03d}"
        if number % _PAIRS_PER_FOLDER == 0:
            (folder / IMAGES / place).mkdir(parents=True)
        images = [f"{place}/{split}-{number:06d}-img{side}.{suffix}" for side in (0, 1)]
        for image, scene in zip(images, (example.pair.left, example.pair.right), strict=True):
            picture = draw_scene(scene, manifest.image_size)
            # image_format was checked on entry, so it is one of the literals.
            encoded = encode_image(picture, "jpeg" if manifest.image_format == "jpeg" else "png")
            (folder / IMAGES / image).write_bytes(encoded)
        lines.extend(
            json.dumps({"sentence": s.sentence, "label": str(s.label), "images": images})
            for s in example.statements[: wanted - len(lines)]
        )
        count()
    _write_text(folder / ANNOTATION / f"nlvr_{split}.json", "[\n" + ",\n".join(lines) + "\n]\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
