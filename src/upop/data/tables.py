"""Reads tables of rows: JSON, JSON lines, Parquet, CSV, WebDataset, folders, and data sets on the hub.

JSON is parsed here, so that errors name the line, and columns may mix types. `datasets`, an optional dependency, reads
everything else. Images stay encoded until they are opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upop.errors import DataError, SettingError, nearest
from upop.libraries import naming_missing
from upop.pruning.errors import some_of
from upop.reading import LARGEST_DATA, parse_json, read_text, reason, regular_file

if TYPE_CHECKING:
    import datasets

_LINES = (".jsonl", ".ndjson")
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".tar": "webdataset", ".arrow": "arrow"}
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")
_LONGEST_LINE = 64 * 2**20
_LOOKED_AT = 1000
"""Number of JSON rows whose columns are taken as those of all rows."""


class Table(ABC):
    """Rows of named cells.

    Attributes:
        source: the file, pattern, folder or hub name.
        columns: names of the cells; fields of objects have dotted names.
        folder: base folder of relative image paths, if any.
    """

    source: str
    columns: tuple[str, ...]
    folder: Path | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def row(self, number: int) -> Mapping[str, Any]:
        """Return all cells of a row; images as {"bytes", "path"}, unopened."""

    def light(self, number: int) -> Mapping[str, Any]:
        """Return the cells of a row without embedded images."""
        return self.row(number)

    def place(self, number: int) -> str:
        """Return the position of a row, in words: "train.jsonl, line 4"."""
        return f"{self.source}, row {number}"

    def stored(self, column: str) -> bool:
        """Return whether a column has embedded images."""
        del column
        return False

    def without(self, column: str) -> int | None:
        """Return the number of a row without an image in a column of embedded images; None if all have one."""
        del column
        return None

    def names(self, column: str) -> tuple[str, ...] | None:
        """Return the class names that the integers of a column index; None if the data set has none."""
        del column
        return None

    def files(self) -> tuple[Path, ...]:
        """Return the local files of the rows."""
        return ()


def open_table(
    source: str | Path,
    *,
    split: str | None = None,
    name: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> Table:
    """Return the rows of a file, of all files of a pattern, of a folder, or of a data set on the hub.

    Args:
        source: a .json, .jsonl, .parquet, .csv or .tar file, a pattern of such files (data/*.parquet), a folder that
            `datasets` reads (CLASS/*.jpg, or images with metadata.jsonl), or a name on the hub.
        split: of a data set with several; by default "train", or the only one.
        name: configuration of a data set on the hub.
        streaming: read the first `limit` rows without downloading the others.
        limit: number of rows to read; None reads all.

    Raises:
        DataError: the source does not exist, or cannot be read.
        SettingError: streaming has no limit.
        MissingLibraryError: `datasets` is needed and not installed.
    """
    text = str(source)
    if streaming and limit is None:
        raise SettingError(
            f"Streaming {text} needs the number of rows to read, and none is set. Set rows (--rows 20000)."
        )
    files = [Path(each) for each in _matching(text)] if has_magic(text) else [Path(text)]
    if not files:
        raise DataError(f"No file matches {text}. Check the pattern.")
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) > 1:
        raise DataError(f"{text} matches files of several kinds: {', '.join(kinds)}. Give files of one kind.")
    (kind,) = kinds
    there = [_exists(file) for file in files]
    if kind in (*_LINES, ".json") and any(there):
        return (
            _JsonLines(text, files, limit) if kind in _LINES or _holds_lines(files) else _JsonList(text, files, limit)
        )
    known = kind in (*_LINES, ".json", *_BUILDERS, *_PACKED) or (kind and "/" not in text)
    if not all(there) and (known or text.startswith((".", "/", "~"))):
        raise DataError(f"{text} does not exist{_near(files[0])}. Check the path.")
    return _hosted(text, files if all(there) else None, kind, split, name, streaming, limit)


def _matching(pattern: str) -> list[str]:
    return sorted(glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob rejects absolute patterns


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:
        return False


def _near(file: Path) -> str:
    try:
        return nearest(file.name, [path.name for path in file.parent.iterdir()])
    except OSError:
        return f", nor does the folder {file.parent}"


def _holds_lines(files: Sequence[Path]) -> bool:
    """Whether .json files hold one object per line rather than one list."""
    try:
        with regular_file(files[0]) as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    except (OSError, ValueError):
        return False
    return start.startswith(b"{")


class _JsonLines(Table):
    """Files with one JSON object per line; only their offsets are kept in memory."""

    def __init__(self, source: str, files: Sequence[Path], limit: int | None) -> None:
        self.source, self._files, self.folder = source, list(files), files[0].parent
        self._places, self._lines = array("Q"), array("Q")
        self._first = [0]  # first row of every file, and the number of all rows
        for file in files:
            self._index(file, limit)
            self._first.append(len(self._places))
        if not self._places:
            raise DataError(f"{source} holds no rows.")
        self.columns = _columns(self.row(number) for number in range(min(len(self), _LOOKED_AT)))

    def _index(self, path: Path, limit: int | None) -> None:
        place = 0
        try:
            with regular_file(path) as file:
                for number, line in enumerate(file, 1):
                    if limit is not None and len(self._places) >= limit:
                        return
                    if line.strip():
                        self._places.append(place)
                        self._lines.append(number)
                    place += len(line)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {reason(error)}.") from error

    def __len__(self) -> int:
        return len(self._places)

    def _file(self, number: int) -> Path:
        return next(file for file, end in zip(self._files, self._first[1:], strict=True) if number < end)

    def row(self, number: int) -> Mapping[str, Any]:
        try:
            with regular_file(self._file(number)) as file:
                file.seek(self._places[number])
                line = file.readline(_LONGEST_LINE)
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"it has more than {_LONGEST_LINE:,} bytes")
            value = parse_json(line.decode("utf-8-sig"), nan=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.place(number)} is not JSON: {reason(error)}. Write one object per line.") from error
        return _object(value, self.place(number))

    def place(self, number: int) -> str:
        return f"{self._file(number)}, line {self._lines[number]}"

    def files(self) -> tuple[Path, ...]:
        return tuple(self._files)


class _JsonList(Table):
    """Files with one JSON list of objects each."""

    def __init__(self, source: str, files: Sequence[Path], limit: int | None) -> None:
        self.source, self._files, self.folder = source, list(files), files[0].parent
        self._rows: list[tuple[int, int, Any]] = []
        for which, path in enumerate(files):
            values = _read_list(path)
            self._rows += [(which, number, value) for number, value in enumerate(values)]
        self._rows = self._rows[:limit]
        if not self._rows:
            raise DataError(f"{source} holds no rows.")
        self.columns = _columns(self.row(number) for number in range(min(len(self), _LOOKED_AT)))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Mapping[str, Any]:
        return _object(self._rows[number][2], self.place(number))

    def place(self, number: int) -> str:
        which, row, _ = self._rows[number]
        return f"{self._files[which]}, row {row}"

    def files(self) -> tuple[Path, ...]:
        return tuple(self._files)


def _read_list(path: Path) -> list[Any]:
    try:
        value = parse_json(read_text(path, LARGEST_DATA), nan=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}. It may be truncated.") from error
    if not isinstance(value, list):
        raise DataError(f"{path} must hold a list of rows, [{{...}}, ...], or one row per line; found a single object.")
    return value


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row must be an object with named cells, {{...}}; found {type(value).__name__}.")
    return value


def _columns(rows: Iterator[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of all cells, and dotted names of fields inside of them, in order of first appearance."""
    found: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = None
            if isinstance(value, dict):
                found |= {f"{name}.{inner}": None for inner in value}
    return tuple(found)


class _Hosted(Table):
    """A data set of `datasets`; images are not decoded."""

    def __init__(self, source: str, data: datasets.Dataset, files: Sequence[Path] | None) -> None:
        self.source, self._files = source, tuple(file for file in files or () if file.is_file())
        self.folder = files[0].parent if self._files and files else None
        self._features = data.features
        held = [name for name, feature in data.features.items() if _images(feature)]
        with _explained(source):
            for name, feature in data.features.items():
                if (plain := undecoded(feature)) != feature:
                    data = data.cast_column(name, plain)
        self._data = data
        self._held = frozenset(held)
        self._light = self._data.remove_columns(held) if held else self._data
        self.columns = _named(data.features)

    def __len__(self) -> int:
        return len(self._data)

    def row(self, number: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._data[number]
        return found

    def light(self, number: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._light[number] if len(self._light.features) else {}
        return found

    def stored(self, column: str) -> bool:
        return column in self._held

    def without(self, column: str) -> int | None:
        import pyarrow.compute as compute

        cells = self._data.with_format("arrow")[column] if column in self._held else None
        if cells is None:
            return None
        missing = compute.index(compute.is_null(cells), True).as_py()
        return None if missing < 0 else int(missing)

    def names(self, column: str) -> tuple[str, ...] | None:
        names = getattr(self._features.get(column), "names", None)
        return None if names is None else tuple(str(each) for each in names)

    def files(self) -> tuple[Path, ...]:
        return self._files


class _Streamed(_Hosted):
    """The first rows of a streamed data set, in memory."""

    def __init__(self, source: str, data: datasets.IterableDataset, files: Sequence[Path] | None, limit: int) -> None:
        self.source, self._files = source, ()
        self.folder = files[0].parent if files and files[0].is_file() else None
        with _explained(source):
            # Some formats have no features before rows are read; such a set has no images to decode.
            rows = list(islice(data.decode(False) if data.features else data, limit))
        if not rows:
            raise DataError(f"{source} holds no rows.")
        self._rows: list[Mapping[str, Any]] = rows
        self._features = data.features or {}
        self._held = frozenset(name for name, feature in self._features.items() if _images(feature))
        self.columns = _named(data.features) if data.features else _columns(iter(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Mapping[str, Any]:
        return self._rows[number]

    def light(self, number: int) -> Mapping[str, Any]:
        return self._rows[number]

    def stored(self, column: str) -> bool:
        return column in self._held

    def without(self, column: str) -> int | None:
        return next((number for number, row in enumerate(self._rows) if row.get(column) is None), None)


def undecoded(features: Any) -> Any:
    """Return features of `datasets` with decoding of images, videos and sound turned off, also in nested ones."""
    import datasets

    if isinstance(features, datasets.Image | datasets.Video | datasets.Audio):
        return type(features)(decode=False)
    if isinstance(features, dict):
        changed = {name: undecoded(feature) for name, feature in features.items()}
        return datasets.Features(changed) if isinstance(features, datasets.Features) else changed
    if isinstance(features, datasets.List):
        return datasets.List(undecoded(features.feature), length=features.length)
    return features


def _images(feature: Any) -> bool:
    """Whether a feature is an image, or a list of them."""
    import datasets

    if isinstance(feature, datasets.List):
        return _images(feature.feature)
    return isinstance(feature, datasets.Image)


def _named(features: Any) -> tuple[str, ...]:
    inner = [(name, feature) for name, feature in features.items() if isinstance(feature, dict)]
    return (*features, *(f"{name}.{key}" for name, feature in inner for key in feature))


def _hosted(
    source: str,
    files: Sequence[Path] | None,
    kind: str,
    split: str | None,
    name: str | None,
    streaming: bool,
    limit: int | None,
) -> Table:
    with naming_missing():
        import datasets

    given: dict[str, Any] = {"streaming": streaming}
    if files is None or files[0].is_dir():
        given |= {"path": source, "name": name}
    else:
        builder = _BUILDERS.get(kind) or ("json" if kind in _PACKED and ".json" in files[0].name else None)
        if builder is None:
            raise DataError(
                f"{source} has the extension {kind or '(none)'}, which no reader supports. Give a .json, .jsonl, "
                f"{', '.join(_BUILDERS)} file, a folder, or a name on the hub."
            )
        given |= {"path": builder, "data_files": {split or "train": [str(file) for file in files]}}
        if kind == ".tsv":
            given["sep"] = "\t"
    with _explained(source):
        found = datasets.load_dataset(**given)
    data = found[_split(source, list(found), split)]
    if streaming:
        assert limit is not None
        return _Streamed(source, data, files, limit)
    if not len(data):
        raise DataError(f"{source} holds no rows.")
    return _Hosted(source, data.select(range(limit)) if limit is not None and limit < len(data) else data, files)


def _split(source: str, found: list[str], wanted: str | None) -> str:
    if wanted is None:
        return "train" if "train" in found or len(found) > 1 else found[0]
    if wanted not in found:
        raise DataError(f"{source} has no split {wanted!r}{nearest(wanted, found)}; it has {some_of(found)}.")
    return wanted


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn errors of `datasets` into ones that name the source, and hide its progress bars."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:  # builders, file systems and networks raise errors of many types
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        words = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise DataError(
            f"{source} cannot be read as a data set: {words}. Check the path or name, and the network."
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


__all__ = ["Table", "open_table", "undecoded"]
