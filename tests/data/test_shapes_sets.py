"""Every generated set with texts, whatever its task: formats, same bytes, prefix law, words, and no image twice."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from upop.cli.app import ShapesTask, app
from upop.data.text import clean_caption, clean_question
from upop.data.tokenizer import load_tokenizer
from upop.demo import FORMATS, Summary, write_shapes
from upop.demo.counting import NUMBER_WORDS
from upop.demo.vocabulary import WORDS
from upop.errors import DataError, SettingError

TASKS = tuple(task for task, layout in FORMATS.items() if layout.texts)
CAPTIONED = ("caption", "retrieval", "retrieval-flickr")
SIZE = 203

Records = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Summary]:
    folder = tmp_path_factory.mktemp("sets")
    return {task: write_shapes(task, folder / task, seed=4, size=SIZE) for task in TASKS}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(summary: Summary) -> Records:
    """All annotation files of lists of records, by name without the ending."""
    files = sorted(summary.annotation.glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files if file.stem != "answer_list"}


def of(records: Records, split: str) -> list[dict[str, Any]]:
    (found,) = (value for name, value in records.items() if split in name.split("_"))
    return found


def images_of(record: dict[str, Any]) -> list[str]:
    return record["images"] if "images" in record else [record["image"]]


def texts(record: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for field in ("sentence", "caption", "question", "answer"):
        value = record.get(field, [])
        found.extend([value] if isinstance(value, str) else value)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(
    sets: dict[str, Summary], task: str, tmp_path: Path
):
    again = write_shapes(task, tmp_path / "again", seed=4, size=SIZE)
    assert digests(again.folder) == digests(sets[task].folder)
    other = write_shapes(task, tmp_path / "other", seed=5, size=SIZE)
    mine, others = read(sets[task]), read(other)
    assert mine.keys() == others.keys()
    assert all(mine[name] != others[name] for name in mine)


@pytest.mark.parametrize("task", TASKS)
def test_a_smaller_set_is_the_beginning_of_a_larger_one(sets: dict[str, Summary], task: str, tmp_path: Path):
    small = write_shapes(task, tmp_path / "small", seed=4, size=11)
    for name, records in read(small).items():
        assert records == read(sets[task])[name][: len(records)]
    larger = digests(sets[task].folder)
    images = {name: digest for name, digest in digests(small.folder).items() if name.startswith("images")}
    assert len(images) == small.images
    assert images.items() <= larger.items()


@pytest.mark.parametrize("task", TASKS)
def test_the_summary_tells_what_is_there(sets: dict[str, Summary], task: str):
    summary = sets[task]
    found = read(summary)
    assert {split: len(of(found, split)) for split in summary.records} == summary.records
    assert summary.records["train"] == SIZE
    images = [path for path in (summary.folder / "images").rglob("*") if path.is_file()]
    assert len(images) == summary.images
    for name, value in summary.settings.items():
        assert Path(value).is_dir(), name
    with Image.open(images[0]) as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")


@pytest.mark.parametrize("task", TASKS)
def test_every_image_is_used_and_every_used_one_is_there(sets: dict[str, Summary], task: str):
    summary = sets[task]
    used = set()
    for records in read(summary).values():
        for record in records:
            roots = {"vqa": "vqa_root", "vg": "vg_root", None: "image_root"}
            root = Path(summary.settings[roots[record.get("dataset")]])
            used.update(root / image for image in images_of(record))
    assert used == {path for path in (summary.folder / "images").rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", TASKS)
def test_no_image_of_one_split_is_in_another(sets: dict[str, Summary], task: str):
    """Backgrounds and small shifts differ anyway, so this is the least; scenes are compared elsewhere."""
    where: dict[str, set[str]] = {}
    for name, records in read(sets[task]).items():
        for record in records:
            for image in images_of(record):
                where.setdefault(image, set()).add(name)
    assert all(len(splits) == 1 for splits in where.values())


@pytest.mark.parametrize("task", TASKS)
def test_all_words_are_in_the_vocabulary(sets: dict[str, Summary], task: str):
    """Digits are no words of sentences, but answers, as in VQAv2."""
    summary = sets[task]
    written = [text for records in read(summary).values() for record in records for text in texts(record)]
    answers = summary.annotation / "answer_list.json"
    written += json.loads(answers.read_text()) if answers.exists() else []
    words = {word for text in set(written) for word in re.findall(r"[^\s,?]+", text)}
    assert words <= {*WORDS, "0", "1", "2", "3", "4"}
    tokenizer = load_tokenizer(summary.settings["tokenizer"])
    tokens = {token for ids in tokenizer(sorted(set(written)))["input_ids"] for token in ids}
    assert tokenizer.unk_token_id not in tokens
    for word in words:
        assert len(tokenizer(word)["input_ids"]) == 3  # itself, between [CLS] and [SEP]


@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval", "retrieval-flickr"])
def test_single_images_have_no_left_and_right(sets: dict[str, Summary], task: str):
    for records in read(sets[task]).values():
        for record in records:
            assert not {"left", "right"} & {word for text in texts(record) for word in text.split()}


@pytest.mark.parametrize("task", TASKS)
def test_the_clean_up_leaves_texts_as_they_are(sets: dict[str, Summary], task: str):
    for records in read(sets[task]).values():
        for record in records:
            for text in texts(record):
                assert (clean_question(text, 12) if "question" in record else clean_caption(text, 22)) == text


@pytest.mark.parametrize("task", CAPTIONED)
def test_caption_files_are_in_the_published_form(sets: dict[str, Summary], task: str):
    found = read(sets[task])
    files = "flickr30k" if task == "retrieval-flickr" else "coco_karpathy"
    assert set(found) == {f"{files}_train", f"{files}_val", f"{files}_test"}
    by_image = Counter()
    for record in of(found, "train"):
        assert list(record) == ["image", "caption", "image_id"]
        assert isinstance(record["caption"], str)
        by_image[record["image"]] += 1
        if files == "coco_karpathy":
            number = int(re.fullmatch(r"train2014/COCO_train2014_(\d{12})\.png", record["image"])[1])
            assert record["image_id"] == f"coco_{number}"
        else:
            assert re.fullmatch(r"flickr30k-images/\d+\.png", record["image"])
    assert sorted(by_image.values()) == [3] + [5] * 40
    assert len({record["image_id"] for record in of(found, "train")}) == len(by_image)
    for split in ("val", "test"):
        for record in of(found, split):
            assert list(record) == ["image", "caption"]
            assert len(set(record["caption"])) == 5
    numbers = [int(re.search(r"(\d+)\.png$", record["image"])[1]) for s in ("val", "test") for record in of(found, s)]
    assert len(set(numbers)) == len(numbers)  # val and test share a folder


def test_ground_truth_is_in_cocos_form_and_says_the_same(sets: dict[str, Summary]):
    for split in ("val", "test"):
        truth = json.loads(Path(sets["caption"].settings["coco_gt_root"], f"coco_karpathy_{split}_gt.json").read_text())
        assert set(truth) == {"annotations", "images"}
        assert len({entry["id"] for entry in truth["annotations"]}) == len(truth["annotations"])
        described: dict[int, list[str]] = {entry["id"]: [] for entry in truth["images"]}
        for entry in truth["annotations"]:
            assert set(entry) == {"image_id", "caption", "id"}
            described[entry["image_id"]].append(entry["caption"])
        records = of(read(sets["caption"]), split)
        assert described == {
            int(re.search(r"(\d+)\.png$", record["image"])[1]): record["caption"] for record in records
        }


def test_question_files_are_in_the_published_form(sets: dict[str, Summary]):
    found = read(sets["vqa"])
    assert set(found) == {"vqa_train", "vqa_val", "vqa_test", "vg_qa"}
    answers = set(json.loads((sets["vqa"].annotation / "answer_list.json").read_text()))
    numbers = []
    for name in ("vqa_train", "vqa_val", "vqa_test"):
        for record in found[name]:
            fields = ["question_id", "question", "answer", "image", "dataset"]
            assert list(record) == [field for field in fields if field != "answer" or name != "vqa_test"]
            assert record["dataset"] == "vqa"
            numbers.append(record["question_id"])
            assert name == "vqa_test" or (len(record["answer"]) == 10 and set(record["answer"]) <= answers)
    assert len(set(numbers)) == len(numbers)
    for record in found["vg_qa"]:
        assert list(record) == ["image", "question", "answer", "dataset"]
        assert record["dataset"] == "vg"
        assert record["answer"] in answers


def test_annotators_mostly_agree(sets: dict[str, Summary]):
    """And where they do not, some write numbers as words or with an article, and some are wrong."""
    agreeing = []
    for record in of(read(sets["vqa"]), "train"):
        votes = Counter(record["answer"])
        agreeing.append(votes.most_common(1)[0][1])
    assert min(agreeing) >= 7
    assert 0.4 < agreeing.count(10) / len(agreeing) < 0.8
    written = {answer for record in of(read(sets["vqa"]), "train") for answer in record["answer"]}
    assert written & set(NUMBER_WORDS)
    assert any(answer.startswith("a ") for answer in written)


@pytest.mark.parametrize("task", TASKS)
def test_the_command_writes_every_set(task: str, sets: dict[str, Summary], tmp_path: Path):
    done = CliRunner().invoke(
        app, ["data", "shapes", "--task", task, "--out", str(tmp_path / "set"), "--seed", "4", "--size", str(SIZE)]
    )
    assert done.exit_code == 0, done.output
    assert f"{SIZE} train" in done.output
    assert digests(tmp_path / "set") == digests(sets[task].folder)


def test_the_command_knows_all_tasks():
    assert {task.value for task in ShapesTask} == set(FORMATS)


@pytest.mark.parametrize("task", TASKS)
def test_images_can_be_jpeg(task: str, tmp_path: Path):
    summary = write_shapes(task, tmp_path / "set", seed=1, size=4, image_size=32, image_format="jpeg")
    for records in read(summary).values():
        assert all(image.endswith(".jpg") for record in records for image in images_of(record))


def test_a_misspelt_task_gets_a_hint(tmp_path: Path):
    with pytest.raises(SettingError, match=r"'captoin' .*did you mean 'caption'.*retrieval-flickr"):
        write_shapes("captoin", tmp_path / "set", seed=1, size=4)
    assert not (tmp_path / "set").exists()


def test_sets_of_two_tasks_do_not_share_a_folder(sets: dict[str, Summary]):
    with pytest.raises(DataError, match="task 'caption', not 'retrieval'"):
        write_shapes("retrieval", sets["caption"].folder, seed=4, size=SIZE)
