"""BLIP for VQA: padding, ranking and writing of answers, tied weights, and what pruning leaves of all that."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import runs
import upop
from upop.checkpoints.official import save_official
from upop.models.vqa import BlipVqa, VqaConfig, answer_losses

END = 2
SIZES = {**runs.TOWERS, "image_size": 32, "vocab_size": 60, "max_positions": 16, "drop_path": 0.0}


def tiny(seed: int = 0) -> BlipVqa:
    """A small model with random biases and norms, in float64."""
    torch.manual_seed(seed)
    model = BlipVqa(VqaConfig(**SIZES))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name.lower() and "weight" in name else 0.0, std=0.4)
    model.text_decoder.cls.predictions.bias.data[END] += 3  # some answers end early
    return model.double().eval()


def questions(count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images and questions of 3 to 8 tokens."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=draw, dtype=torch.float64)
    lengths = torch.randint(3, 9, (count, 1), generator=draw)
    lengths[0] = 8
    mask = (torch.arange(8) < lengths).long()
    return images, torch.randint(3, 50, (count, 8), generator=draw) * mask, mask


def listed(count: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Candidates of 1 to 4 tokens between a start and an end, no two with the same first token."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (count, 6), generator=draw)
    ids[:, 1] = 3 + torch.randperm(47, generator=draw)[:count]
    lengths = torch.randint(3, 7, (count, 1), generator=draw)
    places = torch.arange(6)
    mask = (places < lengths).long()
    return torch.where(places == lengths - 1, END, ids) * mask, mask


def batch_of(count: int) -> dict[str, Tensor]:
    """A training batch: one answer, two answers, one answer, ..."""
    images, question_ids, question_mask = questions(count)
    counts = 1 + torch.arange(count) % 2
    ids, mask = listed(int(counts.sum()), seed=5)
    return {
        "images": images,
        "question_ids": question_ids,
        "question_mask": question_mask,
        "answer_ids": ids,
        "answer_mask": mask,
        "answer_counts": counts,
    }


@torch.no_grad()
def naive_rank(model: BlipVqa, asked: tuple[Tensor, Tensor, Tensor], candidates: tuple[Tensor, Tensor], k: int) -> int:
    """One question, its candidates one at a time, nothing padded, the loss written out."""

    def log_probabilities(ids: Tensor) -> Tensor:
        ids, one = ids.unsqueeze(0), torch.tensor([1])
        return model(*asked, ids, torch.ones_like(ids), one)[0].log_softmax(-1)

    first = log_probabilities(torch.zeros(1, dtype=torch.long))[0]
    likeliest = sorted(range(len(candidates[0])), key=lambda place: -float(first[candidates[0][place, 1]]))[:k]
    losses = {}
    for place in likeliest:
        ids = candidates[0][place, : int(candidates[1][place].sum())]
        found = log_probabilities(ids)[:-1]
        exact = found.gather(1, ids[1:, None]).sum()
        losses[place] = -float(0.9 * exact + 0.1 * found.mean(1).sum())
    return min(losses, key=losses.__getitem__)


def alone(asked: tuple[Tensor, Tensor, Tensor], place: int) -> tuple[Tensor, Tensor, Tensor]:
    """One question of a batch, without its padding."""
    length = int(asked[2][place].sum())
    return asked[0][place : place + 1], asked[1][place : place + 1, :length], asked[2][place : place + 1, :length]


@torch.no_grad()
def ranked(
    model: BlipVqa, asked: tuple[Tensor, Tensor, Tensor], candidates: tuple[Tensor, Tensor], k: int, chunk: int = 1024
) -> list[int]:
    _, states = model.encode(*asked)
    return model.rank(states, asked[2], *candidates, k, chunk).tolist()


@torch.no_grad()
def written(model: BlipVqa, asked: tuple[Tensor, Tensor, Tensor]) -> list[list[int]]:
    """Generated answers up to their end."""
    _, states = model.encode(*asked)
    found = model.generate(states, asked[2], END).tolist()
    return [answer[: answer.index(END) + 1] if END in answer else answer for answer in found]


# --- what is computed


def test_each_answer_sees_its_own_question_and_no_padding() -> None:
    model, batch = tiny(), batch_of(4)
    asked = batch["images"], batch["question_ids"], batch["question_mask"]
    owners = torch.arange(4).repeat_interleave(batch["answer_counts"]).tolist()
    with torch.no_grad():
        found = model(**batch)
        for answer, question in enumerate(owners):
            length = int(batch["answer_mask"][answer].sum())
            ids = batch["answer_ids"][answer : answer + 1, :length]
            single = model(*alone(asked, question), ids, torch.ones_like(ids), torch.tensor([1]))
            torch.testing.assert_close(found[answer, :length], single[0])


def test_the_first_tokens_are_the_models_own() -> None:
    model, batch = tiny(), batch_of(2)
    others = {name: batch[name].clone() for name in ("question_ids", "answer_ids")}
    for ids in others.values():
        ids[:, 0] = 7
    with torch.no_grad():
        assert torch.equal(model(**batch), model(**{**batch, **others}))


def test_loss_of_an_answer_by_hand() -> None:
    logits = torch.randn(2, 4, 9)
    ids = torch.tensor([[1, 5, 2, 0], [1, 3, 6, 2]])
    found = answer_losses(logits, ids, (ids > 0).long())
    wanted = [(0, 0, 5), (0, 1, 2), (1, 0, 3), (1, 1, 6), (1, 2, 2)]
    sums = torch.zeros(2)
    for answer, place, token in wanted:
        chances = logits[answer, place].log_softmax(0)
        sums[answer] -= 0.9 * chances[token] + 0.1 * chances.mean()
    torch.testing.assert_close(found, sums)
    assert answer_losses(logits.bfloat16(), ids, (ids > 0).long()).dtype == torch.float32


def test_every_parameter_gets_a_gradient() -> None:
    model, batch = tiny().train(), batch_of(3)
    answer_losses(model(**batch), batch["answer_ids"], batch["answer_mask"]).sum().backward()
    assert not [name for name, part in model.named_parameters() if part.grad is None]


# --- ranking


@pytest.mark.parametrize("k", [1, 3, 7, 20, 999])
def test_ranking_is_that_of_one_pair_at_a_time(k: int) -> None:
    """The last k asks for more candidates than there are, which means all of them."""
    model, asked, candidates = tiny(), questions(6), listed(20)
    expected = [naive_rank(model, alone(asked, place), candidates, k) for place in range(6)]
    assert len(set(expected)) > 1
    assert ranked(model, asked, candidates, k) == expected


def test_candidates_may_begin_alike() -> None:
    model, asked, (ids, mask) = tiny(), questions(6), listed(20)
    ids[:, 1] = ids[:4, 1].repeat(5)
    expected = [naive_rank(model, alone(asked, place), (ids, mask), 20) for place in range(6)]
    assert ranked(model, asked, (ids, mask), 20) == expected


@pytest.mark.parametrize("chunk", [1, 5, 7, 64])
def test_chunks_bound_the_pairs_in_memory_and_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, candidates = tiny(), questions(5), listed(20)
    expected = ranked(model, asked, candidates, 9)
    pairs: list[int] = []
    decode = model.decode

    def counted(ids: Tensor, *given: Tensor) -> Tensor:
        pairs.append(len(ids))
        return decode(ids, *given)

    monkeypatch.setattr(model, "decode", counted)
    assert ranked(model, asked, candidates, 9, chunk) == expected
    assert pairs[0] == 5  # the first token of each question
    assert sum(pairs[1:]) == 5 * 9
    assert max(pairs[1:]) <= chunk


def test_long_candidates_cost_no_padding_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, candidates = tiny(), questions(5), listed(20)
    tokens: list[int] = []
    decode = model.decode

    def counted(ids: Tensor, *given: Tensor) -> Tensor:
        tokens.append(ids.numel())
        return decode(ids, *given)

    monkeypatch.setattr(model, "decode", counted)
    ranked(model, asked, candidates, 20, chunk=10)
    assert sum(tokens) <= 1.1 * 5 * int(candidates[1].sum()) + 5


# --- batches


def test_answers_do_not_depend_on_the_rest_of_the_batch() -> None:
    model, asked, candidates = tiny(), questions(6), listed(20)
    chosen, said = ranked(model, asked, candidates, 9), written(model, asked)
    for place in range(6):
        assert ranked(model, alone(asked, place), candidates, 9) == [chosen[place]]
        assert written(model, alone(asked, place)) == [said[place]]
    wider = asked[0], *(torch.cat([part, torch.zeros(6, 3, dtype=torch.long)], 1) for part in asked[1:])
    assert ranked(model, wider, candidates, 9) == chosen
    assert written(model, wider) == said


def test_generated_answers_start_and_end_and_are_short() -> None:
    model, asked = tiny(), questions(12)
    with torch.no_grad():
        found = model.generate(model.encode(*asked)[1], asked[2], END)
    assert found[:, 0].eq(58).all()  # [DEC]
    assert found.shape[1] <= 10
    lengths = {len(answer) for answer in written(model, asked)}
    assert len(lengths) > 1
    ended = found.eq(END).long().cumsum(1) - found.eq(END).long()
    assert found[ended > 0].eq(0).all()  # padding, and nothing else, comes after an end


def test_generation_with_cache_is_that_without() -> None:
    model, asked = tiny(), questions(6)
    with torch.no_grad():
        _, states = model.encode(*asked)
        begin = torch.full((6, 1), 58)
        plain = model.text_decoder.generate(
            input_ids=begin,
            attention_mask=torch.ones_like(begin),
            encoder_hidden_states=states,
            encoder_attention_mask=asked[2],
            max_length=10,
            min_length=1,
            num_beams=3,
            do_sample=False,
            use_cache=False,
            eos_token_id=END,
            pad_token_id=0,
        )
        assert torch.equal(model.generate(states, asked[2], END), plain)


# --- weights, and pruning


def half(model: nn.Module) -> dict[str, list[int]]:
    return {group.name: list(range(1, 1 + group.size // 2)) for group in upop.find_groups(model)}


def assert_tied(model: nn.Module) -> None:
    assert isinstance(model, BlipVqa)
    head = model.text_decoder.cls.predictions
    assert head.decoder.weight is model.text_decoder.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias
    names = [name for name, _ in model.named_parameters() if "word_embeddings" in name or "predictions.decoder" in name]
    assert names == [f"text_{part}embeddings.word_embeddings.weight" for part in ("encoder.", "decoder.bert.")]


def test_the_decoders_embedding_is_its_output_layer_whatever_is_done(tmp_path: Path) -> None:
    model, batch = tiny().float(), batch_of(3)
    batch["images"] = batch["images"].float()
    assert_tied(model)
    upop.shrink(model, half(model), verify=batch)
    assert_tied(model)
    upop.save(model, tmp_path / "small")
    save_official("vqa", model, tmp_path / "small.pth")
    published = upop.load_official("vqa", tmp_path / "small.pth", **{k: v for k, v in SIZES.items() if "_" in k})
    for again in (upop.load(tmp_path / "small"), published, copy.deepcopy(model)):
        assert_tied(again)
        with torch.no_grad():
            torch.testing.assert_close(again(**batch), model(**batch), rtol=1e-5, atol=1e-5)
    # One step of training moves both names.
    again = upop.load(tmp_path / "small").train()
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    again(**batch).square().mean().backward()
    optimizer.step()
    assert_tied(again)
    state = again.state_dict()
    words = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(state["text_decoder.cls.predictions.decoder.weight"], words)
    assert not torch.equal(words, model.state_dict()["text_decoder.bert.embeddings.word_embeddings.weight"])


def test_a_state_dict_makes_another_model_the_same() -> None:
    model, other, batch = tiny(), tiny(seed=9), batch_of(2)
    with torch.no_grad():
        assert not torch.equal(model(**batch), other(**batch))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(**batch), other(**batch))


@pytest.mark.slow
def test_answers_of_the_searched_model_are_those_of_the_shrunken_one() -> None:
    model, batch = tiny(), batch_of(4)
    asked, candidates = questions(12, seed=6), listed(20)
    before = ranked(model, asked, candidates, 9), written(model, asked)
    pruner = upop.Pruner(model.train(), 0.5, 3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        answer_losses(model(**batch), batch["answer_ids"], batch["answer_mask"]).mean().backward()
        pruner.step()
        optimizer.step()
    model.eval()
    assert_tied(model)
    masked = ranked(model, asked, candidates, 9), written(model, asked)
    assert masked != before
    pruner.shrink(verify=batch)
    assert (ranked(model, asked, candidates, 9), written(model, asked)) == masked
