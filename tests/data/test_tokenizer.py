"""The tokenizer: the generated vocabulary, the two added tokens, and clear errors, without a network."""

import string
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upop.data.tokenizer import enc_token_id, load_tokenizer
from upop.demo import Summary
from upop.demo.vocabulary import WORDS, vocabulary
from upop.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(generated: Summary):
    return load_tokenizer(generated.tokenizer)


def test_two_tokens_are_added_at_the_end(tokenizer):
    size = len(vocabulary())
    assert len(tokenizer) == size + 2
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [size, size + 1]
    assert tokenizer.bos_token_id == size
    assert enc_token_id(tokenizer) == size + 1


def test_the_vocabulary_is_laid_out_as_berts_and_has_no_repeats(tokenizer):
    entries = vocabulary()
    assert entries[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(entries)) == len(entries) < 500
    assert tokenizer.convert_ids_to_tokens(list(range(len(entries)))) == entries
    assert tokenizer.pad_token_id == 0


def test_each_word_of_the_sentences_is_one_token(tokenizer):
    assert tokenizer.tokenize(" ".join(WORDS)) == list(WORDS)


@given(text=st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " ", max_size=80))
def test_no_ascii_text_is_unknown(tokenizer, text: str):
    assert tokenizer.unk_token_id not in tokenizer(text.replace("[UNK]", ""))["input_ids"]


def test_a_saved_tokenizer_loads_again_without_growing(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(again) == len(tokenizer)
    assert enc_token_id(again) == enc_token_id(tokenizer)
    assert again("the left image")["input_ids"] == tokenizer("the left image")["input_ids"]


@pytest.mark.parametrize("name", ["pretrained/bert-base-uncased", "./nowhere", "/no/such/folder", "~/nothing"])
def test_a_missing_folder_fails_at_once(name: str):
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"does not exist.*vocab\.txt or tokenizer\.json") as caught:
        load_tokenizer(name)
    assert name in str(caught.value)
    assert time.perf_counter() - start < 2


def test_a_misspelt_folder_gets_a_hint(generated: Summary):
    with pytest.raises(DataError, match="did you mean 'tokenizer'"):
        load_tokenizer(generated.folder / "tokeniser")


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds neither vocab\.txt nor tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"cat\ndog\n", b"\xff\xfe\x00\x01"])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"(is not a BERT vocabulary|cannot be read)"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_json_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(generated: Summary):
    with pytest.raises(DataError, match="is a file"):
        load_tokenizer(generated.tokenizer / "vocab.txt")


def test_a_hub_that_does_not_answer_is_a_data_error_soon(monkeypatch: pytest.MonkeyPatch):
    def unreachable(name: str, timeout: float) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"'no-such-tokenizer'.*no route to host.*folder with vocab\.txt"):
        load_tokenizer("no-such-tokenizer")
    assert time.perf_counter() - start < 5
