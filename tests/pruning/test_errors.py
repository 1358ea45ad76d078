"""What users get wrong: every message says what was asked, found and is to be done; nothing is half done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from pruning.families import (
    NLVR,
    VIT,
    Family,
    difference,
    finished_pruner,
    loss_of,
    outputs_of,
    random_masks,
    still_pruner,
    uneven_plan,
)
from upop.pruning.errors import LayoutError, PlanError, SettingError, StepError, UPopError, VerificationError


def refused(kind: type[Exception], fragments: list[str], call: Any) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, UPopError)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, float("nan"), float("inf"), True, False])
def test_ratio_out_of_range(ratio: float) -> None:
    fragments = ["ratio", "strictly between 0 and 1", f"found {ratio!r}"]
    refused(SettingError, fragments, lambda: upop.Pruner(VIT.build(), ratio, 2))


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("50%", ": write 0.5 for 50 %."),
        (50, ": write 0.5 for 50 %."),
        ("33.3 percent", ": write 0.333 for 33.3 %."),
        ("2x", ": write 0.5 for 2x smaller."),
        ("10X", ": write 0.9 for 10x smaller."),
        (2, ": write 0.02 for 2 % or 0.5 for 2x smaller."),
        ("0.5", ": write 0.5."),
        ("0,5", ": write 0.5."),
        ("half", "found 'half'."),
        (100, "found 100."),
        (True, "found True."),
    ],
)
def test_ratio_in_another_form_is_told_how_to_write_it(written: Any, advice: str) -> None:
    with pytest.raises(SettingError) as caught:
        upop.Pruner(VIT.build(), written, 2)
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize("ratio", [0.98, 0.999])
def test_ratio_that_would_empty_groups(ratio: float) -> None:
    refused(
        SettingError,
        [f"ratio={ratio}", "cannot be reached", "keeps at least one channel", "at most 0.9", "Lower the ratio"],
        lambda: upop.Pruner(VIT.build(), ratio, 2),
    )


def test_round_to_that_leaves_nothing_to_remove() -> None:
    refused(
        SettingError,
        ["block of 64 channels", "at most 0.0 ", "smaller round_to"],
        lambda: upop.Pruner(VIT.build(), 0.1, 2, round_to=64),
    )


@pytest.mark.parametrize("name", ["steps", "interval", "round_to"])
@pytest.mark.parametrize("value", [0, -3, 1.0, 2.5, True, "10"])
def test_whole_numbers(name: str, value: Any) -> None:
    settings = {"steps": 4, name: value}
    worded = name == "round_to" and isinstance(value, str)  # words are presets, or sizes by kind
    fragments = [f"{name} must be a whole number" + ("" if worded else " of at least 1"), f"found {value!r}"]
    refused(SettingError, fragments, lambda: upop.Pruner(VIT.build(), 0.5, **settings))


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"include": "*.atn"}, ["include names '*.atn'", "none of the 4 groups", "find_groups"]),
        ({"exclude": ["*.mlp", "blocks.0.atn"]}, ["exclude names", "did you mean 'blocks.0.attn'"]),
        ({"include": "*.mlp", "exclude": "*.mlp"}, ["leave none of the 4 groups"]),
        ({"include": []}, ["include=[]", "leave none"]),
        ({"include": 3}, ["include takes a name or a pattern", "found 3"]),
        ({"exclude": ["*.mlp", None]}, ["exclude takes a name or a pattern", "['*.mlp', None]"]),
        ({"importance": "sined"}, ["importance='sined'", "did you mean 'signed'", "function"]),
        ({"importance": 3}, ["importance=3 is not known"]),
        ({"progress": "hard"}, ['progress is "stages" or "soft"', "found 'hard'"]),
        ({"cost": "reference", "round_to": 8}, ["cost='reference'", "round_to=8", "round_to=1"]),
    ],
)
def test_names_that_are_unknown(settings: dict[str, Any], fragments: list[str]) -> None:
    refused(SettingError, fragments, lambda: upop.Pruner(VIT.build(), 0.5, 2, **settings))


def test_include_and_exclude_choose_groups() -> None:
    model = NLVR.build()
    chosen = upop.Pruner(model, 0.3, 2, include=["visual_encoder.*", "*.intermediate"], exclude="*.blocks.0.*")
    names = {group.name for group in chosen.groups}
    assert "visual_encoder.blocks.1.attn" in names
    assert "text_encoder.encoder.layer.1.intermediate" in names
    assert not any(".blocks.0." in name or name.endswith(("self", "self0")) for name in names)


@pytest.mark.parametrize("call", [upop.find_groups, lambda model: upop.Pruner(model, 0.5, 2)])
def test_a_model_without_groups(call: Any) -> None:
    refused(
        LayoutError,
        ["No prunable group", "Sequential", "no attention or MLP"],
        lambda: call(nn.Sequential(nn.ReLU())),
    )


def test_a_model_of_unknown_layout_says_what_was_looked_at() -> None:
    class MyAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).cumsum(-1).chunk(3, dim=-1)
            return self.out(F.scaled_dot_product_attention(query, key, value))

    model = nn.Sequential(MyAttention())
    refused(
        LayoutError,
        ["2 parts were skipped", "0.qkv: cumsum is taken over it", "Sequential"],
        lambda: upop.find_groups(model),
    )


def test_attention_that_cannot_be_cut_is_skipped_with_the_reason() -> None:
    import timm

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, scale_attn_norm=True
    )
    found = upop.pruning.find_prunable(model)
    assert [group.kind for group in found.groups if group.channel != "head"] == ["mlp"]
    assert any(part.name.startswith("blocks.0.attn") and "normalised" in part.reason for part in found.skipped)


def test_where_dimensions_cannot_go_heads_do() -> None:
    import timm

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, qk_norm=True
    )
    assert [(group.kind, group.channel, group.size) for group in upop.find_groups(model)] == [
        ("attention", "head", 3),
        ("mlp", "neuron", 96),
    ]


def test_frozen_weights() -> None:
    model = NLVR.build()
    model.visual_encoder.requires_grad_(False)
    names = [group.name for group in upop.find_groups(model) if group.name.startswith("visual_encoder")]
    fragments = ["6 groups have frozen weights", f"({', '.join(names)})", "requires_grad", "exclude"]
    refused(LayoutError, fragments, lambda: upop.Pruner(model, 0.5, 2))


def test_groups_that_the_loss_does_not_depend_on_are_named_once() -> None:
    model = Towers()
    pruner = upop.Pruner(
        model, 0.3, 4, 1, example=lambda whole: (whole.first(**VIT.inputs()), whole.second(**VIT.inputs()))
    )
    for step in range(4):
        loss_of(model.first(**VIT.inputs())).backward()
        if step == 1:
            with pytest.warns(UserWarning, match=r"4 of 8 groups had no gradient in 2 search steps.*second\.blocks\.0"):
                pruner.step()
        else:
            pruner.step()
        model.zero_grad()
    pruner.remove()
    one = upop.Pruner(model, 0.3, 1, include="second.*")
    loss_of(model.second(**VIT.inputs())).backward()
    one.step()  # those had one


class Towers(nn.Module):
    """Two models side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = VIT.build(), VIT.build(seed=1)


def test_two_pruners_on_one_model() -> None:
    model = VIT.build()
    first = still_pruner(model, random_masks(upop.find_groups(model)))
    outputs = outputs_of(model, VIT.inputs())
    refused(LayoutError, ["masked already", "remove()"], lambda: upop.Pruner(model, 0.5, 2))
    assert torch.equal(outputs_of(model, VIT.inputs()), outputs)  # the first one is still whole
    first.remove()
    upop.Pruner(model, 0.5, 2).remove()


def test_cutting_a_model_that_is_still_masked() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    pruner = finished_pruner(model, inputs)
    before = outputs_of(model, inputs)
    for verify in (None, inputs):
        with pytest.raises(LayoutError, match="masked"):
            upop.shrink(model, pruner.plan(), verify=verify)
        assert torch.equal(outputs_of(model, inputs), before)
    plan = pruner.plan()
    pruner.remove()
    upop.shrink(model, plan, verify=inputs)


def test_steps_at_the_wrong_moment() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    pruner = upop.Pruner(model, 0.5, 2, 1)
    refused(StepError, ["no gradient on any masked weight", "loss.backward()", "zero_grad()"], pruner.step)
    assert pruner.steps_done == 0
    loss_of(model(**inputs)).backward()
    pruner.step()
    pruner.step()
    refused(StepError, ["All 2 search steps were taken", "shrink()"], pruner.step)
    refused(StepError, ["All 2 search steps were taken"], pruner.skip)
    pruner.shrink(verify=inputs)
    refused(StepError, ["already removed", "upop.shrink"], pruner.shrink)


def test_steps_after_the_masks_were_taken_off() -> None:
    pruner = upop.Pruner(VIT.build(), 0.5, 2)
    pruner.remove()
    refused(StepError, ["masks were removed", "new Pruner"], pruner.step)


def test_a_soft_search_cannot_be_cut_too_early() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    pruner = upop.Pruner(model, 0.5, 2, 1, progress="soft")
    for call, name in ((pruner.plan, "plan()"), (pruner.shrink, "")):
        refused(StepError, [name, "binary masks", "0 of 2 steps", "remaining steps"], call)
    for _ in range(2):
        loss_of(model(**inputs)).backward()
        pruner.step()
    pruner.shrink(verify=inputs)


def test_a_search_in_stages_can_be_cut_at_any_time() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    pruner = upop.Pruner(model, 0.5, 2, 1)
    loss_of(model(**inputs)).backward()
    pruner.step()
    plan, masked = pruner.plan(), outputs_of(model, inputs)
    with pytest.warns(UserWarning, match="after 1 of 2 steps: it removed 25% of the cost"):
        pruner.shrink(verify=inputs)
    assert difference(outputs_of(model, inputs), masked) < 1e-10
    assert 0.25 < sum(map(len, plan.values())) / sum(plan.sizes.values()) < 1


class Tied(nn.Module):
    """Two towers that share one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = VIT.build(), VIT.build(seed=1)
        self.second.blocks[1].mlp.fc1.weight = self.first.blocks[0].mlp.fc1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def test_shared_parameters() -> None:
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    left = [part.reason for part in upop.find_prunable(model, VIT.inputs()).skipped]
    assert any("second.blocks.1.mlp.fc1.weight are one tensor" in reason for reason in left)
    plan = {"first.blocks.0.attn": [0], "first.blocks.0.mlp": [0, 1]}
    refused(PlanError, ["first.blocks.0.mlp", "no group"], lambda: upop.shrink(model, plan))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    upop.shrink(model, {"first.blocks.0.attn": [0]}, verify=VIT.inputs())


def test_shared_parameters_are_left_alone_by_the_search() -> None:
    model = Tied()
    pruner = finished_pruner(model, VIT.inputs(), 0.3)
    assert any("one tensor" in part.reason for part in upop.find_prunable(model).skipped)
    assert not any("first.blocks.0.mlp" in part.tensor for group in pruner.groups for part in group.slices)
    pruner.shrink()


class Noisy(nn.Module):
    """Draws numbers that no seed fixes in evaluation mode, once it is noisy, so that no two forward passes agree."""

    draws = torch.Generator()

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.noisy = VIT.build(), False

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x)
        return outputs * torch.rand(outputs.shape, generator=Noisy.draws).to(outputs) if self.noisy else outputs


def test_a_failing_verification_leaves_the_searched_model() -> None:
    model, inputs = Noisy(), VIT.inputs(8)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = finished_pruner(model, inputs)
    model.noisy = True
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    widths = [(part.in_features, part.out_features) for part in model.modules() if isinstance(part, nn.Linear)]
    heads = [part.head_dim for part in model.modules() if hasattr(part, "head_dim")]
    outputs, masks, plan = outputs_of(model.inner, inputs), pruner.masks, pruner.plan()
    for _ in range(2):
        with pytest.raises(
            VerificationError, match=r"Two calls .* differ \(output by .* random numbers .* left as it was"
        ):
            pruner.shrink(verify=inputs)
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert [(p.in_features, p.out_features) for p in model.modules() if isinstance(p, nn.Linear)] == widths
        assert [part.head_dim for part in model.modules() if hasattr(part, "head_dim")] == heads
        assert all(module.training for module in model.modules())
        assert torch.equal(outputs_of(model.inner, inputs), outputs)
        assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    model.zero_grad()
    loss_of(model(**inputs)).backward()
    optimizer.step()  # still trainable, and by the same optimizer
    assert not torch.equal(outputs_of(model.inner, inputs), outputs)
    pruner.shrink(verify=lambda whole: whole.inner(inputs["x"]))
    assert pruner.plan() == plan


@pytest.mark.parametrize("case", [VIT, NLVR], ids=lambda case: case.name)
def test_a_failing_verification_of_ones_own_plan_undoes_all(case: Family) -> None:
    model, inputs = case.build(), case.inputs()
    before = dict(model.named_parameters())
    calls = []

    def drifting(whole: nn.Module) -> Tensor:
        calls.append(1)
        return whole(**inputs) + len(calls)

    with pytest.raises(VerificationError):
        upop.shrink(model, uneven_plan(upop.find_groups(model)), verify=drifting)

    def failing(whole: nn.Module) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(**inputs)

    with pytest.raises(KeyboardInterrupt):
        upop.shrink(model, uneven_plan(upop.find_groups(model)), verify=failing)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {type(module) for module in model.modules()} == {type(module) for module in case.build().modules()}
    upop.shrink(model, uneven_plan(upop.find_groups(model)), verify=inputs)


def test_verifying_on_nothing_is_no_proof() -> None:
    model = VIT.build()
    plan = uneven_plan(upop.find_groups(model))
    with pytest.raises(VerificationError, match="no floating-point tensor"):
        upop.shrink(model, plan, verify=lambda whole: {"count": 3})
    with pytest.raises(VerificationError, match=r"No output.*finite"):
        upop.shrink(model, plan, verify=lambda whole: whole(VIT.inputs()["x"] * float("nan")))


def test_outputs_in_any_nesting_are_compared() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    plan = uneven_plan(upop.find_groups(model))

    def nested(whole: nn.Module) -> Any:
        width = whole.get_submodule("blocks.0.mlp.fc1").out_features
        return {"a": [whole(**inputs)], "b": ({"c": torch.full((2,), float(width))},)}

    with pytest.raises(VerificationError, match=r"output\['b'\]\[0\]\['c'\] differs"):
        upop.shrink(model, plan, verify=nested)
    upop.shrink(model, plan, verify=lambda whole: {"a": [whole(**inputs)], "n": 3, "none": None})


def test_wrapped_models_can_be_cut_by_a_plan_too() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    plan = finished_pruner(copy.deepcopy(model), inputs).plan()
    upop.shrink(nn.DataParallel(model), plan, verify=inputs)
    assert [group.size for group in upop.find_groups(model)] == [len(kept) for kept in plan.values()]


def test_every_error_is_also_a_built_in_one() -> None:
    for kind, builtin in [
        (SettingError, ValueError),
        (LayoutError, ValueError),
        (PlanError, ValueError),
        (StepError, RuntimeError),
        (VerificationError, RuntimeError),
    ]:
        assert issubclass(kind, builtin)
