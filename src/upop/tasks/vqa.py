"""Visual question answering (VQAv2, with Visual Genome in training) with BLIP."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from upop.data.answers import ANNOTATORS
from upop.data.text import tokenize
from upop.data.transforms import eval_transform, train_transform
from upop.data.vqa import VqaCollator, VqaDataset, VqaTrainingDataset, read_answer_list
from upop.errors import DataError
from upop.examples import Album, Answer, Example
from upop.metrics.vqa import answer_accuracy, vqa_accuracy
from upop.models.blip import BlipConfig
from upop.models.vqa import MAX_TOKENS, BlipVqa, VqaConfig, answer_losses
from upop.pruning import count_macs
from upop.runs.examples import untransformed
from upop.runs.task import Batch
from upop.settings import RunSettings
from upop.tasks.blip import BlipSettings, BlipTask, blank_images, blip_tokenizer, dummy_tokens, with_cross_loss

_INPUTS = ("images", "question_ids", "question_mask", "answer_ids", "answer_mask", "answer_counts")
# The published multiply-adds are those of a training batch cut to one image. All its questions are encoded and all its
# answers decoded, but the answers attend to the first question alone, whose keys and values are computed once.
_QUESTIONS, _QUESTION_TOKENS = 32, 14
_ANSWERS, _ANSWER_TOKENS = 47, 5


class VqaSettings(BlipSettings):
    """Settings of configs/vqa.yaml; the defaults are the published ones."""

    recorded: ClassVar[tuple[str, ...]] = (*BlipSettings.recorded, "inference", "k_test")

    vqa_root: Path = Field(Path("datasets/vision/VQA/Images/mscoco"), description="folder of VQAv2's images")
    vg_root: Path = Field(Path("datasets/vision/visual-genome"), description="folder of Visual Genome's images")
    train_files: tuple[str, ...] = Field(
        ("vqa_train", "vqa_val", "vg_qa"), min_length=1, description="annotation files to train on, without .json"
    )
    val_file: str | None = Field(None, description="annotation file with answers, to select the best epoch; optional")
    test_file: str | None = Field("vqa_test", description="annotation file to answer; optional")
    inference: Literal["rank", "generate"] = Field(
        "rank", description="rank the candidates of answer_list.json, or generate answers"
    )
    k_test: int = Field(128, ge=1, description="candidates per question to rank by all their tokens")
    rank_chunk: int = Field(1024, ge=1, description="question-candidate pairs in memory at once")

    image_size: int = Field(480, gt=0)
    init_lr: float = Field(2e-5, gt=0, description="highest learning rate")
    max_epoch: int = Field(10, ge=1, description="epochs of retraining (and of `train`)")
    batch_size_test: int = Field(64, ge=1)
    interval: int = Field(1000, ge=1, description="search steps between updates of the masks, with method reference")
    w_sp_attn: float = Field(1.44e-2, ge=0, description="weight of the sparsity term; affects only the logged loss")
    w_sp_mlp: float = Field(5e-4, ge=0)

    @property
    def answer_list(self) -> Path:
        """The file of candidate answers."""
        return self.ann_root / "answer_list.json"


class VqaTask(BlipTask[VqaSettings]):
    """Visual question answering."""

    name: ClassVar[str] = "vqa"
    pipeline: ClassVar[str | None] = "visual-question-answering"
    metric: ClassVar[str] = "accuracy"
    shown: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy_yes_no", "accuracy_number", "accuracy_other")
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}
    settings: ClassVar[type[RunSettings]] = VqaSettings
    model: ClassVar[type[nn.Module]] = BlipVqa
    config: ClassVar[type[BlipConfig]] = VqaConfig

    def dataset(self, settings: VqaSettings, split: str) -> Dataset[Any]:
        """Return the questions of a split, with weighted answers in training.

        Warns about training answers that the list of candidates lacks.
        """
        roots, outside = {"vqa": settings.vqa_root, "vg": settings.vg_root}, settings.allow_outside
        if split != "train":
            file = settings.ann_root / f"{settings.val_file if split == 'val' else settings.test_file}.json"
            return VqaDataset(file, roots, eval_transform(settings.image_size, settings.images), outside=outside)
        files = [settings.ann_root / f"{name}.json" for name in settings.train_files]
        transform = train_transform(settings.image_size, settings.augment, settings.images)
        samples = VqaTrainingDataset(files, roots, transform, outside=outside)
        if settings.inference == "rank":
            _check_candidates(samples, settings.answer_list)
        return samples

    def evaluated(self, settings: VqaSettings) -> tuple[str, ...]:
        """Return the splits that the settings name a file for."""
        files = {"val": settings.val_file, "test": settings.test_file}
        return tuple(split for split, file in files.items() if file is not None)

    def collate(self, settings: VqaSettings) -> Callable[[list[Any]], Batch]:
        """Return the collator that stacks images and tokenizes questions and answers."""
        tokenizer = blip_tokenizer(settings.tokenizer)
        if settings.inference == "generate":
            return VqaCollator(tokenizer)
        return VqaCollator(tokenizer, tokenize(tokenizer, read_answer_list(settings.answer_list)))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return images, questions and answers of a training batch."""
        return {name: batch[name] for name in _INPUTS}

    @with_cross_loss
    def loss(self, model: nn.Module, batch: Batch, settings: VqaSettings, epoch: float) -> Tensor:
        """Return the weighted sum of the losses of a question's answers, averaged over questions."""
        losses = answer_losses(model(**self.inputs(batch)), batch["answer_ids"], batch["answer_mask"])
        total: Tensor = (batch["weights"] * losses).sum()
        return total / len(batch["images"])

    def predict(self, model: nn.Module, batch: Batch, settings: VqaSettings) -> dict[str, Tensor]:
        """Return "answers": indices of candidates, [batch] (rank), or token ids, [batch, 10] (generate)."""
        assert isinstance(model, BlipVqa)
        mask = batch["question_mask"]
        _, states = model.encode(batch["images"], batch["question_ids"], mask)
        if settings.inference == "rank":
            candidates = batch["candidate_ids"], batch["candidate_mask"]
            answers = model.rank(states, mask, *candidates, settings.k_test, settings.rank_chunk)
        else:
            tokenizer = blip_tokenizer(settings.tokenizer)
            answers = model.generate(states, mask, tokenizer.sep_token_id, tokenizer.pad_token_id)
            answers = F.pad(answers, (0, MAX_TOKENS - answers.shape[1]), value=tokenizer.pad_token_id)
        return {"answers": answers}

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: VqaSettings
    ) -> dict[str, float]:
        """Return the official accuracy in percent, overall and by answer type; {} without ground truth."""
        assert isinstance(samples, VqaDataset)
        if not samples.people:
            return {}
        return vqa_accuracy(self._texts(predictions["answers"], settings), samples.people, samples.types)

    def files(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: VqaSettings, split: str
    ) -> dict[str, Any]:
        """Return `vqa_result.json` (`vqa_result_val.json` for validation) in the evaluation server's format.

        It is `[{"question_id": int, "answer": str}]`.
        """
        assert isinstance(samples, VqaDataset)
        texts = self._texts(predictions["answers"], settings)
        rows = zip(samples.question_ids, texts, strict=True)
        name = "vqa_result.json" if split == "test" else f"vqa_result_{self.splits[split]}.json"
        return {name: [{"question_id": number, "answer": text} for number, text in rows]}

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: VqaSettings,
        album: Album,
    ) -> list[Example]:
        """Return images, questions and answers, with the most frequent human answer as the truth."""
        assert isinstance(samples, VqaDataset)
        texts = {name: self._texts(rows["answers"], settings) for name, rows in found.items()}
        shown, plain = [], untransformed(samples)
        for place, number in enumerate(numbers):
            item = plain[number]
            people = samples.people[number] if samples.people else ()
            truth = None
            if people:
                (text, count), *others = Counter(people).most_common()
                truth = Answer(text=text, note=f"{count} of {ANNOTATORS} people" if others else None)
            shown.append(
                Example(
                    images=(album.add(item["image"], str(number)),),
                    prompt=item["question"],
                    truth=truth,
                    answers={name: _rated(answers[place], people) for name, answers in texts.items()},
                )
            )
        return shown

    def _texts(self, answers: Tensor, settings: VqaSettings) -> list[str]:
        if settings.inference == "rank":
            candidates = read_answer_list(settings.answer_list)
            return [candidates[place] for place in answers.tolist()]
        decoded = blip_tokenizer(settings.tokenizer).batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` grey images, each with a question of 14 tokens and an answer of 5."""
        return {
            "images": blank_images(model, batch_size),
            **_words(model, "question", batch_size, _QUESTION_TOKENS),
            **_words(model, "answer", batch_size, _ANSWER_TOKENS),
            "answer_counts": torch.ones(batch_size, dtype=torch.long, device=next(model.parameters()).device),
        }

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Return the counts for one question and answer, and the published count for a batch on one image."""
        return {**super().counts(model), "published_gmacs": count_macs(model, _published_pass) / 1e9}


def _published_pass(model: nn.Module) -> Tensor:
    assert isinstance(model, BlipVqa)
    questions = _words(model, "question", _QUESTIONS, _QUESTION_TOKENS)
    answers = _words(model, "answer", _ANSWERS, _ANSWER_TOKENS)
    _, states = model.encode(blank_images(model, 1), **questions)
    return model.decode(**answers, states=states[:1], question_mask=questions["question_mask"][:1])


def _rated(text: str, people: Sequence[str]) -> Answer:
    """Return an answer: right at full accuracy, wrong at 0, unrated in between."""
    accuracy = answer_accuracy(text, people) if people else 0.5
    return Answer(text=text, right=None if 0 < accuracy < 1 else accuracy == 1)


def _check_candidates(samples: VqaTrainingDataset, file: Path) -> None:
    missing, total, share = samples.outside(read_answer_list(file))
    if missing == total:
        raise DataError(
            f"None of the {total} different training answers is in {file}, so ranking can never choose one. Check that "
            "the list belongs to these annotation files, or set inference: generate."
        )
    if missing:
        warnings.warn(
            f"{missing} of the {total} different training answers ({100 * share:.1f} % by weight) are not in {file}: "
            "the model is trained on them, but ranking never chooses them.",
            stacklevel=3,
        )


def _words(model: nn.Module, name: str, count: int, tokens: int) -> dict[str, Tensor]:
    ids, mask = dummy_tokens(model, count, tokens)
    return {f"{name}_ids": ids, f"{name}_mask": mask}
