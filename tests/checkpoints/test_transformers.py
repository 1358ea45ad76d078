"""Compressed models of transformers: its own loading, saving, pipelines and pushing work on them, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PreTrainedModel

import upop
from pruning.families import randomise, uneven_plan
from tiers import mostly_slow, since
from upop.checkpoints.saving.quantizer import UpopConfig, mark, recorded
from upop.errors import CheckpointError, PlanError, SettingError

VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "vocab_size": 60,
    "max_position_embeddings": 20,
}
SPECIAL = {"bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 0}


def words() -> Tensor:
    return torch.randint(1, 57, (2, 7), generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def bert() -> PreTrainedModel:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))


def vit() -> PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))


def llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **SPECIAL, num_key_value_heads=2))


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 60, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=58, eos_token_id=59))


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def clip() -> PreTrainedModel:
    shared = {"projection_dim": 20}
    config = transformers.CLIPConfig(
        vision_config={**VISION, **shared}, text_config={**TEXT, **SPECIAL, **shared}, **shared
    )
    return transformers.CLIPModel(config)


def blip() -> PreTrainedModel:
    text = {**TEXT, **SPECIAL, "sep_token_id": 57}
    return transformers.BlipForConditionalGeneration(transformers.BlipConfig(vision_config=VISION, text_config=text))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], dict[str, Tensor]]]] = {
    "bert": (bert, lambda: {"input_ids": words()}),
    "vit": (vit, lambda: {"pixel_values": images()}),
    "llama": (llama, lambda: {"input_ids": words()}),
    "gpt2": (gpt2, lambda: {"input_ids": words()}),
    "t5": (t5, lambda: {"input_ids": words(), "decoder_input_ids": words()}),
    "clip": (clip, lambda: {"input_ids": words(), "pixel_values": images()}),
    "blip": (blip, lambda: {"input_ids": words(), "pixel_values": images()}),
}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs)
    return torch.cat([part.flatten() for part in found.to_tuple() if isinstance(part, Tensor)])


def compressed(name: str, seed: int = 1) -> tuple[Any, dict[str, Tensor]]:
    build, batch = MODELS[name]
    torch.manual_seed(0)
    model: Any = build().eval()
    randomise(model)
    model.tie_weights()
    inputs = batch()
    upop.shrink(model, uneven_plan(upop.find_groups(model), seed), verify=inputs)
    return model, inputs


def bit_equal(one: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> bool:
    return torch.equal(outputs(one, inputs), outputs(other, inputs))


@pytest.mark.parametrize("name", mostly_slow(MODELS, "bert", "vit", "llama", "t5", "clip"))
def test_it_reloads_by_itself_to_the_last_bit(name: str, tmp_path: Path) -> None:
    model, inputs = compressed(name)
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    assert bit_equal(again, model, inputs)
    assert recorded(again.config) == recorded(model.config) != {}
    again.save_pretrained(tmp_path / "b")
    assert bit_equal(type(model).from_pretrained(tmp_path / "b"), model, inputs)
    for layer in again.modules():
        if type(layer) is nn.Linear:
            assert layer.weight.shape == (layer.out_features, layer.in_features)


@pytest.mark.parametrize("name", mostly_slow(MODELS, "bert", "vit", "llama", "t5", "clip"))
def test_one_folder_serves_both(name: str, tmp_path: Path) -> None:
    model, inputs = compressed(name)
    folder = upop.save(model, tmp_path / "out")
    assert bit_equal(upop.load(folder), model, inputs)
    assert bit_equal(type(model).from_pretrained(folder), model, inputs)
    dense = type(model)(model.config)
    assert bit_equal(upop.load_into(dense, folder), model, inputs)
    description = json.loads((folder / "upop.json").read_text())
    assert set(description["plan"]["groups"]) == set(description["layout"])


def test_a_second_cut_is_recorded_beside_the_first(tmp_path: Path) -> None:
    model, inputs = compressed("vit")
    dense = {group.name: group.size for group in upop.find_groups(vit())}
    kept = {group.name: range(max(1, group.size // 2)) for group in upop.find_groups(model)}
    upop.shrink(model, kept, verify=inputs)
    model.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert bit_equal(again, model, inputs)
    sizes = {group.name: group.size for group in upop.find_groups(model)}
    assert recorded(model.config) == {n: (sizes[n], dense[n]) for n in dense if sizes[n] < dense[n]}
    plan = upop.Plan.from_json(
        json.dumps(json.loads((upop.save(model, tmp_path / "x") / "upop.json").read_text())["plan"])
    )
    assert {name: len(channels) for name, channels in plan.items()} == sizes
    assert dict(plan.sizes) == dense
    fresh = vit().eval()
    randomise(fresh)
    upop.shrink(fresh, plan)
    torch.testing.assert_close(outputs(fresh, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-5)


def test_classes_with_and_without_a_head(tmp_path: Path) -> None:
    model, inputs = compressed("bert")
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        states = base(**inputs).last_hidden_state
        assert torch.equal(states, model.bert(**inputs).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again.bert(**inputs).last_hidden_state, states)


@since("transformers", "5.23", "a text tower of CLIP cannot be saved alone")
def test_a_tower_can_be_loaded_and_saved_alone(tmp_path: Path) -> None:
    model, inputs = compressed("clip")
    model.save_pretrained(tmp_path / "clip")
    model.text_model.save_pretrained(tmp_path / "text")
    image, text = {"pixel_values": inputs["pixel_values"]}, {"input_ids": inputs["input_ids"]}
    vision = transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip")
    assert bit_equal(vision, model.vision_model, image)
    with_projection = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip")
    with torch.no_grad():
        assert torch.equal(
            with_projection(**image).image_embeds,
            model.visual_projection(model.vision_model(**image).pooler_output),
        )
    assert bit_equal(transformers.CLIPTextModel.from_pretrained(tmp_path / "text"), model.text_model, text)


def test_it_is_an_ordinary_model_once_loaded(tmp_path: Path) -> None:
    model, inputs = compressed("llama")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    again.float().train()
    again(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **settings), model.generate(**inputs, **settings))
    assert torch.equal(
        loaded.generate(**inputs, **settings, use_cache=True), loaded.generate(**inputs, **settings, use_cache=False)
    )


def test_the_pruner_marks_it_too(tmp_path: Path) -> None:
    model, inputs = compressed("vit")
    model = vit()
    randomise(model)
    pruner = upop.Pruner(model, 0.5, 2, 1)
    for _ in range(2):
        model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        pruner.step()
    pruner.shrink(verify=inputs)
    model.save_pretrained(tmp_path)
    assert bit_equal(transformers.AutoModelForImageClassification.from_pretrained(tmp_path), model, inputs)


def test_layers_that_were_dropped_after_a_cut(tmp_path: Path) -> None:
    model, inputs = compressed("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    inputs["use_cache"] = False
    model.save_pretrained(tmp_path / "a")
    assert bit_equal(type(model).from_pretrained(tmp_path / "a"), model, inputs)
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.self_attn.*saved without"):
        folder = upop.save(model, tmp_path / "b")
    assert bit_equal(upop.load(folder), model, inputs)


def test_a_limit_of_infinity_in_a_configuration_comes_back(tmp_path: Path) -> None:
    """As state space models have; transformers writes it under a key, because JSON has no such number."""
    model = bert()
    model.config.limits = [0.0, float("inf")]
    model.config.nested = {"least": -float("inf"), "words": {"__float__": "else"}}
    loaded: Any = upop.load(upop.save(model, tmp_path / "saved"))
    assert loaded.config.limits == [0.0, float("inf")]
    assert loaded.config.nested == {"least": -float("inf"), "words": {"__float__": "else"}}


def test_layers_that_are_dropped_and_still_counted_are_told_of_when_the_model_is_saved(tmp_path: Path) -> None:
    model, inputs = compressed("llama")
    model.model.layers = model.model.layers[:1]
    inputs["use_cache"] = False
    with pytest.warns(UserWarning) as described:
        folder = upop.save(model, tmp_path / "a")
    assert any(
        "set their number in model.config" in str(each.message) and "layers.1." in str(each.message)
        for each in described
    )
    other = MODELS["llama"][0]().eval()
    other.model.layers = other.model.layers[:1]
    upop.load_into(other, folder)
    assert bit_equal(other, model, inputs)


def test_cutting_leaves_the_random_states(tmp_path: Path) -> None:
    sizes = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    shared = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_attention_heads": 4}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**shared, **sizes, **positions)).eval()
    before = torch.get_rng_state()
    upop.shrink(model, {upop.find_groups(model)[-1].name: range(9)})
    upop.save(model, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


PIPELINE = """
import sys, torch, upop
from transformers import pipeline
from PIL import Image
image = Image.open(sys.argv[2])
print([round(row["score"], 6) for row in pipeline("image-classification", model=sys.argv[1], top_k=3)(image)])
"""


@pytest.mark.slow
def test_a_pipeline_in_a_fresh_process(tmp_path: Path) -> None:
    from PIL import Image

    model, _ = compressed("vit")
    folder = upop.save(model, tmp_path / "out")
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    image.save(tmp_path / "x.png")
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0].sort(descending=True).values
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(folder), str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == pytest.approx(scores.tolist(), abs=2e-6)


FLAGGED = """
import gc, sys
gc.disable()  # imports are a fifth faster
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig
import torch
folder, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
record = AutoQuantizationConfig.from_dict(config.quantization_config)  # as lm-eval does, before any model is built
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, quantization_config=record)
with torch.no_grad():
    torch.save(model.eval()(torch.arange(1, 8)[None]).logits, out)
model.save_pretrained(folder + "-again")
"""
"""A program that imports no upop, and may run a folder's code."""


def test_the_flag_that_trusts_a_folder_imports_upop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, _ = compressed("llama")
    upop.save(model, tmp_path / "cut")
    words = [sys.executable, "-c", FLAGGED, str(tmp_path / "cut"), str(tmp_path / "out.pt")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "out.pt"), model(torch.arange(1, 8)[None]).logits)
    again = json.loads((tmp_path / "cut-again" / "config.json").read_text())
    assert "auto_map" not in again and again["quantization_config"]["quant_method"] == "upop"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")  # nobody is asked whether to trust it
    upop.save(plain, tmp_path / "whole")
    assert not (tmp_path / "whole" / "configuration_upop.py").exists()


@since("transformers", "5.23", "it pushes in another way")
def test_pushing_uploads_what_reloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = compressed("bert")
    sent: dict[str, Path] = {}

    def upload(_self: Any, working_dir: Any, *_arguments: Any, **_options: Any) -> None:
        import shutil

        sent["to"] = Path(shutil.copytree(working_dir, tmp_path / "hub"))

    class Hub:
        def create_repo(self, *_arguments: Any, **_options: Any) -> Any:
            return type("Url", (), {"repo_id": "me/small"})

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_a, **_o: ModelCard("---\n---\n"))
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    model.push_to_hub("me/small")
    assert bit_equal(type(model).from_pretrained(sent["to"]), model, inputs)


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


HARM: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (
        lambda record: record.update(format=3, upop_version="9.0"),
        CheckpointError,
        r"format 3, written by upop 9\.0.*Update",
    ),
    (lambda record: record.update(kept=[1]), CheckpointError, r"found \[1\]"),
    (
        lambda record: record["kept"].update({"vit.layers.0.mlp": [41, 40]}),
        CheckpointError,
        r"layers\.0\.mlp: \[41, 40\]",
    ),
    (lambda record: record["kept"].update({"vit.layers.0.mpl": [3, 40]}), PlanError, "no such group.*did you mean"),
    (
        lambda record: record["kept"].update({list(record["kept"])[-1]: [3, 48]}),
        PlanError,
        "48 channels.*the model has 40",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), HARM, ids=[row[2] for row in HARM])
def test_damaged_records_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], kind: type[Exception], message: str
) -> None:
    model, _ = compressed("vit")
    model.save_pretrained(tmp_path)
    _edit(tmp_path, change)
    for load in (transformers.ViTForImageClassification.from_pretrained, upop.load):
        with pytest.raises(kind, match=message):
            load(tmp_path)


class Packed(nn.Linear):
    """A linear layer as a quantization puts it in place of the ordinary one."""


def test_other_kinds_of_quantization_are_refused(tmp_path: Path) -> None:
    model = vit()
    model.classifier = Packed(24, 3)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(SettingError, match="kind 'gptq'"):
        upop.shrink(model, {"vit.layers.0.mlp": [0]})
    assert upop.count_parameters(model) == upop.count_parameters(vit())
    with pytest.raises(SettingError, match="kind 'gptq'"):
        mark(model)
    model.config.quantization_config = {"quant_method": "upop", "kept": {}}
    model.save_pretrained(tmp_path)
    _edit(tmp_path, lambda record: record.update(quant_method="gptq"))
    with pytest.raises(CheckpointError, match="quantized by 'gptq'"):
        upop.load(tmp_path)


@since("transformers", "5.23", "its modules have other names")
def test_weights_that_were_unpacked_when_they_were_read_are_like_others(tmp_path: Path) -> None:
    class Reader:
        """What transformers leaves on a model that it read from a GGUF file."""

        quantization_config: ClassVar = {"quant_method": "gguf"}

        def remove_quantization_config(self, model: Any) -> None:
            del model.hf_quantizer

    for record in (Reader.quantization_config, None):  # that in the configuration is often deleted by hand
        model = vit()
        model.hf_quantizer = Reader()
        if record is not None:
            model.config.quantization_config = record
        upop.shrink(model, {"vit.layers.0.mlp": [0, 3]})
        upop.save(model, tmp_path / str(record))
        assert not hasattr(model, "hf_quantizer")
        assert upop.count_parameters(upop.load(tmp_path / str(record))) == upop.count_parameters(model)
    eighth = vit().to(torch.float8_e4m3fn)
    eighth.hf_quantizer = Reader()
    with pytest.raises(SettingError, match="kind 'gguf'"):
        mark(eighth)


def test_a_dense_model_cannot_be_compressed_by_its_configuration(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="compress with upop"):
        transformers.ViTForImageClassification.from_pretrained(
            tmp_path, quantization_config=UpopConfig({"vit.layers.0.mlp": [3, 40]})
        )
    assert upop.count_parameters(upop.load(tmp_path)) == upop.count_parameters(vit())


def test_what_is_missing_or_of_another_model_is_named(tmp_path: Path) -> None:
    model, _ = compressed("vit")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"Classification.*BertForSequenceClass"):
        upop.load_into(bert(), upop.save(model, tmp_path / "ours"))
    with pytest.raises(PlanError, match=r"do not fit BertForSequenceClassification: .*folder.*class"):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors\. .*Fetch.*weights"):
        upop.load(tmp_path)
    with pytest.raises(CheckpointError, match="nothing was found there"):
        upop.load(tmp_path / "gone")


@since("transformers", "5.23", "its modules have other names")
def test_a_model_that_its_configuration_does_not_describe_is_left_unmarked() -> None:
    model = vit()
    model.vit.layers[0].mlp.fc1 = nn.Linear(24, 50)
    model.vit.layers[0].mlp.fc2 = nn.Linear(50, 24)
    with pytest.warns(UserWarning, match=r"configuration.*upop\.load_into"):
        upop.shrink(model, {"vit.layers.0.mlp": range(45)})
    assert not hasattr(model.config, "quantization_config")


@since("transformers", "5.23", "its modules have other names")
def test_models_inside_other_modules_are_marked(tmp_path: Path) -> None:
    whole = nn.ModuleDict({"tower": vit(), "head": nn.Linear(3, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upop.shrink(whole, {"tower.vit.layers.1.mlp": range(7)})
    tower: Any = whole["tower"]
    tower.save_pretrained(tmp_path)
    assert recorded(tower.config) == {"vit.layers.1.mlp": (7, 40)}
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert bit_equal(again, tower, {"pixel_values": images()})


def test_what_from_pretrained_loads_is_saved_as_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model: Any = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=12)).eval()
    attention, words = "encoder.layer.1.attention.self", torch.arange(5)[None]
    for step, left in enumerate((4, 2)):  # [4, 16] of two heads could be four heads, or two of two dimensions
        upop.shrink(model, {attention: range(left)})
        model.save_pretrained(tmp_path / f"library {step}")
        model = transformers.BertModel.from_pretrained(tmp_path / f"library {step}")
        folder = upop.save(model, tmp_path / f"ours {step}")
        for again in (upop.load(folder), transformers.BertModel.from_pretrained(folder)):
            assert torch.equal(again(words).last_hidden_state, model(words).last_hidden_state)
        layout = json.loads((folder / "upop.json").read_text())["layout"][attention]
        assert (layout["heads"], layout["channels"], layout["of"]) == (2, left, 8)
