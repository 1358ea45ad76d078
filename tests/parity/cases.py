"""How the recorded sets of each task are read: one `Case` per task, and the tests run over all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import upop
from conftest import parity_sets
from upop.checkpoints.names.clip import from_openai, group_from_openai, to_openai
from upop.data.caption import caption_labels
from upop.models.caption import BlipCaption, CaptionConfig, caption_loss
from upop.models.classifier import ClassifierConfig, build_classifier
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig, answer_losses
from upop.tasks.windows import Window, slide

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
        group: a recorded name of a mask -> the name of the group.
        in_loop: (config.json, batch, step) -> the batch as official_loop saw it, where that differs from the search.
        norms: model -> L2 norm of every parameter, under the published names.
        ranked: beginning of a recorded name -> (model in evaluation mode, batch, the number that the name ends with)
            -> what was recorded under it. Which numbers there are, the recording says.
        not_shrunk: outputs that a search leaves alone and shrinking then changes: those of momentum copies.
        searched: (set, a searched model's tensors without masks) -> the dense model with these weights.
        official: the name of the task for `upop.load_official`; the folder's name if none is given.
        undisturbed: overrides of `upop.load_official` without which training would draw random numbers.
        exported: model -> its tensors under the published names.
        decayed: (name, parameter) -> whether AdamW decays it.
        update_first_step: whether the published loop moves the masks at its very first step.
        masks_in_optimizer: whether the published loop lets its optimizer move the masks between updates and forgets
            their gradients, which we do not repeat: of official_loop only the steps and the budget are compared.
    """

    sizes: Callable[[Config], dict[str, Any]]
    batch: Callable[[Config, Tensors, Tensors], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    outputs: Callable[[nn.Module, Batch], Tensors]
    verify: Callable[[Batch], Any]
    keys: Mapping[str, Callable[[], nn.Module]]
    interval: int
    group: Callable[[str], str] = lambda name: name
    in_loop: Callable[[Config, Batch, int], Batch] | None = None
    norms: Callable[[nn.Module], dict[str, float]] = lambda model: {
        name: float(value.detach().norm()) for name, value in model.named_parameters(remove_duplicate=False)
    }
    ranked: Mapping[str, Callable[[nn.Module, Batch, int], Tensor]] = field(default_factory=dict)
    not_shrunk: tuple[str, ...] = ()
    searched: Callable[[Recorded, Tensors], nn.Module] = lambda recorded, state: _filled(
        recorded.load("dense.pth"), state
    )
    official: str | None = None
    undisturbed: Mapping[str, Any] = field(default_factory=lambda: {"dropout": 0.0, "drop_path": 0.0})
    exported: Callable[[nn.Module], Tensors] = lambda model: model.state_dict()
    decayed: Callable[[str, Tensor], bool] = lambda _name, _parameter: True
    update_first_step: bool = True
    masks_in_optimizer: bool = False

    def found(self, model: nn.Module, batch: Batch, wanted: Iterable[str]) -> Tensors:
        """Return what the model computes: `outputs`, and of `ranked` all that is wanted, by their recorded names."""
        numbered = {
            name: output(model, batch, int(name.removeprefix(start)))
            for name in wanted
            for start, output in self.ranked.items()
            if name.startswith(start)
        }
        return {**self.outputs(model, batch), **numbered}


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
        sizes = {**self.case.sizes(self.config), **self.case.undisturbed}
        return upop.load_official(self.case.official or self.task, self.folder / name, **sizes)

    def batch(self, step: int, dtype: torch.dtype = torch.float32, search: Tensors | None = None) -> Batch:
        recorded = self.read("inputs")
        shared = {key: value for key, value in recorded.items() if "/" not in key}
        inputs = shared | within(recorded, f"step{step}/")
        inputs["image"] = inputs["image"].to(dtype)
        inputs["step"] = torch.tensor(step)
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


def _vqa_batch(config: Config, inputs: Tensors, _search: Tensors) -> Batch:
    return {
        "images": inputs["image"],
        "question_ids": inputs["q_ids"],
        "question_mask": inputs["q_mask"],
        "answer_ids": inputs["a_ids"],
        "answer_mask": inputs["a_mask"],
        "answer_counts": torch.tensor(config["n"]),
        "weights": inputs["weights"],
        "candidate_ids": inputs["cand_ids"],
        "candidate_mask": inputs["cand_mask"],
    }


def _vqa_verify(batch: Batch) -> dict[str, Tensor]:
    names = ("images", "question_ids", "question_mask", "answer_ids", "answer_mask", "answer_counts")
    return {name: batch[name] for name in names}


def _vqa_answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    return answer_losses(model(**_vqa_verify(batch)), batch["answer_ids"], batch["answer_mask"])


def _vqa_loss(model: nn.Module, batch: Batch) -> Tensor:
    return (batch["weights"] * _vqa_answer_losses(model, batch)).sum() / len(batch["images"])


def _vqa_outputs(model: nn.Module, batch: Batch) -> Tensors:
    images, states = model.encode(batch["images"], batch["question_ids"], batch["question_mask"])
    return {
        "image_embeds": images,
        "question_states": states,
        "answer_logits": model(**_vqa_verify(batch)),
        "answer_loss_none": _vqa_answer_losses(model, batch),
        "loss": _vqa_loss(model, batch),
        "generate_beam3_ids": model.generate(states, None, end=2),
    }


def _vqa_ranked(model: nn.Module, batch: Batch, k: int) -> Tensor:
    _, states = model.encode(batch["images"], batch["question_ids"], batch["question_mask"])
    candidates = batch["candidate_ids"], batch["candidate_mask"]
    # A question has k pairs, so that chunks of fewer end within one.
    return model.rank(states, batch["question_mask"], *candidates, k, chunk=max(1, k - 1))


def _caption_batch(config: Config, inputs: Tensors, _search: Tensors) -> Batch:
    start, *prompt, end = config["prompt_ids"]
    assert inputs["ids"][0, : 1 + len(prompt)].tolist() == [start, *prompt]
    return {
        "images": inputs["image"],
        "input_ids": inputs["ids"],
        "attention_mask": inputs["mask"],
        "labels": caption_labels(inputs["ids"], inputs["mask"], 1 + len(prompt)),
        "prompt": prompt,
        "end": end,
        "lengths": {name: config[name] for name in ("max_length", "min_length")},
    }


def _caption_verify(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}


def _caption_loss(model: nn.Module, batch: Batch) -> Tensor:
    return caption_loss(model(**_caption_verify(batch)), batch["labels"])


def _caption_outputs(model: nn.Module, batch: Batch) -> Tensors:
    def generated(**how: Any) -> Tensor:
        return model.generate(batch["images"], batch["prompt"], batch["end"], **batch["lengths"], **how)

    return {
        "image_embeds": model.visual_encoder(batch["images"]),
        "logits": model(**_caption_verify(batch)),
        "loss": _caption_loss(model, batch),
        "generate_greedy_ids": generated(num_beams=1),
        "generate_beam3_ids": generated(num_beams=3),
        "generate_beam3_rep1.5_ids": generated(num_beams=3, repetition_penalty=1.5),
    }


def _retrieval_batch(config: Config, inputs: Tensors, search: Tensors) -> Batch:
    return {
        "images": inputs["image"],
        "input_ids": inputs["ids"],
        "attention_mask": inputs["mask"],
        "ids": inputs["idx"],
        "alpha": config["distill_alpha_per_step"][int(inputs["step"])],
        "draws": search.get("draws"),
    }


def _retrieval_in_loop(config: Config, batch: Batch, step: int) -> Batch:
    count = 2 * len(batch["ids"])
    draws = torch.tensor(config["official_loop_draws"][step * count : (step + 1) * count])
    alpha = config["distill_alpha"] * min(1, step / config["steps"])
    return {**batch, "draws": draws, "alpha": alpha}


def _retrieval_verify(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}


def _retrieval_loss(model: nn.Module, batch: Batch) -> Tensor:
    contrastive, matching = model(**batch)
    return contrastive + matching


def _retrieval_outputs(model: nn.Module, batch: Batch) -> Tensors:
    states, image = model.encode_image(batch["images"])
    texts = batch["input_ids"], batch["attention_mask"]
    words, text = model.encode_text(*texts)
    compared = model(**_retrieval_verify(batch))
    sims = image @ text.t()
    return {
        "image_embeds": states,
        "image_feat": compared.image_features,
        "text_hidden": words,
        "text_feat": compared.text_features,
        "sims": sims,
        "itm_logits": compared.logits,
        "score_i2t_full": compared.logits[..., 1] + sims,
        "image_feat_m": model.encode_image(batch["images"], momentum=True)[1],
        "text_feat_m": model.encode_text(*texts, momentum=True)[1],
    }


def _clip_sizes(config: Config) -> dict[str, Any]:
    return {f"{tower}_heads": config[f"{tower}_width"] // config["head_dim"] for tower in ("vision", "text")}


def _clip_batch(config: Config, inputs: Tensors, _search: Tensors) -> Batch:
    alpha = config["distill_alpha_per_step"][int(inputs["step"])]
    return {"images": inputs["image"], "input_ids": inputs["ids"], "ids": inputs["idx"], "alpha": alpha}


def _clip_in_loop(config: Config, batch: Batch, step: int) -> Batch:
    return {**batch, "alpha": config["distill_alpha"] * min(1.0, step / config["steps"])}


def _clip_verify(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("images", "input_ids")}


def _clip_outputs(model: nn.Module, batch: Batch) -> Tensors:
    image, text = model(**_clip_verify(batch))
    return {
        "image_features": model.encode_image(batch["images"]),
        "text_features": model.encode_text(batch["input_ids"]),
        "image_features_m": model.encode_image(batch["images"], momentum=True),
        "text_features_m": model.encode_text(batch["input_ids"], momentum=True),
        "sims": image @ text.t(),
    }


def _clip_norms(model: nn.Module) -> dict[str, float]:
    named = dict(model.named_parameters())
    return {name: float(value.detach().norm()) for name, value in to_openai(named).items()}


def _deit_sizes(config: Config) -> dict[str, Any]:
    return {"vision_heads": config["heads"], "vision_mlp": int(config["mlp_ratio"] * config["width"])}


def _deit_loss(model: nn.Module, batch: Batch) -> Tensor:
    # Soft targets, as mixup gives them, or labels.
    smoothing = 0.0 if batch["targets"].is_floating_point() else 0.1
    return F.cross_entropy(model(batch["image"]), batch["targets"], label_smoothing=smoothing)


def _deit_outputs(model: nn.Module, batch: Batch) -> Tensors:
    features = model.forward_features(batch["image"])[:, 0]
    return {"logits": model(batch["image"]), "features": features, "loss": _deit_loss(model, batch)}


def _segmenter_sizes(config: Config) -> dict[str, Any]:
    heads, mlp = config["heads"], config["d_ff_ratio"] * config["width"]
    return {
        f"{part}_{name}": value for part in ("vision", "decoder") for name, value in (("heads", heads), ("mlp", mlp))
    }


def _segmenter_batch(config: Config, inputs: Tensors, _search: Tensors) -> Batch:
    images = {name: inputs[name].to(inputs["image"].dtype) for name in ("image", "odd_image", "slide_image")}
    return {**images, "targets": inputs["targets"].long(), "slide": config["slide"]}


def _segmenter_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["targets"], ignore_index=255)


def _segmenter_outputs(model: nn.Module, batch: Batch) -> Tensors:
    window = Window(batch["slide"]["window_size"], batch["slide"]["window_stride"], batch=1)
    size = batch["slide"]["ori_shape"]
    # The last norm is over few classes that are much alike: in float32 it shows in which order attention was summed.
    with sdpa_kernel(SDPBackend.MATH):
        slid = [slide(model, batch["slide_image"][0], window, size, flipped=flipped) for flipped in (False, True)]
        return {
            "masks": model(batch["image"]),
            "encoder_features": model.encode(batch["image"]),
            "loss": _segmenter_loss(model, batch),
            "odd_masks": model(batch["odd_image"]),
            "slide_flip0": slid[0],
            "slide_flip1": slid[1],
        }


CASES: dict[str, Case] = {
    "caption": Case(
        sizes=blip_sizes,
        batch=_caption_batch,
        loss=_caption_loss,
        outputs=_caption_outputs,
        verify=_caption_verify,
        keys={
            "blip_caption_vit_base": lambda: BlipCaption(CaptionConfig.vit("base")),
            "blip_caption_vit_large": lambda: BlipCaption(CaptionConfig.vit("large")),
        },
        interval=100,
    ),
    "clip": Case(
        official="retrieval-clip",
        sizes=_clip_sizes,
        undisturbed={},
        batch=_clip_batch,
        loss=lambda model, batch: model(**batch),
        in_loop=_clip_in_loop,
        outputs=_clip_outputs,
        verify=_clip_verify,
        not_shrunk=("image_features_m", "text_features_m"),
        keys={"clip_vit_l14_336": lambda: ClipRetrieval(ClipConfig())},
        exported=lambda model: to_openai(model.state_dict()),
        interval=3,
        group=group_from_openai,
        norms=_clip_norms,
        searched=lambda recorded, state: _filled(recorded.load("dense.pth"), from_openai(state)),
    ),
    "deit": Case(
        sizes=_deit_sizes,
        batch=lambda _config, inputs, _search: {"image": inputs["image"], "targets": inputs["targets"]},
        loss=_deit_loss,
        outputs=_deit_outputs,
        verify=lambda batch: batch["image"],
        keys={"deit_small_patch16_224": lambda: build_classifier(ClassifierConfig())},
        interval=3,
        decayed=lambda name, parameter: parameter.dim() > 1 and name not in ("pos_embed", "cls_token"),
        update_first_step=False,
    ),
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
    "retrieval": Case(
        sizes=blip_sizes,
        batch=_retrieval_batch,
        loss=_retrieval_loss,
        outputs=_retrieval_outputs,
        verify=_retrieval_verify,
        keys={
            "blip_retrieval_vit_base": lambda: BlipRetrieval(RetrievalConfig.vit("base")),
            "blip_retrieval_vit_large": lambda: BlipRetrieval(RetrievalConfig.vit("large")),
        },
        interval=200,
        in_loop=_retrieval_in_loop,
        not_shrunk=("image_feat_m", "text_feat_m"),
    ),
    "segmenter": Case(
        sizes=_segmenter_sizes,
        undisturbed={"drop_path": 0.0, "decoder_dropout": 0.0},
        batch=_segmenter_batch,
        loss=_segmenter_loss,
        outputs=_segmenter_outputs,
        verify=lambda batch: batch["image"],
        keys={"seg_small_mask_ade20k_512": lambda: Segmenter(SegmenterConfig())},
        interval=3,
        update_first_step=False,
        masks_in_optimizer=True,
    ),
    "vqa": Case(
        sizes=blip_sizes,
        batch=_vqa_batch,
        loss=_vqa_loss,
        outputs=_vqa_outputs,
        ranked={"rank_ids_k": _vqa_ranked},
        verify=_vqa_verify,
        keys={
            "blip_vqa_vit_base": lambda: BlipVqa(VqaConfig.vit("base")),
            "blip_vqa_vit_large": lambda: BlipVqa(VqaConfig.vit("large")),
        },
        interval=1000,
    ),
}
