"""torch's attention function, called by hand: its heads may be narrower than it allows."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.test_axes import EXAMPLE, HEADS, WIDTH, built
from pruning.test_hand_written import check


class Called(nn.Module):
    """An attention by `F.multi_head_attention_forward`, with weights of its own or as CLIP's pool has them."""

    def __init__(self, separate: bool, more: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.packed = None if separate else nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.first = nn.Parameter(torch.randn(2, 1, 1, WIDTH)) if more else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose(0, 1)
        found, _ = F.multi_head_attention_forward(
            *(tokens, tokens, tokens, WIDTH, HEADS, self.packed),
            torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            *((None, None) if self.first is None else self.first.unbind()),
            self.first is not None,
            0.0,
            *(self.out.weight, self.out.bias, self.training),
            need_weights=self.first is not None,
            key_padding_mask=torch.arange(x.shape[1]).expand(len(x), -1) > 4,
            use_separate_proj_weight=self.packed is None,
            **(
                {} if self.packed is not None else {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
            ),
        )
        return found.transpose(0, 1)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_a_call_of_torchs_function_is_cut(separate: bool, more: bool) -> None:
    check(partial(Called, separate, more), {("attention", "dimension"): 2})


def test_it_compiles_travels_and_is_loaded(tmp_path: Path) -> None:
    model = built(partial(Called, True))
    upop.shrink(model, {group.name: range(5) for group in upop.find_groups(model, EXAMPLE)})
    expected = model(EXAMPLE)
    assert torch.equal(torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")(EXAMPLE), expected)
    upop.save(model, tmp_path)
    loaded = built(partial(Called, True), seed=1)
    upop.load_into(loaded, tmp_path)
    assert torch.equal(loaded(EXAMPLE), expected)
