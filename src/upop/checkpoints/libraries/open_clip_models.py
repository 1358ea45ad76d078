"""Describes open_clip models, which do not know their names, by arguments that are read off their modules.

A model that is built from these arguments must have the same modules, settings and shapes; otherwise nothing is
recorded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from upop.checkpoints.files.description import MOST_LAYERS, Read, read_from
from upop.checkpoints.fitting.likeness import same_but_for_sizes
from upop.checkpoints.fitting.meta import meta_model
from upop.checkpoints.libraries import timm_models
from upop.checkpoints.libraries.outside import checked_config, is_timm_name, sealed
from upop.errors import CheckpointError
from upop.pruning import Plan
from upop.values import shortened

_KINDS = ("CLIP", "CustomTextCLIP")
_WORD = r"^\w*$"
_USUAL_EPS = 1e-5  # default of open_clip's norms


def describe(model: nn.Module, plan: Plan | None) -> dict[str, Any] | None:
    """Return the class of an open_clip model and the arguments that build its dense form.

    Args:
        model: any model, dense or compressed.
        plan: its plan, if known.

    Returns:
        None for models of other classes, and if the arguments cannot be inferred: the model that they build is
        compared with it, module by module.
    """
    kind = _kind(model)
    if type(model).__module__ != "open_clip.model" or kind not in _KINDS:
        return None
    preprocess = getattr(model.visual, "preprocess_cfg", None)
    try:
        arguments = _Reader(model, plan).arguments()
        built = meta_model(lambda: _build(kind, arguments, preprocess))
    except Exception:  # parts that were replaced lack the attributes; open_clip raises errors of many kinds
        return None
    if not _masks_are_alike(model) or not same_but_for_sizes(model, built):
        return None
    return {"class": kind, "arguments": arguments, "preprocess": preprocess}


class _Part(Read):
    model_config = ConfigDict(extra="forbid")


class _Blocks(_Part):
    layers: int | list[int] = Field(12)
    width: int = Field(768, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    ls_init_value: float | None = None
    block_type: Literal["custom", "default"] = "default"
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    act_kwargs: dict[Literal["approximate"], Literal["tanh", "none"]] | None = None
    norm_kwargs: dict[Literal["eps"], float] | None = None
    output_tokens: bool = False
    pool_type: str = Field("", pattern=_WORD)

    @field_validator("layers")
    @classmethod
    def _can_be_built(cls, layers: int | list[int]) -> int | list[int]:
        if not all(0 < each <= MOST_LAYERS for each in ([layers] if isinstance(layers, int) else layers)):
            raise ValueError(f"Input should be between 1 and {MOST_LAYERS}")
        return layers


class _Vision(_Blocks):
    head_width: int = Field(64, ge=1)
    patch_size: int | list[int] = 16
    image_size: int | list[int] = 224
    patch_dropout: float = Field(0.0, ge=0, le=1)
    attentional_pool: bool | str = False
    attn_pooler_queries: int = Field(256, ge=1)
    attn_pooler_heads: int = Field(8, ge=1)
    no_ln_pre: bool = False
    pos_embed_type: Literal["learnable", "sin_cos_2d"] = "learnable"
    final_ln_after_pool: bool = False
    timm_model_name: str | None = None
    timm_pool: str = Field("", pattern=_WORD)
    timm_proj: Literal["linear", "mlp", "none", ""] = ""
    timm_proj_bias: bool = False
    timm_drop: float = Field(0.0, ge=0, le=1)
    timm_drop_path: float | None = Field(None, ge=0, le=1)


class _Text(_Blocks):
    context_length: int = Field(77, ge=1)
    vocab_size: int = Field(49408, ge=1)
    heads: int = Field(8, ge=1)
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    proj_type: Literal["linear", "none"] = "linear"
    proj_bias: bool = False
    hf_config: dict[str, Any] | None = None
    hf_model_pretrained: Literal[False] = False
    hf_pooler_type: str = Field("", pattern=_WORD)
    hf_proj_type: Literal["linear", "mlp"] | None = None


class _Arguments(_Part):
    """The arguments that `describe` writes and `build` passes to open_clip: nothing that would download weights."""

    embed_dim: int = Field(ge=1)
    vision_cfg: _Vision
    text_cfg: _Text
    quick_gelu: bool = False
    nonscalar_logit_scale: bool = False
    init_logit_bias: float | None = None
    cast_dtype: Literal["bfloat16", "float16"] | None = None
    output_dict: bool = False


class _Described(Read):
    kind: str = Field(alias="class")
    arguments: _Arguments
    preprocess: dict[str, Any] | None = None


def build(description: Mapping[str, Any], source: str) -> nn.Module:
    """Return the dense model of a description by `describe`, with initial weights.

    Raises:
        CheckpointError: open_clip is not installed, lacks the model, or rejects its arguments.
    """
    try:
        import open_clip
    except ImportError as error:
        raise CheckpointError(
            f"{source} holds a model of open_clip, which is not installed here: pip install open_clip_torch."
        ) from error
    with read_from(source, "open_clip"):
        described = _Described.model_validate(description)
    if described.kind not in _KINDS:
        raise CheckpointError(
            f"{source} holds open_clip's {shortened(described.kind)}; upop builds {' and '.join(_KINDS)}. Was it "
            "written by a later upop? Update upop."
        )
    arguments = described.arguments.model_dump(exclude_unset=True)
    name, config = described.arguments.vision_cfg.timm_model_name, described.arguments.text_cfg.hf_config
    if name is not None and not is_timm_name(name):
        raise CheckpointError(
            f"{source} asks for the timm_model_name {shortened(name)}, which timm does not build by itself. Nothing is "
            "downloaded for a folder."
        )
    if config is not None:
        arguments["text_cfg"]["hf_config"] = _text_config(config, source)
    try:
        return _build(described.kind, arguments, described.preprocess)
    except Exception as error:  # each class checks its arguments in its own way
        raise CheckpointError(
            f"{source}: open_clip {open_clip.__version__} cannot build {described.kind} as described: "
            f"{type(error).__name__}: {error}. Update open_clip_torch, or build the dense model and call "
            "upop.load_into(model, folder)."
        ) from error


def _text_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the configuration of a transformers text tower, of a model type that open_clip accepts."""
    from open_clip.hf_configs import arch_dict

    wrong = [name for name in ("auto_map", "quantization_config") if config.get(name) is not None]
    if config.get("model_type") not in arch_dict or wrong:
        asked = f"{wrong[0]}={shortened(config[wrong[0]])}" if wrong else shortened(config.get("model_type"))
        raise CheckpointError(
            f"{source} asks for a text tower with {asked}. open_clip accepts the transformers models "
            f"{', '.join(arch_dict)}, and only their own classes are built."
        )
    return checked_config(config, source)


def _build(kind: str, arguments: Mapping[str, Any], preprocess: Any) -> nn.Module:
    from open_clip import model as clip

    settings = json.loads(json.dumps(arguments))  # a copy, since open_clip stores its arguments
    vision, text = settings.pop("vision_cfg"), settings.pop("text_cfg")
    for name in ("image_size", "patch_size"):
        if isinstance(vision.get(name), list):
            vision[name] = tuple(vision[name])
    if torch.get_default_device().type == "meta":  # fixed ones are computed in memory, at any size
        vision.pop("pos_embed_type", None)
    precision = settings.pop("cast_dtype", None)
    settings["cast_dtype"] = getattr(torch, precision) if precision else None
    with tempfile.TemporaryDirectory() as folder, sealed():
        if "hf_config" in text:  # open_clip reads it from a folder, or from the hub
            (Path(folder) / "config.json").write_text(json.dumps(text.pop("hf_config")))
            text["hf_model_name"] = folder
        built: nn.Module = getattr(clip, kind)(
            vision_cfg=clip.CLIPVisionCfg(**vision), text_cfg=clip.CLIPTextCfg(**text), **settings
        )
    if preprocess:
        clip.set_model_preprocess_cfg(built, preprocess)  # as `create_model` does
    return built


class _Reader:
    """Reads the arguments of `CLIP` and `CustomTextCLIP` from the modules of a model, dense or compressed."""

    def __init__(self, model: Any, plan: Plan | None) -> None:
        self._model, self._plan = model, plan
        # CLIP holds the parts of its text tower itself; CustomTextCLIP has it as a module.
        self._text = getattr(model, "text", model)
        self._text_name = "text." if self._text is not model else ""

    def arguments(self) -> dict[str, Any]:
        model, visual = self._model, self._model.visual
        inner: list[Any] = [getattr(tower, "transformer", None) for tower in (visual, self._text)]
        blocks = [each.resblocks[0] for each in inner if hasattr(each, "resblocks")]
        return {
            "embed_dim": self._embed_dim(),
            "vision_cfg": _TOWERS[_kind(visual)](self),
            "text_cfg": self._hugging_face() if _kind(self._text) == "HFTextEncoder" else self._words(),
            "quick_gelu": any(_kind(block.mlp.gelu) == "QuickGELU" for block in blocks),
            "nonscalar_logit_scale": model.logit_scale.dim() > 0,
            "init_logit_bias": None if model.logit_bias is None else 0.0,
            "cast_dtype": "bfloat16" if any(_kind(each.ln_2) == "LayerNormFp32" for each in blocks) else None,
            "output_dict": bool(model.output_dict),
        }

    def _embed_dim(self) -> int:
        for tower in (self._model.visual, self._text):
            if hasattr(tower, "output_dim"):
                return int(tower.output_dim)
        projection = self._text.text_projection
        return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])

    def _vision(self) -> dict[str, Any]:
        visual = self._model.visual
        pooler = visual.attn_pool
        return {
            **self._blocks(visual.transformer, "visual."),
            "width": visual.conv1.out_channels,
            "head_width": visual.conv1.out_channels // self._heads(visual.transformer, "visual."),
            "patch_size": _one(visual.patch_size),
            "image_size": _one(visual.image_size),
            "patch_dropout": float(getattr(visual.patch_dropout, "prob", 0.0)),
            "attentional_pool": False if pooler is None else visual.attn_pool_type or True,
            **(
                {}
                if pooler is None
                else {"attn_pooler_queries": pooler.query.shape[0], "attn_pooler_heads": pooler.attn.num_heads}
            ),
            "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
            # Fixed positions are saved with the weights, and only have to remain fixed.
            "pos_embed_type": "sin_cos_2d" if _is_fixed(visual) else "learnable",
            "final_ln_after_pool": visual.final_ln_after_pool,
            "pool_type": visual.pool_type,
            "output_tokens": bool(visual.output_tokens),
        }

    def _resnet(self) -> dict[str, Any]:
        visual = self._model.visual
        width = visual.conv3.out_channels
        return {
            "layers": [len(part) for part in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)],
            "width": width,
            "head_width": width * 32 // visual.attnpool.num_heads,
            "image_size": visual.image_size,
        }

    def _timm(self) -> dict[str, Any]:
        visual = self._model.visual
        trunk, head = visual.trunk, visual.head
        own = [name for name, kind in (("abs_attn", "AbsAtt"), ("rot_attn", "RotAtt")) if _starts(head, "pool", kind)]
        projection = next((name for part, name in (("proj", "linear"), ("mlp", "mlp")) if hasattr(head, part)), "")
        if not projection and not own and not getattr(trunk, "num_classes", 0):
            projection = "none"
        last = head.proj if projection == "linear" else head.mlp.fc2 if projection == "mlp" else None
        dropout = head.drop if projection == "linear" else head.mlp.drop1 if projection == "mlp" else None
        settings = trunk.pretrained_cfg
        return {
            "timm_model_name": settings.get("architecture"),
            "timm_pool": own[0] if own else _pooling(trunk),
            "timm_proj": projection,
            "timm_proj_bias": last is not None and last.bias is not None,
            "timm_drop": float(dropout.p) if dropout is not None else 0.0,
            "timm_drop_path": timm_models.drop_path_rate(trunk),
            "patch_dropout": float(getattr(getattr(trunk, "patch_drop", None), "prob", 0.0)),
            "image_size": _one(visual.image_size),
        }

    def _words(self) -> dict[str, Any]:
        model, text = self._model, self._text
        projection = text.text_projection
        alone = text is not model
        return {
            **self._blocks(text.transformer, self._text_name),
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.token_embedding.embedding_dim,
            "heads": self._heads(text.transformer, self._text_name),
            "embed_cls": alone and text.cls_emb is not None,
            **({"pad_id": text.pad_id, "output_tokens": bool(text.output_tokens)} if alone else {}),
            "eos_id": text.eos_id if alone else text.text_eos_id,
            "pool_type": text.pool_type if alone else text.text_pool_type,
            "no_causal_mask": text.attn_mask is None,
            "proj_type": "none" if projection is None else "linear",
            "proj_bias": isinstance(projection, nn.Linear),
        }

    def _hugging_face(self) -> dict[str, Any]:
        from open_clip.hf_model import _POOLERS

        text = self._text
        config = text.config.to_dict()
        config.pop("quantization_config", None)  # the record of the cut; the dense tower is built
        kinds: Mapping[str, Callable[..., Any]] = _POOLERS
        pooler = next(name for name, kind in kinds.items() if type(text.pooler) is kind)
        projections = {"Identity": None, "Linear": "linear", "Sequential": "mlp"}
        return {
            "hf_config": json.loads(json.dumps(config, default=str)),
            "hf_model_pretrained": False,
            "hf_pooler_type": pooler,
            "hf_proj_type": projections[_kind(text.proj)],
            "output_tokens": bool(text.output_tokens),
        }

    def _blocks(self, transformer: Any, prefix: str) -> dict[str, Any]:
        block = transformer.resblocks[0]
        own = _kind(block) == "CustomResidualAttentionBlock"
        width = block.ln_1.normalized_shape[0]
        approximate = getattr(block.mlp.gelu, "approximate", "none")
        return {
            "layers": len(transformer.resblocks),
            "mlp_ratio": (self._hidden(transformer, prefix) + 0.5) / width,  # open_clip rounds down
            "ls_init_value": None if isinstance(block.ls_1, nn.Identity) else 1.0,
            "block_type": "custom" if own else "default",
            **({name: read(block) for name, read in _CUSTOM.items()} if own else {}),
            **({"act_kwargs": {"approximate": approximate}} if approximate != "none" else {}),
            **({"norm_kwargs": {"eps": block.ln_1.eps}} if block.ln_1.eps != _USUAL_EPS else {}),
        }

    def _heads(self, transformer: Any, prefix: str) -> int:
        """Return the number of heads of the dense attentions, from the plan if heads were pruned."""
        name, planned = f"{prefix}transformer.resblocks.0.attn", self._plan
        group = {} if planned is None else planned.slices.get(name, {})
        if planned is not None and group.get("channel") == "head":
            return planned.sizes[name]
        return int(transformer.resblocks[0].attn.num_heads)

    def _hidden(self, transformer: Any, prefix: str) -> int:
        """Return the hidden size of the dense MLPs; if unknown, the largest present one, from which all can be cut."""
        planned = self._plan.sizes if self._plan is not None else {}
        sizes = [block.mlp.c_fc.out_features for block in transformer.resblocks]
        names = [f"{prefix}transformer.resblocks.{place}.mlp" for place in range(len(sizes))]
        return int(max(sizes + [planned.get(name, 0) for name in names]))


_TOWERS: Mapping[str, Callable[[_Reader], dict[str, Any]]] = {
    "VisionTransformer": _Reader._vision,
    "ModifiedResNet": _Reader._resnet,
    "TimmModel": _Reader._timm,
}
_CUSTOM: Mapping[str, Callable[[Any], bool]] = {
    "qk_norm": lambda block: not isinstance(block.attn.ln_q, nn.Identity),
    "scaled_cosine_attn": lambda block: block.attn.scaled_cosine,
    "scale_heads": lambda block: block.attn.scale_heads,
    "scale_attn_inner": lambda block: not isinstance(block.attn.ln_inner, nn.Identity),
    "scale_attn": lambda block: not isinstance(block.ln_attn, nn.Identity),
    "scale_fc": lambda block: not isinstance(block.mlp.ln, nn.Identity),
}


def _pooling(trunk: Any) -> str:
    """Return the pooling of a timm model, which some models store in their head."""
    pool = trunk.global_pool if hasattr(trunk, "global_pool") else trunk.head.global_pool
    return str(getattr(pool, "pool_type", pool))


def _one(pair: Any) -> Any:
    """Return the side of a square, or both sides of a rectangle."""
    height, width = pair
    return height if height == width else [height, width]


def _is_fixed(visual: Any) -> bool:
    return not visual.positional_embedding.requires_grad and bool(visual.conv1.weight.requires_grad)


def _starts(module: nn.Module, part: str, kind: str) -> bool:
    return _kind(getattr(module, part, None)).startswith(kind)


def _masks_are_alike(model: nn.Module) -> bool:
    """Whether the causal masks, which are not saved, are those of open_clip."""
    masks = [value for name, value in model.named_buffers() if name.rpartition(".")[2] == "attn_mask"]
    return all(torch.equal(mask.float().cpu(), _causal(mask)) for mask in masks)


def _causal(mask: Tensor) -> Tensor:
    return torch.full(mask.shape, float("-inf")).triu_(1)


def _kind(module: Any) -> str:
    """Return the name of a module's class, or of the class that a cut replaced."""
    return str(getattr(type(module), "uncut_class", type(module)).__name__)
