"""Visual question answering: questions about images (VQAv2, Visual Genome) with human answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from upop.data.answers import ANNOTATORS, ANSWER_TYPES, answer_type
from upop.data.images import open_image
from upop.data.samples import Sample, check_images, is_text, narrowed, read_samples, shown
from upop.data.text import clean_question, tokenize
from upop.data.transforms import ImageTransform
from upop.errors import DataError
from upop.reading import parse_json, read_text, reason
from upop.sources import Sources

SOURCES = ("vqa", "vg")
"""Values of a sample's "dataset", which selects the root of its image."""
QUESTION_TOKENS = 35
VG_WEIGHT = 0.2
"""Weight of an answer from Visual Genome, which has one per question."""


class VqaItem(TypedDict):
    """A sample: image, [3, height, width], the cleaned question, and in training its answers and their weights."""

    image: Tensor
    question: str
    answers: Sequence[str]
    weights: Sequence[float]


class _VqaSamples(Dataset[VqaItem], ABC):
    """Base of training and evaluation data: validated images and questions."""

    def __init__(
        self, files: Sequence[Path], roots: Mapping[str, Path], transform: ImageTransform, *, outside: bool
    ) -> None:
        self.transform = transform
        self.roots = {source: Path(roots[source]) for source in SOURCES}
        self._questions: list[str] = []
        self._places: list[tuple[Path, int, str, str]] = []
        for file in files:
            samples = read_samples(file)
            for sample in samples:
                question = clean_question(sample.text("question")).strip()
                if not question:
                    raise sample.error(f"'question' holds no words: {sample.text('question')!r}.")
                self._questions.append(question)
                source = SOURCES[sample.one_of("dataset", SOURCES)]
                self._places.append((sample.file, sample.number, source, sample.text("image")))
                self._read_answers(sample)
            places = self._places[-len(samples) :]
            for source, root in self.roots.items():
                pairs = zip(samples, places, strict=True)
                named = ((sample, place[3]) for sample, place in pairs if place[2] == source)
                check_images(root, named, outside=outside)

    @abstractmethod
    def _read_answers(self, sample: Sample) -> None:
        """Read the other fields of a sample."""

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._questions)

    def sources(self) -> Sources:
        """Return the files that are read."""
        images = {f"{source}/{image}": self.roots[source] / image for _, _, source, image in self._places}
        return Sources(tuple(dict.fromkeys(file for file, *_ in self._places)), images)

    def _image(self, index: int) -> Tensor:
        file, number, source, image = self._places[index]
        return self.transform(open_image(self.roots[source] / image, file=file, number=number))


class VqaTrainingDataset(_VqaSamples):
    """The samples of annotation files, one file after the other, with weighted answers.

    A sample is `{"question": str, "answer": [str, ...], "image": str, "dataset": "vqa"}`, where the weight of an answer
    is the share of people who gave it, or `{"question": str, "answer": str, "image": str, "dataset": "vg"}`.

    Args:
        files: annotation files.
        roots: "vqa" and "vg" -> the folder that image paths are relative to.
        transform: image -> tensor.
        outside: whether images may lie outside of their roots.

    Raises:
        DataError: an annotation file is not valid or an image is missing; on access, an image cannot be read.
    """

    def __init__(
        self, files: Sequence[Path], roots: Mapping[str, Path], transform: ImageTransform, *, outside: bool = False
    ) -> None:
        self._answers: list[tuple[tuple[str, ...], tuple[float, ...]]] = []
        super().__init__(files, roots, transform, outside=outside)

    def _read_answers(self, sample: Sample) -> None:
        if sample.get("dataset") == "vg":
            self._answers.append(((sample.text("answer"),), (VG_WEIGHT,)))
            return
        given = _people(sample)
        counts = Counter(given)
        self._answers.append((tuple(counts), tuple(count / len(given) for count in counts.values())))

    def __getitem__(self, index: int) -> VqaItem:
        """The sample at an index, with a random augmentation."""
        answers, weights = self._answers[index]
        return {
            "image": self._image(index),
            "question": self._questions[index],
            "answers": answers,
            "weights": weights,
        }

    def outside(self, candidates: Iterable[str]) -> tuple[int, int, float]:
        """Return how many distinct answers are not candidates, how many there are, and the missing share by weight."""
        known = {candidate.strip().lower() for candidate in candidates}
        weights: Counter[str] = Counter()
        for answers, shares in self._answers:
            for answer, weight in zip(answers, shares, strict=True):
                weights[answer.strip().lower()] += weight  # type: ignore[assignment]
        missing = [answer for answer in weights if answer not in known]
        return len(missing), len(weights), sum(weights[answer] for answer in missing) / sum(weights.values())


class VqaDataset(_VqaSamples):
    """The samples of an annotation file for evaluation: `{"question_id": int, "question", "image", "dataset"}`.

    The file may have ten answers per question, for scoring, and a field "answer_type" ("yes/no", "number" or "other"),
    which is otherwise derived from the answers.

    Attributes:
        question_ids: of all samples.
        people: ten answers per sample; empty without answers.
        types: answer type per sample; empty without answers.

    Raises:
        DataError: as for `VqaTrainingDataset`, and if a question_id is not unique.
    """

    def __init__(
        self, file: Path, roots: Mapping[str, Path], transform: ImageTransform, *, outside: bool = False
    ) -> None:
        self.question_ids: list[int] = []
        self.people: list[tuple[str, ...]] = []
        self.types: list[str] = []
        self._seen: dict[int, int] = {}
        super().__init__([file], roots, transform, outside=outside)

    def _read_answers(self, sample: Sample) -> None:
        number = sample.get("question_id")
        if not isinstance(number, int) or isinstance(number, bool):
            raise sample.error(f"'question_id' must be a whole number, not {shown(number)}.")
        if number in self._seen:
            raise sample.error(
                f"'question_id' is {number}, and sample {self._seen[number]} has it too. Give every question its own."
            )
        self._seen[number] = sample.number
        self.question_ids.append(number)
        if sample.number and ("answer" in sample.fields) != bool(self.people):
            other = "have answers" if self.people else "have none"
            raise sample.error(
                f"the field 'answer' {'exists' if 'answer' in sample.fields else 'is missing'}, and the samples "
                f"before {other}. A file must have answers for all questions, or for none."
            )
        if "answer" in sample.fields:
            self.people.append(tuple(_people(sample, ANNOTATORS)))
            typed = "answer_type" in sample.fields
            self.types.append(
                ANSWER_TYPES[sample.one_of("answer_type", ANSWER_TYPES)] if typed else answer_type(self.people[-1])
            )

    def __getitem__(self, index: int) -> VqaItem:
        """The sample at an index."""
        return {
            "image": self._image(index),
            "question": self._questions[index],
            "answers": (),
            "weights": (),
        }

    def without(self, numbers: Collection[int]) -> Self:
        """Return the data set without the samples at these indices."""
        return narrowed(self, numbers, "_questions", "_places", "question_ids", "people", "types")


def _people(sample: Sample, count: int | None = None) -> list[str]:
    value = sample.get("answer")
    wanted = "some" if count is None else str(count)
    # Some answers may be blank, but not all.
    if (
        not isinstance(value, list)
        or (count is not None and len(value) != count)
        or not all(isinstance(text, str) and (is_text(text) or not text.strip()) for text in value)
        or not any(text.strip() for text in value)
    ):
        raise sample.error(f"'answer' must be a list of {wanted} texts that are not all empty, not {shown(value)}.")
    return value


def read_answer_list(file: str | Path) -> tuple[str, ...]:
    """Return the candidate answers of an answer_list.json: a JSON list of texts.

    Raises:
        DataError: it is missing, empty, or anything else; the message names the item, counted from 0.
    """
    file = Path(file)
    try:
        values = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason(error)}"
        raise DataError(
            f"The list of candidate answers {file} {problem}. Ranking needs it; inference: generate works without."
        ) from error
    if not isinstance(values, list) or not values:
        raise DataError(f"The list of candidate answers {file} must be a JSON list of texts, not {shown(values)}.")
    for number, value in enumerate(values):
        if not is_text(value):
            raise DataError(f"{file}, item {number}: must be a non-empty text, not {shown(value)}.")
    return tuple(values)


@dataclass(frozen=True)
class VqaCollator:
    """Collates items; a class, because workers need a picklable collator.

    Texts are padded to the longest of the batch, and questions truncated to 35 tokens. The first token is [CLS]; the
    model replaces it by [ENC] or [DEC].

    Attributes:
        tokenizer: of questions and answers.
        candidates: token ids and mask of candidate answers, [candidates, tokens] each, for ranking in evaluation; None
            if answers are generated.
    """

    tokenizer: Any
    candidates: tuple[Tensor, Tensor] | None = None

    def __call__(self, items: Sequence[VqaItem]) -> dict[str, Tensor]:
        """Return the items as one batch; in training with answers, [answers, tokens], weights and answer_counts."""
        ids, mask = tokenize(self.tokenizer, [item["question"] for item in items], QUESTION_TOKENS)
        batch = {
            "images": torch.stack([item["image"] for item in items]),
            "question_ids": ids,
            "question_mask": mask,
        }
        if items[0]["answers"]:
            answers = tokenize(self.tokenizer, [answer for item in items for answer in item["answers"]])
            return batch | {
                "answer_ids": answers[0],
                "answer_mask": answers[1],
                "answer_counts": torch.tensor([len(item["answers"]) for item in items]),
                "weights": torch.tensor([weight for item in items for weight in item["weights"]]),
            }
        if self.candidates is not None:
            batch["candidate_ids"], batch["candidate_mask"] = self.candidates
        return batch
