"""`merge_tokens` on encoders of several libraries: what merges, what is refused, and what stays as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import upop
from tiers import mostly_slow
from together import run_together
from tokens import merging_ranks
from upop.checkpoints.export.graphs import own_graphs
from upop.checkpoints.official import resized
from upop.errors import LayoutError, SettingError
from upop.models import MODELS
from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.checkpointing import checkpoint_blocks
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.pruning import plan_by_magnitude, shrink
from upop.tokens.encoders import removed_tokens

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
VISION = {**TINY, "patch_size": 8}


def from_timm(name: str, **given: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5, **given}
    return timm.create_model(name, **sizes)


def open_clip_tower() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=3, width=64, patch_size=8, image_size=32)
    return open_clip.model.CLIP(32, vision, open_clip.CLIPTextCfg(width=32, layers=2, heads=2, vocab_size=99))


def clip() -> nn.Module:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config={**text, **words}))


def of(kind: str) -> nn.Module:
    return getattr(transformers, kind)(
        getattr(transformers, kind.partition("For")[0].removesuffix("Model") + "Config")(**VISION)
    )


MERGING: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm vit": (lambda: from_timm("vit_tiny_patch16_224"), 17),
    "timm deit": (lambda: from_timm("deit_tiny_distilled_patch16_224"), 18),
    "timm siglip": (lambda: from_timm("vit_base_patch16_siglip_224"), 16),
    "timm dinov2": (lambda: from_timm("vit_small_patch14_reg4_dinov2"), 21),
    "timm post-norm": (
        lambda: from_timm("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ResPostBlock),
        17,
    ),
    "open_clip": (open_clip_tower, 17),
    "transformers vit": (lambda: of("ViTForImageClassification"), 17),
    "transformers deit": (lambda: of("DeiTForImageClassification"), 18),
    "transformers clip": (clip, 17),
    "transformers siglip": (lambda: of("SiglipVisionModel"), 16),
    "transformers dinov2": (lambda: of("Dinov2WithRegistersModel"), 21),
    "transformers blip": (lambda: of("BlipVisionModel"), 17),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relative tables": (lambda: from_timm("beit_base_patch16_224"), "positions of its tokens"),
    "rotary positions": (lambda: from_timm("eva02_tiny_patch14_224"), "positions of its tokens"),
    "words beside images": (
        lambda: transformers.ViltModel(transformers.ViltConfig(**VISION, vocab_size=99)),
        "from images together with integers",
    ),
    "windows": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
        ),
        "No image encoder",
    ),
    "a grid between layers": (
        lambda: transformers.DPTForDepthEstimation(
            transformers.DPTConfig(
                **{**VISION, "num_hidden_layers": 4},
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8,
            )
        ),
        "between its layers|does not run",
    ),
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def lengths(model: nn.Module, example: Any) -> list[int]:
    """How many tokens every merging layer returned in a call."""
    found: list[int] = []

    def hook(_layer: nn.Module, _args: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).shape[1])

    layers = [each for each in model.modules() if "_upop_merging" in vars(each)]
    handles = [each.register_forward_hook(hook) for each in layers]
    with torch.no_grad():
        upop.pruning.costs.call(model, example)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MERGING)
def test_encoders_of_libraries_merge_and_are_themselves_again(name: str) -> None:
    build, tokens = MERGING[name]
    model = made(build)
    example = upop.pruning.axes.examples.example_for(model)
    with torch.no_grad():
        before = upop.pruning.costs.call(model, example)
    assert upop.merge_tokens(model, 3, example=example) is model
    assert removed_tokens(model) == [[3, 3, 3]]
    assert lengths(model, example) == [tokens - 3, tokens - 6, tokens - 9]
    upop.merge_tokens(model, 0)
    assert removed_tokens(model) is None
    with torch.no_grad():
        after = upop.pruning.costs.call(model, example)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_need_the_places_of_tokens_are_refused_and_left_alone(name: str) -> None:
    build, reason = REFUSED[name]
    model = made(build)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(LayoutError, match=reason):
        upop.merge_tokens(model, 2)
    assert removed_tokens(model) is None
    assert not any("_upop_merging" in vars(each) for each in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("decoder", mostly_slow(["linear", "mask_transformer"], "linear"))
def test_tokens_come_back_to_their_places_for_a_decoder_that_reads_a_grid(decoder: str, tmp_path: Path) -> None:
    sizes = {"image_size": 32, "patch_size": 8, "vision_width": 32, "vision_depth": 3, "vision_heads": 2}
    config = SegmenterConfig(**sizes, vision_mlp=64, classes=3, decoder=decoder)  # type: ignore[arg-type]
    model = made(lambda: Segmenter(config)).double()
    # Eight patches of one kind and eight of another. A processor may round equal tokens differently, which decides
    # ties; whichever four and two are removed, another one of the same kind remains.
    patches = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    image = torch.cat([patches, patches.roll(8, dims=3)], dim=2).repeat(1, 1, 2, 2)
    with torch.no_grad():
        model.encoder.pos_embed[:, 1:] = model.encoder.pos_embed[:, 1:2]  # type: ignore[union-attr, operator]
        wanted = model(image)
    upop.merge_tokens(model, [4, 0, 2])
    assert lengths(model, image)[:3] == [13, 13, 17]  # the last one gives them all back
    with torch.no_grad():
        found = model(image)
        assert found.shape == wanted.shape
        loaded = upop.load(upop.save(model, tmp_path / "segmenter"))
        torch.testing.assert_close(loaded(image), found)
        upop.merge_tokens(model, [4, 2, 0])
        torch.testing.assert_close(model(image), wanted)


@pytest.mark.parametrize("attention", ["fused", "plain", "packed"])
def test_merging_equal_tokens_changes_nothing(attention: str) -> None:
    """What is alike attends and is attended to as one token of its size, to the last digits."""
    model = made(open_clip_tower if attention == "packed" else lambda: from_timm("vit_tiny_patch16_224")).double()
    tower: Any = model.visual if attention == "packed" else model
    for block in tower.blocks if attention == "plain" else ():
        block.attn.fused_attn = False
    positions = tower.positional_embedding if attention == "packed" else tower.pos_embed
    with torch.no_grad():
        positions[..., 1:, :] = positions[..., 1:2, :]
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    image[..., 8:] = image[..., :8].repeat(1, 1, 1, 3)  # four equal columns of patches
    with torch.no_grad():
        wanted = tower(image)
        upop.merge_tokens(tower, [6, 3, 3], example=image)
        found = tower(image)
    torch.testing.assert_close(found, wanted)


def test_each_layer_removes_its_own_number_or_all_together_a_share() -> None:
    model = made(MERGING["timm vit"][0])
    image = torch.randn(2, 3, 32, 32)
    dense = upop.count_macs(model, image)
    upop.merge_tokens(model, [0, 5, 1])
    assert lengths(model, image) == [17, 12, 11]
    upop.merge_tokens(model, 0.3)
    (removed,) = removed_tokens(model) or [[]]
    assert len(set(removed)) == 1
    assert upop.count_macs(model, image) < 0.8 * dense
    plain = made(MERGING["timm vit"][0])
    with torch.no_grad():
        assert torch.equal(upop.merge_tokens(copy.deepcopy(plain), [0, 0, 0])(image), plain(image))


@pytest.mark.parametrize(
    ("vision", "described"),
    [
        (9, "leaves nothing to merge.*At most"),
        ([1, 2], "3 layers"),
        (0.9, "merging can save"),
        (1.5, "between 0 and 1"),
        (None, "is no number of tokens"),
        ([1, "2", 3], "is no number of tokens"),
    ],
)
def test_what_cannot_be_removed_is_refused(vision: Any, described: str) -> None:
    model = made(lambda: from_timm("vit_tiny_patch16_224", depth=3, img_size=16))
    with pytest.raises(SettingError, match=described):
        upop.merge_tokens(model, vision)
    assert removed_tokens(model) is None


@pytest.mark.parametrize("name", ["timm vit", "transformers vit"])
def test_training_goes_through_merging_and_checkpointing_changes_no_gradient(name: str) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        upop.merge_tokens(model, 3).train()
        output = model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
        (output if isinstance(output, Tensor) else output.logits).square().sum().backward()
        return [each.grad for each in model.parameters() if each.grad is not None]

    plain, saving = made(MERGING[name][0]), made(MERGING[name][0])
    checkpoint_blocks(saving)
    wanted = gradients(plain)
    assert len(wanted) == len(list(plain.parameters()))
    torch.testing.assert_close(gradients(saving), wanted)


@pytest.mark.parametrize("name", mostly_slow(["timm vit", "transformers vit"], "transformers vit"))
def test_a_saved_model_merges_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    model = upop.merge_tokens(made(MERGING[name][0]), [3, 2, 1])
    image = torch.randn(2, 3, 32, 32)
    loaded = upop.load(upop.save(model, tmp_path / "model"))
    assert removed_tokens(loaded) == [[3, 2, 1]]
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), model(image))


def test_a_merging_model_of_a_library_merges_as_the_one_of_ours_that_it_is_read_as(tmp_path: Path) -> None:
    saved = upop.save(upop.merge_tokens(made(clip), [3, 2, 1]), tmp_path / "model")
    ours, image = upop.load_official("retrieval-clip", saved), torch.randn(2, 3, 32, 32)
    assert removed_tokens(ours) == [[3, 2, 1]]
    with torch.no_grad():
        wanted = upop.load(saved).get_image_features(image).pooler_output
        torch.testing.assert_close(ours.encode_image(image), wanted)


@pytest.mark.parametrize("name", mostly_slow(["open_clip", "timm vit", "transformers siglip"], "open_clip"))
def test_a_merging_model_is_cut_like_any_other(name: str) -> None:
    model = upop.merge_tokens(made(MERGING[name][0]), 3)
    example = upop.pruning.axes.examples.example_for(model)
    before = upop.count_macs(model, example)
    plan = plan_by_magnitude(model, 0.5)
    assert sum("attn" in group or "attention" in group for group in plan.kept) >= 3
    shrink(model, plan, verify=example)
    assert upop.count_macs(model, example) < 0.8 * before
    assert removed_tokens(model) == [[3, 3, 3]]


def test_a_cut_model_merges_like_any_other() -> None:
    model = made(MERGING["timm vit"][0])
    image = torch.randn(2, 3, 32, 32)
    shrink(model, plan_by_magnitude(model, 0.5), verify=image)
    cut = upop.count_macs(model, image)
    upop.merge_tokens(model, 3)
    assert lengths(model, image) == [14, 11, 8]
    assert upop.count_macs(model, image) < cut


SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 32,
    "vision_depth": 3,
    "vision_heads": 2,
    "vision_mlp": 64,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 2,
    "text_mlp": 64,
    "vocab_size": 99,
    "max_positions": 20,
    "queue_size": 16,
    "embed_dim": 16,
    "classes": 5,
}


@pytest.mark.parametrize("kind", mostly_slow(["blip-caption", "blip-nlvr", "blip-retrieval", "blip-vqa"], "blip-nlvr"))
def test_models_of_ours_see_with_fewer_tokens(kind: str) -> None:
    model = upop.merge_tokens(of_ours(kind), 3)
    assert model.visual_encoder(torch.randn(2, 3, 32, 32)).shape == (2, 8, 32)  # type: ignore[operator]
    larger = resized(model, 48, "a model")
    assert larger.visual_encoder(torch.randn(2, 3, 48, 48)).shape == (2, 28, 32)  # type: ignore[operator]


@pytest.mark.slow
def test_a_captioner_with_half_of_its_tokens_speaks_and_is_saved(tmp_path: Path) -> None:
    names = CaptionConfig.model_fields
    model = made(lambda: BlipCaption(CaptionConfig(**{name: SIZES[name] for name in SIZES if name in names})))
    upop.merge_tokens(model, [4, 4, 0])
    image = torch.randn(2, 3, 32, 32)
    loaded = upop.load(upop.save(model, tmp_path / "captioner"))
    said = [each.generate(image, [5, 6], 98, max_length=9, min_length=9, num_beams=3) for each in (model, loaded)]  # type: ignore[operator]
    assert said[0].shape == (2, 9)
    assert torch.equal(said[0], said[1])
    assert loaded.visual_encoder(image).shape == (2, 9, 32)  # type: ignore[operator]


def of_ours(kind: str) -> Any:
    build, config = MODELS[kind]
    return made(lambda: build(config(**{name: SIZES[name] for name in SIZES if name in config.model_fields})))


def test_momentum_copies_merge_with_what_they_copy(tmp_path: Path) -> None:
    model = upop.merge_tokens(of_ours("blip-retrieval"), [3, 2, 1])
    images = torch.randn(2, 3, 32, 32)
    states, features = model.encode_image(images)
    assert states.shape[1] == 11
    same, _ = model.encode_image(images, momentum=True)
    torch.testing.assert_close(same, states)
    text = {"input_ids": torch.randint(1, 90, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    losses = model.train()(images, **text, ids=torch.arange(2))
    (losses.contrastive + losses.matching).backward()
    loaded: Any = upop.load(upop.save(model, tmp_path / "retrieval"))
    assert loaded.encode_image(images, momentum=True)[0].shape[1] == 11
    assert features.shape == (2, 16)
    upop.merge_tokens(model, 0)
    assert not any("_upop_merging" in vars(each) for each in model.modules())


@pytest.mark.parametrize("kind", ["blip-caption", "blip-retrieval"])
def test_graphs_of_other_parts_take_as_many_image_tokens_as_are_left(kind: str) -> None:
    model = upop.merge_tokens(of_ours(kind), 3)
    graphs = own_graphs(model) or {}
    taking = graphs["decoder" if kind == "blip-caption" else "match"]
    assert taking.inputs["states"] == ("batch", 8, 32)


def test_the_dense_model_teaches_merged_tokens_at_all_of_their_places() -> None:
    teacher = made(MERGING["timm vit"][0])
    model = upop.merge_tokens(copy.deepcopy(teacher), 3).train()
    taught = upop.distill(model, teacher)
    model(torch.randn(2, 3, 32, 32))
    taught.loss().backward()
    last: Any = model.norm  # whose outputs have fewer tokens than the teacher's
    assert last.weight.grad.abs().sum() > 0


def test_layers_that_merge_compute_again_in_the_backward_pass_whoever_asked_first() -> None:
    model = upop.merge_tokens(of_ours("blip-caption"), 3).train()
    checkpoint_blocks(model)
    words = torch.randint(1, 90, (2, 6))
    model(torch.randn(2, 3, 32, 32), words, torch.ones_like(words)).sum().backward()
    assert model.visual_encoder.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip-caption", "blip-retrieval", "clip-crossget", "segmenter"])
def test_models_of_ours_that_merge_are_exported(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = of_ours(kind)
    upop.export(model if kind == "clip-crossget" else upop.merge_tokens(model, 3), tmp_path / "onnx")
    described = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert all(graph["largest_difference"] <= 1e-4 for graph in described["graphs"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "transformers siglip", "transformers dinov2"])
def test_a_merging_model_is_exported_with_any_batch(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = upop.merge_tokens(made(MERGING[name][0]), 3)
    file = tmp_path / "model.onnx"
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.onnx.export(model, (torch.randn(2, 3, 32, 32),), file, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(file)
    for batch in (1, 5):
        image = torch.randn(batch, 3, 32, 32)
        found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
        with torch.no_grad():
            wanted = model(image)
        wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_what_merges_as_one_does(tmp_path: Path) -> None:
    run_together(merging_ranks.run, str(tmp_path))
    wanted = merging_ranks.gradients(merging_ranks.IMAGES)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), wanted)


@pytest.mark.slow
def test_a_merging_model_compiles_whole() -> None:
    model = upop.merge_tokens(made(MERGING["timm vit"][0]), 3)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
        torch.testing.assert_close(found, model(image))


def test_numbers_fit_the_images_that_a_model_takes_and_not_the_small_one_that_is_made_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "mlp_ratio": 2}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=126, patch_size=14)).eval()
    images = torch.randn(2, 3, 126, 126)
    upop.merge_tokens(model, vision=8)  # more than the 16 tokens of 64 pixels allow
    with torch.no_grad():
        found = model(images).last_hidden_state
        assert found.shape[1] == 82 - 8 * 8
        again: Any = upop.load(upop.save(model, tmp_path / "merged"))
        assert torch.equal(again(images).last_hidden_state, found)
    with pytest.raises(SettingError, match="leaves nothing to merge"):
        upop.merge_tokens(model, vision=40)
    with pytest.raises(SettingError, match="leaves nothing to merge"):
        upop.merge_tokens(model, vision=[81, 0, 0, 0, 0, 0, 0, 0])  # all that there are
