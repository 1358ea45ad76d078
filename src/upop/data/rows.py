"""Samples from rows of files or of data sets on the hub, with images, texts and labels.

All rows are validated when they are read, before any long work; errors name the file, the row and the column.
"""

from __future__ import annotations

import base64
import binascii
import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from torch.utils.data import Dataset

from upop.data.columns import KINDS, Columns, find_columns
from upop.data.images import read_rgb
from upop.data.samples import check_images, is_text, shown
from upop.data.tables import Table, open_table
from upop.data.turns import Turn, read_turns
from upop.errors import BadImageError, DataError, nearest
from upop.pruning.errors import some_of
from upop.reading import parse_json
from upop.sources import Sources

_MOST_CLASSES = 100_000
_LONGEST_PATH = 4096
_VIDEOS = ("video", "videos", "mp4", "webm", "mov", "avi", "mkv")
"""Names of cells with videos: columns, and extensions in shards of WebDataset."""
_INNER_TEXTS = ("answer", "text", "caption", "raw", "value")


@dataclass(frozen=True)
class Row:
    """One sample, with unopened images.

    Attributes:
        source: the file or data set.
        number: of the row, from 0.
        place: position for messages: "train.jsonl, line 4".
        kind: one of `upop.data.columns.KINDS`; it decides which of the fields below are set.
        images: image files, or their content.
        turns: for "messages".
        question: for "question".
        answers: for "question", one or several.
        captions: for "caption", one or more.
        label: for "label", the class index.
        text: for "text".
    """

    source: str
    number: int
    place: str
    kind: str
    images: tuple[Path | bytes, ...] = ()
    turns: tuple[Turn, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    label: int = -1
    text: str = ""

    def error(self, problem: str) -> DataError:
        """Return a DataError about a problem of this row."""
        return DataError(f"{self.place}: {problem}")

    @property
    def answer(self) -> str:
        """The most frequent answer; the first of ties."""
        return Counter(self.answers).most_common(1)[0][0]

    def open_images(self) -> list[Image.Image]:
        """Return the images as upright 8-bit RGB.

        Raises:
            BadImageError: one cannot be read; the message names file, row and image.
        """
        return [self._open(image, place) for place, image in enumerate(self.images)]

    def _open(self, image: Path | bytes, place: int) -> Image.Image:
        try:
            return read_rgb(image)
        except Exception as error:  # a broken file makes the decoders raise nearly anything
            reason = str(error) or type(error).__name__
            name = str(image) if isinstance(image, Path) else f"image {place} of {self.place}"
            raise BadImageError(
                f"{self.place}: the image {name if isinstance(image, Path) else place} cannot be read: {reason}. It "
                "may be truncated or not an image; fetch it again.",
                name,
                self.source,
                self.number,
                reason,
            ) from error


@dataclass(frozen=True)
class _At:
    """The position of the current row, for error messages."""

    place: str

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.place}: {problem}")


@dataclass
class Rows(Dataset[Row]):
    """The samples of a table, in its order.

    Attributes:
        table: the rows as they are stored.
        columns: role -> column.
        root: base folder of relative image paths.
        names: class names in the order of labels; only for kind "label".
        numbers: the selected rows of the table.
        notes: remarks for the user.
    """

    table: Table
    columns: Columns
    root: Path
    outside: bool = False
    names: tuple[str, ...] = ()
    numbers: Sequence[int] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The kind of all samples."""
        return self.columns.kind

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        """The sample at an index."""
        number = self.numbers[index]
        return self._read(number, self.table.row(number))

    def __iter__(self) -> Iterator[Row]:
        """Iterate over all samples, in order."""
        return (self[index] for index in range(len(self)))

    def of(self, indices: Sequence[int]) -> Rows:
        """Return the samples at these indices."""
        found = copy.copy(self)
        found.numbers = [self.numbers[index] for index in indices]
        return found

    def without(self, indices: Collection[int]) -> Rows:
        """Return the samples without those at these indices."""
        return self.of([index for index in range(len(self)) if index not in indices])

    def sources(self) -> Sources:
        """Return the local files of the samples."""
        files = self.table.files()
        column = self.columns.named.get("image")
        if not files or (column is not None and self.table.stored(column)):
            return Sources(files, {})
        read = (self._read(number, self.table.light(number), light=True) for number in self.numbers)
        paths = [image for row in read for image in row.images if isinstance(image, Path)]
        return Sources(files, {self._shown(path): path for path in paths})

    def check(self) -> None:
        """Check all samples, and that their images exist.

        Raises:
            DataError: a row is not valid for its kind, or an image is missing; the message names file and row.
        """
        image = self.columns.named.get("image")
        if image is not None and self.kind in ("caption", "label") and (empty := self.table.without(image)) is not None:
            raise DataError(f"{self.table.place(empty)}: the column {image!r} holds no image.")
        read = (self._read(number, self.table.light(number), light=True) for number in self.numbers)
        files = ((row, self._shown(path)) for row in read for path in row.images if isinstance(path, Path))
        check_images(self.root, files, outside=self.outside)

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def _read(self, number: int, cells: Mapping[str, Any], *, light: bool = False) -> Row:
        at, named = _At(self.table.place(number)), self.columns.named
        found: dict[str, Any] = {"source": self.table.source, "number": number, "place": at.place, "kind": self.kind}
        column = named.get("image")
        held = column is not None and self.table.stored(column)
        images: Sequence[Any] = [] if column is None or (light and held) else _listed(_parsed(_cell(cells, column)))
        if not images and _has_video(cells) and not (held and _listed(_cell(self.table.row(number), column or ""))):
            raise at.error("it has a video, and images alone are read. Leave such rows out, or give images of it.")
        if not images and self.kind in ("caption", "label") and not (light and held):
            raise at.error(f"the column {column!r} holds no image.")
        if self.kind == "messages":
            turns = _parsed(_cell(cells, named["messages"]))
            if light and held:
                images = [b""] * _marks(turns)
            try:
                found["turns"], images = read_turns(turns, images)
            except ValueError as error:
                raise at.error(f"the column {named['messages']!r} {error}.") from None
        elif self.kind == "question":
            found["question"] = _text(cells, named["question"], at)
            found["answers"] = _texts(cells, named["answer"], at, "answer")
        elif self.kind == "caption":
            found["captions"] = _texts(cells, named["caption"], at, "caption")
        elif self.kind == "label":
            found["label"] = self._label(_cell(cells, named["label"]), at)
        else:
            found["text"] = _text(cells, named["text"], at)
        found["images"] = tuple(self._image(each, at) for each in images)
        return Row(**found)

    def _image(self, value: Any, at: _At) -> Path | bytes:
        """Return the path of an image, or its encoded content."""
        if isinstance(value, Mapping):
            held = value.get("bytes")
            value = held if held is not None else value.get("path") or value.get("url")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value.strip() or (len(value) > _LONGEST_PATH and value[:5] != "data:"):
            raise at.error(f"an image must be the path or the content of an image file; found {shown(value)}.")
        scheme = urlsplit(value[:64]).scheme.lower()
        if scheme in ("http", "https"):
            raise at.error(
                f"the image {value[:200]!r} is a URL, and images are not downloaded during a run. Download them to a "
                "folder first, and give their paths."
            )
        if scheme == "data":
            try:
                return base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise at.error(f"an image is a data URL (data:...;base64) that cannot be decoded: {error}.") from None
        return self.root / (value.removeprefix("file://") if scheme == "file" else value)

    def _label(self, value: Any, at: _At) -> int:
        column = self.columns.named["label"]
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise at.error(f"the column {column!r} must hold the name or index of a class; found {shown(value)}.")
        if isinstance(value, int) and 0 <= value < len(self.names):
            return value
        if str(value) not in self.names:
            near = nearest(str(value), self.names[:1000])
            raise at.error(f"{value!r} is not one of the {len(self.names)} classes{near}: {some_of(self.names)}.")
        return self.names.index(str(value))


def read_rows(
    source: str | Path,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    columns: Mapping[str, str] | None = None,
    image_root: str | Path | None = None,
    split: str | None = None,
    name: str | None = None,
    classes: Sequence[str] = (),
    outside: bool = False,
    streaming: bool = False,
    limit: int | None = None,
) -> Rows:
    """Return the checked samples of a file, a folder, or a data set on the hub.

    Args:
        source: see `upop.data.tables.open_table`.
        kinds: accepted kinds of samples, of `KINDS`, in order of preference.
        columns: role ("image", "answer", ...) -> column, for columns without a common name.
        image_root: folder that image paths are relative to; by default the folder of the file.
        split: of a data set with several; by default "train".
        name: configuration of a data set on the hub.
        classes: class names that labels index, as in training; by default those of the data.
        outside: whether images may lie outside of `image_root`.
        streaming: read the first `limit` rows without downloading the others.
        limit: number of rows to read; None reads all.

    Raises:
        DataError: the data do not exist, a column is missing, or a row is not valid; the message says where.
        SettingError: a role is unknown, or streaming has no limit.
        MissingLibraryError: `datasets` is needed and not installed.
    """
    table = open_table(source, split=split, name=name, streaming=streaming, limit=limit)
    found = find_columns(table, kinds, columns or {})
    root = Path(image_root if image_root is not None else table.folder or ".").absolute()
    rows = Rows(table, found, root, outside=outside, numbers=range(len(table)))
    if found.kind == "label":
        rows.names = tuple(classes) or table.names(found.named["label"]) or _classes(rows)
    rows.notes.append(_summary(rows))
    rows.check()
    return rows


def _summary(rows: Rows) -> str:
    named = ", ".join(f"{role} from {column!r}" for role, column in rows.columns.named.items())
    return f"{rows.table.source}: {len(rows):,} rows, {named}"


def _classes(rows: Rows) -> tuple[str, ...]:
    """Return the class names: strings sorted, or the numbers from 0 to the highest."""
    column = rows.columns.named["label"]
    values = {number: _cell(rows.table.light(number), column) for number in rows.numbers}
    below = next((number for number, value in values.items() if isinstance(value, int) and value < 0), None)
    if below is not None:
        place = rows.table.place(below)
        raise DataError(
            f"{place}: the column {column!r} holds {values[below]}, and class indices start at 0. Leave out rows "
            "without a class, or give the class a name."
        )
    whole = [value for value in values.values() if isinstance(value, int) and not isinstance(value, bool)]
    if len(whole) == len(values):
        if max(whole) >= _MOST_CLASSES:
            place = rows.table.place(next(number for number, value in values.items() if value == max(whole)))
            raise DataError(
                f"{place}: the column {column!r} holds {max(whole)}; class indices must be below {_MOST_CLASSES}."
            )
        return tuple(str(value) for value in range(max(whole) + 1))
    return tuple(sorted({str(value) for value in values.values() if isinstance(value, int | str)}))


def _cell(cells: Mapping[str, Any], column: str) -> Any:
    """Return a cell, or a field inside of one by a dotted name; None if it does not exist."""
    if column in cells:
        return cells[column]
    name, _, inner = column.partition(".")
    outer = cells.get(name)
    return _cell(outer, inner) if inner and isinstance(outer, Mapping) else None


def _has_video(cells: Mapping[str, Any]) -> bool:
    inner = cells.get("json")
    found = {**(inner if isinstance(inner, Mapping) else {}), **cells}
    return any(value and name.lower() in _VIDEOS for name, value in found.items())


def _parsed(value: Any) -> Any:
    """Return what a cell holds that is JSON in a text, as tables without nested cells write lists."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _listed(value: Any) -> Sequence[Any]:
    if value is None or value == "":
        return []
    return [each for each in value if each is not None] if isinstance(value, list | tuple) else [value]


def _text(cells: Mapping[str, Any], column: str, at: _At) -> str:
    value = _cell(cells, column)
    if not is_text(value):
        raise at.error(f"the column {column!r} must hold a non-empty text; found {shown(value)}.")
    return str(value)


def _texts(cells: Mapping[str, Any], column: str, at: _At, what: str) -> tuple[str, ...]:
    """Return one text or several; they may be in a list, and in objects, as in SQuAD, TextVQA and VQAv2."""
    value = _cell(cells, column)
    if isinstance(value, Mapping):
        value = next((value[name] for name in _INNER_TEXTS if name in value), None)
    found = [_inner(each) for each in _listed(value)]
    if not found or not all(is_text(each) for each in found):
        raise at.error(
            f"the column {column!r} holds no {what}: it must be a text or a list of texts; found {shown(value)}."
        )
    return tuple(str(each) for each in found)


def _inner(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = next((value[name] for name in _INNER_TEXTS if name in value), None)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _marks(turns: Any) -> int:
    """Count the image marks of a conversation, without reading the images."""
    counts: list[int] = []

    def count(value: Any) -> None:
        if isinstance(value, str):
            counts.append(value.count("<image>"))
        elif isinstance(value, Mapping):
            kind = value.get("type")
            if kind in ("image", "image_url", "input_image"):
                counts.append(int(not any(value.get(name) for name in ("image", "image_url", "url", "path"))))
            for name in ("content", "value", "text"):
                count(value.get(name))
        elif isinstance(value, list | tuple):
            for each in value:
                count(each)

    count(turns)
    return sum(counts)
