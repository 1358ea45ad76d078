"""Writes a decoder with Llama's layers in the format of DeciLM (`nemotron-nas`), with two sizes per layer.

`block_configs` states for every layer how many query heads share a key-value head (`n_heads_in_group`), and the width
of the MLP (`ffn_mult`: two thirds of it times the hidden size, rounded up to a multiple of 256). All layers have the
query heads of the dense model: pruned ones are padded with zeros, while keys and values stay pruned. The format is that
of NVIDIA's Llama-Nemotron models, as vLLM, llama.cpp and MLX read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.checkpoints.configs.builders import without_record
from upop.checkpoints.configs.comparing import differing
from upop.errors import SettingError, VerificationError
from upop.libraries import is_pretrained
from upop.pruning import count_parameters
from upop.pruning.known import know_as

CODE = "configuration_decilm.py"
_MULTIPLE = 256
_LAYER = re.compile(
    r"model\.layers\.(\d+)\.(self_attn|mlp)\.((?<=self_attn\.)[qkvo]_proj|(?<=mlp\.)(?:gate|up|down)_proj)\.(weight|bias)"
)
_FIRST = "model.layers.0.mlp.gate_proj.weight"
_OTHER = re.compile(
    r"model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm))\.weight|lm_head\.weight"
)
_COMPUTED = "rotary_emb.inv_freq"
"""Ends the names of what old files hold though every Llama computes it."""
_WAYS = "Use `upop export --to padded` (an ordinary model of its library) or `--to onnx`, or load it with upop.load."


@dataclass(frozen=True)
class Converted:
    """A model in the format of DeciLM.

    Attributes:
        state: tensors, by Llama's names.
        config: the content of config.json.
        parameters: number of parameters.
        cut: number of parameters of the cut model.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    parameters: int
    cut: int

    def described(self) -> str:
        """Return the cost of the format, as a sentence."""
        return (
            f"{self.parameters:,} parameters, {self.cut:,} before: MLPs are padded to multiples of {_MULTIPLE}, and "
            "pruned query heads are zeros; keys, values and their cache stay pruned"
        )


@torch.no_grad()
def convert(model: nn.Module) -> Converted:
    """Convert a cut decoder to the format of DeciLM, and verify a network that is built from it.

    Args:
        model: a transformers model with Llama's layers.

    Raises:
        SettingError: it has other layers; the message names alternatives.
        VerificationError: the outputs differ.
    """
    state, config = _checked(model)
    hidden, size = int(config.hidden_size), _head_size(config)
    heads = hidden // size  # of the dense model, where fewer are left in all layers
    written: dict[str, Tensor] = {}
    blocks, layers = [], {}
    for layer in range(int(config.num_hidden_layers)):
        parts = {
            f"{match[2]}.{match[3]}.{match[4]}": value
            for name, value in state.items()
            if (match := _LAYER.fullmatch(name)) and int(match[1]) == layer
        }
        groups = len(parts["self_attn.k_proj.weight"]) // size
        # A branch that was pruned whole is dropped, unless it ends with a bias, which one group of zeros then carries.
        least = max(groups, 1 if "self_attn.o_proj.bias" in parts else 0)
        shared = _groups(heads, least, len(parts["self_attn.q_proj.weight"]) // size)
        width = math.ceil(len(parts["mlp.gate_proj.weight"]) / _MULTIPLE) * _MULTIPLE
        width = max(width, _MULTIPLE if "mlp.down_proj.bias" in parts else 0)
        found = _attention(parts, heads, groups, shared, size) if shared else {}
        found |= _mlp(parts, width) if width else {}
        norms = [*(["input_layernorm"] if shared else []), *(["post_attention_layernorm"] if width else [])]
        found |= {f"{norm}.weight": state[f"model.layers.{layer}.{norm}.weight"] for norm in norms}
        written |= {f"model.layers.{layer}.{name}": value for name, value in found.items()}
        blocks.append(_block(heads // shared if shared else None, _multiplier(width, hidden) if width else None))
        layers[str(layer)] = {"num_key_value_heads": shared, "intermediate_size": width}
    written |= {name: value for name, value in state.items() if _OTHER.fullmatch(name) and "layernorm" not in name}
    if config.tie_word_embeddings:
        written.pop("lm_head.weight", None)
    described = _described(config, heads, blocks, layers, any(name.endswith("q_proj.bias") for name in written))
    other = network(described)
    other.load_state_dict(written, strict=False, assign=True)
    other.tie_weights()
    other.eval()
    know_as(other, model)
    why = differing(model, other)
    if why is not None:
        raise VerificationError(
            f"A DeciLM with the weights of this {type(model).__name__} does not compute the same: {why}. The model has "
            f"parts that Llama lacks; nothing was written. {_WAYS}"
        )
    return Converted(written, described, sum(each.numel() for each in written.values()), count_parameters(model))


def width_of(multiplier: float, hidden: int) -> int:
    """Return the MLP width of a layer, as readers of the format compute it from `ffn_mult`."""
    width = int(2 * multiplier * hidden / 3)
    return width if width % _MULTIPLE == 0 else width + _MULTIPLE - width % _MULTIPLE


def network(described: Mapping[str, Any]) -> Any:
    """Build the network of a config.json of the format from transformers' Llama layers, with initial weights.

    Args:
        described: the content of config.json.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    own = ("block_configs", "per_layer_config", "model_type", "architectures", "auto_map", "rope_scaling", "rope_theta")
    shared = {name: value for name, value in described.items() if name not in own}

    def config(block: Mapping[str, Any]) -> LlamaConfig:
        groups = described["num_attention_heads"] // (block["attention"]["n_heads_in_group"] or 1)
        width = width_of(block["ffn"]["ffn_mult"] or 1.0, described["hidden_size"])
        built = LlamaConfig(**{**shared, "num_key_value_heads": groups, "intermediate_size": width})
        built._attn_implementation = "eager"
        return built

    model: Any = LlamaForCausalLM(config(described["block_configs"][0]))
    for layer, block in enumerate(described["block_configs"]):
        made: Any = LlamaDecoderLayer(config(block), layer)
        if block["attention"]["no_op"]:
            made.self_attn = _Nothing(beside=True)
        if block["ffn"]["no_op"]:
            made.mlp = _Nothing()
        model.model.layers[layer] = made
    return model


class _Nothing(nn.Module):
    """A branch that adds zero to the residual stream."""

    def __init__(self, *, beside: bool = False) -> None:
        super().__init__()
        self._beside = beside

    def forward(self, hidden_states: Tensor, **_others: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self._beside else nothing


def code() -> str:
    """Return the module for the folder by which transformers reads the configuration."""
    return _CODE


def refuse_others(names: Iterable[str], kind: str) -> None:
    """Refuse a model without Llama's layers by its tensor names, before its weights are read.

    Raises:
        SettingError: it has no such layer; the message names alternatives.
    """
    names = [name for name in names if not name.endswith(_COMPUTED)]
    others = [name for name in names if not _LAYER.fullmatch(name) and not _OTHER.fullmatch(name)]
    if others or _FIRST not in names:
        raise _none(kind, next(iter(others), None))


def _none(kind: str, other: str | None) -> SettingError:
    has = f"it has {other}, for example" if other else "it has none of its layers"
    return SettingError(
        f"nemotron-nas supports only decoders with Llama's layers, and a {kind} is none: {has}. " + _WAYS
    )


def _checked(model: nn.Module) -> tuple[Mapping[str, Tensor], Any]:
    """Return the tensors and the dense configuration of a model with Llama's layers."""
    state = model.state_dict()
    refuse_others(state, type(model).__name__)
    if not is_pretrained(model):
        raise _none(type(model).__name__, None)
    config = without_record(model.config)
    heads, hidden, size = config.num_attention_heads, config.hidden_size, _head_size(config)
    if hidden % size or heads > hidden // size:
        raise SettingError(
            f"nemotron-nas has a head_dim of hidden_size / num_attention_heads, and this {type(model).__name__} has "
            f"{heads} heads of {size} for a hidden size of {hidden}. " + _WAYS
        )
    return state, config


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _groups(heads: int, least: int, queries: int) -> int:
    """Return in how many groups all query heads of a dense layer hold those that are left; 0 if none are.

    Args:
        heads: of the dense model.
        least: groups that are left.
        queries: query heads that are left in them.
    """
    if not least:
        return 0
    for each in range(least, heads + 1):
        if heads % each == 0 and heads // each * least >= queries:
            return each
    raise SettingError(
        f"nemotron-nas has {heads} query heads in groups of equal size, and {queries} in {least} groups do not fit in. "
        + _WAYS
    )


def _attention(parts: Mapping[str, Tensor], heads: int, groups: int, shared: int, size: int) -> dict[str, Tensor]:
    """Return the tensors of an attention with all query heads, in `shared` groups, the first of which hold weights."""
    found = {}
    each = len(parts["self_attn.q_proj.weight"]) // size // max(1, groups)  # kept query heads per group
    for name, value in parts.items():
        if not name.startswith("self_attn."):
            continue
        dim = 1 if name == "self_attn.o_proj.weight" else 0
        if name == "self_attn.o_proj.bias":
            found[name] = value
            continue
        wide, had = (heads // shared, each) if ".q_proj" in name or ".o_proj" in name else (1, 1)
        rows = value.movedim(dim, 0)
        grown = rows.new_zeros(shared, wide, size, *rows.shape[1:])
        if groups:
            grown[:groups, :had] = rows.reshape(groups, had, size, *rows.shape[1:])
        found[name] = grown.flatten(0, 2).movedim(0, dim).contiguous()
    if "self_attn.q_proj.bias" in found:  # the format has one switch for all four biases
        out = found["self_attn.o_proj.weight"]
        found.setdefault("self_attn.o_proj.bias", out.new_zeros(len(out)))
    return found


def _mlp(parts: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    found = {}
    for name, value in parts.items():
        if name.startswith("mlp."):
            dim = 1 if name == "mlp.down_proj.weight" else 0
            shape = list(value.shape)
            if name != "mlp.down_proj.bias":
                shape[dim] = width
            found[name] = value.new_zeros(shape)
            found[name].narrow(dim, 0, value.shape[dim]).copy_(value)
    return found


def _multiplier(width: int, hidden: int) -> float:
    """Return the `ffn_mult` of a width, in six decimals, to which some readers round it."""
    multiplier = round(3 * (width - 0.5) / (2 * hidden), 6)
    if width_of(multiplier, hidden) != width:
        raise SettingError(f"nemotron-nas has no ffn_mult for an MLP width of {width} at hidden size {hidden}. {_WAYS}")
    return multiplier


def _block(in_group: int | None, multiplier: float | None) -> dict[str, Any]:
    return {
        "attention": {
            "n_heads_in_group": in_group,
            "no_op": in_group is None,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {"ffn_mult": multiplier, "no_op": multiplier is None, "replace_with_linear": False, "sparsify": None},
    }


def _described(
    config: Any, heads: int, blocks: list[dict[str, Any]], layers: Mapping[str, Any], biased: bool
) -> dict[str, Any]:
    described = {**config.to_dict(), "num_attention_heads": heads}
    names = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "rms_norm_eps"),
        *(
            "max_position_embeddings",
            "initializer_range",
            "tie_word_embeddings",
            "mlp_bias",
            "rope_parameters",
            "dtype",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    )
    rope = dict(described.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", described.get("rope_theta", 10000.0))
    return {
        **{name: described[name] for name in names if name in described},
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.DeciLMConfig"},
        "attention_bias": biased,
        "head_dim": config.hidden_size // heads,
        "rope_theta": theta,
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "num_key_value_heads": max(each["num_key_value_heads"] for each in layers.values()),
        "intermediate_size": max(each["intermediate_size"] for each in layers.values()),
        "block_configs": blocks,
        "per_layer_config": layers,
    }


_CODE = '''"""The configuration of a decoder whose layers differ, as DeciLM has it; written by upop."""

from transformers import LlamaConfig


class Block(dict):
    """What `block_configs` says of a layer, by names."""

    def __getattr__(self, name):
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """Llama's configuration, with `block_configs`: `n_heads_in_group` and `ffn_mult` of every layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), per_layer_config=None, **settings):
        # per_layer_config is for people and programs that read the file: block_configs say the same.
        super().__init__(**settings)
        self.block_configs = [Block(each) for each in block_configs]
'''
