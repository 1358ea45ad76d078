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

from upop.checkpoints.clip_names import from_openai, to_openai
from upop.models.coop import CoOp, ends_of
from upop.models.crossget import CrossGetClip, CrossGetConfig, Encoded
from upop.tokens.flow import Flow
from upop.tokens.matching import Match, cosine, match, merge, removable

PARITY = Path(os.environ.get("UPOP_TOKENS_PARITY", Path(__file__).parent / "data_tokens"))
EOT = 99  # of the recorded cases of matching
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
        positions = model.clip.text_model.embeddings.position_embedding.weight
        found = model.prompts()
        if not torch.allclose(found, recorded["eval/prompts"]):
            found = found + positions
        close(found, recorded["eval/prompts"], 1e-10, "prompts")
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
