"""Word embeddings without rows that a task never uses: exact on its texts, and tokenizer and heads follow."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import upop
from pruning.families import randomise
from upop.errors import SettingError

TEXTS = ["a red circle above a blue square", "two green triangles", "the circle is red", "a blue circle"]
MORE = ["mountains and rivers", "yellow stars beneath the sky", "nothing of this is used", "triangular shapes", *TEXTS]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    trainer: Any
    if kind == "wordpiece":
        held = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL)
        held.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "bpe":
        held = Tokenizer(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
        held.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        held = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="[UNK]")
        held.pre_tokenizer = pre_tokenizers.Metaspace()
    held.train_from_iterator(MORE * 3, trainer)
    ends = [(name, held.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    held.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=held, mask_token="[MASK]", **names)


def llama(words: int, **settings: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = LlamaConfig(**sizes, vocab_size=words, pad_token_id=0, bos_token_id=2, eos_token_id=words - 1, **settings)
    return randomised(LlamaForCausalLM(config))


def bert(words: int) -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return randomised(BertForMaskedLM(BertConfig(**sizes, vocab_size=words, pad_token_id=0)))


def t5(words: int) -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    return randomised(T5ForConditionalGeneration(T5Config(**sizes, **ends, vocab_size=words)))


def randomised(model: Any) -> Any:
    model.eval()
    randomise(model)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("wordpiece", bert),
        ("bpe", lambda words: llama(words, tie_word_embeddings=True)),
        ("unigram", t5),
        pytest.param("bpe", llama, marks=pytest.mark.slow),
    ],
)
def test_texts_of_the_vocabulary_are_computed_as_before(kind: str, build: Any, tmp_path: Path) -> None:
    words = tokenizer(kind)
    model = build(len(words) + 3)  # as models have rows that no token has
    dense, parameters = copy.deepcopy(model), {name: id(each) for name, each in model.named_parameters()}
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    found = upop.reduce_vocabulary(model, tmp_path / "texts.txt", words)
    assert len(found.kept) < found.size == len(words) + 3
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == len(found.kept)
    assert {name: id(each) for name, each in model.named_parameters()} == parameters  # the same objects
    upop.save(model, tmp_path / "saved", tokenizer=found.tokenizer)
    again: Any = upop.load(tmp_path / "saved")
    fewer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        old, new = (each(text, return_tensors="pt")["input_ids"] for each in (words, fewer))
        assert torch.equal(found.encode(old), new)
        assert torch.equal(found.decode(new), old)
        assert fewer.decode(new[0]) == words.decode(old[0])
        expected = logits(dense, old)[..., list(found.kept)]
        for each in (model, again):
            torch.testing.assert_close(logits(each, new), expected, rtol=1e-4, atol=1e-4)


def test_a_table_of_as_many_positions_stays() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = randomised(BertForMaskedLM(BertConfig(**sizes, vocab_size=32, max_position_embeddings=32)))
    upop.reduce_vocabulary(model, range(10))
    assert model.bert.embeddings.position_embeddings.weight.shape == (32, 16)
    assert model.bert.embeddings.word_embeddings.weight.shape == (10, 16)


def test_a_cut_model_has_fewer_words_too_and_is_loaded_plainly(tmp_path: Path) -> None:
    model = llama(60)
    upop.shrink(model, {f"model.layers.{at}.mlp": range(at, 10 + at) for at in (0, 1)})
    dense = copy.deepcopy(model)
    found = upop.reduce_vocabulary(model, [5, 7, 7, 30])
    assert found.kept == (0, 2, 5, 7, 30, 59)  # with those that the configuration names
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 5)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 5)
    ids = torch.tensor([[2, 7, 30, 5]])
    upop.save(model, tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(plain, found.encode(ids)), logits(dense, ids)[..., list(found.kept)])
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["vocab_size"] == 6
    with pytest.raises(SettingError, match="Token 8 was removed"):
        found.encode(torch.tensor([[2, 8]]))
    loss = model(input_ids=found.encode(ids), labels=found.encode(ids)).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (6, 16)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "neither texts nor tokens"),
        (["a text"], "without a tokenizer"),
        ([3, 99], "Token id 99 is not in the model's vocabulary of 60"),
        ([3, None], "something else"),
        ("absent.txt", "cannot be read"),
    ],
)
def test_what_names_no_words_is_refused(given: Any, said: str) -> None:
    model = llama(60)
    with pytest.raises(SettingError, match=said):
        upop.reduce_vocabulary(model, given)
    assert model.config.vocab_size == 60
