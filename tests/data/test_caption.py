"""Captioning samples: what a good file gives, and what every way of being broken says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from upop.data.caption import (
    CAPTION_TOKENS,
    IGNORED,
    CaptionCollator,
    CaptionEvalDataset,
    CaptionTrainDataset,
    read_ground_truth,
)
from upop.data.tokenizer import load_tokenizer
from upop.data.transforms import eval_transform
from upop.errors import DataError

PROMPT = "a picture of "
DESCRIBED = {"image": "a/red_007.png", "caption": "A RED square.", "image_id": "coco_7"}
SHOWN = {"image": "a/red_007.png", "caption": ["A red square.", "all  red!"]}
OTHER = {"image": "blue12.png", "caption": ["blue"]}
ANNOTATION = {"image_id": 7, "caption": "It is red.", "id": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a" / "red_007.png")
    Image.new("RGB", (20, 11), "blue").save(tmp_path / "images" / "blue12.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "images" / "blue.png")
    return tmp_path / "images"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "square", "blue"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return load_tokenizer(tmp_path)


def training(root: Path, samples: object, prompt: str = PROMPT) -> CaptionTrainDataset:
    file = root.parent / "train.json"
    file.write_text(samples if isinstance(samples, str) else json.dumps(samples))
    return CaptionTrainDataset(file, root, eval_transform(8), prompt=prompt)


def held_out(root: Path, samples: object, truth: object = None) -> CaptionEvalDataset:
    """With a ground truth file, where `truth` is its content."""
    file, ground_truth = root.parent / "val.json", root.parent / "val_gt.json"
    file.write_text(json.dumps(samples))
    if truth is not None:
        ground_truth.write_text(truth if isinstance(truth, str) else json.dumps(truth))
    return CaptionEvalDataset(file, root, eval_transform(8), ground_truth)


# --- training samples


def test_a_training_sample_is_an_image_and_a_prompted_clean_caption(root: Path) -> None:
    data = training(root, [DESCRIBED, {**DESCRIBED, "caption": "Blue; (or so)"}])
    assert len(data) == 2
    assert data[0]["caption"] == "a picture of a red square"
    assert data[-1]["caption"] == "a picture of blue or so"
    assert data[0]["image"].shape == (3, 8, 8)
    with pytest.raises(IndexError):
        data[2]


@pytest.mark.parametrize(("prompt", "found"), [("", "red"), ("seen:", "seen: red"), ("so ", "so red")])
def test_a_prompt_does_not_run_into_the_caption(root: Path, prompt: str, found: str) -> None:
    assert training(root, [{**DESCRIBED, "caption": "Red"}], prompt)[0]["caption"] == found


def test_long_captions_are_cut_to_thirty_words(root: Path) -> None:
    found = training(root, [{**DESCRIBED, "caption": "word " * 50}])[0]["caption"]
    assert found == PROMPT + " ".join(["word"] * 30)


def test_labels_are_the_words_after_the_prompt(root: Path, tokenizer: Any) -> None:
    data = training(root, [DESCRIBED, {"image": "blue12.png", "caption": "blue"}])
    batch = CaptionCollator(tokenizer, 4)([data[0], data[1]])
    assert batch["images"].shape == (2, 3, 8, 8)  # of images of two sizes
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 5, 8, 9, 3], [2, 5, 6, 7, 10, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    nothing = [IGNORED] * 4
    assert batch["labels"].tolist() == [[*nothing, 5, 8, 9, 3], [*nothing, 10, 3, IGNORED, IGNORED]]


def test_tokens_are_cut_where_the_published_code_cuts_them(root: Path, tokenizer: Any) -> None:
    data = training(root, [{**DESCRIBED, "caption": "a,a,a,a," * 30}])
    batch = CaptionCollator(tokenizer, 4)([data[0]])
    assert batch["input_ids"].shape == (1, CAPTION_TOKENS)
    assert batch["labels"][0, -1] == tokenizer.sep_token_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": ["red"]}, "sample 1: 'caption' must be a non-empty text"),
        ({"caption": None}, "sample 1: 'caption' must be a non-empty text, not null"),
        ({"caption": "..."}, "sample 1: 'caption' holds no words: \"...\""),
        ({"image": 7}, "sample 1: 'image' must be a non-empty text"),
        ({"image": "none.png"}, "sample 1: the image 'none.png' does not exist under the image root"),
    ],
    ids=str,
)
def test_broken_training_samples(root: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"train\.json") as caught:
        training(root, [DESCRIBED, {**DESCRIBED, **change}])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a', r"train\.json is not JSON.*truncated"),
        ("{}", r"train\.json must hold a list of samples"),
        ("[]", r"train\.json holds no samples"),
        ('[{"image": "a/red_007.png", "captions": "red"}]', "sample 0: the field 'caption' is missing"),
    ],
    ids=str,
)
def test_files_of_another_form(root: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        training(root, content)


def test_a_broken_image_is_named_when_it_is_read(root: Path) -> None:
    (root / "blue12.png").write_bytes(b"no image")
    described = training(root, [DESCRIBED, {**DESCRIBED, "image": "blue12.png"}])
    shown = held_out(root, [SHOWN, OTHER])
    for data, index in ((described, 1), (described, -1), (shown, 1)):
        with pytest.raises(DataError, match=r"\.json, sample 1: the image .*blue12\.png cannot be read"):
            data[index]


# --- samples to be captioned


def test_images_are_known_by_the_number_of_their_file(root: Path, tokenizer: Any) -> None:
    data = held_out(root, [SHOWN, OTHER])
    assert [data[index]["image_id"] for index in range(len(data))] == [7, 12]
    assert data.references == {7: ["A red square.", "all  red!"], 12: ["blue"]}
    batch = CaptionCollator(tokenizer, 4)([data[0], data[1]])
    assert set(batch) == {"images", "image_ids"}
    assert batch["image_ids"].tolist() == [7, 12]
    assert batch["image_ids"].dtype == torch.int64


def test_the_ground_truth_beats_the_captions_of_the_samples(root: Path) -> None:
    annotations = [ANNOTATION, {"image_id": 99, "caption": "not asked"}, {**ANNOTATION, "caption": "So red."}]
    bare = {"image": SHOWN["image"]}
    for sample in (SHOWN, bare):
        data = held_out(root, [sample], {"annotations": annotations, "images": [{"id": 7}]})
        assert data.references == {7: ["It is red.", "So red."]}


def test_a_test_split_may_have_no_captions(root: Path) -> None:
    data = held_out(root, [{"image": SHOWN["image"]}, {"image": OTHER["image"]}])
    assert data.references == {}
    assert len(data) == 2


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {**OTHER, "image": "blue.png"},
            "sample 1: the image id is the number .* at the end .*'blue.png' has none.*Name",
        ),
        (
            {**OTHER, "image": f"{'1' * 30}.png"},
            "sample 1: the image id is the number .at most 18 digits. at the end",
        ),
        ({**OTHER, "image": "b/red_7.png"}, "sample 1: .*has the number 7, as has sample 0.*rename the images"),
        ({**OTHER, "image": "13.png"}, "sample 1: the image '13.png' does not exist"),
        ({"image": "blue12.png"}, "sample 1: it has no captions, but other samples do. Add them"),
        ({**OTHER, "caption": []}, r"sample 1: 'caption' must be a list of some texts, not \[\]"),
        ({**OTHER, "caption": "blue"}, "sample 1: 'caption' must be a list of some texts"),
        ({**OTHER, "caption": ["blue", ""]}, "sample 1: 'caption' must be a list of some texts, but holds"),
        ({"caption": ["blue"]}, "sample 1: the field 'image' is missing"),
    ],
    ids=str,
)
def test_broken_samples_to_be_captioned(root: Path, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        held_out(root, [SHOWN, sample])
    assert re.search(r"val\.json, " + message, str(caught.value))


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ('{"annotations": [', r"val_gt\.json cannot be read.*cut off"),
        ("[" * 100_000, r"val_gt\.json cannot be read"),
        ([ANNOTATION], r"val_gt\.json must hold an object with a list 'annotations', not"),
        ({"images": []}, r"val_gt\.json must hold an object with a list 'annotations'"),
        ({"annotations": [3]}, r"val_gt\.json, sample 0: must be an object with named fields, not 3"),
        ({"annotations": [{**ANNOTATION, "image_id": "7"}]}, r"sample 0: 'image_id' must be a whole number, not"),
        ({"annotations": [{**ANNOTATION, "image_id": True}]}, r"'image_id' must be a whole number, not true"),
        ({"annotations": [{**ANNOTATION, "caption": " "}]}, r"val_gt\.json, .* 0: 'caption' must be a non-empty text"),
        ({"annotations": [ANNOTATION, {"image_id": 7}]}, r"val_gt\.json, .* 1: the field 'caption' is missing"),
        (
            {"annotations": [ANNOTATION]},
            r"val\.json, sample 1: the ground truth .*val_gt\.json has no caption of image 12.*same split",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_broken_ground_truths(root: Path, truth: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        held_out(root, [SHOWN, OTHER], truth)
    assert re.search(message, str(caught.value))


def test_a_ground_truth_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "gt.json").write_text("\ufeff" + json.dumps({"annotations": [ANNOTATION]}), encoding="utf-8")
    assert read_ground_truth(tmp_path / "gt.json") == {7: ["It is red."]}
