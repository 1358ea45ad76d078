"""CLIP with CrossGET: what the published code gets wrong and ours does not, and what training does to a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import upop
from upop.errors import SettingError
from upop.models.checkpointing import checkpoint_blocks
from upop.models.crossget import CrossGetClip, CrossGetConfig

VISION = {"image_size": 32, "patch_size": 8, "vision_width": 32, "vision_depth": 3, "vision_heads": 4, "vision_mlp": 64}
TEXT = {"text_width": 24, "text_depth": 3, "text_heads": 2, "text_mlp": 48, "vocab_size": 60, "max_positions": 16}
SIZES = {**VISION, **TEXT, "embed_dim": 16}


def tiny(**given: object) -> CrossGetClip:
    torch.manual_seed(0)
    model = CrossGetClip(CrossGetConfig(**{**SIZES, "rv": 4, "rl": 2, **given}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_" in name or "bias" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def texts(*lengths: int, padding: int = 0) -> Tensor:
    """Texts of so many words between the first and the last one, with something behind them."""
    torch.manual_seed(1)
    ids = torch.full((len(lengths), 16), padding)
    for row, length in enumerate(lengths):
        ids[row, : length + 2] = torch.tensor([58, *torch.randint(1, 58, (length,)), 59])
    return ids


def images(count: int = 3) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(count, 3, 32, 32)


def test_what_follows_a_text_changes_nothing_unless_asked_for_as_published() -> None:
    ids, others = texts(3, 9, 14), texts(3, 9, 14, padding=7)
    with torch.no_grad():
        model = tiny(rl=4)
        assert torch.equal(model.encode_text(ids).features, model.encode_text(others).features)
        model = tiny(rl=4, merge_padding=True)
        assert not torch.allclose(model.encode_text(ids).features, model.encode_text(others).features)


def test_without_cross_tokens_it_is_a_clip_that_merges_image_tokens_like_any_other() -> None:
    model, ids = tiny(cross=False, rv=0, rl=0), texts(3, 9, 14)
    with torch.no_grad():
        plain, words = model.encode_image(images()).features, model.encode_text(ids)
        tower = model.text_model(ids)
        torch.testing.assert_close(words.features, model.text_projection(tower.pooler_output))
        upop.merge_tokens(model, [4, 3, 2])
        merged = model.encode_image(images())
        assert [len(match.source[0]) for match in merged.flow.matches if match is not None] == [4, 3, 2]
        assert not torch.allclose(merged.features, plain)
        upop.merge_tokens(model, 0)
        torch.testing.assert_close(model.encode_image(images()).features, plain)


def test_a_short_text_loses_its_padding_before_its_words() -> None:
    ids = texts(3, 4)
    with torch.no_grad():
        reduced, whole = tiny(rl=3).encode_text(ids), tiny(rl=0).encode_text(ids)
    assert len(reduced.flow.matches) == 3
    torch.testing.assert_close(reduced.features, whole.features)


def test_the_end_of_a_text_is_found_in_half_precision() -> None:
    model = tiny(vocab_size=49408, merge_padding=True).bfloat16()
    ids = texts(5, 11)
    ids[ids == 59] = 49407
    ids[ids == 58] = 49406
    with torch.no_grad():
        found = model.encode_text(ids)
    places = ids.argmax(1)
    for match in found.flow.matches:
        assert match is not None
        assert not (match.source == places.unsqueeze(1)).any()
        places = (match.kept == places.unsqueeze(1)).int().argmax(1)
    assert torch.equal(found.flow.guide, places)
    assert found.features.isfinite().all()


def test_towers_of_unequal_depth_are_trained_together() -> None:
    model = tiny(vision_depth=4, text_depth=2).train()
    losses = model(images(), texts(3, 5, 9), torch.tensor([0, 1, 1]))
    (losses.contrastive + losses.cross).backward()
    for tower, name in ((model.vision_model, "cross_image"), (model.text_model, "cross_text")):
        gradient = getattr(tower.encoder, name).grad
        assert gradient.abs().sum(2).gt(0).all()  # every layer's


def test_checkpointing_changes_no_loss_and_no_gradient() -> None:
    def trained(model: CrossGetClip) -> tuple[Tensor, list[Tensor]]:
        losses = model.train()(images(), texts(3, 5, 9), torch.arange(3))
        first = sum(losses)
        losses = model(images().flip(0), texts(9, 2, 5), torch.arange(3))  # another pass before the backward one
        loss = first + sum(losses)
        loss.backward()
        return loss.detach(), [each.grad for each in model.parameters() if each.grad is not None]

    plain, saving = tiny(), tiny()
    checkpoint_blocks(saving)
    wanted, found = trained(plain), trained(saving)
    torch.testing.assert_close(found, wanted)
    assert len(found[1]) == len(list(plain.parameters()))


def test_a_copy_has_cross_tokens_of_its_own() -> None:
    model = tiny()
    with torch.no_grad():
        before = model.encode_image(images()).features
        twin = copy.deepcopy(model)
        twin.vision_model.encoder.cross_image.mul_(-3)
        assert not torch.allclose(twin.encode_image(images()).features, before)
        assert torch.equal(model.encode_image(images()).features, before)


def test_an_image_is_encoded_alike_alone_and_in_a_batch() -> None:
    model = tiny()
    with torch.no_grad():
        together = model.encode_image(images()).features
        alone = torch.cat([model.encode_image(each.unsqueeze(0)).features for each in images()])
    torch.testing.assert_close(alone, together)


def test_another_way_of_merging_is_refused_where_there_is_one() -> None:
    with pytest.raises(SettingError, match="merges tokens already"):
        upop.merge_tokens(tiny(rv=0, rl=0), 2)


@pytest.mark.slow
def test_compiled_it_computes_the_same() -> None:
    model = tiny()
    compiled = torch.compile(lambda given, ids: model(given, ids), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(), texts(3, 5, 9)), model(images(), texts(3, 5, 9)))
