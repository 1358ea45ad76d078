"""Units of models that nobody here wrote: their attentions and MLPs are found, and cut right."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import upop
from pruning.families import uneven_plan

SIZES = {"image_size": 64, "patch_size": 16, "num_classes": 5, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 96}
LEVIT = {"image_size": 64, "num_classes": 5, "stages": 2, "dim": (32, 48), "depth": 1, "heads": (2, 3), "mlp_mult": 2}
MAXVIT = {"num_classes": 5, "dim_conv_stem": 16, "dim": 16, "dim_head": 8, "depth": (1, 1), "window_size": 4}
CVT = {f"s{stage}_{name}": value for stage in (1, 2, 3) for name, value in {"emb_dim": 16 * stage, "depth": 1}.items()}
MOBILE = {"dims": [16, 24, 32], "channels": [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48]}


def of(module: str, kind: str, sizes: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = getattr(import_module(f"vit_pytorch.{module}"), kind)(**sizes)
        return made.double().eval()

    return build


MODELS = {
    "vit": of("vit", "ViT", SIZES),
    "simple_vit": of("simple_vit", "SimpleViT", SIZES),
    "deepvit": of("deepvit", "DeepViT", SIZES),
    "cait": of("cait", "CaiT", {**SIZES, "cls_depth": 1}),
    "parallel_vit": of("parallel_vit", "ViT", SIZES),
    "qk norm": of("simple_vit_with_qk_norm", "SimpleViT", SIZES),
    "small data": of("vit_for_small_dataset", "ViT", SIZES),
    "levit": of("levit", "LeViT", LEVIT),
    "cvt": of("cvt", "CvT", {**CVT, "num_classes": 5, "s1_heads": 1, "s2_heads": 2, "s3_heads": 3}),
    "max_vit": of("max_vit", "MaxViT", MAXVIT),
    "mobile_vit": of("mobile_vit", "MobileViT", {**MOBILE, "image_size": (64, 64), "num_classes": 5}),
}
QUICK = ("vit", "qk norm")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in MODELS]
)
@pytest.mark.filterwarnings("ignore")  # of the package
def test_models_of_a_package(name: str) -> None:
    model = MODELS[name]()
    example = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    units = upop.survey(model, example).units
    kinds = Counter(unit.kind for unit in units)
    assert kinds["attention"] and kinds["mlp"]
    cut = copy.deepcopy(model)
    upop.shrink(cut, upop.Plan.of(list(units), uneven_plan(units, 1)), verify=example)
    assert upop.count_parameters(cut) < upop.count_parameters(model)
