"""Writes generated questions in the formats of VQAv2 and Visual Genome, and the list of answers."""

from __future__ import annotations

from collections.abc import Mapping

from upop.demo.layout import SetFormat, Sink, held_out
from upop.demo.vqa import QUESTIONS_PER_IMAGE, AnnotatedQuestion, answer_list, sample_examples

VQA_IMAGES = "images/mscoco"
VG_IMAGES = "images/visual-genome"
FEWEST_HELD_OUT = 100

_NUMBERS = {"train": 1, "val": 2, "test": 3, "vg": 4}
_FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015"}
_FILES = {"train": "vqa_train.json", "val": "vqa_val.json", "test": "vqa_test.json", "vg": "vg_qa.json"}


def _records(size: int) -> dict[str, int]:
    others = held_out(size, FEWEST_HELD_OUT)
    return {"train": size, "vg": max(size // 4, 1), "val": others, "test": others}


def _images(records: Mapping[str, int]) -> int:
    return sum(-(-count // QUESTIONS_PER_IMAGE) for count in records.values())


def _write(sink: Sink, seed: int, records: Mapping[str, int]) -> None:
    for split, wanted in records.items():
        root = VG_IMAGES if split == "vg" else VQA_IMAGES
        found: list[dict[str, object]] = []
        for number, example in enumerate(sample_examples(seed, split)):
            if len(found) >= wanted:
                break
            # Unique in a set of any size.
            identity = 10 * number + _NUMBERS[split]
            image = _image(split, identity, sink.suffix)
            sink.scene_image(root, image, example.scene)
            questions = enumerate(example.questions[: wanted - len(found)])
            found.extend(_sample(split, 10 * identity + place, image, one) for place, one in questions)
        sink.records(_FILES[split], found)
    sink.records("answer_list.json", answer_list())


def _image(split: str, identity: int, suffix: str) -> str:
    if split == "vg":
        return f"VG_100K/{identity}.{suffix}"
    folder = _FOLDERS[split]
    return f"{folder}/COCO_{folder}_{identity:012d}.{suffix}"


def _sample(split: str, number: int, image: str, question: AnnotatedQuestion) -> dict[str, object]:
    if split == "vg":
        return {"image": image, "question": question.text, "answer": question.answer, "dataset": "vg"}
    answers = {} if split == "test" else {"answer": list(question.answers)}
    return {"question_id": number, "question": question.text, **answers, "image": image, "dataset": "vqa"}


VQA = SetFormat({"vqa_root": VQA_IMAGES, "vg_root": VG_IMAGES}, _records, _images, _write)
