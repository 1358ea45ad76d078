"""Which groups go into which row of bars, and under what title."""

from __future__ import annotations

import pytest

from upop.pruning import Group, Plan
from upop.report.shares import GroupShare, kept_share, panels


def group(name: str, kind: str, modality: str, size: int = 8) -> Group:
    return Group(name, kind, modality, size, heads=1, slices=())  # type: ignore[arg-type]


def nlvr_names(depth: int) -> list[tuple[str, str, str]]:
    names = []
    for layer in range(depth):
        block = f"visual_encoder.blocks.{layer}"
        names += [(f"{block}.attn", "attention", "vision"), (f"{block}.mlp", "mlp", "vision")]
    for layer in range(depth):
        block = f"text_encoder.encoder.layer.{layer}"
        for part in ("attention.self", "crossattention.self0", "crossattention.self1"):
            names.append((f"{block}.{part}", "attention", "text"))
        names.append((f"{block}.intermediate", "mlp", "text"))
    return names


def test_a_share_counts_what_the_plan_keeps_and_a_group_not_named_keeps_all() -> None:
    groups = [group("blocks.0.attn", "attention", "vision"), group("blocks.0.mlp", "mlp", "vision", 40)]
    shares = GroupShare.of(groups, Plan.of(groups, {"blocks.0.attn": [1, 5]}))
    assert [(share.name, share.size, share.kept) for share in shares] == [
        ("blocks.0.attn", 8, 2),
        ("blocks.0.mlp", 40, 40),
    ]
    assert shares[0].share == 0.25
    assert kept_share(shares) == pytest.approx(42 / 48)
    assert kept_share([]) == 1


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_twin_cross_attentions_have_a_panel_each_with_all_their_layers(depth: int) -> None:
    found = panels(GroupShare.of([group(*row) for row in nlvr_names(depth)], {}))
    assert [(panel.modality, panel.title) for panel in found] == [
        ("vision", "Attention"),
        ("vision", "MLP"),
        ("text", "Self-attention"),
        ("text", "Cross-attention 1"),
        ("text", "Cross-attention 2"),
        ("text", "MLP"),
    ]
    assert all(len(panel.layers) == depth for panel in found)
    assert [share.name for share in found[3].layers] == [
        f"text_encoder.encoder.layer.{layer}.crossattention.self0" for layer in range(depth)
    ]


def test_towers_of_one_modality_are_told_apart_by_name() -> None:
    names = [f"{tower}.blocks.{layer}.mlp" for tower in ("encoder", "mask_decoder") for layer in range(2)]
    found = panels(GroupShare.of([group(name, "mlp", "vision") for name in names], {}))
    assert [panel.title for panel in found] == ["MLP (encoder)", "MLP (mask decoder)"]


def test_vision_comes_first_whatever_the_order_of_the_groups() -> None:
    groups = [
        group("a.0.mlp", "mlp", "other"),
        group("b.0.mlp", "mlp", "text"),
        group("c.0.mlp", "mlp", "vision"),
    ]
    assert [panel.modality for panel in panels(GroupShare.of(groups, {}))] == ["vision", "text", "other"]
