"""Runs that do without some unreadable images: scores as if those samples were not there, and all files told once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from tiers import mostly_slow
from together import run_together
from training.bad_images_ranks import refused_alike, tolerant
from upop.errors import BadImageError, DataError, RunFolderError
from upop.runs.folder import RunFolder
from upop.runs.verbs import compress, evaluate_checkpoint, train
from upop.settings import read_settings
from upop.tasks import find_task

_ANNOTATED = {
    "caption": "coco_karpathy_test.json",
    "nlvr": "nlvr_test.json",
    "retrieval": "coco_karpathy_test.json",
    "retrieval-clip": "coco_karpathy_test.json",
    "vqa": "vqa_val.json",
}


def annotations(config: Path, name: str) -> Path:
    return Path(yaml.safe_load(config.read_text())["ann_root"]) / name


def named(sample: dict[str, Any]) -> list[str]:
    """The images of a sample."""
    return sample["images"] if "images" in sample else [sample["image"]]


def image_files(config: Path, task: str, split: str) -> list[Path]:
    """The image files of a split, in order."""
    settings = yaml.safe_load(config.read_text())
    if task == "classification":
        return sorted((Path(settings["data_path"]) / split).rglob("*.png"))
    return sorted(find_task(task).settings(**settings).root.glob(f"images/{split}/*.png"))


def shorten(config: Path) -> None:
    """Leave 30 samples in every file to evaluate on."""
    for pattern in ("*_val.json", "*_dev.json", "*_test.json"):
        for file in annotations(config, "").glob(pattern):
            file.write_text(json.dumps(json.loads(file.read_text())[:30]))


def spoil(*files: Path) -> None:
    """Cut files in half."""
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoiled_test(task: str, config: Path) -> tuple[list[Path], Callable[[], None]]:
    """Spoil two images of what is evaluated; return them, and what takes their samples away."""
    settings = yaml.safe_load(config.read_text())
    if task in _ANNOTATED:
        file = annotations(config, _ANNOTATED[task])
        samples = json.loads(file.read_text())
        images = [named(samples[number])[-1] for number in (3, 20)]
        root = Path(settings.get("image_root") or settings["vqa_root"])
        kept = [sample for sample in samples if not set(named(sample)) & set(images)]
        return [root / image for image in images], lambda: file.write_text(json.dumps(kept)) and None
    if task == "classification":
        found = [image_files(config, task, "test")[number] for number in (3, 20)]
        return found, lambda: [file.unlink() for file in found] and None
    shown = [image_files(config, task, "validation")[number] for number in (3, 20)]
    maps = [Path(str(file).replace("/images/", "/annotations/")) for file in shown]
    # One image, and one label map.
    return [shown[0], maps[1]], lambda: [file.unlink() for file in (*shown, *maps)] and None


def scores(task: str, config: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    found = find_task(task)
    results = evaluate_checkpoint(found, read_settings(found.settings, config, {"output_dir": folder, **overrides}))
    assert results is not None
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("task", mostly_slow(sorted(runs.TINY), "classification", "nlvr", "segmentation"))
def test_scores_are_those_without_the_samples(task: str, tmp_path: Path) -> None:
    config = runs.make_task(task, tmp_path)
    if task in _ANNOTATED:
        shorten(config)
    if task == "vqa":
        config = runs.edited(config, {"test_file": None})
    bad, take_away = spoiled_test(task, config)
    spoil(*bad)
    found = scores(task, config, tmp_path / "found", skip_bad_images=2, num_workers=2)
    rows = json.loads((tmp_path / "found" / "bad_images.json").read_text())
    assert sorted(row["image"] for row in rows) == sorted(map(str, bad))
    assert all(row["reason"] and row["file"] and row["sample"] >= 0 for row in rows)
    take_away()
    wanted = scores(task, config, tmp_path / "wanted")
    last = find_task(task).splits["val" if task in ("vqa", "segmentation") else "test"]
    assert list(found["left_out"]) == [last] and not wanted["left_out"]
    few, of = found["left_out"][last]
    assert 2 <= few < of
    for split, metrics in wanted["models"][0]["metrics"].items():
        assert found["models"][0]["metrics"][split] == pytest.approx(metrics, abs=1e-4)
    for file in (tmp_path / "wanted").glob("result/*.json"):
        assert json.loads((tmp_path / "found" / "result" / file.name).read_text()) == json.loads(file.read_text())


@pytest.fixture
def spoiled(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Settings of NLVR, and three spoiled images: two of the training split, and one of the dev split."""
    config = runs.make_task("nlvr", tmp_path, max_epoch=1)
    shorten(config)
    root = Path(yaml.safe_load(config.read_text())["image_root"])
    train_samples = json.loads(annotations(config, "nlvr_train.json").read_text())
    dev_samples = json.loads(annotations(config, "nlvr_dev.json").read_text())
    images = train_samples[4]["images"][0], train_samples[5]["images"][1], dev_samples[7]["images"][0]
    bad = [root / image for image in images]
    spoil(*bad)
    return config, bad


@pytest.mark.slow
def test_training_goes_on_with_other_samples(spoiled: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The next readable ones, whatever the number of workers; so that the losses are those of such a file."""
    config, bad = spoiled
    losses = {}
    for workers in (0, 2):
        train(*runs.nlvr(config, output_dir=tmp_path / f"{workers}", skip_bad_images=3, num_workers=workers))
        losses[workers] = [row["loss"] for row in runs.rows(tmp_path / f"{workers}") if "loss" in row]
        rows = json.loads((tmp_path / f"{workers}" / "bad_images.json").read_text())
        assert {row["image"] for row in rows} == set(map(str, bad)) and len(rows) == 3
    file = annotations(config, "nlvr_train.json")
    samples = json.loads(file.read_text())
    samples[4] = samples[5] = samples[6]
    file.write_text(json.dumps(samples))
    train(*runs.nlvr(config, output_dir=tmp_path / "replaced", skip_bad_images=3))
    losses[-1] = [row["loss"] for row in runs.rows(tmp_path / "replaced") if "loss" in row]
    assert losses[0] == losses[2] == losses[-1]
    assert len(losses[0]) == 4


@pytest.mark.parametrize("workers", mostly_slow([0, 2], 0))
def test_one_more_stops_the_run(
    spoiled: tuple[Path, list[Path]], tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config, bad = spoiled
    with pytest.raises(DataError, match="unreadable file number 3, and skip_bad_images is 2") as caught:
        compress(*runs.nlvr(config, output_dir=tmp_path / "run", skip_bad_images=2, num_workers=workers))
    assert all(str(image) in str(caught.value) for image in bad)
    printed = capsys.readouterr().out.replace("\n", "")
    assert "unreadable image file 1, of at most 2" in printed and bad[2].name in printed
    assert "unreadable image file 2, of at most 2" in printed
    assert len(json.loads((tmp_path / "run" / "bad_images.json").read_text())) == 3


@pytest.mark.parametrize("workers", mostly_slow([0, 2], 0))
def test_the_first_one_stops_a_run_that_tolerates_none(
    spoiled: tuple[Path, list[Path]], tmp_path: Path, workers: int
) -> None:
    config, bad = spoiled
    with pytest.raises(BadImageError, match=f"{bad[2]} cannot be read"):
        compress(*runs.nlvr(config, output_dir=tmp_path / "run", num_workers=workers))


def test_where_no_sample_can_be_read(tmp_path: Path) -> None:
    config = runs.make_task("nlvr", tmp_path)
    root = Path(yaml.safe_load(config.read_text())["image_root"])
    files = sorted(root.rglob("*.png"))
    spoil(*files)
    with pytest.raises(DataError, match=r"No image|can be scored|unreadable file number"):
        evaluate_checkpoint(*runs.nlvr(config, output_dir=tmp_path / "run", skip_bad_images=len(files)))


def test_a_resumed_run_remembers_them(spoiled: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A file that is repaired after a run was stopped still counts among those that were met."""
    config, bad = spoiled
    with pytest.raises(DataError, match="skip_bad_images is 2"):
        train(*runs.nlvr(config, output_dir=tmp_path / "run", skip_bad_images=2, checkpoint_minutes=0, seed=1))
    results = train(
        *runs.nlvr(config, output_dir=tmp_path / "run", skip_bad_images=3, checkpoint_minutes=0, seed=1, resume="auto")
    )
    assert results is not None
    rows = json.loads((tmp_path / "run" / "bad_images.json").read_text())
    assert sorted(row["image"] for row in rows) == sorted(map(str, bad))
    wanted = train(*runs.nlvr(config, output_dir=tmp_path / "at once", skip_bad_images=3, seed=1))
    assert wanted is not None
    assert results.models[0].metrics == wanted.models[0].metrics


@pytest.mark.slow
def test_two_processes_are_one(spoiled: tuple[Path, list[Path]], tmp_path: Path) -> None:
    config, bad = spoiled
    tolerant("nlvr", config, {"output_dir": tmp_path / "one", "skip_bad_images": 3}, "compress")
    two = runs.edited(config, {"batch_size_train": 8, "batch_size_test": 7})
    run_together(tolerant, "nlvr", two, {"output_dir": tmp_path / "two", "skip_bad_images": 3}, "compress")
    one, both = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    dev = json.loads(annotations(config, "nlvr_dev.json").read_text())
    left_out = sum(bad[2].name == Path(image).name for sample in dev for image in sample["images"])
    assert one["left_out"] == both["left_out"] == {"dev": [left_out, 30]}
    assert [model["metrics"] for model in one["models"]] == [model["metrics"] for model in both["models"]]
    described = [json.loads((tmp_path / name / "bad_images.json").read_text()) for name in ("one", "two")]
    assert sorted(described[0], key=str) == sorted(described[1], key=str)
    run_together(refused_alike, two, tmp_path / "refused")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "segmentation"])
def test_two_processes_score_as_one(task: str, tmp_path: Path) -> None:
    """The tasks that gather in their own ways."""
    config = runs.make_task(task, tmp_path)
    if task == "retrieval":
        shorten(config)
    spoil(*spoiled_test(task, config)[0])
    shared = {"skip_bad_images": 2, "batch_size_test": 7}
    tolerant(task, config, {"output_dir": tmp_path / "one", **shared})
    run_together(tolerant, task, config, {"output_dir": tmp_path / "two", **shared})
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["left_out"] == two["left_out"] and one["left_out"]
    for split, metrics in one["models"][0]["metrics"].items():
        assert two["models"][0]["metrics"][split] == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"image": "a.png"}]', "[" * 9999])
def test_a_damaged_list_of_unreadable_files_is_named(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path / "run", main=True)
    try:
        assert folder.bad_images() == []
        (tmp_path / "run" / "bad_images.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"bad_images\.json .*restore it"):
            folder.bad_images()
        assert folder.metrics() == []
        (tmp_path / "run" / "metrics.jsonl").mkdir()
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be read: .*(folder|directory)"):
            folder.metrics()
    finally:
        folder.close()
