"""Examples for models that come without one: what a library's model takes is found, and all of it runs."""

from __future__ import annotations

import pytest
import torch
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
