"""Examples for models that come without one: what a library's model takes is found, and all of it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from pruning.registry import ARCHITECTURES, Architecture
from tiers import mostly_slow
from upop.errors import LayoutError
from upop.pruning.axes import example_for
from upop.pruning.costs import call

QUICK = {"vit_tiny_patch16_224", "naflexvit_base_patch16_gap", "bert", "bart", "clip", "llava", "wav2vec2", "CLIP"}
pytestmark = pytest.mark.filterwarnings("ignore:::timm|transformers|open_clip|torch")


def layers_that_run(model: nn.Module, example: object) -> set[str]:
    """Return the names of the innermost modules that a call of a model runs."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _module, _args, _output, name=name: ran.add(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        call(model, example)
    for hook in hooks:
        hook.remove()
    return ran


@pytest.mark.parametrize(
    "architecture",
    mostly_slow(ARCHITECTURES, *(each for each in ARCHITECTURES if each.name in QUICK)),
    ids=lambda each: f"{each.library}-{each.name}",
)
def test_all_layers_of_a_librarys_model_run(architecture: Architecture) -> None:
    model = architecture.build(torch.float32)
    state = torch.get_rng_state()
    example = example_for(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert layers_that_run(model, architecture.batch(model, torch.float32)) <= layers_that_run(model, example)


_SIZES = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 99}
_PAIR = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _bros() -> nn.Module:
    return transformers.BrosModel(transformers.BrosConfig(hidden_size=128, **_SIZES))


def _lxmert() -> nn.Module:
    sizes = {"num_attention_heads": 2, "intermediate_size": 32, "l_layers": 1, "x_layers": 1, "r_layers": 1}
    sizes |= {"visual_feat_dim": 16, "visual_pos_dim": 4, "hidden_size": 32, "vocab_size": 99}
    return transformers.LxmertModel(transformers.LxmertConfig(**sizes))


def _encodec() -> nn.Module:
    sizes = {"num_filters": 8, "hidden_size": 16, "codebook_size": 16, "upsampling_ratios": [4, 2]}
    return transformers.EncodecModel(transformers.EncodecConfig(**sizes, num_residual_layers=1, num_lstm_layers=1))


def _instruct_blip() -> nn.Module:
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    config = transformers.InstructBlipConfig(
        vision_config={**_PAIR, "image_size": 32, "patch_size": 16},
        qformer_config={**_PAIR, "vocab_size": 99, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_index=98,
    )
    return transformers.InstructBlipForConditionalGeneration(config)


@pytest.mark.parametrize("make", [_bros, _lxmert, _encodec, _instruct_blip], ids=lambda make: make.__name__)
def test_boxes_regions_sounds_and_second_texts_are_made_up(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    with torch.no_grad():
        assert call(model, example_for(model)) is not None


class OfTwo(nn.Module):
    """Takes what nobody could guess."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, graph: dict[str, Tensor], depth: int) -> Tensor:
        found: Tensor = self.layer(graph["nodes"])
        return found[:depth]


def test_what_cannot_be_known_is_asked_for() -> None:
    with pytest.raises(LayoutError, match=r'example=\{"graph": \.\.\., "depth": \.\.\.\}'):
        example_for(OfTwo())
