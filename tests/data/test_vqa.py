"""VQA samples: what good files give, and what every way of being broken says."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from upop.data.text import tokenize
from upop.data.tokenizer import load_tokenizer
from upop.data.transforms import eval_transform
from upop.data.vqa import VqaCollator, VqaDataset, VqaTrainingDataset, read_answer_list
from upop.errors import DataError

TEN = ["red", "red", "red", "red", "red", "red", "dark red", "dark red", "dark red", "pink"]
ASKED: dict[str, Any] = {"question_id": 7, "question": "What COLOR (is it)?", "image": "a/red.png", "dataset": "vqa"}
ANSWERED: dict[str, Any] = {**ASKED, "answer": TEN}
GENOME: dict[str, Any] = {"question": "what is it?", "answer": "a square", "image": "blue.png", "dataset": "vg"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a root of images for each source: the same name shows something else in the other."""
    for source, colour, name in (("coco", "red", "a/red.png"), ("coco", "red", "blue.png"), ("vg", "blue", "blue.png")):
        path = tmp_path / source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), colour).save(path)
    return tmp_path


def roots(root: Path) -> dict[str, Path]:
    return {"vqa": root / "coco", "vg": root / "vg"}


def training(root: Path, *files: object) -> VqaTrainingDataset:
    paths = []
    for number, samples in enumerate(files):
        paths.append(root / f"train{number}.json")
        paths[-1].write_text(samples if isinstance(samples, str) else json.dumps(samples))
    return VqaTrainingDataset(paths, roots(root), eval_transform(8))


def asked(root: Path, samples: object) -> VqaDataset:
    file = root / "asked.json"
    file.write_text(samples if isinstance(samples, str) else json.dumps(samples))
    return VqaDataset(file, roots(root), eval_transform(8))


# --- good files


def test_answers_weigh_as_many_tenths_as_people_gave_them(root: Path) -> None:
    data = training(root, [ANSWERED])
    item = data[0]
    assert item["question"] == "what color is it?"
    assert dict(zip(item["answers"], item["weights"], strict=True)) == {"red": 0.6, "dark red": 0.3, "pink": 0.1}
    assert item["image"].shape == (3, 8, 8)


def test_a_visual_genome_answer_weighs_a_fifth(root: Path) -> None:
    item = training(root, [GENOME])[0]
    assert (list(item["answers"]), list(item["weights"])) == (["a square"], [0.2])


def test_files_follow_each_other_and_images_lie_under_their_own_root(root: Path) -> None:
    both = {**ANSWERED, "image": "blue.png"}
    data = training(root, [ANSWERED, both], [GENOME])
    assert len(data) == 3
    red, blue = [item["image"][0].mean() > item["image"][2].mean() for item in (data[1], data[2])]
    assert red
    assert not blue
    with pytest.raises(IndexError):
        data[3]


def test_a_root_that_no_sample_needs_may_be_missing(root: Path) -> None:
    file = root / "asked.json"
    file.write_text(json.dumps([ASKED]))
    data = VqaDataset(file, {"vqa": root / "coco", "vg": root / "nowhere"}, eval_transform(8))
    assert len(data) == 1


def test_a_file_without_answers_has_none(root: Path) -> None:
    data = asked(root, [ASKED, {**ASKED, "question_id": 2}])
    assert data.question_ids == [7, 2]
    assert data.people == []
    assert data.types == []
    assert data[1]["answers"] == ()


def test_a_file_with_answers_has_their_types(root: Path) -> None:
    people = (TEN, ["yes"] * 6 + ["no"] * 4, ["two"] * 5 + ["3"] * 5, ["2"] * 10, [""] * 3 + ["no."] * 7)
    samples = [{**ASKED, "question_id": number, "answer": answer} for number, answer in enumerate(people)]
    samples[3]["answer_type"] = "other"  # the file knows better
    data = asked(root, samples)
    assert data.types == ["other", "yes/no", "number", "other", "yes/no"]
    assert data.people == [tuple(answer) for answer in people]
    assert data[0]["answers"] == ()  # not for the model


def test_question_ids_may_be_of_any_size(root: Path) -> None:
    assert asked(root, [{**ASKED, "question_id": 10**30}, {**ASKED, "question_id": -1}]).question_ids == [10**30, -1]


def test_what_the_candidates_lack_is_counted(root: Path) -> None:
    data = training(root, [ANSWERED], [GENOME])
    assert data.outside(["RED ", "dark red", "a square", "green"]) == (1, 4, pytest.approx(0.1 / 1.2))
    assert data.outside(["red", "dark red", "pink", "a square"]) == (0, 4, 0)
    assert data.outside(["green"]) == (4, 4, 1)


def test_the_list_of_candidates(root: Path) -> None:
    file = root / "answer_list.json"
    file.write_text("\ufeff" + json.dumps(["yes", "no", "2"]))
    assert read_answer_list(file) == ("yes", "no", "2")


# --- broken files


@pytest.mark.parametrize("kind", ["training", "asked"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('[{"question": "a', "is not JSON.*truncated"),
        ("{}", r"must hold a list of samples, not \{\}"),
        ("[]", "holds no samples"),
        ("[1]", "sample 0: must be an object with named fields, not 1"),
    ],
)
def test_a_file_that_is_no_list_of_samples_is_refused(root: Path, kind: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"(train0|asked)\.json.*{message}"):
        training(root, content) if kind == "training" else asked(root, content)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"question": 5}, "'question' must be a non-empty text, not 5"),
    ({"question": "(...)"}, "'question' holds no words: '(...)'"),
    ({"dataset": "coco"}, '\'dataset\' must be the text "vqa" or "vg", not "coco"'),
    ({"dataset": "VQA"}, "'dataset' must be the text"),
    ({"dataset": None}, '\'dataset\' must be the text "vqa" or "vg", not null'),
    ({"image": "a/rad.png"}, "the image 'a/rad.png' does not exist under the image root"),
    ({"image": ["a/red.png"]}, "'image' must be a non-empty text"),
    ({"answer": "red"}, "'answer' must be a list of"),
    ({"answer": []}, "'answer' must be a list of"),
    ({"answer": ["red"] * 9 + [2]}, "'answer' must be a list of"),
    ({"answer": ["", " "] * 5}, "texts that are not all empty"),
]


@pytest.mark.parametrize(("fields", "message"), BROKEN, ids=str)
def test_a_broken_field_is_named_with_file_and_sample(root: Path, fields: dict[str, Any], message: str) -> None:
    for name, read in (
        ("train1.json", lambda samples: training(root, [ANSWERED], samples)),
        ("asked.json", lambda samples: asked(root, samples)),
    ):
        with pytest.raises(DataError) as caught:
            read([{**ANSWERED, "question_id": 1}, {**ANSWERED, **fields}])
        assert f"{name}, sample 1: " in str(caught.value)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question_id": "7"}, "'question_id' must be a whole number, not \"7\""),
        ({"question_id": True}, "'question_id' must be a whole number, not true"),
        ({"question_id": 1.5}, "'question_id' must be a whole number, not 1.5"),
        ({"question_id": 1}, "'question_id' is 1, and sample 0 has it too"),
        ({"answer": TEN[:9]}, "'answer' must be a list of 10 texts"),
        ({"answer_type": "yesno"}, '\'answer_type\' must be the text "yes/no" or "number" or "other"'),
    ],
    ids=str,
)
def test_broken_questions_to_be_answered(root: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        asked(root, [{**ANSWERED, "question_id": 1}, {**ANSWERED, **fields}])
    assert "asked.json, sample 1: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(("first", "message"), [(ANSWERED, "is missing, and the"), (ASKED, "exists, and the")])
def test_answers_for_some_questions_only_are_refused(root: Path, first: dict[str, Any], message: str) -> None:
    other = ASKED if first is ANSWERED else ANSWERED
    with pytest.raises(DataError, match=rf"asked\.json, sample 1: the field 'answer' {message}.*for none"):
        asked(root, [first, {**other, "question_id": 8}])


@pytest.mark.parametrize("name", ["question", "image", "dataset", "answer"])
def test_a_missing_field_is_named_with_the_nearest(root: Path, name: str) -> None:
    sample = {(key + "s" if key == name else key): value for key, value in ANSWERED.items()}
    with pytest.raises(DataError, match=rf"sample 1: the field '{name}' is missing \(did you mean '{name}s'\?\)"):
        training(root, [ANSWERED, sample])


def test_a_visual_genome_answer_is_one_text(root: Path) -> None:
    with pytest.raises(DataError, match=r"train0\.json, sample 1: 'answer' must be a non-empty text.*not \[\"a\"\]"):
        training(root, [GENOME, {**GENOME, "answer": ["a"]}])


def test_a_missing_image_names_the_root_of_its_source(root: Path) -> None:
    with pytest.raises(DataError, match=r"train0\.json, sample 1: the image 'a/red\.png' does not exist .*vg\."):
        training(root, [GENOME, {**GENOME, "image": "a/red.png"}])
    file = root / "train0.json"
    with pytest.raises(DataError, match=r"sample 0: the image root .*nowhere is not a folder"):
        VqaTrainingDataset([file], {"vqa": root / "coco", "vg": root / "nowhere"}, eval_transform(8))


def test_a_image_that_cannot_be_read_is_named_when_it_is_asked_for(root: Path) -> None:
    data = training(root, [ANSWERED], [GENOME, GENOME])
    (root / "vg" / "blue.png").write_bytes(b"no image")
    assert data[0]
    with pytest.raises(DataError, match=r"train1\.json, sample 1: the image .*vg.blue\.png cannot be read"):
        data[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"answer_list\.json does not exist. Ranking needs it; inference: generate"),
        ("[", r"answer_list\.json cannot be read"),
        ("[]", r"answer_list\.json must be a JSON list of texts, not \[\]"),
        ('{"yes": 1}', r"answer_list\.json must be a JSON list of texts"),
        ('["yes", 2]', r"answer_list\.json, item 1: must be a non-empty text, not 2"),
        ('["yes", " "]', r"answer_list\.json, item 1: must be a non-empty text"),
    ],
)
def test_broken_lists_of_candidates(root: Path, content: str | None, message: str) -> None:
    file = root / "answer_list.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_answer_list(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from([None, *ANSWERED, "answer_type"]), value=JSON)
def test_any_json_is_read_or_refused_by_name(root: Path, name: str | None, value: object) -> None:
    text = json.dumps(value if name is None else [{**ANSWERED, name: value}])
    for read in (training, asked):
        try:
            assert len(read(root, text)) == 1
        except DataError as error:
            assert ".json" in str(error)


# --- batches


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    words = ["what", "color", "is", "it", "?", "red", "dark", "pink", "a", "square", "yes"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return load_tokenizer(tmp_path)


def test_a_training_batch_has_the_answers_of_all_questions_in_a_row(root: Path, tokenizer: Any) -> None:
    data = training(root, [GENOME, ANSWERED])
    batch = VqaCollator(tokenizer)([data[0], data[1]])
    assert batch["images"].shape == (2, 3, 8, 8)
    assert batch["question_ids"].tolist() == [[2, 5, 7, 8, 9, 3, 0], [2, 5, 6, 7, 8, 9, 3]]
    assert batch["question_mask"].tolist() == [[1] * 6 + [0], [1] * 7]
    assert batch["answer_counts"].tolist() == [1, 3]
    assert batch["answer_ids"].tolist() == [[2, 13, 14, 3], [2, 10, 3, 0], [2, 11, 10, 3], [2, 12, 3, 0]]
    assert batch["answer_mask"].sum(1).tolist() == [4, 3, 4, 3]
    torch.testing.assert_close(batch["weights"], torch.tensor([0.2, 0.6, 0.3, 0.1]))


def test_a_batch_to_be_answered_carries_the_candidates(root: Path, tokenizer: Any) -> None:
    data = asked(root, [ANSWERED])
    candidates = tokenize(tokenizer, ["yes", "dark red"])
    batch = VqaCollator(tokenizer, candidates)([data[0]])
    assert set(batch) == {"images", "question_ids", "question_mask", "candidate_ids", "candidate_mask"}
    assert batch["candidate_ids"].tolist() == [[2, 15, 3, 0], [2, 11, 10, 3]]
    assert set(VqaCollator(tokenizer)([data[0]])) == {"images", "question_ids", "question_mask"}


def test_long_questions_are_cut(root: Path, tokenizer: Any) -> None:
    data = asked(root, [{**ASKED, "question": "what " * 60}])
    assert len(data[0]["question"].split()) == 50
    assert VqaCollator(tokenizer)([data[0]])["question_ids"].shape == (1, 35)


def test_worker_processes_can_be_given_all_of_it(root: Path, tokenizer: Any) -> None:
    data, collate = training(root, [ANSWERED], [GENOME]), VqaCollator(tokenizer, tokenize(tokenizer, ["yes"]))
    twin, as_well = pickle.loads(pickle.dumps((data, collate)))
    one, two = collate([data[0], data[1]]), as_well([twin[0], twin[1]])
    assert all(torch.equal(one[key], two[key]) for key in one)
