"""A search in stages: masks that fall for good, scores of a stage alone, and readers that make up for what goes."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import upop
from pruning.families import (
    BLIP_SIZES,
    BY_NAME,
    NLVR,
    VIT,
    Family,
    Inputs,
    difference,
    loss_of,
    outputs_of,
    randomise,
    reader_and_inputs,
)
from tiers import mostly_slow
from upop.models.blip import checkpoint_last_blocks
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.pruning import budget
from upop.pruning.correction import RIDGES
from upop.pruning.errors import SettingError

both = pytest.mark.parametrize("case", [VIT, NLVR], ids=lambda case: case.name)


def take(model: nn.Module, pruner: upop.Pruner, inputs: Inputs) -> None:
    model.zero_grad()
    loss_of(model(**inputs)).backward()
    pruner.step()


def searched(model: nn.Module, case: Family, *given: Any, **settings: Any) -> Iterator[upop.Pruner]:
    """Search without training; yields the pruner before each step and after the last."""
    pruner = upop.Pruner(model, *given, **settings)
    for step in range(pruner.steps):
        yield pruner
        take(model, pruner, case.inputs(4, seed=step))
    yield pruner


def gone(pruner: upop.Pruner) -> dict[str, Tensor]:
    return {name: mask == 0 for name, mask in pruner.masks.items()}


def marked(pruner: upop.Pruner, scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return budget.select(pruner.groups, scores, pruner.costs, share, standardised=False).marked


@pytest.mark.parametrize("round_to", [1, 3])
@both
def test_masks_fall_for_good_and_by_equal_shares(case: Family, round_to: int) -> None:
    steps, interval, before = 7, 2, dict[str, Tensor]()
    for step, pruner in enumerate(searched(case.build(), case, 0.5, steps, interval, round_to=round_to)):
        masks = pruner.masks
        assert all(bool(((mask == 0) | (mask == 1)).all()) for mask in masks.values())
        assert all(bool((mask <= before[name]).all()) for name, mask in masks.items() if before)
        taken = steps if step == steps else step - step % interval
        assert pruner.current_ratio == pytest.approx(0.5 * taken / steps)
        total = sum(pruner.costs[group.name] * group.size for group in pruner.groups)
        block = round_to * max(pruner.costs.values())
        assert abs((1 - pruner.kept_share()) * total - pruner.current_ratio * total) <= block / 2 * (1 + 1e-9)
        before = masks
    assert pruner.finished
    pruner.shrink(verify=case.inputs())


@pytest.mark.parametrize(("steps", "stages"), [(1, 1), (3, 3), (8, 8), (16, 8), (40, 8)])
def test_eight_stages_unless_told_otherwise(steps: int, stages: int) -> None:
    found = {round(pruner.current_ratio, 12) for pruner in searched(VIT.build(), VIT, 0.5, steps, correct=False)}
    assert found == {round(0.5 * stage / stages, 12) for stage in range(stages + 1)}


def test_what_means_the_published_search() -> None:
    settings: list[dict[str, Any]] = [{"cost": "reference"}, {"importance": "signed"}, {"progress": "soft"}]
    for each in settings:
        pruner = upop.Pruner(VIT.build(), 0.5, 1000, **each)
        assert (pruner.progress, pruner.importance, pruner.interval) == ("soft", "signed", 50)
    pruner = upop.Pruner(VIT.build(), 0.5, 1000)
    assert (pruner.progress, pruner.importance, pruner.interval) == ("stages", "absolute", 125)
    assert upop.Pruner(VIT.build(), 0.5, 8, importance="signed", progress="stages").progress == "stages"
    assert upop.Pruner(VIT.build(), 0.5, 8, importance="squared", progress="soft").importance == "squared"


def scores_after(count: int, **settings: Any) -> dict[str, Tensor]:
    steps = searched(VIT.build(), VIT, 0.5, 100, 100, **settings)
    return next(pruner for number, pruner in enumerate(steps) if number == count).scores


def test_a_soft_search_says_that_it_corrects_nothing() -> None:
    with pytest.raises(SettingError, match="found correct=True"):
        upop.Pruner(VIT.build(), 0.5, 4, cost="reference", correct=True)
    assert not upop.Pruner(VIT.build(), 0.5, 4, cost="reference").corrections


def test_scores_by_name_and_of_ones_own() -> None:
    first, second = (scores_after(count, importance="signed", progress="stages") for count in (1, 2))
    changes = {name: (first[name], second[name] - first[name]) for name in first}
    absolute, squared = scores_after(2), scores_after(2, importance="squared")
    own = scores_after(2, progress="stages", importance=lambda weight, gradient: gradient.abs().sum(1))
    for name, (one, two) in changes.items():
        torch.testing.assert_close(absolute[name], -(one.abs() + two.abs()), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(squared[name], -(one.square() + two.square()), rtol=1e-9, atol=1e-12)
        assert bool((own[name] >= 0).all()) and own[name].any()


def test_scores_begin_anew_with_every_stage() -> None:
    model = VIT.build()
    pruner = upop.Pruner(model, 0.5, 6, 3)
    for step in range(6):
        take(model, pruner, VIT.inputs(4, seed=step))
        if step in (0, 3):  # the first of a stage
            layer = model.blocks[0].mlp.fc1
            terms = (layer.weight.grad * layer.weight).sum(1) + layer.bias.grad * layer.bias
            torch.testing.assert_close(pruner.scores["blocks.0.mlp"], -terms.detach().abs(), rtol=1e-9, atol=1e-12)
            assert terms.any()


@both
def test_what_was_cut_is_what_the_last_scores_rank_first(case: Family) -> None:
    before: dict[str, Tensor] = {}
    for step, pruner in enumerate(searched(case.build(), case, 0.6, 6, 2)):
        if step and step % 2 == 0:
            ranked = {
                name: importance.masked_fill(before[name], torch.inf) for name, importance in pruner.scores.items()
            }
            expected = marked(pruner, ranked, pruner.current_ratio)
            assert all(torch.equal(each, expected[name]) for name, each in gone(pruner).items())
        before = gone(pruner)


def test_a_stage_without_scores_goes_by_the_last_ones() -> None:
    model = VIT.build()
    pruner = upop.Pruner(model, 0.5, 4, 2)
    for step in range(2):
        take(model, pruner, VIT.inputs(4, seed=step))
    scores = pruner.scores
    with pytest.warns(UserWarning, match="2 of 4 search steps.*finite"):
        for _ in range(2):
            pruner.skip()
    expected = marked(pruner, scores, 0.5)
    assert all(torch.equal(each, expected[name]) for name, each in gone(pruner).items())
    pruner.shrink(verify=VIT.inputs())


@both
def test_corrected_consumers_are_the_nearest_to_the_old_ones(case: Family) -> None:
    """No other weights bring their outputs nearer to the old ones, for the pull that holds them to the old weights."""
    model, dense, batch = case.build(), case.build(), case.inputs(16)
    group = next(group for group in upop.find_groups(dense) if group.kind == "mlp")
    reader = group.online[-1].tensor.removesuffix(".weight")
    pruner = upop.Pruner(model, 0.5, 1, include=group.name)
    take(model, pruner, batch)
    _, wanted = reader_and_inputs(dense, batch, reader)
    inputs, found = reader_and_inputs(model, batch, reader)
    kept = pruner.masks[group.name].bool()
    assert not inputs[:, :-1][:, ~kept].any()
    new, old = (each.get_submodule(reader) for each in (model, dense))
    squares = wanted.square().sum(1)
    weight = (squares.log().mean().exp() / squares).clamp_max(1).sqrt().unsqueeze(1)  # none counts more for being large
    inputs, wanted, found = inputs * weight, wanted * weight, found * weight
    pull = inputs[:, :-1].square().sum(0)[kept].mean() * (new.weight - old.weight)[:, kept]
    pull = torch.cat([pull, pull.new_zeros(len(pull), 1)], 1).detach()
    force = ((wanted - found).t() @ inputs)[:, [*kept.tolist(), True]]
    assert (wanted - found).abs().max() > 1e-3
    assert pull.abs().max() > 1e-6
    near = 1e-9 * float(inputs.norm() * wanted.norm())
    assert any(torch.allclose(force, ridge * pull, rtol=1e-6, atol=near) for ridge in RIDGES)


@both
def test_only_readers_change_and_without_correction_nothing_does(case: Family) -> None:
    dense = case.build()
    groups = upop.find_groups(dense)
    read = {group.online[-1].tensor for group in groups}
    read |= {name.removesuffix("weight") + "bias" for name in read}
    for correct in (True, False):
        model = case.build()
        *_, pruner = searched(model, case, 0.5, 4, 2, correct=correct, rotate=False)
        pruner.remove()
        changed = {
            name for name, value in model.state_dict().items() if not torch.equal(value, dense.state_dict()[name])
        }
        assert changed <= read
        assert bool(changed) is correct


def test_readers_of_momentum_copies_are_corrected_too() -> None:
    sizes = {name: value for name, value in BLIP_SIZES.items() if not name.startswith("drop")}
    model = ClipRetrieval(ClipConfig(**sizes, embed_dim=20, queue_size=12))
    randomise(model)
    with torch.no_grad():
        for parameter, twin in model.momentum_pairs():
            twin.copy_(parameter)
    before = {name: value.clone() for name, value in model.double().state_dict().items()}
    pruner = upop.Pruner(model, 0.5, 1)
    take(model, pruner, BY_NAME["clip"].inputs(4))
    for parameter, twin in model.momentum_pairs():
        torch.testing.assert_close(twin, parameter, rtol=1e-12, atol=0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    helped = [group for group in pruner.groups if pruner.corrections[group.name] < 1]
    copied = {part.tensor for group in helped for part in group.slices if part.follows and not part.produces}
    assert changed >= copied
    assert len(copied) == len(helped) > len(pruner.groups) / 2


def note(seen: list[StorageWeakRef], _module: nn.Module, args: tuple[Tensor]) -> None:
    seen.append(StorageWeakRef(args[0].untyped_storage()))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, None])
def test_checkpointed_blocks_keep_nothing_to_look_at(count: int | None) -> None:
    found, kept = [], []
    for checkpointed in (False, True):
        model = NLVR.build().train()
        if checkpointed:
            checkpoint_last_blocks(model.visual_encoder, count)
        pruner = upop.Pruner(model, 0.5, 2, 2)
        seen: list[StorageWeakRef] = []
        layer = model.visual_encoder.blocks[-1].mlp.fc2
        hook = layer.register_forward_pre_hook(partial(note, seen))
        loss = loss_of(model(**NLVR.inputs()))
        gc.collect()
        kept.append(not seen[0].expired())
        hook.remove()
        loss.backward()
        pruner.step()
        take(model, pruner, NLVR.inputs(seed=1))
        found.append(outputs_of(model, NLVR.inputs()))
    assert kept == [True, False]
    assert difference(found[1], found[0]) < 1e-10


class Counting:
    """A compiler that changes nothing, and counts how often what it compiled is run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def test_compiled_models_are_corrected_and_run_compiled_all_the_other_steps() -> None:
    torch.compiler.reset()
    model, plain, counting = VIT.build(), VIT.build(), Counting()
    compiled: Any = torch.compile(model, backend=counting, fullgraph=True)
    pruner, expected = upop.Pruner(compiled, 0.5, 12, 6), upop.Pruner(plain, 0.5, 12, 6)
    runs = []
    for step in range(12):
        before = counting.runs
        for net, search in ((compiled, pruner), (plain, expected)):
            net.zero_grad()
            loss_of(net(**VIT.inputs(4, seed=step))).backward()
            search.step()
        runs.append(counting.runs - before)
    # The inputs of the first call, and the last four steps of a stage, are looked at.
    assert runs == [0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    before = counting.runs
    assert difference(outputs_of(compiled, VIT.inputs()), outputs_of(plain, VIT.inputs())) < 1e-12
    assert counting.runs == before + 1
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch.compile, which looks for it everywhere
@pytest.mark.parametrize(
    "way",
    mostly_slow(
        ["known wrapper", "unknown wrapper", "in place", "a block in place", "a function"], "in place", "a function"
    ),
)
def test_what_is_compiled_is_looked_at_and_other_compiled_code_stays_compiled(way: str) -> None:
    torch.compiler.reset()
    counting, others = Counting(), Counting()
    model, plain, other = VIT.build(), VIT.build(), torch.compile(nn.Linear(2, 2), backend=others)
    called: Any = model
    if way == "in place":
        model.compile(backend=counting)
    elif way == "a block in place":
        model.blocks[0].compile(backend=counting)
    elif way == "a function":
        called = torch.compile(lambda **inputs: model(**inputs), backend=counting)
        called.zero_grad = model.zero_grad
    else:
        called = torch.compile(model, backend=counting)
    pruner = upop.Pruner(called if way == "known wrapper" else model, 0.5, 8, 4)  # every step is looked at
    expected = upop.Pruner(plain, 0.5, 8, 4)
    for step in range(8):
        for net, search in ((called, pruner), (plain, expected)):
            net.zero_grad()
            loss_of(net(**VIT.inputs(4, seed=step))).backward()
            search.step()
        assert counting.runs == 0
        if way != "a function":
            other(torch.ones(1, 2))
            assert others.runs == step + 1
    assert pruner.corrections.keys() == expected.corrections.keys()
    assert difference(outputs_of(model, VIT.inputs()), outputs_of(plain, VIT.inputs())) < 1e-12
    pruner.remove()
    before = counting.runs, others.runs
    outputs_of(called, VIT.inputs()), other(torch.ones(1, 2))
    assert counting.runs > before[0]
    assert others.runs == before[1] + 1
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch.compile, which looks for it everywhere
def test_compiled_functions_that_do_not_run_the_model_go_on_compiled_after_its_first_step() -> None:
    torch.compiler.reset()
    counting, model = Counting(), VIT.build()
    other = torch.compile(lambda value: value * 2, backend=counting)
    pruner, runs = upop.Pruner(model, 0.5, 4, 4), []
    for step in range(4):
        model.zero_grad()
        loss_of(model(**VIT.inputs(4, seed=step))).backward()
        pruner.step()
        other(torch.ones(2))
        runs.append(counting.runs)
    assert runs == [1, 2, 3, 4]
    torch.compiler.reset()


def test_nothing_is_left_of_a_search_that_was_let_go_of() -> None:
    torch.compiler.reset()
    counting, model = Counting(), VIT.build()
    compiled = torch.compile(model, backend=counting)
    upop.Pruner(compiled, 0.5, 4, 1)
    gc.collect()
    compiled(**VIT.inputs())
    assert counting.runs == 1
    torch.compiler.reset()


def test_copies_of_a_model_that_is_looked_at_are_not() -> None:
    model = VIT.build()
    pruner = upop.Pruner(model, 0.5, 2, 2)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks
    for twin in (copy.deepcopy(model), model):
        loss_of(twin(**VIT.inputs())).backward()
        if twin is model:
            pruner.step()
        assert bool(pruner.state_dict()["seen"]["passes"]) is (twin is model)
    assert all(callable(pickle.loads(pickle.dumps(hook))) for hook in hooks)


def test_inputs_that_are_not_finite_correct_nothing() -> None:
    model = VIT.build()
    pruner = upop.Pruner(model, 0.5, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3):
            inputs = VIT.inputs(4, seed=step)
            take(model, pruner, {"x": inputs["x"] * float("nan")} if step == 1 else inputs)
    assert pruner.skipped_steps == 1
    assert outputs_of(model, VIT.inputs()).isfinite().all()
