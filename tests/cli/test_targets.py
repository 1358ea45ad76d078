"""A folder full of somebody's files as every kind of target: it is refused with what it holds, and stays as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import upop
from pruning.families import NLVR
from report.pages import results, write_run
from upop.checkpoints.official import save_official
from upop.cli.demo import CONFIG, DENSE
from upop.errors import RunFolderError
from upop.ownership import MARKER
from upop.runs.folder import RunFolder
from upop.tasks import find_task

Command = Callable[..., tuple[int, str]]

FILES = (
    "thesis.tex",
    "examples/mine.py",
    "best/model.bin",
    "last/notes.txt",
    "figures/kept.png",
    "result/mine.json",
    "checkpoints/step-mine.pt",
    "trackers/upop/events.out.tfevents.mine",
    "data/shapes.txt",
    ".mail/new/letter",
    ".mail/old/letter",
    ".plan.json.4711.part",
    "report.html",
    "plan.json",
)


def foreign(folder: Path) -> Path:
    """Fill a folder with files of somebody else, of names that runs and models use too."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"three years of work: {name}")
    (folder / "link").symlink_to(folder / "thesis.tex")
    (folder / "empty").mkdir()
    return folder


def held(folder: Path) -> dict[str, tuple[int, str]]:
    """Every entry of a folder with what it holds, and files with their times."""
    found = {}
    for path in folder.rglob("*"):
        place = str(path.relative_to(folder))
        if path.is_dir():
            found[place] = (0, "")
        else:
            text = str(path.readlink()) if path.is_symlink() else path.read_text()
            found[place] = (path.lstat().st_mtime_ns, text)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upop.save(NLVR.build(torch.float32), tmp_path_factory.mktemp("model") / "nlvr")


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "convert": lambda model, folder: ["convert", model, folder],
    "convert, overwriting": lambda model, folder: ["convert", model, folder, "--overwrite"],
    "convert to a file": lambda model, folder: ["convert", model, folder, "--to", "official", "--overwrite"],
    "export": lambda model, folder: ["export", model, "--out", folder],
    "export, overwriting": lambda model, folder: ["export", model, "--out", folder, "--overwrite"],
    "data": lambda model, folder: ["data", "shapes", "--out", folder, "--size", "1"],
    "train": lambda model, folder: ["train", "nlvr", "--config", CONFIG, "--output-dir", folder, "--device", "cpu"],
    "compress": lambda model, folder: [
        *("compress", "nlvr", "--config", CONFIG, "--output-dir", folder, "--device", "cpu"),
        *("--pretrained", DENSE),
    ],
    "evaluate": lambda model, folder: [
        *("evaluate", "nlvr", "--config", CONFIG, "--output-dir", folder, "--device", "cpu"),
        *("--pretrained", DENSE),
    ],
    "demo": lambda model, folder: ["demo", "--output-dir", folder, "--device", "cpu"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_folder_of_others_stays_as_it_is(what: str, model: Path, tmp_path: Path, upop_command: Command) -> None:
    folder = foreign(tmp_path / "home")
    if what == "evaluate":
        shutil.rmtree(folder / "checkpoints")  # as of a run, beside which an evaluation writes
    before = held(tmp_path)
    code, text = upop_command(*COMMANDS[what](model, folder))
    assert code == 1, text
    assert any(name in text for name in ("thesis.tex", "examples/", "best")), text
    assert "RunFolderError" in text or "DataError" in text, text
    assert held(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_library_refuses_it_too(overwrite: bool, model: Path, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "home")
    before = held(tmp_path)
    loaded = upop.load(model)
    for write in (
        lambda: upop.save(loaded, folder, overwrite=overwrite),
        lambda: upop.export(loaded, folder, "torch-export", overwrite=overwrite),
        lambda: save_official("nlvr", loaded, folder, overwrite=overwrite),
        lambda: RunFolder(folder, True).start(find_task("nlvr").settings(), "nlvr", "train"),
    ):
        with pytest.raises(RunFolderError, match=r"best|checkpoints"):
            write()
        (folder / "run.lock").unlink(missing_ok=True)  # of a run that was not closed
        assert held(tmp_path) == before


def test_a_file_of_others_is_replaced_only_if_that_is_meant(model: Path, tmp_path: Path, upop_command: Command) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", results(name="magnitude 2x"))]
    for name, words in (
        ("weights.pth", ["convert", model, tmp_path / "weights.pth"]),
        ("page.html", ["report", runs[0], "--out", tmp_path / "page.html"]),
        ("both.html", ["report", "--compare", *runs, "--out", tmp_path / "both.html"]),
    ):
        path = tmp_path / name
        path.write_text("image,caption\n")
        code, text = upop_command(*words)
        assert code == 1, text
        assert f"{path} already exists: a file of 14 bytes, which begins 'image,caption" in text
        assert path.read_text() == "image,caption\n"
        assert upop_command(*words, "--overwrite")[0] == 0
        written = path.read_bytes()
        assert upop_command(*words)[0] == 0  # it is ours by now
        assert path.read_bytes() == written
    (runs[0] / "report.html").write_text("mine")
    assert upop_command("report", runs[0])[0] == 1
    assert (runs[0] / "report.html").read_text() == "mine"


def test_a_published_file_is_no_file_of_ours(model: Path, tmp_path: Path, upop_command: Command) -> None:
    torch.save({"model": {"weight": torch.ones(1)}}, tmp_path / "model_base_nlvr.pth")
    before = (tmp_path / "model_base_nlvr.pth").read_bytes()
    assert upop_command("convert", model, tmp_path / "model_base_nlvr.pth")[0] == 1
    assert (tmp_path / "model_base_nlvr.pth").read_bytes() == before


def test_a_folder_of_upop_0_1_is_ours_until_something_is_put_into_it(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / MARKER).unlink()
    upop.save(upop.load(model), folder)
    assert (folder / MARKER).is_file()
    (folder / MARKER).unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"did not write: tokenizer\.json"):
        upop.save(upop.load(model), folder, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "upop.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(RunFolderError, match=r"did not write.*: upop\.json"):
        upop.save(upop.load(model), other)


def test_a_folder_of_logs_or_of_other_folders_takes_a_run(tmp_path: Path) -> None:
    (tmp_path / "slurm-17.out").write_text("started")
    (tmp_path / "another run").mkdir()
    (tmp_path / "another run" / "thesis.tex").write_text("three years of work")
    before = held(tmp_path)
    folder = RunFolder(tmp_path, True)
    for _ in range(2):
        folder.start(find_task("nlvr").settings(), "nlvr", "train")
        folder.save_files({"answers.json": []})
        assert before.items() <= held(tmp_path).items()
    (tmp_path / "result" / "mine.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"notes\.txt, result/mine\.json"):
        folder.start(find_task("nlvr").settings(), "nlvr", "train")
    folder.close()


def test_a_link_in_the_place_of_a_file_of_the_run_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    folder = RunFolder(tmp_path / "run", True)
    folder.start(find_task("nlvr").settings(), "nlvr", "train")
    (tmp_path / "run" / "plan.json").symlink_to(tmp_path / "victim")
    with pytest.raises(RunFolderError, match=r"plan\.json"):
        folder.claim("plan.json")
    folder.close()
    assert (tmp_path / "victim").read_text() == "precious"
