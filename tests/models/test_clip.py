"""CLIP for retrieval: published sizes, the library's function, and what only training and surgery show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import upop
from conftest import parity_sets
from parity.cases import Recorded
from pruning.families import BLIP_SIZES, difference, finished_pruner, randomise, uneven_plan
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.tasks import find_task

SIZES = {
    **{name: value for name, value in BLIP_SIZES.items() if not name.startswith("drop")},
    "embed_dim": 20,
    "queue_size": 12,
}


def clip(dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: Any) -> ClipRetrieval:
    torch.manual_seed(seed)
    model = ClipRetrieval(ClipConfig(**{**SIZES, **sizes}))
    randomise(model, seed)  # the momentum copies get values of their own
    return model.to(dtype)


def pairs(count: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 58, (count, 9), generator=generator)
    ids[:, 0], ids[::2, 8], ids[1::2, 5] = 58, 59, 59
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return {"images": images.to(dtype), "input_ids": ids}


def both_features(model: ClipRetrieval, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat(model(**inputs))


def test_deployed_and_published_sizes() -> None:
    with torch.device("meta"):
        counts = find_task("retrieval-clip").counts(ClipRetrieval(ClipConfig()))
    assert counts["parameters"] == 427_944_193
    # The paper prints 856.0: it counts the masks of the search too, 0.14 million.
    assert counts["published_parameters"] == 855_888_385
    assert counts["published_gmacs"] == pytest.approx(395.7, rel=1e-3)  # theirs counts norms too
    assert counts["gmacs"] == pytest.approx(counts["published_gmacs"] / 2, rel=1e-3)


@pytest.mark.parametrize("path", parity_sets("clip"), ids=lambda path: path.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_recorded_training_pass(path: Path, dtype: torch.dtype, tolerance: float) -> None:
    recorded = Recorded("clip", path)
    expected = load_file(path / "dense_out.safetensors")
    prefix = "f64/train" if dtype == torch.float64 else "f32/train"
    model = recorded.load("dense.pth").to(dtype).train()
    loss = model(**{**recorded.batch(0, dtype), "alpha": 0.4})
    assert float(loss.detach()) == pytest.approx(float(expected[f"{prefix}/loss_alpha0.4"]), rel=tolerance)
    for name in ("image_queue", "text_queue", "idx_queue"):
        torch.testing.assert_close(getattr(model, name), expected[f"{prefix}/after_{name}"], rtol=0, atol=tolerance)
    assert torch.equal(model.ptr_queue, expected[f"{prefix}/after_ptr"])


def library(seed: int = 3) -> tuple[CLIPModel, dict[str, int]]:
    """Return transformers' own model with random weights, and the sizes that its tensors do not tell."""
    vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
    vision |= {"image_size": 16, "patch_size": 8}
    text |= {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 58, "eos_token_id": 59}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=20))
    randomise(model, seed)
    return model.eval(), {"vision_heads": 3, "text_heads": 4, "vision_mlp": 40, "text_mlp": 56}


def test_weights_of_transformers_load_and_compute_what_transformers_does(tmp_path: Path) -> None:
    source, sizes = library()
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(5) for tower in ("text", "vision")}
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    save_file(state | positions, tmp_path / "model.safetensors")
    model = upop.load_official("retrieval-clip", tmp_path / "model.safetensors", **sizes, queue_size=12)
    inputs = pairs(dtype=torch.float32)
    with torch.no_grad():
        found = source(pixel_values=inputs["images"], input_ids=inputs["input_ids"])
    expected = torch.cat([found.image_embeds, found.text_embeds])
    assert difference(both_features(model, inputs), expected) < 1e-5
    for parameter, twin in model.momentum_pairs():
        assert torch.equal(parameter, twin)
        assert not twin.requires_grad
    assert model.idx_queue.tolist() == [[-100] * 12]
    assert torch.allclose(model.text_queue.norm(dim=0), torch.ones(12))


def test_what_stands_behind_the_end_of_a_text_does_not_matter() -> None:
    model, inputs = clip().eval(), pairs()
    before = both_features(model, inputs)
    ids = inputs["input_ids"].clone()
    ids[1::2, 6:] = 0
    assert difference(both_features(model, {**inputs, "input_ids": ids}), before) < 1e-12
    short = {"images": inputs["images"], "input_ids": ids[1::2, :6]}
    texts = before[4:]
    assert difference(both_features(model, short)[4:], texts[1::2]) < 1e-12
    ids[:, 1] += 1
    assert difference(both_features(model, {**inputs, "input_ids": ids}), before) > 1e-3


def test_the_momentum_text_tower_ends_with_the_online_norm() -> None:
    model, inputs = clip().eval(), pairs()

    def features() -> Tensor:
        with torch.no_grad():
            return model.encode_text(inputs["input_ids"], momentum=True)

    before = features()
    torch.nn.init.normal_(model.text_model_m.final_layer_norm.weight)
    assert torch.equal(features(), before)
    torch.nn.init.normal_(model.text_model.final_layer_norm.weight)
    assert difference(features(), before) > 1e-3


def test_a_loss_trains_the_online_towers_and_moves_the_copies() -> None:
    model, inputs = clip().train(), pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**inputs, ids=torch.tensor([0, 1, 0, 2]), alpha=0.4).backward()
    copies = set(model.momentum_encoders.values())
    for name, parameter in model.named_parameters():
        is_copy = name.split(".")[0] in copies
        assert (parameter.grad is None) == is_copy, name
        if is_copy:
            root, _, rest = name.partition(".")
            online = before[f"{root.removesuffix('_m')}.{rest}"]
            torch.testing.assert_close(parameter, 0.995 * before[name] + 0.005 * online, rtol=1e-12, atol=1e-12)
    assert model.idx_queue[0].tolist() == [0, 1, 0, 2] + [-100] * 8
    with torch.no_grad():
        image, text = model(**inputs)
    torch.testing.assert_close(model.image_queue[:, :4].t(), image)
    torch.testing.assert_close(model.text_queue[:, :4].t(), text)


def test_a_loss_in_evaluation_changes_nothing() -> None:
    model, inputs = clip().eval(), pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(**inputs, ids=torch.arange(4), alpha=0.4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_are_cut_from_their_own_weights_with_the_online_indices() -> None:
    model = clip().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = uneven_plan(upop.find_groups(model))
    assert not any("_m." in name for name in plan)
    upop.shrink(model, plan, verify=pairs())
    mlp, kept = "text_model{}.encoder.layers.1.mlp.fc1.weight", plan["text_model.encoder.layers.1.mlp"]
    for twin in ("", "_m"):
        name = mlp.format(twin)
        assert torch.equal(model.get_parameter(name), before[name][kept])
    for parameter, twin in model.momentum_pairs():
        assert parameter.shape == twin.shape
    model.train()(**pairs(), ids=torch.arange(4), alpha=0.4).backward()


def test_a_searched_model_is_saved_with_its_copies_and_queues(tmp_path: Path) -> None:
    model = clip(torch.float32)
    inputs = pairs(dtype=torch.float32)
    model.train()(**inputs, ids=torch.arange(4))  # the queues hold something
    pruner = finished_pruner(model, inputs)
    pruner.shrink(verify=inputs)
    upop.save(model, tmp_path / "m", pruner.plan())
    found = upop.load(tmp_path / "m")
    state = found.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(both_features(found, inputs), both_features(model.eval(), inputs))


def test_scores_come_from_the_online_towers_alone() -> None:
    found = []
    for seed in (0, 1):
        model, inputs = clip().train(), pairs()
        torch.manual_seed(seed)
        for _, twin in model.momentum_pairs():
            torch.nn.init.normal_(twin)
        pruner = upop.Pruner(model, 0.5, 10)
        image, text = model(**inputs)
        F.mse_loss(image, text.flip(0)).backward()
        pruner.step()
        found.append(pruner.scores)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    "sizes", [{"vision_heads": 5}, {"text_heads": 5}, {"queue_size": 0}, {"momentum": 1.0}, {"drop_path": 0.1}]
)
def test_sizes_that_make_no_sense(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(sizes))):
        ClipConfig(**{**SIZES, **sizes})
