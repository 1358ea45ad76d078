"""Models as users have them: with shared or added parts, adapters, quantized layers, masks, or no weights yet."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import upop
from pruning.families import randomise, uneven_plan
from upop.errors import CheckpointError, LayoutError

VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VISION, image_size=16, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    randomise(model)
    return model.eval()


def llama() -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, intermediate_size=56, vocab_size=60))
    randomise(model)
    return model.eval()


PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
WORDS = {"input_ids": torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


def with_a_shared_layer() -> Any:
    model = vit()
    model.vit.layers[1] = model.vit.layers[0]
    return model


def with_another_head() -> Any:
    model = vit()
    model.extra = nn.Linear(3, 2)
    return model


def with_a_wider_mlp() -> Any:
    model = vit()
    model.vit.layers[0].mlp.fc1, model.vit.layers[0].mlp.fc2 = nn.Linear(24, 50), nn.Linear(50, 24)
    return model


@pytest.mark.filterwarnings("ignore:.*is not what its configuration builds")
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (with_a_shared_layer, "layers.1.*"),
        (with_another_head, r"it builds has no extra\.weight"),
        (with_a_wider_mlp, r"layers\.0\.mlp\.fc1\.weight"),
    ],
)
def test_transformers_models_that_their_configuration_does_not_build(
    build: Callable[[], Any], why: str, tmp_path: Path
) -> None:
    model = build()
    upop.shrink(model, uneven_plan(upop.find_groups(model)), verify=PIXELS)
    with pytest.warns(UserWarning, match=rf"not what its configuration builds \(.*{why}"):
        folder = upop.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"upop\.load_into"):
        upop.load(folder)
    again = upop.load_into(build(), folder)
    assert torch.equal(logits(again, PIXELS), logits(model, PIXELS))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_models_without_anything_to_prune_come_back_too(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet").eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(upop.load(upop.save(model, tmp_path / "timm"))(image), model(image))
    own = nn.Linear(3, 3)
    again = upop.load_into(nn.Linear(3, 3), upop.save(own, tmp_path / "own"))
    assert torch.equal(again.weight, own.weight)  # type: ignore[arg-type]


def test_saving_while_masks_are_on_is_said(tmp_path: Path) -> None:
    model = vit()
    dense = logits(model, PIXELS)
    pruner = upop.Pruner(model, 0.5, 2, 1, correct=False)
    model(**PIXELS, labels=torch.tensor([0, 1])).loss.backward()
    pruner.step()
    with pytest.warns(UserWarning, match="still masked.*the dense model is written"):
        folder = upop.save(model, tmp_path / "out")
    pruner.remove()
    torch.testing.assert_close(logits(upop.load(folder), PIXELS), dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upop.save(model, tmp_path / "out")


def test_models_without_weights_are_not_saved_nor_verified(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, image_size=16, patch_size=8))
    with pytest.raises(LayoutError, match=r"meta device.*weights"):
        upop.save(model, tmp_path / "out")
    with pytest.raises(LayoutError, match=r"meta device.*outputs"):
        upop.shrink(model, {"vit.layers.0.mlp": [0]}, verify=PIXELS)


def dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this way to quantize goes one day
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})  # type: ignore[no-any-return]


def weight_only(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("quantize", [dynamic, weight_only])
def test_quantized_layers_are_left_alone_and_named(quantize: Callable[[nn.Module], nn.Module]) -> None:
    model = quantize(llama())
    found = upop.find_prunable(model)
    assert not found.groups
    named = {part.name for part in found.skipped if "prune the model before it is quantised" in part.reason}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"} <= named
    with pytest.raises(LayoutError, match="quantised"):
        upop.Pruner(model, 0.5, 2)


@pytest.mark.parametrize("quantize", [dynamic, weight_only])
def test_a_compressed_model_can_be_quantized(quantize: Callable[[nn.Module], nn.Module]) -> None:
    model = llama()
    upop.shrink(model, uneven_plan(upop.find_groups(model)))
    before = logits(model, WORDS)
    assert float((logits(quantize(model), WORDS) - before).abs().max()) < 0.2 * float(before.abs().max())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers in an older way
class TestAdapters:
    """Those of peft."""

    peft: Any

    @pytest.fixture(autouse=True)
    def _peft(self) -> None:
        self.peft = pytest.importorskip("peft")

    def adapted(self, model: Any, *targets: str) -> Any:
        settings = self.peft.LoraConfig(r=2, target_modules=list(targets) or "all-linear", init_lora_weights=False)
        return self.peft.get_peft_model(model, settings).eval()

    def test_factors_are_no_groups_and_what_is_frozen_is_named(self) -> None:
        found = upop.find_prunable(self.adapted(llama(), "q_proj"))
        assert {group.kind for group in found.groups} == {"attention", "mlp"}
        assert not any("lora_" in group.name for group in found.groups)
        # What is not wrapped is frozen: an adapter trains nothing else.
        with pytest.raises(LayoutError, match=r"frozen weights.*layers\.0\.mlp"):
            upop.Pruner(self.adapted(llama(), "q_proj"), 0.5, 2)

    def test_merged_they_are_pruned_as_any(self, tmp_path: Path) -> None:
        model = self.adapted(llama()).merge_and_unload()
        upop.shrink(model, uneven_plan(upop.find_groups(model)), verify=WORDS)
        again = transformers.AutoModelForCausalLM.from_pretrained(upop.save(model, tmp_path / "out"))
        assert torch.equal(logits(again, WORDS), logits(model, WORDS))

    def test_they_train_on_a_compressed_model_and_are_saved_beside_it(self, tmp_path: Path) -> None:
        model = llama()
        upop.shrink(model, uneven_plan(upop.find_groups(model)))
        upop.save(model, tmp_path / "base")
        adapted = self.adapted(copy.deepcopy(model))
        adapted(**WORDS, labels=WORDS["input_ids"]).loss.backward()
        adapted.save_pretrained(tmp_path / "adapter")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = self.peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(logits(again, WORDS), logits(adapted, WORDS))
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(
            logits(upop.load(upop.save(merged, tmp_path / "merged")), WORDS), logits(merged, WORDS)
        )
