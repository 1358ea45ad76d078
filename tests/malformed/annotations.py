"""What may be wrong with annotation files: every row is one file that must be refused by name, and by sample."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.data.caption import CaptionEvalDataset, CaptionTrainDataset, read_ground_truth
from upop.data.nlvr import NlvrDataset
from upop.data.retrieval import RetrievalGallery, RetrievalPairs
from upop.data.transforms import eval_transform
from upop.data.vqa import VqaDataset, VqaTrainingDataset, read_answer_list

IMAGES = ("a_1.png", "b_2.png")
"""Images that exist beside the annotation file."""
_PLAIN = eval_transform(8)
_NOWHERE = Path("no-ground-truth.json")


@dataclass(frozen=True)
class Kind:
    """One kind of annotation file: what a valid one holds, and what reads it (file, folder of images)."""

    content: Any
    read: Callable[[Path, Path], Any]
    paths: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _asked(extra: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"question_id": number, "question": "what is it?", "image": image, "dataset": "vqa", **extra}
        for number, image in enumerate(IMAGES)
    ]


def _roots(folder: Path) -> dict[str, Path]:
    return {"vqa": folder, "vg": folder}


KINDS = {
    "nlvr": Kind(
        [{"sentence": "a dog", "label": "True", "images": list(IMAGES)} for _ in range(2)],
        lambda file, root: NlvrDataset(file, root, _PLAIN, swap=False),
        texts=("sentence",),
        lists=("images",),
        others=("label",),
    ),
    "caption train": Kind(
        [{"image": image, "caption": "a dog", "image_id": "x"} for image in IMAGES],
        lambda file, root: CaptionTrainDataset(file, root, _PLAIN, prompt="a picture of "),
        paths=("image",),
        texts=("caption",),
    ),
    "caption val": Kind(
        [{"image": image, "caption": ["a dog", "one dog"]} for image in IMAGES],
        lambda file, root: CaptionEvalDataset(file, root, _PLAIN, _NOWHERE),
        paths=("image",),
        lists=("caption",),
    ),
    "ground truth": Kind(
        {"annotations": [{"image_id": 1, "caption": "a dog", "id": 1}] * 2, "images": [{"id": 1}]},
        lambda file, _root: read_ground_truth(file),
    ),
    "retrieval train": Kind(
        [{"image": image, "caption": "a dog", "image_id": "x"} for image in IMAGES],
        lambda file, root: RetrievalPairs(file, root, _PLAIN),
        paths=("image",),
        texts=("caption",),
        others=("image_id",),
    ),
    "retrieval test": Kind(
        [{"image": image, "caption": ["a dog", "one dog"]} for image in IMAGES],
        lambda file, root: RetrievalGallery(file, root, _PLAIN),
        paths=("image",),
        lists=("caption",),
    ),
    "vqa train": Kind(
        _asked({"answer": ["dog"] * 10}),
        lambda file, root: VqaTrainingDataset([file], _roots(root), _PLAIN),
        paths=("image",),
        texts=("question",),
        lists=("answer",),
        others=("dataset",),
    ),
    "vqa test": Kind(
        _asked({}),
        lambda file, root: VqaDataset(file, _roots(root), _PLAIN),
        paths=("image",),
        texts=("question",),
        others=("question_id", "dataset"),
    ),
    "answers": Kind(["yes", "no"], lambda file, _root: read_answer_list(file)),
}


def _valid(kind: str) -> str:
    return json.dumps(KINDS[kind].content)


RAW: dict[str, Callable[[str], bytes]] = {
    "empty": lambda _text: b"",
    "blanks": lambda _text: b" \n\t ",
    "cut off": lambda text: text[: len(text) * 2 // 3].encode(),
    "one brace": lambda _text: b"{",
    "empty list": lambda _text: b"[]",
    "empty object": lambda _text: b"{}",
    "null": lambda _text: b"null",
    "number": lambda _text: b"5",
    "text": lambda _text: b'"dog"',
    "list of null": lambda _text: b"[null]",
    "list of lists": lambda _text: b"[[[]]]",
    "list of numbers": lambda _text: b"[1, 2]",
    "comma too many": lambda text: (text[:-1] + "," + text[-1]).encode(),
    "two documents": lambda text: (text + text).encode(),
    "lines of JSON": lambda text: (text + "\n" + text).encode(),
    "single quotes": lambda text: text.replace('"', "'").encode(),
    "CSV": lambda _text: b"image,caption\na.png,a dog\n",
    "NaN": lambda text: text.replace('"', "NaN", 1).encode(),
    "only NaN": lambda _text: b"[NaN]",
    "only infinity": lambda _text: b'[{"x": -Infinity}]',
    "UTF-16": lambda text: text.encode("utf-16"),
    "Latin-1": lambda text: (text.replace("dog", "chien âgé") + "é").encode("latin-1"),
    "null bytes": lambda _text: b"\0" * 64,
    "null byte inside": lambda text: text.replace('"', '"\0', 1).encode(),
    "PNG": lambda _text: b"\x89PNG\r\n\x1a\n" + bytes(64),
    "pickle": lambda _text: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00]\x94(K\x01K\x02e.",
    "deep": lambda _text: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda _text: b'[{"a":' * 50_000,
    "number of 5000 digits": lambda _text: b"[" + b"9" * 5000 + b"]",
}
"""What a whole file may hold in place of its content; takes the valid text."""

PLACES = ("missing", "folder", "dangling link", "link to itself")
"""What may be where the file should be."""

_WRONG_TEXT: dict[str, Any] = {
    "null": None,
    "number": 5,
    "true": True,
    "list": ["a dog"],
    "object": {"a": "dog"},
    "empty": "",
    "blanks": "  \n",
    "no words": ".!()",
    "half a character": "a \ud800 dog",
}
_WRONG_PATH: dict[str, Any] = {
    "null": None,
    "number": 5,
    "list": ["a_1.png"],
    "empty": "",
    "missing": "c_3.png",
    "other case": "A_1.PNG",
    "absolute": "/nowhere/a_1.png",
    "above": "../../nowhere/a_1.png",
    "null byte": "a_1.png\0",
    "half a character": "a\ud800_1.png",
    "very long": "a" * 5000 + "_1.png",
    "below a file": "a_1.png/a_1.png",
    "URL": "http://127.0.0.1/a_1.png",
}
_WRONG_LIST: dict[str, Any] = {
    "null": None,
    "text": "a_1.png",
    "number": 2,
    "empty": [],
    "of null": [None, None],
    "of numbers": [1, 2],
    "of lists": [["a"], ["b"]],
    "of empty texts": ["", ""],
    "object": {"0": "a", "1": "b"},
    "half a character": ["\udfff", "a_1.png"],
}
_WRONG: dict[str, dict[str, Any]] = {
    "nlvr label": {"lower case": "true", "boolean": True, "number": 1, "null": None, "empty": "", "other": "yes"},
    "nlvr images": {"one": [IMAGES[0]], "three": [*IMAGES, IMAGES[0]], "missing": [IMAGES[0], "c_3.png"]},
    "retrieval train image_id": {"null": None, "empty": "", "float": 1.5, "boolean": True, "list": [1]},
    "vqa train dataset": {"other": "coco", "upper case": "VQA", "null": None, "number": 0},
    "vqa train answer": {"one of them a number": ["dog"] * 9 + [5], "for vqa a text": "dog"},
    "vqa test dataset": {"other": "coco", "list": ["vqa"]},
    "vqa test question_id": {"text": "1", "float": 1.5, "null": None, "boolean": True, "same as another": 0},
    "caption val image": {"without a number": "c.png", "number too long": "c_" + "9" * 30 + ".png"},
}


@dataclass(frozen=True)
class FieldRow:
    """A sample, the last of its file, with one field changed; `REMOVED` and `RENAMED` are no values."""

    kind: str
    field: str
    value: Any

    def content(self) -> Any:
        """The file's content with the change."""
        content = copy.deepcopy(KINDS[self.kind].content)
        sample = content[-1]
        if self.value is REMOVED:
            del sample[self.field]
        elif self.value is RENAMED:
            sample[self.field.capitalize()] = sample.pop(self.field)
        else:
            sample[self.field] = self.value
        return content


REMOVED, RENAMED = object(), object()


def _field_rows() -> Iterator[tuple[str, FieldRow]]:
    for name, kind in KINDS.items():
        fields = [(kind.paths, _WRONG_PATH), (kind.texts, _WRONG_TEXT), (kind.lists, _WRONG_LIST), (kind.others, {})]
        for names, wrong in fields:
            for field in names:
                values = {"removed": REMOVED, "renamed": RENAMED, **wrong, **_WRONG.get(f"{name} {field}", {})}
                for what, value in values.items():
                    yield f"{name}: {field}: {what}", FieldRow(name, field, value)


FIELDS = dict(_field_rows())

_TRUTH = {"image_id": 1, "caption": "a dog", "id": 1}
TRUTHS: dict[str, Any] = {
    "a list": [_TRUTH],
    "no annotations": {"images": []},
    "annotations are null": {"annotations": None},
    "annotations are an object": {"annotations": {"0": _TRUTH}},
    "an annotation is a list": {"annotations": [_TRUTH, []]},
    "no caption": {"annotations": [_TRUTH, {"image_id": 1}]},
    "caption is a list": {"annotations": [_TRUTH, {**_TRUTH, "caption": ["a dog"]}]},
    "caption is empty": {"annotations": [_TRUTH, {**_TRUTH, "caption": " "}]},
    "no image_id": {"annotations": [_TRUTH, {"caption": "a dog"}]},
    "image_id is a text": {"annotations": [_TRUTH, {**_TRUTH, "image_id": "1"}]},
    "image_id is true": {"annotations": [_TRUTH, {**_TRUTH, "image_id": True}]},
    "image_id is no whole number": {"annotations": [_TRUTH, {**_TRUTH, "image_id": 1.5}]},
}
"""Contents of a ground truth that are JSON and yet none."""

ANSWERS: dict[str, Any] = {
    "a number": ["yes", 5],
    "null": ["yes", None],
    "empty": ["yes", ""],
    "a list": ["yes", ["no"]],
    "half a character": ["yes", "\ud800"],
    "an object": {"yes": 1, "no": 2},
}
"""Lists of candidate answers that are none."""
