"""CLIP's texts: byte pairs from a folder or OpenAI's list, or any vocabulary that ends with the two words needed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from upop.data.clip_tokenizer import BEGIN, END, ClipCollator, load_clip_tokenizer
from upop.errors import DataError

MERGES = [("r", "e"), ("re", "d</w>"), ("a", "b")]


def words(merges: list[tuple[str, str]] = MERGES) -> list[str]:
    letters = list(bytes_to_unicode().values())
    return [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BEGIN, END]


def folder_of(path: Path, vocabulary: list[str]) -> Path:
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)))
    return path


def merge_list(path: Path, merges: list[str]) -> Path:
    file = path / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab"', *merges]).encode()))
    return file


def bert(path: Path, vocabulary: list[str]) -> Path:
    (path / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    return path


def test_byte_pairs_of_a_folder(tmp_path: Path) -> None:
    tokenizer = load_clip_tokenizer(folder_of(tmp_path, words()))
    assert len(tokenizer) == 512 + 3 + 2
    found = tokenizer(["Red  ab!", "red"], 77)
    assert [words()[number] for number in found["input_ids"][0]] == [BEGIN, "red</w>", "a", "b</w>", "!</w>", END]
    assert found["input_ids"][1].tolist() == [515, 513, 516, 0, 0, 0]
    assert found["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]


def test_openais_list_is_the_same_vocabulary(tmp_path: Path) -> None:
    ours = load_clip_tokenizer(folder_of(tmp_path, words()))
    theirs = load_clip_tokenizer(merge_list(tmp_path, [" ".join(merge) for merge in MERGES]))
    text = ["A red-ab café, isn't it? 12"]
    assert torch.equal(theirs(text, 77)["input_ids"], ours(text, 77)["input_ids"])
    assert len(theirs) == len(ours)


def test_long_texts_are_cut_and_end_all_the_same(tmp_path: Path) -> None:
    tokenizer = load_clip_tokenizer(folder_of(tmp_path, words()))
    found = tokenizer(["red " * 50], 12)["input_ids"][0].tolist()
    assert found == [515, *[513] * 10, 516]


def test_a_bert_vocabulary_serves_too(tmp_path: Path) -> None:
    tokenizer = load_clip_tokenizer(bert(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red"]))
    assert len(tokenizer) == 9
    assert tokenizer(["a red house"], 77)["input_ids"].tolist() == [[7, 5, 6, 1, 8]]


def test_a_batch(tmp_path: Path) -> None:
    tokenizer = load_clip_tokenizer(bert(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red"]))
    items = [{"image": torch.zeros(3, 4, 4), "number": 7, "caption": text} for text in ("a red", "a")]
    batch = ClipCollator(tokenizer, 9)(items)
    assert batch["input_ids"].tolist() == [[7, 5, 6, 8], [7, 5, 8, 0]]
    assert batch["ids"].tolist() == [7, 7]
    assert batch["images"].shape == (2, 3, 4, 4)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    for name in (tmp_path / "none", "./none", "pretrained/a/b", "none"):
        with pytest.raises(DataError, match=r"does not exist.*vocab\.json and merges\.txt"):
            load_clip_tokenizer(name)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty"):
        load_clip_tokenizer(empty)
    with pytest.raises(DataError, match="ids are 515 and 516"):
        load_clip_tokenizer(folder_of(tmp_path, [*words(), "late"]))
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_clip_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"not a list of merges of two.*'x y z'"):
        load_clip_tokenizer(merge_list(tmp_path, ["r e", "x y z"]))
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        load_clip_tokenizer(tmp_path / "bpe_simple_vocab_16e6.txt.gz")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(bytes(2**25), mtime=0), "more than"),  # some kilobytes, which unpack to 32 megabytes
        (gzip.compress(b"version\na b", mtime=0) + bytes(2**25), "more than"),  # padding, skipped byte by byte
        (gzip.compress(b"version\na b\nq r s", mtime=0), "not a list of merges of two"),
        (gzip.compress(b"version\nab cd\na b", mtime=0), "is not a valid list of merges"),
        (gzip.compress(b"", mtime=0), "cannot be read"),
        (gzip.compress(b"version\na b\n\xff \xff", mtime=0), "cannot be read"),
        (gzip.compress(b"version\na b\nab c" * 50, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_lists_of_merges_that_are_damaged(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load_clip_tokenizer(tmp_path / "bpe_simple_vocab_16e6.txt.gz")
