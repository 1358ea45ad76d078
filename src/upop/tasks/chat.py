"""Chat: generative models of transformers, with or without images, on conversations, questions, captions and texts."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from upop.checkpoints.files.hub import local_path
from upop.checkpoints.pretrained import open_model
from upop.checkpoints.processors import open_processor
from upop.data.chat import IGNORED, ChatFormat, Sample, conversation, prompts
from upop.data.grouping import ImageTokens, LengthSampler
from upop.data.rows import Row, Rows
from upop.data.turns import IMAGE, Turn
from upop.errors import DataError, SettingError
from upop.examples import Album, Answer, Example
from upop.libraries import naming_missing
from upop.metrics.answers import answer_scores
from upop.metrics.captions import caption_scores
from upop.runs.task import Batch, Task
from upop.settings import RunSettings
from upop.sources import Sources
from upop.tasks.row_settings import RowSettings, rows_for

AUTOS = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
"""Auto classes of transformers for generative models."""
KINDS = ("messages", "question", "caption", "text")
"""Kinds of rows that the task takes."""
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FOLDER = "_upop_folder"
"""Attribute of a model: the folder of its processor. Copies of the model keep it."""
_LETTERS_PER_TOKEN = 4
"""In the length of a conversation, where conversations of like length are batched."""


class ChatSettings(RowSettings):
    """Settings of `upop compress chat`."""

    recorded: ClassVar[tuple[str, ...]] = ("max_tokens", "prompt")
    of_model: ClassVar[Mapping[str, str]] = {}

    prompt: str = Field("Describe the image.", min_length=1, description="question for images with captions")
    max_tokens: int = Field(
        2048, ge=8, description="maximum tokens of a conversation, images included; longer ones are truncated"
    )
    generate: bool = Field(True, description="generate answers in evaluation, besides measuring the loss")
    max_new_tokens: int = Field(32, ge=1, description="maximum tokens of a generated answer")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of weights and optimizer; auto keeps the checkpoint's"
    )
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw", description="8-bit optimizers need bitsandbytes and CUDA"
    )
    group_by_length: bool = Field(True, description="batch conversations of similar length, for less padding")
    distill_logits: float = Field(
        0.0, ge=0, description="weight of the KL divergence to the dense model's next-token probabilities"
    )

    init_lr: float = Field(1e-5, gt=0, description="highest learning rate")
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float | None = Field(1.0, gt=0, description="maximum norm of the gradients")
    schedule: Literal["epoch", "step", "polynomial"] = "step"
    epochs: int | None = Field(2, ge=1)
    batch_size_train: int = Field(8, ge=1)
    batch_size_test: int = Field(16, ge=1)
    num_workers: int = Field(2, ge=0)


@dataclass(frozen=True)
class Item:
    """A sample and its index in the data set."""

    number: int
    sample: Sample


class ChatRows(Dataset[Item]):
    """The conversations of a split.

    Args:
        rows: of the split.
        format: of the model.
        prompt: question for images with captions.
        training: whether to draw one of several captions; otherwise the first is used.

    Raises:
        DataError: a row does not fit the model; every row is checked here.
    """

    def __init__(self, rows: Rows, format: ChatFormat, prompt: str, *, training: bool) -> None:
        self.rows, self._format, self._prompt, self._training = rows, format, prompt, training
        self.notes = rows.notes
        for row in rows:
            format.check(conversation(row, prompt), row)

    def __len__(self) -> int:
        """The number of conversations."""
        return len(self.rows)

    def __getitem__(self, number: int) -> Item:
        """A conversation with its images opened."""
        row = self.rows[number]
        which = int(torch.randint(len(row.captions), ())) if self._training and len(row.captions) > 1 else 0
        turns = conversation(row, self._prompt, which)
        images = row.open_images()[: sum(turn.images for turn in turns)]
        return Item(number, Sample(row, turns, tuple(images)))

    def without(self, numbers: Sequence[int]) -> ChatRows:
        """Return the conversations without some, whose images cannot be read."""
        return ChatRows(self.rows.without(set(numbers)), self._format, self._prompt, training=self._training)

    def sources(self) -> Sources:
        """Return the files of the rows."""
        return self.rows.sources()

    def lengths(self) -> list[int]:
        """Return the estimated number of tokens of each conversation."""
        tokens, found = ImageTokens(self._format.processor), []
        for row in self.rows:
            turns = conversation(row, self._prompt)
            images = row.images[: sum(turn.images for turn in turns)]
            found.append(sum(len(turn.text) for turn in turns) // _LETTERS_PER_TOKEN + tokens.of(images))
        return found

    def truths(self, number: int) -> tuple[str, ...]:
        """Return the accepted answers to the last question."""
        row = self.rows[number]
        return row.answers or row.captions or (conversation(row, self._prompt)[-1].text.strip(),)

    def asked(self, number: int) -> str:
        """Return the conversation before the last answer, as text."""
        turns = conversation(self.rows[number], self._prompt)[:-1]
        return turns[0].text if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.text}" for turn in turns)


@dataclass(frozen=True)
class ChatCollator:
    """Collates conversations; a class, because workers need a picklable collator."""

    format: ChatFormat

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return the model's arguments, and "labels", [batch, tokens]."""
        return self.format.batch([item.sample for item in items])


class ChatTask(Task[ChatSettings]):
    """Text generation, in answer to text and images."""

    name: ClassVar[str] = "chat"
    pipeline: ClassVar[str | None] = "image-text-to-text"
    metric: ClassVar[str] = "token_acc"
    shown: ClassVar[tuple[str, ...]] = (
        *("token_acc", "perplexity", "exact_match", "vqa_acc", "anls", "cider", "bleu4"),
    )
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val", "test": "test"}
    settings: ClassVar[type[RunSettings]] = ChatSettings
    model_prepares: ClassVar[bool] = True
    autos: ClassVar[tuple[str, ...]] = AUTOS

    def build(self, settings: ChatSettings) -> nn.Module:
        """Refuse: a model needs the processor and chat template of a checkpoint.

        Raises:
            SettingError: always.
        """
        raise SettingError(
            "No model is given. Set --model to a folder of transformers, a name on the hub, or an output of upop."
        )

    def load(self, path: Path, settings: ChatSettings) -> nn.Module:
        """Return the model in a folder, dense or compressed, in the precision of the settings."""
        return self._prepared(open_model(path, AUTOS).model, path, settings)

    def start(self, path: Path, settings: ChatSettings) -> tuple[nn.Module, Sequence[str]]:
        """Return a model to train, and its newly initialised tensors: all of them if the folder has no weights."""
        opened = open_model(path, AUTOS, fresh=True)
        return self._prepared(opened.model, path, settings), opened.fresh

    def _prepared(self, model: nn.Module, path: Path, settings: ChatSettings) -> nn.Module:
        setattr(model, _FOLDER, str(path))
        return model.to(PRECISIONS[settings.precision]) if settings.precision != "auto" else model

    def adapt(self, model: nn.Module, settings: ChatSettings, *, training: bool) -> tuple[nn.Module, Sequence[str]]:
        """Return the model unchanged; check the optimizer before any long work.

        Raises:
            SettingError: the optimizer needs a CUDA device, and the run has none.
            MissingLibraryError: the library of the optimizer is not installed.
        """
        if training:
            _optimizer_class(settings)
        return model, ()

    def dataset(self, settings: ChatSettings, split: str) -> ChatRows:
        """Return the conversations of a split."""
        found = _format(settings)
        return ChatRows(rows_for(settings, split, KINDS), found, settings.prompt, training=split == "train")

    def evaluated(self, settings: ChatSettings) -> tuple[str, ...]:
        """Return the held-out splits that the settings name data for."""
        return settings.held_out

    def collate(self, settings: ChatSettings) -> Callable[[list[Any]], Batch]:
        """Return the collator, which calls the model's processor."""
        return ChatCollator(_format(settings))

    def sampler(self, samples: Dataset[Any], settings: ChatSettings) -> Sampler[int] | None:
        """Return a sampler that batches conversations of similar length, or None."""
        assert isinstance(samples, ChatRows)
        if not settings.group_by_length:
            return None
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if group else 1
        # A step ends when its longest batch does, on whichever process.
        together = settings.batch_size_train * settings.accumulate * processes
        return LengthSampler(samples.lengths(), together, settings.seed)

    def pipeline_for(self, settings: ChatSettings) -> str:
        """Return the hub's task: image-text-to-text, or text-generation for a model without images."""
        return "image-text-to-text" if _format(settings).takes_images else "text-generation"

    def tokenizer(self, settings: ChatSettings) -> Any:
        """Return the model's processor, which checkpoints store."""
        return _format(settings).processor

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return all but the labels."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def distill_options(self, settings: ChatSettings) -> dict[str, float]:
        """Return the weights of the feature loss and of the divergence of next-token probabilities."""
        return {"features": settings.distill_weight, "logits": settings.distill_logits}

    def optimizer(self, model: nn.Module, settings: ChatSettings) -> torch.optim.Optimizer:
        """Return AdamW, with 8-bit state if set."""
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate, decay = settings.init_lr, settings.weight_decay
        found: torch.optim.Optimizer = _optimizer_class(settings)(weights, lr=rate, weight_decay=decay)
        return found

    def loss(self, model: nn.Module, batch: Batch, settings: ChatSettings, epoch: float) -> Tensor:
        """Return the mean cross-entropy of all answer tokens in the batch."""
        nll, labels, _ = token_losses(model, batch)
        return nll.sum() / (labels != IGNORED).sum().clamp(min=1)

    def predict(self, model: nn.Module, batch: Batch, settings: ChatSettings) -> dict[str, Tensor]:
        """Return per answer the loss "nll", "tokens" and correct tokens "right", [batch]; and generated "answers"."""
        nll, labels, likeliest = token_losses(model, batch)
        in_answer = labels != IGNORED
        found = {
            "nll": nll.sum(1),
            "tokens": in_answer.sum(1),
            "right": ((likeliest == labels) & in_answer).sum(1),
        }
        if settings.generate:
            found["answers"] = generate_answers(model, batch, _format(settings), settings.max_new_tokens)
        return found

    def score(
        self, predictions: Mapping[str, Tensor], samples: Dataset[Any], settings: ChatSettings
    ) -> dict[str, float]:
        """Return token_acc (percent), loss and perplexity; for generated answers, also answer or caption scores."""
        assert isinstance(samples, ChatRows)
        _check_truncated(predictions["tokens"], samples, settings)
        tokens = int(predictions["tokens"].sum())
        loss = float(predictions["nll"].double().sum()) / tokens
        scores = {
            "token_acc": 100 * int(predictions["right"].sum()) / tokens,
            "loss": loss,
            "perplexity": math.exp(min(loss, 30)),
        }
        if "answers" not in predictions or samples.rows.kind == "text":
            return scores
        texts = _format(settings).decode(predictions["answers"])
        truths = [samples.truths(number) for number in range(len(samples))]
        if samples.rows.kind == "caption":
            return scores | caption_scores(dict(enumerate(texts)), dict(enumerate(truths)))
        return scores | answer_scores(texts, truths)

    def examples(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Dataset[Any],
        numbers: Sequence[int],
        settings: ChatSettings,
        album: Album,
    ) -> list[Example]:
        """Return images, questions and generated answers, with the true answer."""
        assert isinstance(samples, ChatRows)
        format = _format(settings)
        texts = {name: format.decode(rows["answers"]) for name, rows in found.items() if "answers" in rows}
        shown = []
        for place, number in enumerate(numbers):
            truths = samples.truths(number)
            images = samples[number].sample.images
            shown.append(
                Example(
                    images=tuple(album.add(image, f"{number}-{which}") for which, image in enumerate(images)),
                    prompt=samples.asked(number),
                    truth=Answer(text=truths[0]),
                    answers={name: _rated(answers[place], truths) for name, answers in texts.items()},
                )
            )
        return shown

    def example(self, model: nn.Module, batch_size: int) -> dict[str, Tensor]:
        """Return `batch_size` copies of a question, with a grey image if the model takes images."""
        format = chat_format(getattr(model, _FOLDER), 2**20)
        image = (Image.new("RGB", (336, 336), "grey"),) if format.takes_images else ()
        turns = (
            Turn("user", (*(IMAGE for _ in image), "What is shown in the image?")),
            Turn("assistant", ("A grey square.",)),
        )
        row = Row("example", 0, "an example", "question")
        batch = format.batch([Sample(row, turns, image)] * batch_size)
        device, kind = next(model.parameters()).device, next(model.parameters()).dtype
        return {
            name: value.to(device, kind if value.is_floating_point() else value.dtype)
            for name, value in self.inputs(batch).items()
        }


def _optimizer_class(settings: ChatSettings) -> Any:
    """Return the class of the optimizer that the settings name."""
    name = settings.optimizer
    if name == "adamw":
        return torch.optim.AdamW
    if settings.device in ("cpu", "mps") or not torch.cuda.is_available():
        raise SettingError(f"optimizer: {name} needs a CUDA device, and the run has none. Use optimizer: adamw.")
    with naming_missing():
        import bitsandbytes
    return {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}[name]


def _check_truncated(tokens: Tensor, samples: ChatRows, settings: ChatSettings) -> None:
    """Warn about rows whose answers are truncated to nothing; raise a `DataError` if all are."""
    empty = (tokens == 0).nonzero().flatten().tolist()
    if not empty:
        return
    place, most = samples.rows[empty[0]].place, f"max_tokens ({settings.max_tokens})"
    if len(empty) == len(tokens):
        raise DataError(
            f"{place}: the answer lies beyond {most}, where conversations are truncated, as in all other evaluated "
            "rows. Raise max_tokens."
        )
    warnings.warn(
        f"{len(empty)} of {len(tokens)} rows (the first is {place}) have their answers beyond {most}, where "
        "conversations are truncated. Token accuracy and perplexity leave them out. Raise max_tokens to include them.",
        stacklevel=2,
    )


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of labels (0 for ignored ones), the labels and the likeliest tokens, [batch, positions] each.

    Positions without a label in any sample are left out, if the model has `logits_to_keep`: logits over a vocabulary
    take much memory.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    kind = next(model.parameters()).dtype
    inputs = {name: value.to(kind) if value.is_floating_point() else value for name, value in inputs.items()}
    if "decoder_input_ids" not in inputs:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if "logits_to_keep" in inspect.signature(getattr(model, "module", model).forward).parameters:
            kept = (labels != IGNORED).any(0).nonzero().flatten()
            inputs["logits_to_keep"] = kept if len(kept) else torch.zeros(1, dtype=torch.long, device=labels.device)
            labels = labels[:, inputs["logits_to_keep"]]
    logits = model(**inputs).logits
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view_as(labels), labels, logits.argmax(-1)


@torch.no_grad()
def generate_answers(model: Any, batch: Batch, format: ChatFormat, most: int) -> Tensor:
    """Return the token ids of greedily generated answers, [batch, most], padded."""
    pad = format.tokenizer.pad_token_id
    prompt = prompts(batch, pad)
    kind = next(model.parameters()).dtype
    prompt = {name: value.to(kind) if value.is_floating_point() else value for name, value in prompt.items()}
    given = 0 if "decoder_input_ids" in batch else prompt["input_ids"].shape[1]
    found = model.generate(
        **prompt, max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=pad, eos_token_id=format.ends
    )[:, given:]
    return F.pad(found[:, :most], (0, most - min(most, found.shape[1])), value=pad)


@lru_cache(maxsize=4)
def chat_format(folder: str, max_tokens: int) -> ChatFormat:
    """Return the chat format of the model in a folder: it turns conversations into batches.

    Raises:
        CheckpointError: the folder does not exist, or has no processor or tokenizer.
    """
    return ChatFormat(open_processor(Path(folder)), Path(folder), max_tokens)


def _format(settings: ChatSettings) -> ChatFormat:
    if not settings.pretrained:
        raise SettingError(
            "No model is given. Set --model to a folder of transformers, a name on the hub, or an output of upop."
        )
    return chat_format(str(local_path(settings.pretrained)), settings.max_tokens)


def _rated(text: str, truths: Sequence[str]) -> Answer:
    right = answer_scores([text], [truths])["exact_match"] == 100
    return Answer(text=text, right=right or None)
