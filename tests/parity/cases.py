"""How the recorded sets of each task are read: one `Case` per task, and the tests run over all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import upop
from conftest import parity_sets
from upop.models.nlvr import BlipNlvr, NlvrConfig

Config = Mapping[str, Any]
"""A set's config.json."""
Tensors = dict[str, Tensor]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What differs between tasks.

    Attributes:
        sizes: overrides of `upop.load_official`: what shapes cannot tell.
        batch: (config.json, a step's tensors of inputs.safetensors, what was recorded of that step in the search)
            -> a batch; images are in the dtype asked for already.
        loss: (model in training mode, batch) -> the task's loss.
        outputs: (model in evaluation mode, batch) -> tensors under the names of dense_out.safetensors.
        verify: batch -> inputs for which masked and shrunken outputs are compared.
        keys: names of the recorded key files -> the full-size model, made on the meta device.
        interval: between updates of the masks in official_loop.
        unit: a recorded name of a mask -> the name of the unit.
        in_loop: (config.json, batch, step) -> the batch as official_loop saw it, where that differs from the search.
        norms: model -> L2 norm of every parameter, under the published names.
        searched: (set, a searched model's tensors without masks) -> the dense model with these weights.
    """

    sizes: Callable[[Config], dict[str, Any]]
    batch: Callable[[Config, Tensors, Tensors], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    outputs: Callable[[nn.Module, Batch], Tensors]
    verify: Callable[[Batch], Any]
    keys: Mapping[str, Callable[[], nn.Module]]
    interval: int
    unit: Callable[[str], str] = lambda name: name
    in_loop: Callable[[Config, Batch, int], Batch] | None = None
    norms: Callable[[nn.Module], dict[str, float]] = lambda model: {
        name: float(value.detach().norm()) for name, value in model.named_parameters(remove_duplicate=False)
    }
    searched: Callable[[Recorded, Tensors], nn.Module] = lambda recorded, state: _filled(
        recorded.load("dense.pth"), state
    )


@dataclass(frozen=True)
class Recorded:
    """One recorded set of a task."""

    task: str
    folder: Path

    @property
    def case(self) -> Case:
        return CASES[self.task]

    @property
    def config(self) -> Config:
        return json.loads((self.folder / "config.json").read_text())

    def read(self, name: str) -> Tensors:
        return load_file(self.folder / f"{name}.safetensors")

    def load(self, name: str) -> nn.Module:
        return upop.load_official(
            self.task, self.folder / name, **self.case.sizes(self.config), dropout=0.0, drop_path=0.0
        )

    def batch(self, step: int, dtype: torch.dtype = torch.float32, search: Tensors | None = None) -> Batch:
        inputs = within(self.read("inputs"), f"step{step}/")
        inputs["image"] = inputs["image"].to(dtype)
        return self.case.batch(self.config, inputs, within(search or {}, f"step{step}/"))


def _filled(model: nn.Module, state: Tensors) -> nn.Module:
    model.load_state_dict(state)
    return model


def all_recorded() -> list[Recorded]:
    """Every set of every task, in the folder that UPOP_PARITY names or in the project's own."""
    return [Recorded(task, folder) for task in CASES for folder in parity_sets(task)]


def within(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def blip_sizes(config: Config) -> dict[str, Any]:
    """The sizes of a recorded BLIP model that its tensors do not tell."""
    return {
        "vision_heads": config["vision"]["heads"],
        "text_heads": config["med"]["num_attention_heads"],
        "vision_mlp": int(config["vision"]["mlp_ratio"] * config["vision"]["width"]),
        "text_mlp": config["med"]["intermediate_size"],
    }


def _nlvr_batch(_config: Config, inputs: Tensors, _search: Tensors) -> Batch:
    return {
        "images": inputs["image"],
        "input_ids": inputs["ids"],
        "attention_mask": inputs["mask"],
        "labels": inputs["targets"],
    }


def _nlvr_verify(batch: Batch) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("images", "input_ids", "attention_mask")}


def _nlvr_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(**_nlvr_verify(batch)), batch["labels"])


def _nlvr_outputs(model: nn.Module, batch: Batch) -> Tensors:
    images, text = model.encode(**_nlvr_verify(batch))
    loss = _nlvr_loss(model, batch)
    return {"image_embeds": images, "text_hidden": text, "logits": model(**_nlvr_verify(batch)), "loss": loss}


CASES: dict[str, Case] = {
    "nlvr": Case(
        sizes=blip_sizes,
        batch=_nlvr_batch,
        loss=_nlvr_loss,
        outputs=_nlvr_outputs,
        verify=_nlvr_verify,
        keys={
            "blip_nlvr_vit_base": lambda: BlipNlvr(NlvrConfig.vit("base")),
            "blip_nlvr_vit_large": lambda: BlipNlvr(NlvrConfig.vit("large")),
        },
        interval=50,
    ),
}
