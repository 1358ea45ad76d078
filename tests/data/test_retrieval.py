"""Retrieval samples: what a good file gives, and what every way of being broken says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from upop.data.retrieval import RetrievalCollator, RetrievalGallery, RetrievalPairs
from upop.data.tokenizer import load_tokenizer
from upop.data.transforms import eval_transform
from upop.errors import DataError

PAIR = {"image": "a/red.png", "caption": "A RED image.", "image_id": "coco_7"}
SHOWN = {"image": "a/red.png", "caption": ["A red image.", "all  red!"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a" / "red.png")
    Image.new("RGB", (20, 11), "blue").save(tmp_path / "images" / "blue.png")
    return tmp_path / "images"


def read(kind: type[Any], root: Path, samples: list[dict[str, Any]]) -> Any:
    file = root.parent / "records.json"
    file.write_text(json.dumps(samples))
    return kind(file, root, eval_transform(8))


def refusal(kind: type[Any], root: Path, samples: list[dict[str, Any]]) -> str:
    with pytest.raises(DataError) as caught:
        read(kind, root, samples)
    assert "records.json" in str(caught.value)
    return str(caught.value)


def test_pairs_of_one_image_share_a_number(root: Path) -> None:
    other = {"image": "blue.png", "caption": "blue", "image_id": "coco_9"}
    data = read(RetrievalPairs, root, [PAIR, other, {**PAIR, "caption": "all red"}])
    assert [item["number"] for item in (data[0], data[1], data[2])] == [0, 1, 0]
    assert data[0]["caption"] == "a red image"
    assert len(data) == 3


def test_a_whole_number_is_an_image_id_too(root: Path) -> None:
    data = read(RetrievalPairs, root, [{**PAIR, "image_id": 7}, {**PAIR, "image_id": "7"}, {**PAIR, "image_id": 8}])
    assert [data[index]["number"] for index in range(3)] == [0, 0, 1]


def test_a_gallery_knows_whose_texts_are_whose(root: Path) -> None:
    data = read(RetrievalGallery, root, [SHOWN, {"image": "blue.png", "caption": ["blue"]}])
    assert data.texts == ["a red image", "all red", "blue"]
    assert data.image_of_text.tolist() == [0, 0, 1]
    assert [data[index]["number"] for index in range(len(data))] == [0, 1]


def test_images_of_other_sizes_become_one_batch(root: Path, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "picture", "blue"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    collate = RetrievalCollator(load_tokenizer(tmp_path), max_length=4)
    data = read(RetrievalPairs, root, [PAIR, {**PAIR, "image": "blue.png", "caption": "blue", "image_id": "x"}])
    batch = collate([data[0], data[1]])
    assert batch["images"].shape == (2, 3, 8, 8)
    assert batch["ids"].tolist() == [0, 1]
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3], [2, 8, 3, 0]]  # cut to 4 tokens
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    gallery = read(RetrievalGallery, root, [SHOWN])
    assert set(collate([gallery[0]])) == {"images", "ids"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": []}, r"sample 1: 'caption' must be a list of some texts, not \[\]"),
        ({"caption": "red"}, "sample 1: 'caption' must be a list of some texts"),
        ({"caption": ["red", "..!"]}, "sample 1: 'caption' holds no words"),
        ({"image": "a/rad.png"}, "sample 1: the image 'a/rad.png' does not exist"),
    ],
    ids=str,
)
def test_broken_gallery_samples(root: Path, change: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(RetrievalGallery, root, [SHOWN, {**SHOWN, **change}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": ["red"]}, "sample 1: 'caption' must be a non-empty text"),
        ({"caption": "***"}, "sample 1: 'caption' holds no words"),
        ({"image_id": None}, "sample 1: 'image_id' must be a text or a whole number, not null"),
        ({"image_id": True}, "sample 1: 'image_id' must be a text or a whole number, not true"),
        ({"image": "none.png"}, "sample 1: the image 'none.png' does not exist"),
    ],
    ids=str,
)
def test_broken_pairs(root: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(RetrievalPairs, root, [PAIR, {**PAIR, **change}])


def test_a_image_without_captions_is_named(root: Path) -> None:
    message = refusal(RetrievalGallery, root, [SHOWN, {"image": "blue.png"}])
    assert "sample 1: the field 'caption' is missing" in message


def test_a_broken_image_is_named_when_it_is_read(root: Path) -> None:
    (root / "blue.png").write_bytes(b"no image")
    data = read(RetrievalGallery, root, [SHOWN, {**SHOWN, "image": "blue.png"}])
    assert data[0]["image"].shape == (3, 8, 8)
    with pytest.raises(DataError, match=r"records\.json, sample 1: the image .*blue\.png cannot be read"):
        data[1]
    assert torch.isfinite(data[0]["image"]).all()
