"""Files and folders take the place of others whole or not at all, and never of what upop did not write."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import upop.files
from together import run_code, start_code
from upop.errors import RunFolderError
from upop.files import remove_folder, remove_parts, replacing_file, replacing_folder, rewrite_text, write_text
from upop.ownership import MARKER
from upop.processes import ProcessId
from upop.shared_folder import SharedFolder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every entry with what it holds; links by where they lead."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = str(path.readlink()) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
    return found


def write_model(folder: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with replacing_folder(folder, "model", overwrite=overwrite) as fresh:
        (fresh / "weights").write_text(text)
        (fresh / "deep").mkdir()
        (fresh / "deep" / "config").write_text(text)


@pytest.fixture(params=["exchanged", "moved aside"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As Linux has it, and as where the system has no other rename than the oldest one."""
    if request.param == "moved aside":
        monkeypatch.setattr("upop.files._renameat2", lambda *_: 38)
    return str(request.param)


# Whole folders ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("file_system")
def test_a_folder_that_upop_wrote_is_replaced_whole(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    before = names(tmp_path)
    write_model(tmp_path / "model")
    assert (tmp_path / "model" / "deep" / "config").read_text() == "new"
    assert names(tmp_path) == before == ["model", f"model/{MARKER}", "model/deep", "model/deep/config", "model/weights"]


def add_file(folder: Path) -> None:
    (folder / "deep" / "thesis.tex").write_text("three years of work")


def add_hidden(folder: Path) -> None:
    (folder / ".notes").write_text("mine")


def add_folder(folder: Path) -> None:
    (folder / "drafts").mkdir()


def add_link(folder: Path) -> None:
    (folder / "weights").rename(folder.parent / "elsewhere")
    (folder / "weights").symlink_to(folder.parent / "elsewhere")


def spoil_marker(folder: Path) -> None:
    (folder / MARKER).write_text("[" * 100_000)


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file": (add_file, r"deep/thesis\.tex"),
    "a hidden file": (add_hidden, r"\.notes"),
    "an empty folder": (add_folder, "drafts/"),
    "a link in the place of a file": (add_link, "weights"),
    "a marker that is none": (spoil_marker, "deep, weights"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_with_anything_of_others_is_refused(what: str, overwrite: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    add, described = FOREIGN[what]
    add(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match=f"upop did not write.*: .*{described}.*Nothing was changed"):
        write_model(tmp_path / "model", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_changed_file_is_replaced_only_if_that_is_meant(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    (tmp_path / "model" / "weights").write_text("odd")  # of the same size
    with pytest.raises(RunFolderError, match=r"changed since upop wrote them: weights.*--overwrite"):
        write_model(tmp_path / "model")
    write_model(tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing of the older one stays beside
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_a_folder_of_another_kind_is_replaced_only_if_that_is_meant(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    with (
        pytest.raises(RunFolderError, match="exported graphs"),
        replacing_folder(tmp_path / "model", "graphs"),
    ):
        raise AssertionError("nothing is computed before it is refused")
    with replacing_folder(tmp_path / "model", "graphs", overwrite=True) as fresh:
        (fresh / "graph").write_text("new")
    assert names(tmp_path / "model") == [MARKER, "graph"]
    SharedFolder(tmp_path / "run", "run").claim("notes").write_text("1")
    with pytest.raises(RunFolderError, match=r"run of upop.*notes"):
        write_model(tmp_path / "run", overwrite=True)


def test_a_copy_of_a_folder_is_ours_too(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    subprocess.run(["cp", "-r", tmp_path / "model", tmp_path / "copy"], check=True)
    write_model(tmp_path / "copy")
    assert (tmp_path / "copy" / "weights").read_text() == "new"


def test_a_link_to_a_folder_is_followed_and_stays(tmp_path: Path) -> None:
    write_model(tmp_path / "disk" / "model", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    write_model(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model" / "weights").read_text() == "new"
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"nowhere .*a link to .*gone"):
        write_model(tmp_path / "nowhere")
    assert names(tmp_path / "disk") == ["model", f"model/{MARKER}", "model/deep", "model/deep/config", "model/weights"]


def test_a_file_a_pipe_and_the_working_directory_are_no_folders_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\n")
    os.mkfifo(tmp_path / "pipe")
    write_model(tmp_path / "model", "old")
    before = names(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match=r"a file of 14 bytes, which begins 'image,caption\\n', of that name"):
            write_model(tmp_path / "captions.csv", overwrite=overwrite)
        with pytest.raises(RunFolderError, match="a pipe or a socket"):
            write_model(tmp_path / "pipe", overwrite=overwrite)
    monkeypatch.chdir(tmp_path / "model" / "deep")
    for place in (Path(), Path(".."), tmp_path / "model"):
        with pytest.raises(RunFolderError, match=r"upop did not write|it is the working directory"):
            write_model(place)
    for place in (Path("/"), Path.home()):
        with pytest.raises(RunFolderError, match="already exists"):
            write_model(place, overwrite=True)
    assert names(tmp_path) == before
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_an_empty_folder_is_filled_and_the_last_entry_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    before, order = folder.stat().st_ino, []
    rename = upop.files._rename_new

    def watch(source: Path, target: Path) -> None:
        order.append(source.name)
        rename(source, target)

    monkeypatch.setattr("upop.files._rename_new", watch)
    with replacing_folder(folder, last="b") as new:
        for name in "abcdefgh":
            (new / name).write_text(name)
    assert sorted(order) == list("abcdefgh")
    assert order[-1] == "b"
    assert names(tmp_path) == ["data", *(f"data/{name}" for name in "abcdefgh")]
    assert folder.stat().st_ino == before
    with pytest.raises(RunFolderError, match=r"did not write.*: a, b, c"), replacing_folder(folder):
        pass  # without a marker nothing is replaced


def test_the_working_directory_can_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path())
    assert names(tmp_path) == [MARKER, "deep", "deep/config", "weights"]


def test_a_folder_goes_if_it_is_ours_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    remove_folder(tmp_path / "model", "model")
    remove_folder(tmp_path / "model", "model")
    assert names(tmp_path) == []
    write_model(tmp_path / "model")
    add_file(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match=r"deep/thesis\.tex"):
        remove_folder(tmp_path / "model", "model")
    assert contents(tmp_path) == before


def test_a_file_of_a_folder_is_written_anew_unless_it_was_changed(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rewrite_text(tmp_path / "model", "weights", "newer")
    write_model(tmp_path / "model")  # still ours alone
    (tmp_path / "model" / "weights").write_text("mine")
    with pytest.raises(RunFolderError, match="was not written by upop"):
        rewrite_text(tmp_path / "model", "weights", "newer")
    assert (tmp_path / "model" / "weights").read_text() == "mine"


# Races and errors ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("file_system")
def test_what_comes_while_a_folder_is_written_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    with (
        pytest.raises(RunFolderError, match="changed by another process"),
        replacing_folder(tmp_path / "model", "model") as fresh,
    ):
        (fresh / "weights").write_text("new")
        (tmp_path / "model" / "late").write_text("mine")
    assert (tmp_path / "model" / "late").read_text() == "mine"
    assert (tmp_path / "model" / "weights").read_text() == "old"
    with pytest.raises(RunFolderError, match="File exists"), replacing_folder(tmp_path / "other", "model") as fresh:
        (fresh / "weights").write_text("new")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "late").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="File exists"), replacing_folder(tmp_path / "empty", "model") as fresh:
        (fresh / "weights").write_text("new")
        (tmp_path / "empty" / "weights").write_text("mine")
    assert names(tmp_path / "other") == ["late"]
    assert contents(tmp_path / "empty") == {"weights": b"mine"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("file_system")
def test_what_comes_while_a_file_is_written_is_kept(tmp_path: Path) -> None:
    for there in (False, True):
        path = tmp_path / f"page {there}"
        if there:
            path.write_text("ours")
        with (
            pytest.raises(RunFolderError, match=r"File exists|changed by another process"),
            replacing_file(path, replace=True) as part,
        ):
            part.write_text("new")
            path.unlink(missing_ok=True)
            path.write_text("mine, and longer")
        assert path.read_text() == "mine, and longer"
    assert names(tmp_path) == ["page False", "page True"]


def test_a_folder_that_cannot_be_replaced_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", "old")
    before = contents(tmp_path)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "new" and target.name == "model":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("upop.files._renameat2", lambda *_: 38)  # as where the file system cannot swap two folders
    with pytest.raises(RunFolderError, match=r"model cannot be written: Permission denied\. What was there .* is kept"):
        write_model(tmp_path / "model")
    assert contents(tmp_path) == before


def test_an_error_in_between_leaves_all_as_it_was(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    write_text(tmp_path / "page", "old")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "model", "model") as fresh:
        (fresh / "weights").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="mine"), replacing_file(tmp_path / "page", replace=True) as part:
        part.write_text("half")
        raise ValueError("mine")
    assert contents(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_whatever_the_writer_raises(small_disk: Path) -> None:
    tensors = {"model": torch.ones(200_000)}
    with replacing_file(small_disk / "step.pt") as part:
        torch.save({"model": torch.ones(10)}, part)
    before = contents(small_disk)
    described = r"step\.pt cannot be written: No space left on device\. What was there before is kept\. Free some space"
    with pytest.raises(RunFolderError, match=described), replacing_file(small_disk / "step.pt", replace=True) as part:
        torch.save(tensors, part)  # a RuntimeError
    with pytest.raises(RunFolderError, match="No space left on device"):
        upop.save(torch.nn.TransformerEncoderLayer(128, 2, 1024), small_disk / "model")  # safetensors' own error
    with pytest.raises(RunFolderError, match=r"new\.txt cannot be written: No space left on device"):
        write_text(small_disk / "new.txt", "long " * 100_000)
    assert contents(small_disk) == before
    gc.collect()  # files of writers that failed are open until then
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RunFolderError, match="Read-only file system"):
        write_text(small_disk / "new.txt", "short")


_LIMITED = """
import resource, sys, torch
from pathlib import Path
from upop.errors import RunFolderError
from upop.files import replacing_file
folder = Path(sys.argv[1])
kind = getattr(resource, sys.argv[2])
resource.setrlimit(kind, (int(sys.argv[3]), resource.getrlimit(kind)[1]))
held = []
try:
    with replacing_file(folder / "step.pt") as part:
        if sys.argv[2] == "RLIMIT_NOFILE":
            while True:
                try:
                    held.append(open("/dev/null"))
                except OSError:
                    break
        torch.save({"model": torch.ones(2_000_000)}, part)
except RunFolderError as error:
    del held
    Path(sys.argv[4]).write_text(str(error))
"""


@pytest.mark.parametrize(
    ("limit", "value", "described"),
    [
        ("RLIMIT_FSIZE", 500_000, r"File too large.*ulimit -f"),
        ("RLIMIT_FSIZE", 5_000_000, r"File too large, or the disk is full.*ulimit -f"),
        ("RLIMIT_NOFILE", 64, r"Too many open files.*ulimit -n"),
    ],
)
def test_limits_are_told(limit: str, value: int, described: str, tmp_path: Path) -> None:
    said = tmp_path.with_name(f"{tmp_path.name}-said")
    assert run_code(_LIMITED, tmp_path, limit, value, said) == 0
    assert pytest.raises(RunFolderError, match=described).matches(RunFolderError(said.read_text())), said.read_text()
    assert names(tmp_path) == []


# Single files ----------------------------------------------------------------------------------------------------


def test_a_file_of_others_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>mine</p>")
    described = r"page\.html already exists: a file of 11 bytes, which begins '<p>mine</p>', that upop did not write"
    with pytest.raises(RunFolderError, match=described):
        write_text(page, "new")
    with pytest.raises(RunFolderError, match=described):
        write_text(page, "new", lambda path: "ours" in path.read_text())
    assert page.read_text() == "<p>mine</p>"
    write_text(page, "ours", replace=True)
    write_text(page, "ours again", lambda path: "ours" in path.read_text())
    assert names(tmp_path) == ["page.html"]


def test_links_and_folders_are_no_files_to_replace(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("three years of work")
    before = contents(tmp_path)
    for name, described in (("link", "a link to 'victim'"), ("folder", r"a folder with thesis\.tex")):
        with pytest.raises(RunFolderError, match=f"a file.*{described} of that name"):
            write_text(tmp_path / name, "new", replace=True)
    assert contents(tmp_path) == before


def test_names_that_can_be_guessed_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    for name in (f".write-test-{os.getpid()}", f".page.html.{os.getpid()}.part", ".upop-.part", "written-by-upop.html"):
        (tmp_path / name).symlink_to("victim")
    before = contents(tmp_path)
    write_text(tmp_path / "page.html", "new")
    with replacing_file(tmp_path / "page.html", replace=True) as part:
        beside = part.parent.stat()
        assert stat.S_IMODE(beside.st_mode) == 0o700
        assert part.parent.parent == tmp_path
        first = part.parent.name
        part.write_text("new")
    with replacing_file(tmp_path / "page.html", replace=True) as part:
        assert part.parent.name != first
        part.write_text("new")
    assert contents(tmp_path) == {**before, "page.html": b"new"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(mask: int, tmp_path: Path) -> None:
    former = os.umask(mask)
    try:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "file").write_text("")
        with replacing_folder(tmp_path / "made", "model") as fresh:
            (fresh / "private").write_text("")
            (fresh / "private").chmod(0o600)  # as safetensors leaves it
            (fresh / "folder").mkdir(mode=0o700)
        with replacing_file(tmp_path / "file") as part:
            part.write_text("")
            part.chmod(0o600)
        upop.save(torch.nn.TransformerEncoderLayer(8, 2, 16), tmp_path / "model")
    finally:
        os.umask(former)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()} == {0o777 & ~mask}


# What killed processes leave -------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys, time
from pathlib import Path
from upop.files import replacing_file, replacing_folder
folder = Path(sys.argv[1])
with replacing_file(folder / "step.pt") as part, replacing_folder(folder / "model", "model") as fresh:
    part.write_text("half")
    (fresh / "weights").write_text("half")
    if sys.argv[2] == "aside":
        (folder / "model").rename(fresh.with_name("old"))
    (folder / sys.argv[2]).touch()
    if sys.argv[2] == "wait":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".upop-*"))


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".mail" / "new").mkdir(parents=True)
    (tmp_path / ".mail" / "new" / "letter").write_text("dear ...")
    (tmp_path / ".step.pt.4711.part").write_text("another's")
    (tmp_path / ".upop-mine.part").mkdir()
    (tmp_path / ".upop-mine.part" / "thesis.tex").write_text("three years of work")
    (tmp_path / "below").mkdir()
    before = contents(tmp_path)
    for folder in (tmp_path, tmp_path / "below"):
        assert run_code(_KILLED, folder, "now") == -signal.SIGKILL
        (folder / "now").unlink()
    assert len(parts(tmp_path)) == 3
    remove_parts(tmp_path)
    assert len(parts(tmp_path / "below")) == 2  # of another folder
    remove_parts(tmp_path / "below")
    assert contents(tmp_path) == before


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    process = start_code(_KILLED, tmp_path, "wait")
    try:
        while process.is_alive() and not (tmp_path / "wait").exists():
            time.sleep(0.01)
        remove_parts(tmp_path)
        with replacing_file(tmp_path / "own") as part:
            part.write_text("")
            remove_parts(tmp_path)
        assert process.is_alive()
        assert len(parts(tmp_path)) == 2
    finally:
        process.kill()
        process.join()
    remove_parts(tmp_path)
    assert names(tmp_path) == ["own", "wait"]


def test_what_was_moved_aside_when_its_process_was_killed_comes_back(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    before = contents(tmp_path)
    assert run_code(_KILLED, tmp_path, "aside") == -signal.SIGKILL
    (tmp_path / "aside").unlink()
    assert not (tmp_path / "model").exists()
    write_text(tmp_path / "page", "")
    remove_parts(tmp_path)
    (tmp_path / "page").unlink()
    assert contents(tmp_path) == before


_FORKS = """
import os, sys, warnings
from pathlib import Path
from upop.files import replacing_file
warnings.simplefilter("ignore")  # of threads in a process that forks
with replacing_file(Path(sys.argv[1])) as part:
    part.write_text("whole")
    if not (child := os.fork()):
        sys.exit()  # unwinds the block in the child too
    os.waitpid(child, 0)
"""


def test_a_forked_process_removes_nothing_of_its_parent(tmp_path: Path) -> None:
    assert run_code(_FORKS, tmp_path / "file") == 0
    assert (tmp_path / "file").read_text() == "whole"
    assert names(tmp_path) == ["file"]


def test_processes_are_told_apart(tmp_path: Path) -> None:
    me = ProcessId.current()
    assert not me.has_ended()
    with subprocess.Popen(["sleep", "60"]) as process:
        other = me.model_copy(update={"pid": process.pid})
        assert other.has_ended()  # another process had that number, which started at another time
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        living = me.model_copy(update={"pid": process.pid, "started": ""})
        while not living.has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert living.has_ended()  # though nobody has asked for its exit code
    assert me.model_copy(update={"boot": "another"}).has_ended()
    for elsewhere in ({"host": "another", "boot": "another"}, {"namespace": "another", "pid": 2**22}):
        assert not me.model_copy(update=elsewhere).has_ended()  # nobody here can know


# Shared folders --------------------------------------------------------------------------------------------------


def test_a_shared_folder_is_refused_with_anything_of_others_but_logs(tmp_path: Path) -> None:
    run = SharedFolder(tmp_path / "run", "run", ["examples", "best"])
    run.check()  # nothing is there
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "slurm-1.out").write_text("started")
    (tmp_path / "run" / "another run").mkdir()
    (tmp_path / "run" / "another run" / "thesis.tex").write_text("three years of work")
    run.check()
    (tmp_path / "run" / "examples").mkdir()
    (tmp_path / "run" / "examples" / "mine.py").write_text("code")
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match=r"did not write: examples/\. Nothing was changed"):
        run.check()
    with pytest.raises(RunFolderError, match="examples/"):
        run.claim("results.json")
    run.remove(["examples/mine.py", "slurm-1.out"])
    assert contents(tmp_path) == before


def test_a_claimed_name_is_ours_until_it_is_removed(tmp_path: Path) -> None:
    run = SharedFolder(
        tmp_path, "run", ["best", "figures"], lambda name, path: name == "report.html" and path.read_text() == "ours"
    )
    run.claim("settings.yaml").write_text("a: 1")
    run.claim("figures/kept.png").parent.mkdir()
    (tmp_path / "figures" / "kept.png").write_text("")
    (tmp_path / "report.html").write_text("ours")
    write_model(tmp_path / "best")
    with replacing_folder(tmp_path / "onnx", "graphs") as graphs:
        (graphs / "vision.onnx").write_text("")
    run.check()
    (tmp_path / "figures" / "mine.png").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "best" / "tokenizer.json").write_text("mine")
    with pytest.raises(RunFolderError, match=r"changed: best/tokenizer\.json, figures/mine\.png, notes\.txt\. "):
        run.check()
    with pytest.raises(RunFolderError, match=r"notes\.txt already exists"):
        run.claim("notes.txt")
    run.remove(["settings.yaml", "notes.txt", "report.html", "nothing"])
    assert not (tmp_path / "settings.yaml").exists()
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "settings.yaml").write_text("mine")
    with pytest.raises(RunFolderError, match=r"settings\.yaml already exists"):
        run.claim("settings.yaml")
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "settings.yaml").read_text() == "mine"


def test_files_that_a_library_made_for_us_go_and_those_beside_them_stay(tmp_path: Path) -> None:
    (tmp_path / "upop").mkdir()
    (tmp_path / "upop" / "events.mine").write_text("mine")
    shared = SharedFolder(tmp_path, "trackers")
    before = shared.glob("upop/events.*")
    (tmp_path / "upop" / "events.ours").write_text("ours")
    shared.own(shared.glob("upop/events.*") - before)
    shared.remove(shared.glob("upop/events.*"))
    assert names(tmp_path) == [MARKER, "upop", "upop/events.mine"]
