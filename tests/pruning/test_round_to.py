"""Alignment counts channels: heads and groups of heads are multiples already, and kinds of groups may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from upop.cli.app import app
from upop.errors import SettingError
from upop.pruning import plan_by_magnitude
from upop.pruning.goal import Goal
from upop.report.inspection import after_budget
from upop.settings import RunSettings, read_settings

WORDS = torch.tensor([[1, 5, 9, 3], [2, 7, 4, 8]])


def llama(groups: int = 4, head_dim: int = 16, hidden: int = 160) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4 * 2 * groups,
        num_hidden_layers=2,
        num_attention_heads=2 * groups,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=hidden,
        vocab_size=16,
    )
    return LlamaForCausalLM(config).eval()


def searched(model: LlamaForCausalLM, ratio: float, round_to: Any, steps: int = 3, **settings: Any) -> upop.Pruner:
    pruner = upop.Pruner(model, ratio, steps, round_to=round_to, example={"input_ids": WORDS}, **settings)
    for step in range(steps):
        torch.manual_seed(step)
        model(input_ids=WORDS, labels=torch.randint(16, WORDS.shape)).loss.backward()
        pruner.step()
        model.zero_grad()
    return pruner


def kept_sizes(plan: upop.Plan, kind: str) -> list[int]:
    return [len(kept) for name, kept in plan.items() if (kind == "attention") == name.endswith("self_attn")]


def test_attention_of_few_key_value_groups_is_cut_on_cuda_s_default() -> None:
    model = llama()
    pruner = searched(model, 0.5, 8, include="*self_attn")
    assert sum(kept_sizes(pruner.plan(), "attention")) == 4  # of 8
    pruner.shrink(verify={"input_ids": WORDS})


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_the_budget_holds(ratio: float) -> None:
    model = llama()
    pruner = searched(model, ratio, 8)
    plan = pruner.plan()
    assert all(size % 8 == 0 for size in kept_sizes(plan, "mlp"))
    total = sum(pruner.costs[group.name] * group.size for group in pruner.groups)
    gone = sum(pruner.costs[group.name] * (group.size - len(plan[group.name])) for group in pruner.groups)
    largest = max(pruner.costs[group.name] * (1 if group.kind == "attention" else 8) for group in pruner.groups)
    assert abs(gone - ratio * total) <= largest / 2 * (1 + 1e-9)
    pruner.shrink(verify={"input_ids": WORDS})


def test_heads_that_are_no_multiple_go_in_blocks_of_several() -> None:
    plan = plan_by_magnitude(llama(groups=6, head_dim=4), 0.4, round_to={"attention": 8})
    assert all(size % 2 == 0 for size in kept_sizes(plan, "attention"))
    assert any(size < 6 for size in kept_sizes(plan, "attention"))


def test_a_kind_has_an_alignment_of_its_own() -> None:
    model = llama()
    pruner = searched(model, 0.4, {"mlp": 64})
    assert set(kept_sizes(pruner.plan(), "mlp")) <= {64, 128, 160}
    assert pruner.state_dict()["settings"]["round_to"] == {"mlp": 64}
    assert upop.Plan.from_json(pruner.plan().to_json()).settings["round_to"] == {"mlp": 64}
    _, preview = after_budget(llama(), Goal(0.4, None), {"mlp": 64, "attention": 64})
    assert set(kept_sizes(preview, "mlp")) == {128}
    assert set(kept_sizes(preview, "attention")) == {4}  # of 16 rows each


@pytest.mark.parametrize(
    ("round_to", "fragments"),
    [
        ({"mpl": 8}, ["round_to names 'mpl'", "did you mean 'mlp'"]),
        ({"mlp": 0}, ["round_to of mlp must be a whole number of at least 1", "found 0"]),
        ({"attention": 8.0}, ["round_to of attention must be", "write 8"]),
        ("8", ["round_to must be a whole number", "found '8'"]),
    ],
)
def test_what_is_no_alignment_is_refused(round_to: Any, fragments: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        upop.Pruner(llama(), 0.5, 2, round_to=round_to)
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_an_alignment_that_leaves_groups_whole_is_said_where_the_ratio_cannot_be_reached() -> None:
    with pytest.raises(SettingError, match=r"round_to=attention=128,mlp=256, 4 of them stay whole.*smaller round_to"):
        upop.Pruner(llama(), 0.5, 2, round_to={"attention": 128, "mlp": 256})


def test_files_and_flags_say_it_by_kind(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("round_to: {attention: 8, mlp: 128}\n")
    by_kind = {"attention": 8, "mlp": 128}
    assert read_settings(RunSettings, tmp_path / "settings.yaml", {}).round_to == by_kind
    assert read_settings(RunSettings, None, {"round_to": "attention=8,mlp=128"}).round_to == by_kind
    assert read_settings(RunSettings, None, {"round_to": "8"}).round_to == 8
    for wrong, found in (("attention=8,mlp=x", "mlp=x"), ("attention=8,attention=8", "twice"), ({"mpl": 3}, "'mpl'")):
        with pytest.raises(SettingError, match=found):
            read_settings(RunSettings, None, {"round_to": wrong})


def test_a_preview_takes_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(
            [
                "inspect",
                "vit_tiny_patch16_224",
                "--set",
                "depth=1",
                "--ratio",
                "0.5",
                "--round-to",
                "attention=8,mlp=256",
            ]
        )
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "768 -> 512" in shown or "768 -> 256" in shown


@pytest.mark.parametrize("round_to", ["nemotron-nas", "torchao", "tensor-cores"])
def test_a_preset_gives_the_widths_that_a_target_wants(round_to: str) -> None:
    plan = plan_by_magnitude(llama(hidden=640), 0.4, round_to=round_to)
    multiple = {"nemotron-nas": 256, "torchao": 128, "tensor-cores": 64}[round_to]
    assert all(size % multiple == 0 and 0 < size < 640 for size in kept_sizes(plan, "mlp"))


def test_a_preset_that_there_is_not_is_named_with_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"or a preset \(.*\); found 'nemotron' \(did you mean 'nemotron-nas'\?\)"):
        plan_by_magnitude(llama(), 0.4, round_to="nemotron")
