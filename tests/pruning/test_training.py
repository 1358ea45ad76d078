"""What training loops do to a masked model: accumulation, clipping, autocast, compilation, ranks, ..."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upop
from pruning import ranks
from pruning.families import (
    BY_NAME,
    NLVR,
    VIT,
    Family,
    difference,
    loss_of,
    nlvr,
    outputs_of,
    random_masks,
    randomise,
    rows_of,
    still_pruner,
)
from tiers import mostly_slow, since
from together import FORKS
from upop.models.blip import checkpoint_last_blocks

Scores = dict[str, Tensor]
both = pytest.mark.parametrize("case", [VIT, NLVR], ids=lambda case: case.name)


def all_scores(pruner: upop.Pruner) -> Tensor:
    return torch.cat([importance.double().flatten() for importance in pruner.scores.values()])


def halves(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    size = len(inputs.get("input_ids", next(iter(inputs.values()))))
    return [rows_of(inputs, size, slice(0, size // 2)), rows_of(inputs, size, slice(size // 2, size))]


@both
def test_two_half_batches_equal_one_batch(case: Family) -> None:
    model, inputs = case.build(), case.inputs(4)
    masks = random_masks(upop.find_groups(model))
    whole = still_pruner(model, masks)
    loss_of(model(**inputs)).backward()
    whole.step()
    whole.remove()
    model.zero_grad()
    parts = still_pruner(model, masks)
    for half in halves(inputs):
        (loss_of(model(**half)) / 2).backward()
    parts.step()
    assert difference(all_scores(parts), all_scores(whole)) < 1e-10


@both
def test_clipping_after_step_leaves_the_scores(case: Family) -> None:
    found = []
    for clip in (False, True):
        model = case.build()
        pruner = still_pruner(model, random_masks(upop.find_groups(model)))
        loss_of(model(**case.inputs())).backward()
        pruner.step()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        found.append(all_scores(pruner))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", mostly_slow([torch.optim.SGD, torch.optim.AdamW], torch.optim.AdamW))
def test_the_optimizer_may_be_made_before_or_after(kind: Callable[..., torch.optim.Optimizer]) -> None:
    inputs, found = NLVR.inputs(), []
    for early in (True, False):
        model = NLVR.build()
        optimizer = kind(model.parameters(), lr=1e-2) if early else None
        pruner = upop.Pruner(model, 0.5, 4, 1)
        optimizer = optimizer or kind(model.parameters(), lr=1e-2)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}  # masks are nobody's parameters
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model(**inputs))
            loss.backward()
            pruner.step()
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.step()
            for old, parameter in zip(before, model.parameters(), strict=True):
                assert parameter.grad is not None
                assert parameter.grad.abs().max() < 1e-9 or not torch.equal(old, parameter)
            losses.append(float(loss.detach()))
        found.append(losses)
    assert found[0] == found[1]


@pytest.mark.parametrize("case", [VIT, BY_NAME["vit-eager"], BY_NAME["vit-no-bias"], NLVR], ids=lambda case: case.name)
def test_bfloat16_autocast(case: Family) -> None:
    model, inputs = case.build(torch.float32), case.inputs(4, torch.float32)
    masks = random_masks(upop.find_groups(model))
    exact = still_pruner(model, masks)
    outputs = model(**inputs)
    loss_of(outputs).backward()
    exact.step()
    exact.remove()
    model.zero_grad()
    pruner = still_pruner(model, masks)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**inputs)
        loss = loss_of(rough.float())
    assert rough.dtype == torch.bfloat16
    loss.backward()
    pruner.step()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)
    assert all(importance.dtype == torch.float32 for importance in pruner.scores.values())
    assert bool(all_scores(pruner).isfinite().all())
    assert pruner.skipped_steps == 0
    assert difference(rough.detach().float(), outputs.detach()) < 0.1
    pair = torch.stack([all_scores(pruner), all_scores(exact)])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.99


@both
def test_autocast_gives_the_bits_that_a_plain_linear_would(case: Family) -> None:
    model, inputs = case.build(torch.float32), case.inputs(2, torch.float32)
    found = []
    for attached in (False, True):
        pruner = upop.Pruner(model, 0.5, 10) if attached else None
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**inputs)
        loss_of(outputs.float()).backward()
        found.append(
            [
                outputs.detach(),
                *(value.grad.clone() for value in model.parameters() if value.grad is not None),
            ]
        )
        if pruner:
            pruner.remove()
    assert len(found[0]) == len(found[1])
    assert torch.equal(found[0][0], found[1][0])
    for plain, masked in zip(*found, strict=True):
        assert difference(masked, plain) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both
def test_models_in_half_precision(case: Family, dtype: torch.dtype) -> None:
    model, inputs = case.build(dtype), case.inputs(2, dtype)
    pruner = upop.Pruner(model, 0.5, 3, 1)
    for _ in range(3):
        model.zero_grad()
        loss_of(model(**inputs).float()).backward()
        pruner.step()
    assert pruner.skipped_steps == 0
    assert all(importance.dtype == torch.float32 for importance in pruner.scores.values())
    pruner.shrink(verify=inputs)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@both
def test_a_model_cast_after_attaching_goes_on(case: Family) -> None:
    model = case.build(torch.float32)
    pruner = upop.Pruner(model, 0.5, 2, 1)
    model.double()
    for _ in range(2):
        model.zero_grad()
        loss_of(model(**case.inputs())).backward()
        pruner.step()
    pruner.shrink(verify=case.inputs())


def test_masks_keep_no_more_for_the_backward_pass() -> None:
    model, inputs = NLVR.build(), NLVR.inputs(8)

    def kept() -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
        masks = [each for module in model.modules() for each in vars(module).values() if isinstance(each, Tensor)]
        own |= {mask.untyped_storage().data_ptr() for mask in masks}
        sizes: dict[int, int] = {}
        held: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)  # an address is told once only while its tensor lives
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model(**inputs))
        return sum(sizes.values())

    plain = kept()
    still_pruner(model, random_masks(upop.find_groups(model)))
    assert kept() <= plain


@pytest.mark.slow
@pytest.mark.parametrize(("progress", "backend"), [("soft", "eager"), ("stages", "aot_eager")])
def test_compiled_models_see_masks_move(progress: Any, backend: str) -> None:
    torch.compiler.reset()
    plain, inputs = VIT.build(), VIT.inputs(3)
    model = VIT.build()
    compiled = torch.compile(model, backend=backend)
    assert difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) < 1e-12  # compiled before attaching
    expected, pruner = (upop.Pruner(net, 0.5, 7, 3, progress=progress) for net in (plain, compiled))
    for _ in range(7):
        losses = []
        for net, search in ((plain, expected), (compiled, pruner)):
            net.zero_grad()
            loss = loss_of(net(**inputs))
            loss.backward()
            search.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert difference(all_scores(pruner), all_scores(expected)) < 1e-10
        assert difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) < 1e-12
    assert pruner.shrink(verify=inputs) is model
    expected.shrink(verify=inputs)
    assert difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) < 1e-12
    torch.compiler.reset()


@since("torch", "2.7", "its compiler raises warnings about functions of autograd")
def test_compiled_models_notice_that_masks_are_gone() -> None:
    torch.compiler.reset()
    model, inputs = VIT.build(), VIT.inputs()
    before = outputs_of(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pruner = still_pruner(model, random_masks(upop.find_groups(model)))
    masked = outputs_of(model, inputs)
    assert difference(outputs_of(compiled, inputs), masked) < 1e-12
    assert difference(masked, before) > 1e-3
    pruner.remove()
    assert difference(outputs_of(compiled, inputs), before) < 1e-12
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("count", [None, 1, 2])
def test_gradient_checkpointing_gives_the_same_gradients(count: int | None) -> None:
    inputs, found = NLVR.inputs(), []
    for checkpointed in (False, True):
        model = NLVR.build().train()
        if checkpointed:
            checkpoint_last_blocks(model.visual_encoder, count)
        pruner = still_pruner(model, random_masks(upop.find_groups(model)))
        loss_of(model(**inputs)).backward()
        pruner.step()
        found.append((all_scores(pruner), {name: value.grad for name, value in model.named_parameters()}))
    assert difference(found[1][0], found[0][0]) < 1e-12
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-12, atol=1e-13)


def test_data_parallel_wrappers_are_looked_through() -> None:
    model, inputs = VIT.build(), VIT.inputs()
    wrapped = nn.DataParallel(model)
    pruner = upop.Pruner(wrapped, 0.5, 2, 1)
    assert [group.name for group in pruner.groups] == [group.name for group in upop.find_groups(model)]
    for _ in range(2):
        wrapped.zero_grad()
        loss_of(wrapped(**inputs)).backward()
        pruner.step()
    assert pruner.shrink(verify=inputs) is model


def test_a_scaled_loss_scales_scores_and_so_changes_no_choice() -> None:
    marked = []
    for scale in (1.0, 1024.0):
        model = VIT.build()
        pruner = upop.Pruner(model, 0.5, 2, 1)
        for _ in range(2):
            model.zero_grad()
            (scale * loss_of(model(**VIT.inputs()))).backward()
            pruner.step()
        marked.append(pruner.plan().kept)
    assert marked[0] == marked[1]


def test_scores_are_of_gradients_whose_scale_was_taken_off() -> None:
    """A GradScaler writes to gradients without their noticing."""
    found = []
    for scale in (1.0, 64.0):
        model = VIT.build()
        pruner, optimizer = upop.Pruner(model, 0.5, 4), torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(model(**VIT.inputs()))).backward()
        scaler.unscale_(optimizer)
        pruner.step()
        found.append(pruner.scores)
        pruner.remove()
    torch.testing.assert_close(found[0], found[1])


def test_dropout_does_not_disturb_shrinking() -> None:
    torch.manual_seed(0)
    model = nlvr(dropout=0.3, drop_path=0.3)
    randomise(model)
    model.double().train()
    model.text_encoder.eval()
    modes = [module.training for module in model.modules()]
    pruner = upop.Pruner(model, 0.5, 2, 1)
    for _ in range(2):
        model.zero_grad()
        loss_of(model(**NLVR.inputs())).backward()
        pruner.step()
    state = torch.get_rng_state()
    pruner.shrink(verify=NLVR.inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_frozen_towers_can_be_left_out() -> None:
    model, inputs = NLVR.build(), NLVR.inputs()
    model.visual_encoder.requires_grad_(False)
    before = copy.deepcopy(model.visual_encoder.state_dict())
    pruner = upop.Pruner(model, 0.5, 3, 1, exclude="visual_encoder.*")
    assert {group.modality for group in pruner.groups} == {"text"}
    for _ in range(3):
        model.zero_grad()
        loss_of(model(**inputs)).backward()
        pruner.step()
    pruner.shrink(verify=inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.visual_encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.visual_encoder.parameters())


def test_frozen_weights_stay_frozen_when_they_are_cut() -> None:
    model = VIT.build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    pruner = upop.Pruner(model, 0.5, 2, 1)
    for _ in range(2):
        model.zero_grad()
        loss_of(model(**VIT.inputs())).backward()
        pruner.step()
    pruner.shrink(verify=VIT.inputs())
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


def test_weights_beside_an_adapter_are_scored_and_the_loop_does_not_notice() -> None:
    """An adapter starts at zero: by it alone, channels would be ranked by noise."""
    peft = pytest.importorskip("peft")
    plain, inputs = VIT.build(), VIT.inputs()
    layers = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=layers, lora_dropout=0.0)
    adapted = peft.get_peft_model(copy.deepcopy(plain), config)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    found = []
    for model, scale in ((plain, 1.0), (adapted, 64.0)):
        pruner = upop.Pruner(model, 0.5, 4, rotate=False)  # weights beside adapters are not rotated
        for _ in range(2):  # accumulated
            (loss_of(model(**inputs)) * scale).backward()
        assert all(name in trained or each.grad is None for name, each in model.named_parameters() if model is adapted)
        for each in model.parameters():
            each.grad = None if each.grad is None else each.grad / scale  # as unscale_ does
        pruner.step(scale=scale)
        found.append(list(pruner.scores.values()))
        pruner.remove()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trained


def test_heads_with_frozen_weights_beside_trained_ones_are_scored_as_they_are() -> None:
    """These scores are of the backward pass, so that a rotation after it would come too late."""
    found = []
    for rotate in (True, False):
        model = VIT.build()
        model.get_parameter("blocks.0.attn.qkv.weight").requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        pruner = upop.Pruner(model, 0.5, 4, rotate=rotate)
        loss_of(model(**VIT.inputs())).backward()
        pruner.step()
        found.append(pruner.scores["blocks.0.attn"])
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.partition(".attn")[0] for name in moved} == ({"blocks.1"} if rotate else set())
    torch.testing.assert_close(*found)


def partly_frozen() -> tuple[nn.Module, nn.Parameter]:
    model = VIT.build()
    weight = model.get_parameter("blocks.0.mlp.fc1.weight")
    return model, weight.requires_grad_(False)


def test_a_frozen_weight_is_the_loops_own_as_soon_as_it_is_thawed() -> None:
    model, weight = partly_frozen()
    pruner = upop.Pruner(model, 0.5, 4)
    for thaw in (False, True):
        weight.requires_grad_(weight.requires_grad or thaw)
        loss_of(model(**VIT.inputs())).backward()
        assert (weight.grad is not None) is thaw
        pruner.step()
        assert weight.requires_grad is thaw
        model.zero_grad()
    pruner.remove()
    assert weight.requires_grad


def test_copies_and_transforms_of_a_model_that_is_searched_leave_frozen_weights_frozen() -> None:
    model, weight = partly_frozen()
    pruner, inputs = upop.Pruner(model, 0.5, 4), VIT.inputs()
    other = copy.deepcopy(model)
    loss_of(other(**inputs)).backward()
    assert not other.get_parameter("blocks.0.mlp.fc1.weight").requires_grad
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.func.grad(lambda given: loss_of(torch.func.functional_call(model, given, (), inputs)))(trained)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, other.get_parameter(name).grad)
    loss_of(model(**inputs)).backward()
    assert weight.requires_grad  # until the step ends
    del pruner
    gc.collect()
    assert not weight.requires_grad
    loss_of(model(**inputs)).backward()
    assert weight.grad is None and not weight.requires_grad


def test_scores_of_frozen_weights_add_up_as_their_gradients_do() -> None:
    """The known ones are added up at once, so that no gradient is held; those of one's own need whole gradients."""
    found = []
    for importance in ("signed", lambda weight, gradient: (weight * gradient).sum(1)):
        model, _ = partly_frozen()
        pruner = upop.Pruner(model, 0.5, 8, importance=importance, progress="stages", correct=False)
        for part in halves(VIT.inputs(4)):
            loss_of(model(**part)).backward()
        pruner.step()
        found.append(pruner.scores)
        pruner.remove()
    torch.testing.assert_close(found[0], found[1])


def test_groups_that_the_loss_does_not_reach_get_no_score() -> None:
    model, inputs = NLVR.build(), NLVR.inputs()
    pruner = still_pruner(model)
    model.visual_encoder(inputs["images"]).square().mean().backward()
    pruner.step()
    assert all(bool(pruner.scores[group.name].any()) == (group.modality == "vision") for group in pruner.groups)


def test_own_scores_and_the_published_one_agree_where_they_should() -> None:
    found = []
    for importance in ("signed", lambda weight, gradient: (weight * gradient).sum(1)):
        model = VIT.build()
        pruner = still_pruner(model, random_masks(upop.find_groups(model)), importance=importance)
        loss_of(model(**VIT.inputs())).backward()
        pruner.step()
        found.append(all_scores(pruner))
    assert difference(*found) < 1e-12


@since("timm", "1.0.22", "it reads numbers off torch.linspace")
def test_a_model_may_be_built_and_cut_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nlvr()
        plan = {group.name: range(0, group.size, 2) for group in upop.find_groups(model)}
        upop.shrink(model, plan)
    real = NLVR.build(torch.float32)
    upop.shrink(real, plan)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in real.state_dict().items()
    }


def in_two_ranks(work: Any, how: Any, folder: Path) -> list[dict[str, Any]]:
    """Return what came of both ranks' work."""
    other = FORKS.Process(target=ranks.run, args=(1, str(folder), work, how))
    other.start()
    try:
        ranks.run(0, str(folder), work, how)
        other.join(timeout=60)
        assert other.exitcode == 0
    finally:
        other.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("progress", ["stages", "soft"])
def test_two_ranks_search_as_one_process_does(progress: str, tmp_path: Path) -> None:
    expected = ranks.search(NLVR.inputs(4), None, progress)
    results = in_two_ranks(ranks.search, progress, tmp_path)
    for found in results:
        assert found["plan"] == expected["plan"]
        for name, importance in expected["scores"].items():
            torch.testing.assert_close(found["scores"][name], importance, rtol=1e-10, atol=1e-12)
            assert torch.equal(found["masks"][name], expected["masks"][name])
            assert torch.equal(found["scores"][name], results[0]["scores"][name])
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-9, atol=1e-11)
            assert torch.equal(found["weights"][name], results[0]["weights"][name])


def test_two_ranks_are_compressed_as_one_process_is_and_train_on_in_their_wrapper(tmp_path: Path) -> None:
    expected = ranks.compress(NLVR.inputs(4), None, 6)
    results = in_two_ranks(ranks.compress, 6, tmp_path)
    for found in results:
        assert found["plan"] == expected["plan"]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-9, atol=1e-11)
            assert torch.equal(found["weights"][name], results[0]["weights"][name])
