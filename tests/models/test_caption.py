"""BLIP for captioning: how captions are made, what the loss counts, and the tied weights of the decoder."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs
import upop
from pruning.families import loss_of, uneven_plan
from upop.checkpoints.official import save_official
from upop.models.caption import BlipCaption, CaptionConfig, caption_loss

SIZES = {**runs.TOWERS, "image_size": 32, "vocab_size": 60, "max_positions": 24}
BEGIN, END, PROMPT = 58, 5, [7, 8]
WORDS, OUTPUT = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"


def tiny(seed: int = 0, end_bias: float = 4.0) -> BlipCaption:
    """A small model with random biases and norms; a higher bias ends captions earlier."""
    torch.manual_seed(seed)
    model = BlipCaption(CaptionConfig(**SIZES))
    for name, parameter in model.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=0.3)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[END] += end_bias
    return model.eval()


def random_images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def captions(count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    words = torch.randint(9, 58, (count, 8), generator=draw)
    mask = torch.ones_like(words)
    mask[1::2, 6:] = 0
    return {"images": random_images(count), "input_ids": words, "attention_mask": mask}


# --- captions


def next_words(model: BlipCaption, image: Tensor, tokens: list[int], min_length: int) -> Tensor:
    """Log-probabilities of the word after `tokens`, from a whole forward pass without a cache."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        found = model(image.unsqueeze(0), ids, torch.ones_like(ids))[0, -1].log_softmax(-1)
    if len(tokens) < min_length:
        found[END] = -torch.inf
    return found


def plain_beam_search(model: BlipCaption, image: Tensor, max_length: int, min_length: int, beams: int) -> list[int]:
    """One image at a time, as the published models do: the score of a text is its mean over all its tokens."""
    running: list[tuple[float, list[int]]] = [(0.0, [BEGIN, *PROMPT])]
    finished: list[tuple[float, list[int]]] = []
    done = False
    while not done and len(running[0][1]) < max_length:
        length = len(running[0][1])
        found = [
            (score + float(value), [*tokens, word])
            for score, tokens in running
            for word, value in enumerate(next_words(model, image, tokens, min_length))
        ]
        found = sorted(found, key=lambda one: -one[0])[: 2 * beams]
        finished += [(score / length, tokens) for score, tokens in found[:beams] if tokens[-1] == END]
        finished = sorted(finished, key=lambda one: -one[0])[:beams]
        running = [one for one in found if one[1][-1] != END][:beams]
        done = len(finished) == beams and finished[-1][0] >= found[0][0] / length
    if not done:
        finished += [(score / len(tokens), tokens) for score, tokens in running]
    return max(finished, key=lambda one: one[0])[1]


@pytest.mark.parametrize(("beams", "min_length", "end_bias"), [(3, 5, 4.0), (3, 5, 2.0), (2, 9, 6.0), (5, 0, 4.0)])
def test_beam_search_with_its_cache_is_a_plain_one(beams: int, min_length: int, end_bias: float) -> None:
    lengths = set()
    for seed in range(3):
        model, images = tiny(seed, end_bias), random_images(4, seed)
        found = model.generate(images, PROMPT, END, num_beams=beams, max_length=12, min_length=min_length)
        for image, row in zip(images, found.tolist(), strict=True):
            expected = plain_beam_search(model, image, 12, min_length, beams)
            assert row == expected + [0] * (len(row) - len(expected))
            lengths.add(len(expected))
    assert len(lengths) > 1


def test_one_beam_is_greedy() -> None:
    model, images = tiny(), random_images(4)
    found = model.generate(images, PROMPT, END, num_beams=1, max_length=12)
    for image, row in zip(images, found.tolist(), strict=True):
        tokens = [BEGIN, *PROMPT]
        while len(tokens) < 12 and tokens[-1] != END:
            tokens.append(int(next_words(model, image, tokens, 5).argmax()))
        assert row == tokens + [0] * (len(row) - len(tokens))


def test_sampled_words_come_from_the_nucleus_and_from_the_seed() -> None:
    model, images = tiny(end_bias=1.0), random_images(6)

    def sampled(seed: int, top_p: float) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(images, PROMPT, END, sample=True, top_p=top_p, max_length=12)

    first = sampled(3, 0.7)
    assert torch.equal(first, sampled(3, 0.7))
    assert any(sampled(seed, 0.7).tolist() != first.tolist() for seed in range(4, 7))
    outside_of_the_best = 0
    for image, row in zip(images, first.tolist(), strict=True):
        for place in range(3, len(row)):
            if 0 in row[:place] or END in row[:place]:
                break
            likely = next_words(model, image, row[:place], 5).exp()
            # Likelier words than this one fill less than the nucleus.
            assert float(likely[likely > likely[row[place]]].sum()) < 0.7
            outside_of_the_best += int(row[place] != int(likely.argmax()))
    assert outside_of_the_best > 5
    greedy = model.generate(images, PROMPT, END, num_beams=1, max_length=12)
    assert torch.equal(sampled(0, 1e-6), greedy)


@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}, {"sample": True}], ids=str)
@pytest.mark.parametrize(("shortest", "longest"), [(5, 20), (9, 9), (0, 4), (12, 14)])
def test_lengths_are_kept(how: dict[str, Any], shortest: int, longest: int) -> None:
    for end_bias in (-9.0, 20.0):
        found = tiny(end_bias=end_bias).generate(
            random_images(3), PROMPT, END, max_length=longest, min_length=shortest, **how
        )
        assert found.shape[1] <= longest
        for row in found.tolist():
            assert row[:3] == [BEGIN, *PROMPT]
            place = row.index(END) if END in row else len(row)
            assert place >= min(shortest, longest)
            assert not any(row[place + 1 :])
            assert (END in row) is (end_bias > 0 and longest > max(shortest, 3))


def test_a_caption_without_a_prompt() -> None:
    found = tiny().generate(random_images(2), [], END, max_length=8)
    assert found[:, 0].tolist() == [BEGIN, BEGIN]


def test_a_repeated_word_can_be_made_less_likely() -> None:
    def repeats(penalty: float) -> int:
        found = tiny(end_bias=-9.0).generate(random_images(4), PROMPT, END, num_beams=1, repetition_penalty=penalty)
        return sum(len(row) - len(set(row)) for row in found.tolist())

    assert repeats(5.0) < repeats(1.0)


# --- the loss


def test_the_first_token_is_always_the_begin_token() -> None:
    model, batch = tiny(), captions(2)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 0] = BEGIN
    assert torch.equal(model(**batch), model(**other))


def test_padding_and_later_words_change_nothing_before_them() -> None:
    model, batch = tiny(), captions(2)
    longer = {name: part if name == "images" else F.pad(part, (0, 3)) for name, part in batch.items()}
    with torch.no_grad():
        found, expected = model(**longer), model(**batch)
    # Sums of another length are rounded otherwise: relative to the largest logit, as everywhere.
    largest = float(expected.abs().max())
    torch.testing.assert_close(found[0, :8], expected[0], rtol=0, atol=1e-5 * largest)
    torch.testing.assert_close(found[1, :6], expected[1, :6], rtol=0, atol=1e-5 * largest)


def test_loss_is_the_mean_over_the_words_to_be_said() -> None:
    logits = torch.randn(2, 5, 60)
    labels = torch.tensor([[-100, -100, 9, 10, 5], [-100, -100, 11, 5, -100]])
    losses = []
    for row, place, word in ((0, 1, 9), (0, 2, 10), (0, 3, 5), (1, 1, 11), (1, 2, 5)):
        said = logits[row, place].log_softmax(-1)
        losses.append(-0.9 * said[word] - 0.1 * said.mean())  # smoothed by 0.1
    torch.testing.assert_close(caption_loss(logits, labels), torch.stack(losses).mean())
    assert caption_loss(logits.bfloat16(), labels).dtype == torch.float32
    assert caption_loss(logits.double(), labels).dtype == torch.float64


# --- pruning, tied weights, files


def assert_tied(model: nn.Module) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    assert named[WORDS] is named[OUTPUT]
    assert named["text_decoder.cls.predictions.bias"] is named["text_decoder.cls.predictions.decoder.bias"]
    assert upop.count_parameters(model) == sum(part.numel() for part in {id(p): p for p in named.values()}.values())


def in_our_folder(model: nn.Module, path: Path) -> nn.Module:
    upop.save(model, path)
    return upop.load(path)


def in_a_published_file(model: nn.Module, path: Path) -> nn.Module:
    save_official("caption", model, path)
    state = torch.load(path, weights_only=True)["model"]
    assert WORDS in state
    assert OUTPUT in state
    sizes = {name: SIZES[name] for name in ("vision_heads", "text_heads", "vision_mlp", "text_mlp")}
    return upop.load_official("caption", path, **sizes, dropout=0.0)


def in_a_state_dict(model: nn.Module, path: Path) -> nn.Module:
    other = tiny(seed=9)
    upop.shrink(other, {group.name: range(group.size) for group in upop.find_groups(model)})
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kept", [in_our_folder, in_a_published_file, in_a_state_dict])
def test_word_embedding_and_output_layer_stay_one(kept: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    model, batch = tiny(), captions(2)
    assert_tied(model)
    for cut in (False, True):
        if cut:
            upop.shrink(model, uneven_plan(upop.find_groups(model)), verify=batch)
            assert_tied(model)
        again = kept(model, tmp_path / str(cut))
        assert isinstance(again, BlipCaption)
        assert_tied(again)
        with torch.no_grad():
            torch.testing.assert_close(again(**batch), model(**batch), rtol=1e-5, atol=1e-5)
        assert torch.equal(again.generate(random_images(3), PROMPT, END), model.generate(random_images(3), PROMPT, END))
    # What is trained on is still one tensor.
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    loss_of(again.train()(**batch)).backward()
    optimizer.step()
    assert_tied(again)
    assert not torch.equal(again.get_parameter(WORDS), model.get_parameter(WORDS))


def search(model: nn.Module, pruner: upop.Pruner, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model(**{**captions(2), "images": random_images(2, step).double()})).backward()
        pruner.step()
        optimizer.step()


def test_masked_captions_are_the_shrunken_ones() -> None:
    model = tiny().double()
    pruner = upop.Pruner(model, 0.5, 4, 2)
    assert len(pruner.groups) == 2 * 2 + 2 * 3  # cross-attention is a group of its own
    search(model, pruner, range(4))
    asked: list[dict[str, Any]] = [{"num_beams": 3}, {"num_beams": 1}, {"sample": True}]

    def made() -> list[Tensor]:
        torch.manual_seed(4)
        return [model.generate(random_images(5).double(), PROMPT, END, max_length=14, **how) for how in asked]

    masked = made()
    before = upop.count_parameters(model)
    pruner.shrink(verify={**captions(2), "images": random_images(2).double()})
    assert upop.count_parameters(model) < before
    assert_tied(model)
    for found, expected in zip(made(), masked, strict=True):
        assert torch.equal(found, expected)


def test_a_resumed_search_keeps_the_tie_and_ends_alike() -> None:
    whole = tiny().double()
    expected = upop.Pruner(whole, 0.5, 4, 1)
    search(whole, expected, range(4))
    first = tiny().double()
    pruner = upop.Pruner(first, 0.5, 4, 1)
    search(first, pruner, range(2))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "search": pruner.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = tiny(seed=5).double()
    second.load_state_dict(saved["model"])
    resumed = upop.Pruner(second, 0.5, 4, 1)
    resumed.load_state_dict(saved["search"])
    search(second, resumed, range(2, 4))
    assert resumed.plan() == expected.plan()
    resumed.shrink()
    assert_tied(second)
