"""CrossGET against recordings of the published code: what was decided, computed, lost and learnt.

`UPOP_TOKENS_PARITY` names another folder of the layout of `data_tokens/`, with sets of other sizes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from upop.checkpoints import load_official, read_weights
from upop.checkpoints.names.clip import from_openai, to_openai
from upop.models.coop import CoOp, ends_of
from upop.models.crossget import CrossGetClip, CrossGetConfig, Encoded
from upop.models.llava import add_cross_tokens, from_published, llava_losses
from upop.tokens.flow import Flow, flow_of
from upop.tokens.layer import place_of
from upop.tokens.matching import Match, cosine, match, merge, removable

PARITY = Path(os.environ.get("UPOP_TOKENS_PARITY", Path(__file__).parent / "data_tokens"))
VARIANTS = ("none", "cross", "v", "l", "vl", "clamp")

Tensors = dict[str, Tensor]


def sets(task: str) -> list[Path]:
    return sorted(path.parent for path in PARITY.glob(f"{task}/*/config.json"))


def read(folder: Path, name: str) -> Tensors:
    return load_file(folder / f"{name}.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def within(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert_close(
        found.detach().to(wanted.dtype), wanted, atol=tolerance, rtol=tolerance, msg=lambda said: f"{what}: {said}"
    )


# Matching and merging.


def cases() -> Iterator[Any]:
    for folder in sets("matching"):
        for name, case in config_of(folder)["cases"].items():
            yield pytest.param(folder, name, case, id=f"{folder.name}-{name}")


@pytest.mark.parametrize(("folder", "name", "case"), list(cases()))
def test_decisions_weights_and_merged_tokens_are_the_recorded_ones(
    folder: Path, name: str, case: Mapping[str, Any]
) -> None:
    given = within(read(folder, "cases"), f"{name}/")
    keys, size = given["keys"], given["size"].squeeze(2)
    tokens = keys.shape[1]
    places = torch.arange(tokens)
    protected = (places == 0) | (places == tokens - 1)
    count = 2
    if case["kind"] == "llava":
        attended = given["attention"]
        importance = attended[:, :-1].mean(1) + attended[:, -1]
    elif case["kind"] == "text":
        end = given["ids"].argmax(1)
        importance = cosine(keys, given["queries"][torch.arange(len(end)), end])
        protected, count = protected | (places == end.unsqueeze(1)), 3
    else:
        importance = cosine(keys, given["queries"][:, -1])
    remove = removable(tokens, count, case["r"])
    assert remove == case["removed"]
    found = match(keys, importance, remove, protected)
    for part in ("source", "kept", "target"):
        assert torch.equal(getattr(found, part), given[f"out/{part}"].long()), part
    close(found.weight, given["out/weight"], 1e-12, "weight")
    merged, sizes = merge(given["x"], size, found)
    close(merged, given["out/x"], 1e-12, "x")
    close(sizes, given["out/size"].squeeze(2), 1e-12, "size")


# CLIP.


def clip_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    width, text = config["vision_width"], config["text_width"]
    return {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "vision_width": width,
        "vision_depth": config["layers"],
        "vision_heads": config["vision_heads"],
        "vision_mlp": 4 * width,
        "text_width": text,
        "text_depth": config["layers"],
        "text_heads": config["text_heads"],
        "text_mlp": 4 * text,
        "vocab_size": config["vocab"],
        "max_positions": config["context"],
        "embed_dim": config["embed_dim"],
        "rl": 0,
        "merge_padding": True,
    }


def build(folder: Path, variant: str) -> CrossGetClip:
    config = config_of(folder)
    removed = {"v": ("rv",), "l": ("rl",), "vl": ("rv", "rl")}.get(variant, ())
    counts = {name: 50 if variant == "clamp" else config[name] if name in removed else 0 for name in ("rv", "rl")}
    sizes = {**clip_sizes(config), "cross": variant != "none", **counts}
    model = CrossGetClip(CrossGetConfig(**sizes)).double()
    state = from_openai(read(folder, "weights"))
    if variant == "none":
        state = {key: value for key, value in state.items() if "cross_" not in key}
    model.load_state_dict({key: value.double() for key, value in state.items()})
    return model


def pairs(folder: Path, step: int) -> Tensors:
    inputs = within(read(folder, "inputs"), f"step{step}/")
    return {"images": inputs["image"].double(), "input_ids": inputs["ids"], "ids": inputs["idx"]}


def layers_of(model: nn.Module) -> list[Tensor]:
    """Have the outputs of a tower's layers gathered, in the order of calls."""
    gathered: list[Tensor] = []
    for layer in model.encoder.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda _layer, _args, output: gathered.append(output))
    return gathered


def check_layers(flow: Flow, outputs: list[Tensor], recorded: Tensors, ids: Tensor | None, tolerance: float) -> None:
    """Compare the decisions of every layer, the sizes, the tokens, and, of texts, the mean ids."""
    size: Tensor | None = None
    for number, found in enumerate(flow.matches):
        at = within(recorded, f"layer{number}/")
        if "kept" not in at:
            assert found is None
            continue
        tokens = outputs[number]
        if size is None:
            size = tokens.new_ones(len(tokens), at["kept"].shape[1] + at["source"].shape[1])
        if found is None:  # the recorded code goes through all steps where nothing goes
            assert not at["source"].numel()
        else:
            check_match(found, at, tolerance)
            before, joined = size, size.gather(1, found.source)
            size = size.gather(1, found.kept).scatter_add(1, found.target, joined)
            if ids is not None:
                summed = (before * ids).gather(1, found.kept)
                summed = summed.scatter_add(1, found.target, (before * ids).gather(1, found.source))
                ids = summed / size
        close(size, at["size"].reshape(size.shape), tolerance, f"size {number}")
        if "x" in at:
            close(tokens, at["x"], tolerance, f"x {number}")
        if ids is not None and "ids" in at:
            close(ids, at["ids"], tolerance, f"ids {number}")


def check_match(found: Match, at: Tensors, tolerance: float) -> None:
    for part in ("source", "kept", "target"):
        assert torch.equal(getattr(found, part), at[part].long()), part
    close(found.weight, at["weight"], tolerance, "weight")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("folder", sets("clip"), ids=lambda folder: folder.name)
def test_clip_computes_layer_by_layer_what_was_recorded(folder: Path, variant: str) -> None:
    model = build(folder, variant).eval()
    batch = pairs(folder, 0)
    recorded = within(read(folder, "out_f64"), f"{variant}/")
    towers = {"image": model.vision_model, "text": model.text_model}
    outputs = {name: layers_of(tower) for name, tower in towers.items()}
    with torch.no_grad():
        image, text = model.encode_image(batch["images"]), model.encode_text(batch["input_ids"])
    close(image.features, recorded["image_features"], 1e-10, "image features")
    close(text.features, recorded["text_features"], 1e-10, "text features")
    ids = torch.cat([batch["input_ids"], batch["input_ids"][:, :1]], 1).double()
    check_layers(image.flow, outputs["image"], within(recorded, "image/"), None, 1e-10)
    check_layers(text.flow, outputs["text"], within(recorded, "text/"), ids, 1e-10)
    inputs = within(read(folder, "inputs"), "eval/")
    with torch.no_grad():
        compared = model(inputs["image"].double(), inputs["ids"])
    close(compared[0] @ compared[1].t(), recorded["eval_sims"], 1e-10, "similarities")
    counts = json.loads((folder / "report.json").read_text())["counts"][variant]
    for name in ("image", "text"):
        assert [output.shape[1] for output in outputs[name][: len(counts[name])]] == [
            after for _, after in counts[name]
        ]


def stacked(encoded: Encoded) -> Tensor:
    return torch.cat(encoded.crosses)


@pytest.mark.parametrize("variant", [each for each in VARIANTS if each != "none"])
@pytest.mark.parametrize("folder", sets("clip"), ids=lambda folder: folder.name)
def test_clip_has_the_recorded_losses_and_gradients(folder: Path, variant: str) -> None:
    model = build(folder, variant).train()
    batch = pairs(folder, 0)
    recorded = within(read(folder, "out_f64"), f"{variant}/train/")
    close(stacked(model.encode_image(batch["images"])), recorded["image_cross"], 1e-10, "image cross tokens")
    close(stacked(model.encode_text(batch["input_ids"])), recorded["text_cross"], 1e-10, "text cross tokens")
    losses = model(**batch)
    close(losses.contrastive, recorded["loss_ita"], 1e-10, "loss_ita")
    close(losses.cross, recorded["loss_kd"], 1e-10, "loss_kd")
    loss = 0.5 * losses.contrastive + 0.5 * losses.cross
    close(loss, recorded["loss"], 1e-10, "loss")
    loss.backward()
    gradients = to_openai(
        {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in model.named_parameters()}
    )
    known = within(read(folder, "grads_f64"), f"{variant}/")
    assert within(known, "norm/").keys() == gradients.keys()
    for name, norm in within(known, "norm/").items():
        close(gradients[name].norm(), norm.squeeze(), 1e-10, name)
    for name, gradient in within(known, "grad/").items():
        close(gradients[name], gradient, 1e-10, name)


@pytest.mark.parametrize("folder", sets("clip"), ids=lambda folder: folder.name)
def test_clip_trains_as_recorded(folder: Path) -> None:
    config, recorded = config_of(folder), read(folder, "train_loop")
    model = build(folder, "vl").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    for step in range(config["epochs"] * config["steps"]):
        rate = recorded[f"epoch{step // config['steps']}/lr"].item()
        optimizer.param_groups[0]["lr"] = rate
        losses = model(**pairs(folder, step % config["steps"]))
        close(losses.contrastive, recorded[f"step{step}/loss_ita"], 1e-9, f"loss_ita {step}")
        close(losses.cross, recorded[f"step{step}/loss_kd"], 1e-9, f"loss_kd {step}")
        optimizer.zero_grad()
        (0.5 * losses.contrastive + 0.5 * losses.cross).backward()
        optimizer.step()
    weights = to_openai(dict(model.named_parameters()))
    final = within(recorded, "final/")
    for name, norm in within(final, "norm/").items():
        close(weights[name].norm(), norm.squeeze(), 1e-9, name)
    for name in final.keys() & weights.keys():
        close(weights[name], final[name], 1e-9, name)
    with torch.no_grad():
        batch = pairs(folder, 0)
        close(model.encode_image(batch["images"]).features, final["image_features"], 1e-9, "image features")
        close(model.encode_text(batch["input_ids"]).features, final["text_features"], 1e-9, "text features")


@pytest.mark.parametrize("folder", sets("clip"), ids=lambda folder: folder.name)
def test_a_published_checkpoint_loads_and_computes_what_was_trained(folder: Path) -> None:
    path = folder / "checkpoint_best.pth"
    if not path.exists():
        pytest.skip("this set is without its checkpoint")
    config = config_of(folder)
    sizes = {name: config[name] for name in ("vision_heads", "text_heads", "rv", "rl")}
    model = load_official("crossget", path, **sizes, merge_padding=True)
    final, batch = within(read(folder, "train_loop"), "final/"), pairs(folder, 0)
    with torch.no_grad():
        close(model.encode_image(batch["images"].float()).features, final["image_features"], 1e-4, "image features")
        close(model.encode_text(batch["input_ids"]).features, final["text_features"], 1e-4, "text features")


# CoOp.


def coop(folder: Path, variant: str) -> CoOp:
    """The recorded model; embeddings of the prompts' words are those of the recorded table."""
    config, inputs = config_of(folder), read(folder, "inputs")
    state = {key: value.double() for key, value in from_openai(read(folder, "weights")).items()}
    words = state.pop("text_model.embeddings.token_embedding.weight")
    if variant == "none":
        state = {key: value for key, value in state.items() if "cross_" not in key}
    prompts, count = inputs["tokenized_prompts"].long(), config["n_ctx"]
    sizes = clip_sizes({**config, "context": prompts.shape[1]})
    sizes |= {"cross": variant != "none", "rv": config["rv"] if variant == "v" else 0}
    model = CoOp(
        CrossGetConfig(**sizes),
        words[prompts[:, :1]],
        words[prompts[:, 1 + count :]],
        prompts.argmax(1),
        inputs["ctx"].double(),
        config["name_lens"] if config["position"] == "middle" else None,
    ).double()
    model.clip.load_state_dict(state)
    for name, each in model.named_parameters():
        each.requires_grad_(name in model.trained)
    if config["position"] == "end":
        assert torch.equal(ends_of(model.suffix, 1 + count), prompts.argmax(1))
    return model


@pytest.mark.parametrize("variant", ["none", "cross", "v"])
@pytest.mark.parametrize("folder", sets("coop"), ids=lambda folder: folder.name)
def test_coop_has_the_recorded_logits_losses_and_gradients(folder: Path, variant: str) -> None:
    model, inputs = coop(folder, variant), read(folder, "inputs")
    images, labels = inputs["image"].double(), inputs["label"].long()
    recorded = within(read(folder, "out"), f"f64/{variant}/")
    close(model(images), recorded["eval/logits"], 1e-10, "logits")
    if "eval/prompts" in recorded:
        close(model.prompts(), recorded["eval/prompts"], 1e-10, "prompts")
    if variant == "none":
        return
    losses = model(images, labels)
    close(losses.classes, recorded["train/loss_ce"], 1e-10, "loss_ce")
    close(losses.cross, recorded["train/loss_cross"], 1e-10, "loss_cross")
    close(losses.total(), recorded["train/loss"], 1e-10, "loss")
    close(stacked(model.clip.encode_image(images)), recorded["train/image_cross"], 1e-10, "image cross tokens")
    losses.total().backward()
    names = {
        "prompt_learner.ctx": "context",
        "image_encoder.transformer.cross_image": "clip.vision_model.encoder.cross_image",
        "text_encoder.transformer.cross_text": "clip.text_model.encoder.cross_text",
    }
    for name, gradient in within(recorded, "grad/").items():
        close(model.trained[names[name]].grad, gradient, 1e-10, name)


# LLaVA.


def llava(folder: Path) -> LlavaForConditionalGeneration:
    """The recorded model as transformers has it."""
    config, weights = config_of(folder), read(folder, "weights")
    layer = "model.vision_tower.vision_tower.vision_model.encoder.layers.0"
    vision = {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "hidden_size": config["vision_width"],
        "num_attention_heads": config["vision_heads"],
        "num_hidden_layers": config["vision_layers"],
        "intermediate_size": weights[f"{layer}.mlp.fc1.weight"].shape[0],
    }
    text = {
        "hidden_size": config["width"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config["heads"],
        "num_hidden_layers": config["layers"],
        "vocab_size": config["vocab"],
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
    }
    used = set(read(folder, "inputs")["input_ids"].flatten().tolist())
    place = min(set(range(3, config["vocab"])) - used)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_index=place)
    ).eval()
    model.load_state_dict(from_published(weights))
    assert add_cross_tokens(model, read_weights(folder / "cross_tokens.bin"), config["r"])
    return model


def prompts(folder: Path, model: LlavaForConditionalGeneration, limit: int | None = None) -> dict[str, Tensor]:
    """The recorded texts, with as many places as there are visual tokens in that of the image."""
    inputs = read(folder, "inputs")
    count, place = model.config.image_seq_length, model.config.image_token_id

    def spread(rows: Tensor, at: int) -> Tensor:
        image = inputs["input_ids"][: len(rows), : rows.shape[1]] == -200
        made = [
            torch.cat([row[: int(where)], torch.full((count,), at), row[int(where) + 1 :]])
            for row, where in zip(rows, image.int().argmax(1), strict=True)
        ]
        return torch.stack(made)

    rows = 1 if limit else len(inputs["input_ids"])
    given = {name: inputs[name][:rows, :limit].long() for name in ("input_ids", "attention_mask", "labels")}
    filled = {"input_ids": place, "attention_mask": 1, "labels": -100}
    return {"pixel_values": inputs["image"][:rows]} | {name: spread(given[name], filled[name]) for name in given}


@pytest.mark.parametrize("folder", sets("llava"), ids=lambda folder: folder.name)
def test_llava_vision_tower_gives_the_recorded_visual_tokens(folder: Path) -> None:
    model, recorded = llava(folder).double(), within(read(folder, "out"), "f64/")
    tower = model.model.vision_tower
    outputs = layers_of(tower)
    images = read(folder, "inputs")["image"].double()
    with torch.no_grad():
        found = model.model.get_image_features(images, return_dict=True)
    close(found.hidden_states[-2][:, 1:], recorded["image_features"], 1e-10, "features")
    close(torch.stack(list(found.pooler_output)), recorded["projected"], 1e-10, "projected")
    place = place_of(tower.encoder.layers[0])
    assert place is not None
    flow = flow_of(outputs[-1], place.merger)
    assert flow is not None
    check_layers(flow, outputs, within(recorded, "vision/"), None, 1e-10)


@pytest.mark.parametrize("folder", sets("llava"), ids=lambda folder: folder.name)
def test_llava_speaks_as_recorded(folder: Path) -> None:
    model, recorded = llava(folder), within(read(folder, "out"), "lm/")
    batch = prompts(folder, model)
    with torch.no_grad():
        found = model(**batch)
    seen = batch["attention_mask"].bool()
    close(found.logits[seen], recorded["eval/logits"][seen], 1e-4, "logits")
    close(found.loss, recorded["eval/loss"], 1e-4, "loss")
    start = prompts(folder, model, 8)
    del start["labels"]
    model.generation_config.eos_token_id = None
    for beams in (1, 3):
        said = model.generate(**start, num_beams=beams, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert said[0, start["input_ids"].shape[1] :].tolist() == recorded[f"generate/beams{beams}"][0, 8:].tolist()


@pytest.mark.parametrize("folder", sets("llava"), ids=lambda folder: folder.name)
def test_llava_has_the_recorded_losses_and_gradients(folder: Path) -> None:
    model, recorded = llava(folder).train(), within(read(folder, "out"), "lm/")
    for name, each in model.model.vision_tower.named_parameters():
        each.requires_grad_("cross_image" in name)
    losses = llava_losses(model, **prompts(folder, model))
    close(losses.cross, recorded["train/loss_kd"], 1e-4, "loss_kd")
    close(losses.total(), recorded["train/loss"], 1e-4, "loss")
    losses.total().backward()
    cross_image, cross_text = model.model.vision_tower.encoder.cross_image, model.model.language_model.cross_text
    gradients = from_published(within(recorded, "grad/"))
    named = dict(model.named_parameters())
    for name, gradient in gradients.items():
        close(named[name].grad, gradient, 1e-4, name)
    close(cross_text.grad, recorded["grad/model.cross_text"], 1e-4, "cross_text")
    vision = "model.vision_tower.vision_tower.vision_model.encoder.cross_image"
    close(cross_image.grad, recorded[f"grad/{vision}"], 1e-4, "cross_image")
