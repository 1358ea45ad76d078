"""Checks that everything a run needs is present and intact, before GPU hours begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upop.checkpoints.files.hub import is_hub_name, is_remote
from upop.data.images import opened
from upop.errors import UPopError
from upop.pruning import count_parameters
from upop.published_data import PublishedData
from upop.runs.examples import spread
from upop.runs.inputs import resolved
from upop.runs.task import Task
from upop.settings import LanguageSettings, RunSettings
from upop.sources import Sources

State = Literal["right", "wrong", "unknown"]
_SHOWN = 3
_READERS = 8  # threads; reading and decoding release the GIL


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        part: "checkpoint", "tokenizer", or a split such as "train".
        state: "unknown" if it can only be checked when the run starts.
        message: what was found, and what to do if it is wrong.
    """

    part: str
    state: State
    message: str


def check(
    task: Task[Any],
    settings: RunSettings,
    published: PublishedData | None,
    *,
    decoded: int | None,
    evaluate: bool = False,
    advance: Callable[[int, int], None],
) -> Iterator[Finding]:
    """Check the checkpoint, the tokenizer and the data of a run; yield one finding per part.

    The checkpoint is loaded on the CPU, as a run loads it. Every annotation file is read, every image must exist and
    not be empty, and some images are decoded.

    Args:
        task: of the run.
        settings: of the run.
        published: sample counts of the published data set; None skips the comparison.
        decoded: number of images to decode per split, evenly spaced; None decodes all.
        evaluate: whether the run only evaluates.
        advance: called from time to time with the number of checked images and the total.
    """
    found, settings = _checkpoint(task, settings)
    yield found
    if isinstance(settings, LanguageSettings):
        yield _finding("tokenizer", lambda: f"{len(task.tokenizer(settings)):,} words from {settings.tokenizer}")
    for split in (*(() if evaluate else ("train",)), *task.evaluated(settings)):
        yield _split(task, settings, split, published, decoded, advance)


def _finding(part: str, describe: Callable[[], str]) -> Finding:
    try:
        return Finding(part, "right", describe())
    except UPopError as error:
        return Finding(part, "wrong", str(error))


def _checkpoint(task: Task[Any], settings: RunSettings) -> tuple[Finding, RunSettings]:
    """Load the checkpoint; return the finding, and the settings with the checkpoint's input preparation."""
    part, source = "checkpoint", str(settings.pretrained or "")
    if not source:
        return Finding(part, "wrong", "None was given. Give --pretrained."), settings
    if is_remote(source) or (is_hub_name(source) and not Path(source).exists()):
        return Finding(part, "unknown", f"{source} is downloaded and checked when the run starts."), settings
    try:
        settings, notes = resolved(task, settings, Path(source))
        model = task.load(Path(source), settings)
    except UPopError as error:
        return Finding(part, "wrong", str(error)), settings
    size = f"{source}: {type(model).__name__}, {count_parameters(model) / 1e6:.1f} M parameters"
    return Finding(part, "right", "; ".join([size, *notes])), settings


def _split(
    task: Task[Any],
    settings: RunSettings,
    split: str,
    published: PublishedData | None,
    decoded: int | None,
    advance: Callable[[int, int], None],
) -> Finding:
    part = task.splits.get(split, split)
    try:
        samples: Any = task.dataset(settings, split)
        sources: Sources | None = samples.sources() if hasattr(samples, "sources") else None
    except UPopError as error:
        return Finding(part, "wrong", str(error))
    wrong: list[str] = []
    message = [f"{len(samples):,} samples"]
    expected = getattr(published, split) if published is not None else 0
    if expected and len(samples) != expected:
        exact = split != "train" or published is None or published.exact
        words = f"the published data has {'' if exact else 'about '}{expected:,} ({published.source})"  # type: ignore[union-attr]
        (wrong if exact else message).append(words)
    if sources is not None:
        paths = list(sources.images.values())
        message.append(f"{len(paths):,} images")
        empty = _matching(paths, _is_empty, lambda done: advance(done, len(paths)))
        chosen = paths if decoded is None else [paths[number] for number in spread(len(paths), decoded)]
        broken = _matching(chosen, _unreadable, lambda done: advance(done, len(chosen)))
        message.append(f"{len(chosen):,} of them decoded")
        wrong += [_listed(empty, "empty")] if empty else []
        wrong += [_listed([path for path in broken if path not in set(empty)], "unreadable")] if broken else []
        wrong = [each for each in wrong if each]
    message += getattr(samples, "notes", ())
    if wrong:
        return Finding(part, "wrong", "; ".join([*message, *wrong]) + ". Download missing or damaged files again.")
    return Finding(part, "right", "; ".join(message))


def _matching(paths: Sequence[Path], test: Callable[[Path], bool], advance: Callable[[int], None]) -> list[Path]:
    """Return the paths that pass a test, in order."""
    with ThreadPoolExecutor(_READERS) as pool:
        found = []
        for number, (path, true) in enumerate(zip(paths, pool.map(test, paths), strict=True), 1):
            if true:
                found.append(path)
            if number % 256 == 0 or number == len(paths):
                advance(number)
        return found


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return True


def _unreadable(path: Path) -> bool:
    try:
        with opened(path) as image:
            image.load()
    except Exception:  # a broken file makes the decoders raise nearly anything
        return True
    return False


def _listed(paths: Sequence[Path], how: str) -> str:
    if not paths:
        return ""
    names = ", ".join(str(path) for path in paths[:_SHOWN])
    more = f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else ""
    return f"{len(paths):,} {how}: {names}{more}"
