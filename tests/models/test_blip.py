"""BLIP's towers and its NLVR head: sizes, published costs, and behaviour that no recording shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import upop
from pruning.families import NLVR, difference, nlvr, outputs_of
from upop.models.blip import BlipConfig, build_vision_encoder, checkpoint_last_blocks
from upop.models.checkpointed_block import CheckpointedBlock
from upop.models.nlvr import BlipNlvr, NlvrConfig


def full_size(size: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    with torch.device("meta"):
        inputs = {
            "images": torch.zeros(2, 3, 384, 384),
            "input_ids": torch.zeros(1, 36, dtype=torch.long),
            # A mask with all its dimensions: transformers would read values of a smaller one.
            "attention_mask": torch.zeros(1, 1, 36, 36),
        }
        return BlipNlvr(NlvrConfig.vit(size)), inputs


def test_the_published_cost_of_a_forward_pass() -> None:
    model, inputs = full_size("base")
    assert upop.count_macs(model, inputs) / 1e9 == pytest.approx(132.5, rel=0.01)


def test_the_published_parameters() -> None:
    # The paper prints 259.5 million; the published architecture itself holds 259,372,034 (see tests/parity).
    assert upop.count_parameters(full_size("base")[0]) / 1e6 == pytest.approx(259.5, rel=1e-3)


@pytest.mark.slow
def test_vit_large_has_groups_of_its_own_sizes() -> None:
    groups = upop.find_groups(full_size("large")[0])
    assert {(group.modality, group.kind, group.size, group.heads) for group in groups} == {
        ("vision", "attention", 64, 16),
        ("vision", "mlp", 4096, 1),
        ("text", "attention", 64, 12),
        ("text", "mlp", 3072, 1),
    }


def test_merge_layers_begin_where_configured() -> None:
    layers = nlvr(text_depth=3, merge_from=2).text_encoder.encoder.layer
    assert [layer.crossattention.output.merge_layer is not None for layer in layers] == [False, False, True]


def test_padding_and_the_first_token_do_not_matter() -> None:
    model, inputs = NLVR.build().eval(), NLVR.inputs(2)
    before = outputs_of(model, inputs)
    ids = inputs["input_ids"].clone()
    ids[inputs["attention_mask"] == 0] = 1  # padding is not seen
    ids[:, 0] = 3  # the first token becomes [ENC] whatever it was
    assert difference(outputs_of(model, {**inputs, "input_ids": ids}), before) < 1e-12
    assert torch.equal(inputs["input_ids"], NLVR.inputs(2)["input_ids"])  # and the caller's ids stay


def test_samples_do_not_meet_and_images_have_their_own_place() -> None:
    model, inputs = NLVR.build().eval(), NLVR.inputs(3)
    whole = outputs_of(model, inputs).view(3, 2)
    one = {name: value[1:2] for name, value in inputs.items()} | {"images": inputs["images"][[1, 4]]}
    assert difference(outputs_of(model, one), whole[1]) < 1e-12
    swapped = {**one, "images": inputs["images"][[4, 1]]}
    assert difference(outputs_of(model, swapped), whole[1]) > 1e-3


@pytest.mark.parametrize(("count", "expected"), [(None, 3), (0, 0), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_checkpointing_covers_the_last_blocks(count: int | None, expected: int) -> None:
    encoder = build_vision_encoder(nlvr().config)
    checkpoint_last_blocks(encoder, count)
    changed = [isinstance(block, CheckpointedBlock) for block in encoder.blocks]
    assert changed == [False] * (3 - expected) + [True] * expected


def test_checkpointing_draws_the_same_random_numbers() -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nlvr(drop_path=0.5).double().train()
        if checkpointed:
            checkpoint_last_blocks(model.visual_encoder)
        torch.manual_seed(1)
        model.visual_encoder(NLVR.inputs(4)["images"]).square().mean().backward()
        found.append(model.visual_encoder.blocks[1].mlp.fc1.weight.grad)
    assert difference(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("width", [24, 48, 768, 1024, 1152])
def test_mlp_widths_are_exact(width: int) -> None:
    for hidden in range(1, 4 * width, max(1, width // 16)):
        with torch.device("meta"):
            encoder = build_vision_encoder(
                BlipConfig(vision_width=width, vision_mlp=hidden, vision_depth=1, vision_heads=1)
            )
        assert encoder.blocks[0].mlp.fc1.out_features == hidden


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 0}, {"dropout": 1.0}, {"vision_depth": -1}, {"visoin_depth": 2}, {"merge_from": -1}],
)
def test_sizes_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        NlvrConfig(**settings)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        NlvrConfig().image_size = 3  # type: ignore[misc]
