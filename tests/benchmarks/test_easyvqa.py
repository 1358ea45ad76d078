"""easy-VQA in the published files of question answering: upop reads what is written, and no image is in two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from upop.data.vqa import VqaDataset, VqaTrainingDataset, read_answer_list
from upop.errors import RunFolderError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder laid out as the package's, with 20 training images of two questions each, and 3 test images."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    folder = tmp_path / "easy_vqa"
    for split, count in (("train", 20), ("test", 3)):
        place = folder / "data" / split
        (place / "images").mkdir(parents=True)
        rows: list[Any] = []
        for number in range(count):
            Image.new("RGB", (64, 64), (number, 0, 0)).save(place / "images" / f"{number}.png")
            rows += [["What color is the shape?", "red", number], ["Is there a circle?", "no", number]]
        (place / "questions.json").write_text(json.dumps(rows))
    (folder / "data" / "answers.txt").write_text("red\nyes\nno\n")
    return folder


def test_upop_reads_what_is_written(package: Path, tmp_path: Path) -> None:
    from real.easyvqa import write
    from upop.settings import read_settings
    from upop.tasks import find_task

    out = tmp_path / "out"
    assert write(package, out) == {"vqa_train": 36, "vqa_val": 4, "vqa_test": 6}
    assert write(package, out)["vqa_train"] == 36  # the same again
    task = find_task("vqa")
    settings: Any = read_settings(task.settings, out / "vqa.yaml", {})
    assert task.evaluated(settings) == ("val", "test")
    train, val, test = (task.dataset(settings, split) for split in ("train", "val", "test"))
    assert isinstance(train, VqaTrainingDataset)
    assert isinstance(val, VqaDataset)
    assert isinstance(test, VqaDataset)
    assert train[0]["answers"] == ("red",)
    assert train[0]["weights"] == (1.0,)
    assert train[0]["image"].shape == (3, 64, 64)
    assert test.people[:2] == [("red",) * 10, ("no",) * 10]
    assert read_answer_list(settings.answer_list) == ("red", "yes", "no")
    seen, held = (
        {sample["image"] for sample in json.loads((out / "annotation" / f"vqa_{name}.json").read_text())}
        for name in ("train", "val")
    )
    assert len(held) == 2
    assert not seen & held


def test_files_of_others_are_not_replaced(package: Path, tmp_path: Path) -> None:
    from real.easyvqa import write

    (tmp_path / "vqa.yaml").write_text(yaml.safe_dump({"mine": True}))
    with pytest.raises(RunFolderError):
        write(package, tmp_path)
    assert yaml.safe_load((tmp_path / "vqa.yaml").read_text()) == {"mine": True}
