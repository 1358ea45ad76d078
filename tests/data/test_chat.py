"""Conversations become batches by a model's own template and processor, and answers alone are labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import processors
from torch import Tensor

import chat_models
import upop
from tiers import mostly_slow
from upop.data.chat import IGNORED, ChatFormat, Sample, conversation, prompts
from upop.data.rows import Rows, read_rows
from upop.errors import DataError


def read(folder: Path, *rows: Any) -> Rows:
    for number in range(2):
        Image.new("RGB", (40, 24), (90 * number, 0, 0)).save(folder / f"{number}.png")
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_rows(file)


def batched(format: ChatFormat, rows: Rows) -> dict[str, Tensor]:
    samples = [Sample(row, conversation(row, "Describe the image."), tuple(row.open_images())) for row in rows]
    for sample in samples:
        format.check(sample.turns, sample.row)
    return format.batch(samples)


def labelled(format: ChatFormat, batch: dict[str, Tensor]) -> list[str]:
    return [format.tokenizer.decode(row[row != IGNORED]).strip() for row in batch["labels"]]


def made(family: str, folder: Path) -> ChatFormat:
    chat_models.FAMILIES[family](folder)
    return ChatFormat(transformers.AutoProcessor.from_pretrained(folder), folder, 512)


@pytest.mark.parametrize("family", mostly_slow(sorted(chat_models.FAMILIES), "smolvlm", "llama"))
def test_answers_alone_are_labels(family: str, tmp_path: Path) -> None:
    format = made(family, tmp_path / family)
    image = {"image": "1.png"} if format.takes_images else {}
    rows = read(
        tmp_path,
        {"question": "What colour is this?", "answer": "red", **image},
        {"question": "What is it?", "answer": "It is a blue circle.", **image},
    )
    batch = batched(format, rows)
    for text, answer in zip(labelled(format, batch), ("red", "It is a blue circle."), strict=True):
        assert answer in text
        rest = text.replace(answer, "").removeprefix("<s>")
        assert rest in ("</s>", "<|end|>", "<end_of_utterance>")  # by which the model learns to stop
    model = upop.load(tmp_path / family)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**inputs).logits.shape[:2] == batch["labels"].shape
    asked = prompts(batch, format.tokenizer.pad_token_id)
    assert "red" not in format.tokenizer.decode(asked["input_ids"][0])
    if format.style != "seq2seq":  # what stands before the answer is the same, whatever fills up
        place = int((batch["labels"][0] != IGNORED).nonzero()[0])
        described = asked["input_ids"][0][asked["attention_mask"][0] == 1]
        assert torch.equal(described, batch["input_ids"][0, :place])


@pytest.mark.parametrize(
    "family", mostly_slow(["llava", "smolvlm", "idefics3", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"], "llava")
)
def test_all_answers_of_a_conversation_count(family: str, tmp_path: Path) -> None:
    format = made(family, tmp_path / family)
    said = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a red circle"},
        {"from": "human", "value": "Same shape?\n<image>"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "never answered"},
    ]
    alone = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello there"}]
    rows = read(tmp_path, {"conversations": said, "image": ["0.png", "1.png"]}, {"conversations": alone})
    batch = batched(format, rows)
    both, one = labelled(format, batch)
    assert both.startswith("a red circle") and "yes" in both and one.startswith("Hello there")
    assert all(word not in both + one for word in ("What", "Same", "never"))
    asked = prompts(batch, format.tokenizer.pad_token_id)
    text = format.tokenizer.decode(asked["input_ids"][0])
    assert "a red circle" in text and "Same shape?" in text and "yes" not in text


def test_answers_are_whole_where_a_tokenizer_trims_its_offsets(tmp_path: Path) -> None:
    format = made("llama", tmp_path / "llama")
    format.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    batch = batched(format, read(tmp_path, {"question": "What is it?", "answer": "Yes \u65e5\n\n  one\n\ntwo"}))
    assert labelled(format, batch) == ["Yes \u65e5\n\n  one\n\ntwo<|end|>"]
    asked = prompts(batch, format.tokenizer.pad_token_id)
    assert format.tokenizer.decode(asked["input_ids"][0]).endswith("assistant\n")


def test_marks_of_images_in_questions(tmp_path: Path) -> None:
    format = made("llava", tmp_path / "llava")
    told = {"answer": "red", "image": "0.png"}
    rows = read(tmp_path, {"question": "What is <image> ?", **told}, {"question": "What is it?", **told})
    ids = batched(format, rows)["input_ids"]
    assert ((ids == format.processor.image_token_id).sum(1) == 16).all()
    inside, before = (format.tokenizer.decode(row) for row in ids)
    assert inside.index("What is") < inside.index("<image>") and before.index("What is") > before.index("<image>")
    with pytest.raises(DataError, match=r"line 1: the question has 2 <image> marks, but the row has 1 images"):
        batched(format, read(tmp_path, {"question": "<image> <image> What?", **told}))
    with pytest.raises(DataError, match=r"line 1: a text contains <image>, the model's token for an image"):
        batched(format, read(tmp_path, {"question": "What is <image> of HTML?", "answer": "a mark"}))


def test_a_model_without_template(tmp_path: Path) -> None:
    chat_models.llama(tmp_path / "plain", template=None)
    format = ChatFormat(transformers.AutoProcessor.from_pretrained(tmp_path / "plain"), tmp_path / "plain", 512)
    batch = batched(format, read(tmp_path, {"question": "What is it?", "answer": "red"}))
    assert format.tokenizer.decode(batch["input_ids"][0]) == "<s>User: What is it?\nAssistant: red</s>"
    assert labelled(format, batch) == ["red</s>"]
    batch = batched(format, read(tmp_path, {"text": "It is a red circle."}))
    assert labelled(format, batch) == ["It is a red circle.</s>"]


def test_what_a_model_cannot_take_is_named(tmp_path: Path) -> None:
    words, sees = made("llama", tmp_path / "a"), made("paligemma", tmp_path / "b")
    with pytest.raises(DataError, match=r"line 1: it has 1 images, and the model takes text only"):
        batched(words, read(tmp_path, {"question": "What?", "answer": "red", "image": "0.png"}))
    with pytest.raises(DataError, match=r"line 1: it has no image, and a PaliGemma needs one"):
        batched(sees, read(tmp_path, {"question": "What?", "answer": "red"}))
    for family, most in (("smolvlm", 20), ("gemma3", 12)):
        short = made(family, tmp_path / family)
        short.max_tokens = most
        with pytest.raises(DataError, match=f"an image lies beyond {most} tokens"):
            batched(short, read(tmp_path, {"question": "What?", "answer": "red", "image": "0.png"}))
