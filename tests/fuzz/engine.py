"""Tries bad inputs in a process of its own, which is watched: what they raise, how long they take, what they touch.

Every input has a number. Its reader's name and the number make it again: `python -m fuzz.again READER NUMBER`.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from shared_kinds import FOLDER, share
from together import FORKS
from upop.errors import UPopError

SEED = 20261129
SECONDS = 60
"""Longest that one input may take."""
MEMORY = 2 << 30
"""Most that one input may have the process hold, in bytes, its libraries counted."""
_MORE = 3 << 30  # of address space, which is asked for more freely than it is used

REFUSED = "refused"
"""What a case returns where what it tried was refused without an error that reaches it, as by a command."""

Draw = random.Random
Case = Callable[[random.Random], object]
"""Makes a bad input with the generator it is given, and reads it."""
Reader = Callable[[Path], Case]
"""Prepares good inputs in a folder, and returns what reads bad ones there."""


class Wrong(Exception):  # noqa: N818 - no error of what is tested: it says that what came out is wrong
    """What came out is not what may come out."""


@dataclass
class Failure:
    """What an input did that none may."""

    reader: str
    number: int
    what: str
    where: str = ""
    text: str = ""

    def __str__(self) -> str:
        """Return all of it, and how to try it again."""
        return f"{self.reader} {self.number}: {self.what}\n    at {self.where}\n{self.text}"


@dataclass
class Tried:
    """What came of the inputs of a reader."""

    reader: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)
    memory: tuple[int, int] = (0, 0)
    failures: list[Failure] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"{self.reader}: {self.inputs} inputs, {self.refused} refused, {len(self.failures)} failed; "
            f"{self.seconds:.0f} s, the slowest {self.slowest[0]:.2f} s (number {self.slowest[1]}), "
            f"at most {self.memory[0] / 2**20:.0f} MiB (number {self.memory[1]})"
        )


def generator(reader: str, number: int) -> random.Random:
    """The chance of one input."""
    return random.Random(f"{SEED} {reader} {number}")


def attempt(case: Case, reader: str, number: int, touched: list[str]) -> tuple[bool, Failure | None]:
    """Try one input; return whether it was refused, and what is wrong with how it ended."""
    touched.clear()
    refused, failure = False, None
    try:
        refused = case(generator(reader, number)) is REFUSED
    except UPopError as error:
        refused = True
        problem = _wrong_message(str(error))
        if problem:
            failure = Failure(reader, number, f"{type(error).__name__}: {problem}", _place(error), str(error)[:2000])
    except Wrong as error:
        failure = Failure(reader, number, str(error), "", traceback.format_exc()[-3000:])
    except BaseException as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        failure = Failure(reader, number, what, _place(error), traceback.format_exc()[-3000:])
    if touched and failure is None:
        failure = Failure(reader, number, f"touched {touched[0]}", "", "\n".join(touched))
    return refused, failure


def _wrong_message(text: str) -> str:
    if not text.strip():
        return "the message is empty"
    if len(text) > 20_000:
        return f"the message has {len(text)} characters"
    return ""


def _place(error: BaseException) -> str:
    """The last line of ours that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/src/upop/" in frame.filename or "/site-packages/upop/" in frame.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rpartition('/upop/')[2]}:{frame.lineno} {frame.name}"


def watch_what_is_touched(folder: Path) -> list[str]:
    """Note from now on what this process starts, asks for, connects to, or changes outside a folder."""
    touched: list[str] = []
    inside = os.path.realpath(folder)
    never = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "builtins.input"}
    never |= {"socket.connect", "socket.getaddrinfo", "socket.sendto"}
    changes = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
    changes |= {"shutil.rmtree", "shutil.move"}

    def is_outside(path: str) -> bool:
        return not path.startswith((inside, "/dev/null", "/dev/tty"))

    def moved(event: str, arguments: tuple[Any, ...]) -> list[str]:
        """What a change of names is about: names, whatever they link to."""
        # What is named below an open folder is of shutil.rmtree, whose own event is looked at.
        if event not in changes or any(isinstance(each, int) and each >= 0 for each in arguments[-2:]):
            return []
        names = [os.fsdecode(each) for each in arguments[:2] if isinstance(each, str | bytes | os.PathLike)]
        names = names[1:] if event == "os.symlink" else names
        return [os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name)) for name in names]  # noqa: PTH118, PTH119, PTH120

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not isinstance(path, int) and is_outside(os.path.realpath(os.fsdecode(path))):
                touched.append(f"open {path!r} to write")
        elif event in never or any(map(is_outside, moved(event, arguments))):
            touched.append(f"{event} {arguments!r}"[:300])

    sys.addaudithook(hook)
    return touched


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def confined(folder: Path) -> list[str]:
    """Have this process work in a folder, with home and temporary files; return what it touches elsewhere later."""
    folder = Path(os.path.realpath(folder))
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ.update(HOME=str(folder), TMPDIR=str(folder / "tmp"), HF_HUB_OFFLINE="1", COLUMNS="80")
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    if FOLDER in os.environ:  # what is read of models here stays here
        share(str(folder / "tmp"))
    return watch_what_is_touched(folder)


def prepared(make: Reader, folder: Path) -> Case:
    """Prepare a reader in a new folder below one, which becomes the working directory."""
    inside = Path(os.path.realpath(folder)) / "case"
    os.chdir(folder)
    if inside.exists():
        shutil.rmtree(inside)
    inside.mkdir(parents=True)
    os.chdir(inside)
    case = make(inside)
    gc.collect()
    gc.freeze()  # what stays need not be looked through again and again
    return case


def _child(work: Sequence[tuple[str, int]], folder: Path, kept: Path, at: Synchronized[int], notes: Path) -> None:
    import torch

    from fuzz.readers import READERS

    torch.set_num_threads(1)
    os.setsid()
    touched = confined(folder)
    limit = _resident("VmSize") + _MORE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    ready = ""
    with notes.open("a") as file:
        for place, (reader, number) in enumerate(work):
            if reader != ready:
                at.value, ready = -1, reader
                case = prepared(READERS[reader], folder)
            at.value = place
            _reset_peak()
            start = time.perf_counter()
            refused, failure = attempt(case, reader, number, touched)
            seconds, peak = time.perf_counter() - start, _resident("VmHWM")
            if failure is None and peak > MEMORY:
                failure = Failure(reader, number, f"took {peak / 2**30:.1f} GiB")
            row: dict[str, Any] = {"reader": reader, "number": number, "refused": refused}
            row |= {"seconds": seconds, "peak": peak}
            if failure is not None:
                row["failure"] = vars(failure)
                _keep(folder / "case", kept, failure)
            file.write(json.dumps(row) + "\n")
            file.flush()


def _keep(inputs: Path, kept: Path, failure: Failure) -> None:
    """Copy what an input was made of, as far as it is files of a size to look at, and what it did."""
    to = kept / f"{failure.reader}-{failure.number}".replace("/", "-")

    def unfit(folder: str, names: list[str]) -> set[str]:
        paths = [Path(folder, name) for name in names]
        return {
            p.name for p in paths if p.is_symlink() or not (p.is_dir() or (p.is_file() and p.stat().st_size < 2**24))
        }

    shutil.copytree(inputs, to, dirs_exist_ok=True, ignore=unfit)
    (to / "failure.txt").write_text(str(failure), errors="backslashreplace")


def tried(work: Mapping[str, Sequence[int]], folder: Path) -> list[Tried]:
    """Try inputs on readers, in one process; one that crashes or hangs is a failure, and the others go on in another.

    Args:
        work: name in `READERS` -> numbers of the inputs.
        folder: to work in; the files of inputs that fail are in `failures` below it.
    """
    kept, notes = folder / "failures", folder / "notes.jsonl"
    kept.mkdir(parents=True)
    notes.touch()
    left = [(reader, number) for reader, numbers in work.items() for number in numbers]
    while left:
        at: Any = FORKS.Value("q", -1)
        process = FORKS.Process(target=_child, args=(left, folder / "in", kept, at, notes))
        process.start()
        ended = _watch(process, at)
        if process.exitcode == 0:
            break
        assert at.value >= 0, "a reader cannot be prepared"
        failure = Failure(*left[at.value], ended or f"the process died with code {process.exitcode}")
        _keep(folder / "in" / "case", kept, failure)
        row = {"reader": failure.reader, "number": failure.number, "refused": False, "seconds": 0.0, "peak": 0}
        with notes.open("a") as file:
            file.write(json.dumps({**row, "failure": vars(failure)}) + "\n")
        left = left[at.value + 1 :]
    found = {reader: Tried(reader) for reader in work}
    for row in map(json.loads, notes.read_text().splitlines()):
        one = found[row["reader"]]
        one.inputs += 1
        one.refused += row["refused"]
        one.seconds += row["seconds"]
        one.slowest = max(one.slowest, (row["seconds"], row["number"]))
        one.memory = max(one.memory, (row["peak"], row["number"]))
        if "failure" in row:
            one.failures.append(Failure(**row["failure"]))
    return list(found.values())


def _watch(process: Any, at: Any) -> str:
    """Wait for a process to end; end it where an input takes too long, and say so."""
    place, since = at.value, time.monotonic()
    while process.is_alive():
        process.join(0.2)
        if at.value != place:
            place, since = at.value, time.monotonic()
        elif time.monotonic() - since > SECONDS:
            process.kill()
            process.join()
            return f"took more than {SECONDS} s"
    return ""


def kinds(failures: Sequence[Failure]) -> Mapping[str, list[Failure]]:
    """Sort failures by what and where; the text of numbers aside."""
    found: dict[str, list[Failure]] = {}
    for failure in failures:
        name = failure.what.partition(":")[0]
        found.setdefault(f"{failure.reader.partition(' ')[0]} | {name} | {failure.where}", []).append(failure)
    return found


def described(results: Sequence[Tried]) -> str:
    """Return what to print of results: a line each, the sum, and one failure of each kind, whole."""
    lines = [f"seed {SEED}", *map(str, results)]
    lines.append(f"{sum(found.inputs for found in results)} bad inputs in {sum(f.seconds for f in results):.0f} s")
    failures = [failure for found in results for failure in found.failures]
    groups = kinds(failures)
    counts = Counter({name: len(group) for name, group in groups.items()})
    for name, count in counts.most_common():
        numbers = " ".join(str(failure.number) for failure in groups[name][:8])
        lines.append(f"\n=== {count} x {name}\n    numbers {numbers}\n{groups[name][0]}")
    return "\n".join(lines)
