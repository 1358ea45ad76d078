"""transformers' configurations at tiny sizes, by rules over the names of their numbers."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_RULES: tuple[tuple[str, int], ...] = (
    (r"encoder_hidden_size|decoder_hidden_size|out_hidden_size|output_dim|vision_feature_dim", 32),
    (r"num_attention_heads|attention_heads|n_heads?|num_heads|num_query_heads", 4),
    (r"num_key_value_heads|num_kv_heads", 2),
    (r"head_dim|d_kv", 8),
    (
        "hidden_size|d_model|embed_dim|n_embd|hidden_dim|width|embedding_size|dim|projection_dim|prompt_embed_dim",
        32,
    ),
    (r"num_hidden_layers|num_layers|encoder_layers|decoder_layers|n_layers?|depth|num_(de|en)coder_layers", 2),
    (r"num_hidden_groups|num_blocks?", 2),
    (r"intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|d_inner|dim_feedforward", 48),
    (r"moe_intermediate_size", 24),
    (r"vocab_size", 150),
    (r"image_size|img_size", 32),
    (r"temporal_patch_size", 2),
    (r"patch_size", 8),
    (r"max_position_embeddings|max_source_positions|max_target_positions|n_positions|n_ctx|max_seq_len", 128),
    (r"num_experts|num_local_experts|n_routed_experts", 4),
    (r"num_experts_per_tok", 2),
    (r"num_queries|num_query_tokens", 5),
    (r"num_mel_bins", 16),
)
# Settings that speak of the layers of the large model, one by one; the class derives them again.
_PER_LAYER = ("layer_types", "mlp_layer_types", "per_layer_config", "out_features", "out_indices", "stage_names")


def tiny_config(kind: str, **overrides: Any) -> PreTrainedConfig:
    """Return a tiny configuration of the type `kind`; an override may be a mapping into a part of it."""
    settings = _small(CONFIG_MAPPING[kind]().to_dict())
    for name in ("model_type", "transformers_version", "architectures", "dtype"):
        settings.pop(name, None)
    return CONFIG_MAPPING[kind].from_dict(_merged(settings, overrides))


def _merged(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for name, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = _merged(settings[name], value) if nested else value
    return settings


def _small(settings: dict[str, Any]) -> dict[str, Any]:
    small = {}
    for name, value in settings.items():
        if name in _PER_LAYER:
            continue
        if name == "mrope_section":
            small[name] = [2, 1, 1]
        elif isinstance(value, dict) and not name.endswith("label") and "label2id" not in name:
            small[name] = _small(value)
        elif re.search(r"token_id$|token_index$", name):
            small[name] = 3 if isinstance(value, list) or (isinstance(value, int) and value > 149) else value
        elif isinstance(value, int) and not isinstance(value, bool):
            rules = (size for pattern, size in _RULES if re.search(rf"(^|_)({pattern})$", name))
            small[name] = next(rules, value)
        else:
            small[name] = value
    return small
