"""Formats conversations with the chat template and processor of a model, and finds the tokens of the answers.

The template first renders the conversation with a placeholder for every answer. That gives the exact positions of
answers in the text, and the tokenizer's offsets give their tokens, also after image placeholders are expanded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upop.data.rows import Row
from upop.data.turns import IMAGE, Turn, split_marks
from upop.errors import CheckpointError, DataError
from upop.reading import read_object

IGNORED = -100
"""Label of tokens outside of answers."""
_MARK = re.compile("\ue000(\\d+)\ue001")
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
_PADDED_WITH = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": IGNORED}
_PLAIN = {"user": "User: ", "assistant": "Assistant: ", "system": "", "tool": "Tool: "}


@dataclass(frozen=True)
class Sample:
    """A conversation with its images opened; the last turn is an answer.

    Attributes:
        row: the row of the sample.
        turns: the turns; a plain text is one answer.
        images: in the order of the turns.
    """

    row: Row
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]


def conversation(row: Row, prompt: str, caption: int = 0) -> tuple[Turn, ...]:
    """Return the turns of a row, up to the last answer.

    Args:
        row: of any kind but "label".
        prompt: question for images with captions.
        caption: which caption is the answer.

    Raises:
        DataError: the number of <image> marks in a question differs from the row's number of images.
    """
    if row.kind == "messages":
        last = max(number for number, turn in enumerate(row.turns) if turn.role == "assistant")
        return row.turns[: last + 1]
    if row.kind == "question":
        return (_question(row, row.question), Turn("assistant", (row.answer,)))
    if row.kind == "caption":
        return (_question(row, prompt), Turn("assistant", (row.captions[caption % len(row.captions)],)))
    return (Turn("assistant", (row.text,)),)


def _question(row: Row, text: str) -> Turn:
    """Return the turn of a question, with images at their marks, or in front."""
    parts = split_marks(text) if row.images else [text]
    marks = sum(part is IMAGE for part in parts)
    if marks and marks != len(row.images):
        raise row.error(f"the question has {marks} <image> marks, but the row has {len(row.images)} images.")
    return Turn("user", tuple(parts) if marks else (*(IMAGE for _ in row.images), text))


class ChatFormat:
    """Turns conversations into batches for a model.

    Args:
        processor: a processor or tokenizer of transformers.
        folder: of the model; its config.json says whether it is an encoder-decoder.
        max_tokens: maximum tokens of a conversation, images included; longer texts are truncated, images are not.

    Attributes:
        takes_images: whether the processor takes images.
        style: "chat" (one sequence), "pair" (PaliGemma: prompt and suffix) or "seq2seq" (Florence-2).
    """

    def __init__(self, processor: Any, folder: Path, max_tokens: int) -> None:
        self.processor, self.max_tokens = processor, max_tokens
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = hasattr(processor, "image_processor")
        config = read_object(folder / "config.json", CheckpointError, "Fetch or write it again.", nan=True)
        self._start = config.get("decoder_start_token_id") or (config.get("text_config") or {}).get(
            "decoder_start_token_id"
        )
        self.style = "chat"
        if config.get("is_encoder_decoder") or (config.get("text_config") or {}).get("is_encoder_decoder"):
            self.style = "seq2seq"
        elif type(processor).__name__ == "PaliGemmaProcessor":
            self.style = "pair"
        self.template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        special = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        self._special = re.compile("|".join(re.escape(each) for each in sorted(special, key=len, reverse=True)) or "$^")

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        found = {self.tokenizer.eos_token_id} - {None}
        if self.style == "chat":
            text, ((_, stop),) = self.rendered((Turn("user", ("a",)), Turn("assistant", ("b",))))
            known = {**self.tokenizer.get_vocab()}
            found |= {
                number for mark in self._special.findall(text[:stop])[-1:] if (number := known.get(mark)) is not None
            }
        return sorted(found)

    def decode(self, tokens: Tensor) -> list[str]:
        """Decode generated tokens, [batch, tokens], each row up to its end token."""
        ends = set(self.ends)
        rows = [list(takewhile(lambda token: token not in ends, row)) for row in tokens.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def check(self, turns: Sequence[Turn], row: Row) -> None:
        """Refuse a conversation that the model does not support.

        Raises:
            DataError: the model does not take its number of images or turns, or a text contains the model's image
                token.
        """
        images = sum(turn.images for turn in turns)
        mark = getattr(self.processor, "image_token", None) if self.takes_images else None
        if mark and any(mark in turn.text for turn in turns):
            raise row.error(
                f"a text contains {mark}, the model's token for an image. Write it differently, or leave the row out."
            )
        if images and not self.takes_images:
            raise row.error(f"it has {images} images, and the model takes text only. Use a model that takes images.")
        if self.style == "chat":
            return
        name = type(self.processor).__name__.removesuffix("Processor")
        if not images:
            raise row.error(f"it has no image, and a {name} needs one.")
        if len(turns) != 2:
            raise row.error(f"it is a conversation of {len(turns)} turns, and a {name} takes a question and an answer.")

    def batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the model's arguments, and "labels", [batch, tokens]: token ids in answers, -100 elsewhere.

        Sequences are padded on the right. Labels of style "seq2seq" are those of the decoder, [batch, answer tokens].

        Raises:
            DataError: the processor rejects a sample, or an image lies beyond `max_tokens`; the message names it.
        """
        if self.style == "chat":
            return self._chat(samples)
        texts = [turn.text for each in samples for turn in each.turns if turn.role == "user"]
        answers = [each.turns[-1].text.strip() for each in samples]
        images = [list(each.images) for each in samples]
        if self.style == "pair":
            marked = ["<image>" * len(each.images) + text for each, text in zip(samples, texts, strict=True)]
            return self._truncated(self._processed(samples, marked, images, suffix=answers), samples)
        found = self._processed(samples, texts, [image for each in images for image in each])
        whole = self.tokenizer("a")["input_ids"][-1] == self.tokenizer.eos_token_id
        end = "" if whole else self.tokenizer.eos_token or ""
        target = self.tokenizer(
            text=[answer + end for answer in answers],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            truncation=True,
            max_length=self.max_tokens,
        )
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
        filled = target["input_ids"]
        first = torch.full_like(filled[:, :1], self._start if self._start is not None else self.tokenizer.pad_token_id)
        return {**found, "decoder_input_ids": torch.cat([first, filled[:, :-1]], 1), "labels": labels}

    def _chat(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        rendered = [self.rendered(each.turns) for each in samples]
        texts = [text for text, _ in rendered]
        bos = self.tokenizer.bos_token
        held = bool(bos) and all(text.startswith(bos) for text in texts)
        plain = self.template is None or any(each.row.kind == "text" for each in samples)
        special = plain or (self.takes_images and not held)
        tokenized = _Tokenized()
        with _recording(self.processor, self.tokenizer, tokenized):
            images = [list(each.images) for each in samples]
            found = self._processed(
                samples, texts, images if any(images) else None, tokenized, add_special_tokens=special
            )
        labels = torch.full_like(found["input_ids"], IGNORED)
        for place, (text, spans) in enumerate(rendered):
            spans = expand_spans(text, tokenized.texts[place], spans, getattr(self.processor, "image_token", None))
            for start, end in spans:
                offsets = tokenized.offsets[place]
                touched = (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
                if len(answer := touched.nonzero().flatten()):
                    # All tokens in between, too: whitespace has no width if the tokenizer trims offsets.
                    whole = slice(int(answer[0]), int(answer[-1]) + 1)
                    labels[place, whole] = found["input_ids"][place, whole]
        labels = labels.masked_fill(found["attention_mask"] == 0, IGNORED)
        return self._truncated({**found, "labels": labels}, samples)

    def _processed(
        self,
        samples: Sequence[Sample],
        texts: list[str],
        images: Any,
        tokenized: _Tokenized | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        shared = {"padding": True, "padding_side": "right", "return_tensors": "pt", **options}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about the processor itself, which a user cannot fix
                if self.takes_images:
                    found = self.processor(text=texts, images=images, **shared)
                else:
                    found = _Recorder(self.tokenizer, tokenized or _Tokenized())(texts, **shared)
        except Exception as error:  # processors raise errors of any type
            places = " or ".join(dict.fromkeys(each.row.place for each in samples[:3]))
            more = "" if len(samples) <= 3 else f" or one of {len(samples) - 3} more"
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{places}{more}: the model's {type(self.processor).__name__} failed: {words}") from error
        return {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "offset_mapping"}

    def _truncated(self, found: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Truncate conversations to `max_tokens`, but never within an image."""
        most = self.max_tokens
        if found["input_ids"].shape[1] <= most:
            return found
        # Gemma's processor calls the mark in texts the image's token, and its tokenizer the tokens of the image itself.
        given = {getattr(each, "image_token_id", None) for each in (self.processor, self.tokenizer)} - {None}
        tokens = torch.tensor(sorted(given), dtype=torch.long)
        if bool((beyond := torch.isin(found["input_ids"][:, most:], tokens).any(1)).any()):
            row = samples[int(beyond.nonzero()[0])].row
            raise row.error(
                f"an image lies beyond {most} tokens, where conversations are truncated. Raise max_tokens, make images "
                "smaller, or leave the row out."
            )
        return {name: value[:, :most] if name in _PER_TOKEN else value for name, value in found.items()}

    def rendered(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation as text with image placeholders; return it with the positions of answers.

        An answer includes the template's end-of-turn token; if the last one has none, the end-of-text token, so that
        the model learns to stop.
        """
        answers = [turn.text.strip() for turn in turns if turn.role == "assistant"]
        marked = _with_marks(turns)
        pieces = _MARK.split(self._template(marked) if len(turns) > 1 or self.template is None else "\ue0000\ue001")
        text, spans, end = pieces[0], [], self.tokenizer.eos_token or ""
        for number, (which, after) in enumerate(zip(pieces[1::2], pieces[2::2], strict=True)):
            start = len(text)
            text += answers[int(which)]
            ended = self._special.match(after.lstrip())
            if ended is not None:
                stop = len(text) + len(after) - len(after.lstrip()) + ended.end()
            elif number == len(answers) - 1:
                text, after = text + end, ""
                stop = len(text)
            else:
                stop = len(text)
            text += after
            spans.append((start, stop))
        return text, spans

    def _template(self, turns: Sequence[Turn]) -> str:
        if self.template is None:
            mark = str(getattr(self.processor, "image_token", "<image>"))
            end = self.tokenizer.eos_token or ""
            texts = [
                _PLAIN[turn.role]
                + "".join(mark if part is IMAGE else str(part) for part in turn.parts)
                + (end if turn.role == "assistant" else "")
                for turn in turns
            ]
            return texts[0].removeprefix(_PLAIN["assistant"]) if len(texts) == 1 else "\n".join(texts)
        messages = [{"role": turn.role, "content": self._content(turn)} for turn in turns]
        try:
            return str(self.processor.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise their own errors, such as "roles must alternate"
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(f"The model's chat template rejects a conversation of {roles}: {error}") from error

    def _content(self, turn: Turn) -> Any:
        if not self.takes_images:
            return turn.text
        return [{"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in turn.parts]


def _with_marks(turns: Sequence[Turn]) -> list[Turn]:
    found, count = [], 0
    for turn in turns:
        if turn.role == "assistant":
            turn, count = replace(turn, parts=(f"\ue000{count}\ue001",)), count + 1
        found.append(turn)
    return found


def expand_spans(text: str, expanded: str, spans: Sequence[tuple[int, int]], mark: str | None) -> list[tuple[int, int]]:
    """Map spans of a text to their positions after image placeholders were expanded.

    Args:
        text: with placeholders.
        expanded: the same text with expanded placeholders.
        spans: parts of `text` without placeholders.
        mark: the image placeholder, or None.
    """
    if text == expanded or not mark:
        return list(spans)
    places: list[tuple[int, int]] = []  # start of each piece between marks, in the text and in the expanded one
    here = there = 0
    pieces = text.split(mark)
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        there = len(expanded) - len(piece) if last else expanded.index(piece, there)
        places.append((here, there))
        here, there = here + len(piece) + len(mark), there + len(piece)
    found = []
    for start, end in spans:
        own, other = max(place for place in places if place[0] <= start)
        found.append((start - own + other, end - own + other))
    return found


class _Tokenized:
    """The last texts of a tokenizer, with the offsets of their tokens, [tokens, 2] each."""

    texts: Sequence[str]
    offsets: Tensor


class _Recorder:
    """A tokenizer that records its inputs and the offsets of its tokens."""

    def __init__(self, tokenizer: Any, tokenized: _Tokenized) -> None:
        self._tokenizer, self._tokenized = tokenizer, tokenized

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        found = self._tokenizer(text, *args, **{**options, "return_offsets_mapping": True})
        self._tokenized.texts, self._tokenized.offsets = text, torch.as_tensor(found.pop("offset_mapping"))
        return found


@contextmanager
def _recording(processor: Any, tokenizer: Any, tokenized: _Tokenized) -> Iterator[None]:
    """Record the inputs of a processor's tokenizer within the block."""
    if processor is tokenizer:
        yield
        return
    processor.tokenizer = _Recorder(tokenizer, tokenized)
    try:
        yield
    finally:
        processor.tokenizer = tokenizer


def prompts(batch: Mapping[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Return the prompts of a batch for generation: everything before the last answer, padded on the left.

    Args:
        batch: of `ChatFormat.batch`.
        pad: the padding token.
    """
    labels = batch["labels"]
    rest = {name: value for name, value in batch.items() if name not in _PER_TOKEN and name != "decoder_input_ids"}
    if "decoder_input_ids" in batch:
        return {**rest, **{name: batch[name] for name in _PER_TOKEN if name in batch and name != "labels"}}
    answer = labels != IGNORED
    width = labels.shape[1]
    places = torch.arange(width, device=labels.device)
    last = torch.where(answer, places, -1).amax(1)
    # If the whole answer was truncated, all that is left is the prompt.
    last = torch.where(last < 0, (places * batch["attention_mask"]).amax(1), last)
    others = torch.where(~answer & (places <= last[:, None]), places, -1).amax(1)  # the last one before the last answer
    lengths = [max(1, int(each) + 1) for each in others]
    longest = max(lengths)
    cut: dict[str, Tensor] = {}
    for name in _PER_TOKEN:
        if name in batch and name != "labels":
            filler = _PADDED_WITH.get(name, pad)
            parts = [
                F.pad(batch[name][row, :length], (longest - length, 0), value=filler)
                for row, length in enumerate(lengths)
            ]
            cut[name] = torch.stack(parts)
    return {**rest, **cut}
