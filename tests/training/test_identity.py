"""A run that goes on compares what decides its result: weights, data, libraries; what is different is named truly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import runs
from tiers import mostly_slow
from training.test_resume import start
from upop import sources
from upop.errors import SettingError
from upop.report.run import read_run
from upop.runs.verbs import compress
from upop.settings import read_settings
from upop.sources import Sources, differences, digests_of
from upop.tasks import find_task


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a dense model, settings, and a run that was killed in its search."""
    folder = tmp_path_factory.mktemp("stopped")
    config = runs.make_task("nlvr", folder)
    process = start("nlvr", config, folder / "run", kill_at=40)
    process.join()
    assert list((folder / "run" / "checkpoints").glob("*.pt"))
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    """All of it elsewhere, with other times; settings name the new places."""
    folder = tmp_path / "moved"
    shutil.copytree(stopped, folder, copy_function=shutil.copyfile)
    text = (folder / "nlvr.yaml").read_text()
    (folder / "nlvr.yaml").write_text(text.replace(str(stopped), str(folder)))
    return folder


def go_on(folder: Path, **settings: Any) -> Any:
    return compress(*runs.nlvr(folder / "nlvr.yaml", output_dir=folder / "run", resume="must", **settings))


def test_moved_and_touched_files_are_the_same(copied: Path) -> None:
    assert go_on(copied) is not None
    assert "changes" not in json.loads((copied / "run" / "versions.json").read_text())


def _other_weight(folder: Path) -> None:
    path = folder / "dense" / "model.safetensors"
    state = load_file(path)
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, path)


def _other_label(folder: Path) -> None:
    path = folder / "data" / "annotation" / "nlvr_train.json"
    samples = json.loads(path.read_text())
    samples[0]["label"] = {"True": "False", "False": "True"}[samples[0]["label"]]
    path.write_text(json.dumps(samples))


def _other_pixels(folder: Path) -> None:
    sample = json.loads((folder / "data" / "annotation" / "nlvr_dev.json").read_text())[0]
    path = next((folder / "data").rglob(Path(sample["images"][0]).name))
    Image.open(path).rotate(90).save(path)


def _other_word(folder: Path) -> None:
    path = next(path for path in (folder / "data").rglob("vocab.txt"))
    path.write_text(path.read_text().rstrip("\n") + "\nsomething\n")


@pytest.mark.parametrize(
    ("change", "described"),
    [
        (_other_weight, ["pretrained: the content of its files has changed"]),
        (_other_label, ["the train data: the content of the annotation file nlvr_train.json changed"]),
        (_other_pixels, ["of images changed"]),
        (_other_word, ["tokenizer: the content of its files has changed"]),
        (lambda folder: (_other_weight(folder), _other_label(folder)), ["pretrained: ", "nlvr_train.json"]),
    ],
    ids=["weights", "labels", "pixels", "words", "both"],
)
def test_what_is_different_is_named_and_refused(
    copied: Path, change: Callable[[Path], Any], described: list[str]
) -> None:
    change(copied)
    before = (copied / "run" / "versions.json").read_bytes()
    with pytest.raises(SettingError, match=r"resumed.*changed(.|\n)*--allow-changes") as caught:
        go_on(copied)
    lines = str(caught.value).splitlines()[1:-1]
    assert all(any(words in line for line in lines) for words in described), lines
    assert ("pretrained" in str(caught.value)) == any("pretrained" in words for words in described)
    assert (copied / "run" / "versions.json").read_bytes() == before


def test_other_libraries_are_named_refused_or_allowed_and_noted(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == "timm" else version(name))
    with pytest.raises(SettingError, match=rf"timm was {version('timm')} and is 0\.0\.1"):
        go_on(copied)
    go_on(copied, allow_changes=True)
    noted = json.loads((copied / "run" / "versions.json").read_text())["changes"]
    assert [set(each) for each in noted] == [{"step", "changed"}]
    change = f"timm was {version('timm')} and is 0.0.1"
    assert noted[0]["changed"] == [change]
    assert change in (copied / "run" / "best" / "README.md").read_text()
    assert any(change in note for note in read_run(copied / "run").missing)


def test_large_sets_go_by_names_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ_WHOLE", 10)
    files = {name: tmp_path / name for name in ("a.png", "b.png")}
    for path in files.values():
        path.write_bytes(b"0123456789")
    before = digests_of(Sources((), files))
    assert before["contents"] is None
    os.utime(files["a.png"], (1, 1))
    described, notes = differences(before, digests_of(Sources((), files)), "train")
    assert not described and "times of image files changed" in notes[0]
    files["a.png"].write_bytes(b"01234567890")
    assert differences(before, digests_of(Sources((), files)), "train")[0] == [
        "the train data: file sizes of images changed"
    ]
    files["c.png"] = tmp_path / "c.png"
    files["c.png"].write_bytes(b"")
    assert "there were 2, and are 3" in differences(before, digests_of(Sources((), files)), "train")[0][0]


@pytest.mark.parametrize("name", mostly_slow(sorted(runs.TINY), "nlvr", "classification", "retrieval-clip"))
def test_every_task_says_what_it_reads(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    settings = read_settings(task.settings, runs.make_task(name, tmp_path), {})
    for split in ("train", *task.evaluated(settings)):
        read = task.dataset(settings, split).sources()  # type: ignore[attr-defined]
        assert read.images
        assert all(path.is_file() and not Path(image).is_absolute() for image, path in read.images.items())
        assert all(path.is_file() for path in read.annotations)
        assert read.annotations or name in ("classification", "segmentation")


@pytest.mark.parametrize("kind", ["a named pipe", "a device"])
def test_what_is_no_file_is_not_read_for_its_digest(kind: str, tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    if kind == "a device":
        image.symlink_to("/dev/zero")
    else:
        os.mkfifo(image)
    found = digests_of(Sources((), {"0.png": image}))  # without an end, or for ever, if it were read
    assert found["images"] == 1
    with pytest.raises(ValueError, match=f"it is {kind}, not a file"):
        sources.file_digest(image)
