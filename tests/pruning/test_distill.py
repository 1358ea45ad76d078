"""The dense model as teacher: what is compared, and that nothing else changes by it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

import upop
from models.test_clip import clip
from models.test_clip import pairs as clip_pairs
from models.test_retrieval import pairs as retrieval_pairs
from models.test_retrieval import tiny as retrieval
from pruning import distill_ranks
from pruning.families import BY_NAME, NLVR, VIT, Family, finished_pruner, loss_of
from tiers import mostly_slow
from together import run_together
from upop.distillation import feature_loss
from upop.errors import LayoutError, SettingError, StepError
from upop.models.checkpointing import checkpoint_blocks

CASES = [BY_NAME[name] for name in ("vit-registers", "nlvr", "segmenter", "clip", "vqa", "caption")]
WORDS = {"input_ids": torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))}
WORDS["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])


def pair(case: Family = VIT) -> tuple[nn.Module, nn.Module]:
    """Return a model in training mode and a teacher of other weights."""
    return case.build().train(), case.build(seed=1)


def _draw(*_: Any) -> None:
    torch.rand(5)


def bert(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    )


def qwen(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=60, num_key_value_heads=2, head_dim=8, **sizes))


@pytest.mark.parametrize(
    "case",
    mostly_slow(CASES, *(case for case in CASES if case.name == "vit-registers")),
    ids=lambda case: case.name,
)
def test_it_is_zero_at_first_and_goes_on_through_search_and_cut(case: Family) -> None:
    model, inputs = case.build().train(), case.inputs(4)
    distill = upop.distill(model, copy.deepcopy(model))
    model(**inputs)
    assert distill.loss() < 1e-20
    pruner = finished_pruner(model, inputs, 0.5, 2)  # whose passes end with their own backward
    with pytest.raises(StepError, match="before backward"):
        distill.loss()
    model(**inputs)
    masked = distill.loss()
    assert masked > 1e-5
    pruner.shrink()
    model.zero_grad()
    model(**inputs)
    cut = distill.loss()
    torch.testing.assert_close(cut, masked)
    cut.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_features_are_those_of_all_norms_sample_by_sample() -> None:
    model, teacher = pair()
    inputs = VIT.inputs(3)
    distill = upop.distill(model, teacher, features=1.0)
    model(**inputs)
    names = [*(f"blocks.{block}.norm{norm}" for block in (0, 1) for norm in (1, 2)), "norm"]
    assert list(distill.norms) == names
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for each in (VIT.build(), VIT.build(seed=1)):
        for name in names:
            each.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: found[name].append(out))
        each(**inputs)
    shares = [
        ((own - aim).square().flatten(1).mean(1) / aim.square().flatten(1).mean(1)).mean()
        for own, aim in found.values()
    ]
    torch.testing.assert_close(distill.loss(), torch.stack(shares).mean())


def test_a_step_towards_the_teacher_makes_it_smaller() -> None:
    model, teacher = pair(NLVR)
    distill = upop.distill(model, teacher)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        model(**NLVR.inputs())
        optimizer.zero_grad()
        losses.append(distill.loss())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("build", "norms"), [(bert, 5), (qwen, 5)])
def test_models_of_transformers_and_padding(build: Any, norms: int) -> None:
    """Norms within heads are no part of it; nor are tokens that the attention mask leaves out, or their logits."""
    model, teacher = build(0).train(), build(1)
    distill = upop.distill(model, teacher, logits=1.0)
    assert len(distill.norms) == norms
    losses = []
    for words in (3, 8):
        ids = torch.where(WORDS["attention_mask"] == 1, WORDS["input_ids"], words)
        model(input_ids=ids, attention_mask=WORDS["attention_mask"])
        losses.append(distill.loss())
    assert losses[0] > 0.01
    torch.testing.assert_close(*losses)
    # Without the mask padding counts.
    model(input_ids=ids)
    assert not torch.isclose(distill.loss(), losses[0])


@pytest.mark.parametrize("case", [VIT, BY_NAME["segmenter"], BY_NAME["caption"]], ids=lambda case: case.name)
def test_logits(case: Family) -> None:
    model, teacher = pair(case)
    inputs = case.inputs(2)
    distill = upop.distill(model, teacher, features=0, logits=0.5, temperature=3.0)
    own = model(**inputs)
    with torch.no_grad():
        aim = teacher(**inputs)
    if own.dim() == 4:
        own, aim = (maps.permute(0, 2, 3, 1) for maps in (own, aim))
    if "attention_mask" in inputs:
        own, aim = (values[inputs["attention_mask"] == 1] for values in (own, aim))
    own, aim = (values.flatten(0, -2) / 3 for values in (own, aim))
    expected = F.kl_div(own.log_softmax(-1), aim.softmax(-1), reduction="batchmean") * 9 * 0.5
    torch.testing.assert_close(distill.loss(), expected)


# --- what must stay as it is


def test_random_numbers_are_drawn_as_without_a_teacher() -> None:
    found = []
    for taught in (False, True):
        model = VIT.build().train()
        model.pos_drop = nn.Dropout(0.3)
        if taught:
            teacher = VIT.build()
            teacher.get_submodule("norm").register_forward_hook(_draw)
            upop.distill(model, teacher)
        torch.manual_seed(3)
        outputs = [model(**VIT.inputs()) for _ in range(2)]
        assert not torch.equal(*outputs)
        found.append(torch.cat(outputs))
    assert torch.equal(*found)


def test_model_and_teacher_are_apart() -> None:
    model, teacher = pair()
    names = list(model.state_dict())
    before = copy.deepcopy(teacher.state_dict())
    distill = upop.distill(model, teacher)
    for _ in range(2):
        loss = loss_of(model(**VIT.inputs()))
        (loss + distill.loss()).backward()
    assert list(model.state_dict()) == names
    assert len(list(model.modules())) == len(list(VIT.build().modules()))
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    distill.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in teacher.modules())
    with pytest.raises(StepError, match=r"removed by remove\(\)"):
        distill.loss()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_free_of_the_teacher(how: Any) -> None:
    model, teacher = pair()
    distill = upop.distill(model, teacher)
    size = len(pickle.dumps(VIT.build()))
    twin = how(model)
    assert len(pickle.dumps(model)) < 1.2 * size
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    twin(**VIT.inputs())
    assert not calls
    with pytest.raises(StepError, match="no forward pass"):
        distill.loss()
    model(**VIT.inputs())
    assert calls
    assert torch.equal(twin(**VIT.inputs()), model(**VIT.inputs()))


def test_evaluation_costs_nothing() -> None:
    model, teacher = pair()
    distill = upop.distill(model, teacher)
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**VIT.inputs())
    model.eval()
    model(**VIT.inputs())
    assert not calls
    with pytest.raises(StepError, match="in training mode with gradients"):
        distill.loss()


# --- loops


def test_several_passes_count_alike() -> None:
    """Two calls in a step, and two halves with a backward pass each, give the loss of the whole batch."""
    inputs, found = VIT.inputs(4)["x"], []
    for way in ("whole", "calls", "halves"):
        model, teacher = pair()
        distill = upop.distill(model, teacher)
        if way == "whole":
            model(inputs)
            distill.loss().backward()
        elif way == "calls":
            for part in inputs.split(2):
                model(part)
            distill.loss().backward()
        else:
            for part in inputs.split(2):
                model(part)
                (distill.loss() / 2).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_gradient_checkpointing_gives_the_same() -> None:
    found = []
    for checkpointed in (False, True):
        model, teacher = pair(NLVR)
        if checkpointed:
            checkpoint_blocks(model)
        distill = upop.distill(model, teacher)
        task = loss_of(model(**NLVR.inputs()))
        loss = distill.loss()
        (task + loss).backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
        with pytest.raises(StepError):  # what was computed again is no pass of its own
            distill.loss()
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_norms_that_a_checkpoint_hides_are_named() -> None:
    model, teacher = pair(VIT)
    plain = model.blocks[0].forward
    model.blocks[0].forward = lambda *args: checkpoint(plain, *args, use_reentrant=True)
    distill = upop.distill(model, teacher)
    with pytest.warns(UserWarning, match=r"cannot compare 2 of 5 norms \(blocks.0.norm1, .*use_reentrant=False"):
        model(**VIT.inputs())
    for count in (1, 2):  # it is said once
        assert float(distill.loss().detach()) > 0
        if count == 1:
            model(**VIT.inputs())


def test_autocast_of_the_model_is_the_teachers() -> None:
    """Whether it is around the call, or put into the model's own forward as Accelerate does."""
    for inside in (False, True):
        model, teacher = VIT.build(torch.float32).train(), VIT.build(torch.float32)
        kinds: list[torch.dtype] = []
        teacher.get_submodule("blocks.0.attn.proj").register_forward_hook(
            lambda _, __, out, kinds=kinds: kinds.append(out.dtype)
        )
        distill = upop.distill(model, teacher)
        kinds.clear()  # hooks also run on the copies that are read
        context = torch.autocast("cpu", torch.bfloat16)
        if inside:
            model.forward = context(model.forward)
            model(**VIT.inputs(dtype=torch.float32))
        else:
            with context:
                model(**VIT.inputs(dtype=torch.float32))
        assert kinds == [torch.bfloat16]
        loss = distill.loss()
        assert loss == 0
        assert loss.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it itself, but not where warnings are errors
def test_compiled_models_are_looked_through() -> None:
    model, teacher = pair()
    plain = upop.distill(model, teacher)
    model(**VIT.inputs())
    expected = plain.loss()
    plain.remove()
    compiled = torch.compile(model, backend="eager")
    distill = upop.distill(compiled, teacher)
    for _ in range(2):
        outputs = compiled(**VIT.inputs())
        loss = distill.loss()
        torch.testing.assert_close(loss, expected)
        (loss_of(outputs) + loss).backward()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Gradients are those of the whole batch, and the teacher sees hard negatives of the other process."""
    run_together(distill_ranks.run, str(tmp_path))
    whole = distill_ranks.gradients(NLVR.inputs(4))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, whole["loss"])
    for rank, other in ((0, slice(3, 6)), (1, slice(0, 3))):
        for one, two in zip(ranks[rank]["gradients"], whole["gradients"], strict=True):
            torch.testing.assert_close(one, two)
        assert set(ranks[rank]["draws"].tolist()) & set(range(6)[other])
        assert ranks[rank]["retrieval"] < 1e-10


# --- models with momentum copies, queues and draws


def test_retrieval_compares_the_same_pairs() -> None:
    """The teacher is shown the hard negatives that the model drew, and neither moves copies nor fills queues."""
    model = retrieval().train()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.temp.fill_(0.5)  # left to itself, it would draw others
    before = copy.deepcopy(teacher.state_dict())
    distill = upop.distill(model, teacher)
    for seed in range(3):
        losses = model(**retrieval_pairs(8, seed=seed), alpha=0.4)
        assert distill.loss() < 1e-10
        (losses.contrastive + losses.matching).backward()
    assert model.ptr_queue != before["ptr_queue"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_clip_compares_the_towers() -> None:
    model = clip().train()
    teacher = copy.deepcopy(model)
    before = copy.deepcopy(teacher.state_dict())
    distill = upop.distill(model, teacher)
    calls: list[int] = []
    teacher.vision_model_m.register_forward_hook(lambda *_: calls.append(1))
    for positional in (False, True):
        batch = {**clip_pairs(), "ids": torch.arange(4)}
        loss = model(*batch.values(), 0.4) if positional else model(**batch, alpha=0.4)
        assert distill.loss() == 0
        loss.backward()
        model.zero_grad()
    assert not calls  # of momentum copies, of which the features know nothing
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with torch.no_grad():
        model.vision_model.post_layernorm.bias.add_(1)
    model(**batch)
    assert distill.loss() > 0


# --- mistakes


@pytest.mark.parametrize(
    "settings",
    [{"features": -1.0}, {"features": 0.0}, {"logits": -0.1}, {"temperature": 0.0}, {"logits": float("nan")}],
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"at least 0|above 0"):
        upop.distill(*pair(), **settings)


def test_a_teacher_that_is_the_model() -> None:
    model = VIT.build()
    for teacher in (model, nn.parallel.DataParallel(model), copy.copy(model)):
        with pytest.raises(SettingError, match=r"copy\.deepcopy"):
            upop.distill(model, teacher)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("other", [NLVR.build, lambda: timm.create_model("vit_tiny_patch16_224", depth=2)])
def test_a_teacher_of_another_architecture(other: Any) -> None:
    with pytest.raises(LayoutError, match=r"another architecture.*, VisionTransformer"):
        upop.distill(VIT.build(), other())


def test_nothing_to_compare() -> None:
    model, teacher = pair()
    distill = upop.distill(model, teacher)
    model.requires_grad_(False)
    model(**VIT.inputs())
    with pytest.raises(StepError, match="nothing to compare"):
        distill.loss()
    retrieval_model = clip().train()
    distill = upop.distill(retrieval_model, copy.deepcopy(retrieval_model), logits=1.0)
    retrieval_model(**clip_pairs(), ids=torch.arange(4))
    with pytest.raises(StepError, match=r"needs logits with gradients.*ClipRetrieval returns Tensor"):
        distill.loss()


def test_differences_are_not_kept_in_float32() -> None:
    aim = torch.randn(4, 5, 8, dtype=torch.bfloat16)
    own = (aim + torch.randn_like(aim)).requires_grad_()
    mask = torch.tensor([[True] * 3 + [False] * 2] * 4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        loss = feature_loss(own, aim, mask)
    assert not [each for each in kept if each.dtype == torch.float32 and each.shape == own.shape]
    loss.backward()
    one, other = own.detach().float().requires_grad_(), aim.float()
    expected = ((one - other)[:, :3].square().mean((1, 2)) / other[:, :3].square().mean((1, 2))).mean()
    expected.backward()
    assert own.grad is not None and one.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own.grad.float(), one.grad, rtol=1e-2, atol=1e-5)


def test_fewer_norms_are_compared_where_that_is_asked_for() -> None:
    model, teacher = pair()
    everything = upop.distill(model, copy.deepcopy(teacher)).norms
    some = upop.distill(model, copy.deepcopy(teacher), layers=2)
    assert some.norms == everything[::-1][::2][::-1]
    assert some.norms[-1] == everything[-1]
    model.train()
    loss_of(model(**VIT.inputs()))
    assert some.loss() > 0
    with pytest.raises(SettingError, match=r"layers .*found 0"):
        upop.distill(model, teacher, layers=0)


def test_a_teacher_computes_in_the_models_precision() -> None:
    """In bfloat16 it takes half of the memory, and says the same as one that was converted by hand."""
    losses = []
    for by_hand in (False, True):
        model, teacher = pair()
        model.to(torch.bfloat16)
        taught = upop.distill(model.train(), teacher.to(torch.bfloat16) if by_hand else teacher)
        model(VIT.inputs()["x"].to(torch.bfloat16))
        losses.append(taught.loss())
        assert {each.dtype for each in teacher.parameters()} == {torch.bfloat16}
    assert torch.equal(*losses)
