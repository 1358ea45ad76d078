"""The budget: what is marked costs what was asked, whatever the scores, sizes and costs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import upop
from pruning.families import NLVR, VIT, Family, finished_pruner, outputs_of
from tiers import mostly_slow
from upop.pruning import budget
from upop.pruning.errors import SettingError

EXTRAS = Path(__file__).parents[1] / "parity" / "data" / "extras"
EPSILON = 1e-9


def group(name: str, kind: str, size: int) -> upop.Group:
    return upop.Group(name, kind, "other", size, 1, ())  # type: ignore[arg-type]


def random_scores(groups: list[upop.Group], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {part.name: torch.randn(part.size, generator=generator, dtype=torch.float64) for part in groups}


@st.composite
def problems(draw: st.DrawFn, ties: bool = True) -> tuple[list[upop.Group], dict[str, Tensor], dict[str, float]]:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    kinds = draw(st.lists(st.sampled_from(["attention", "mlp"]), min_size=len(sizes), max_size=len(sizes)))
    groups = [group(f"u{number}", kind, size) for number, (kind, size) in enumerate(zip(kinds, sizes, strict=True))]
    costs = {part.name: draw(st.sampled_from([1.0, 12.0, 36.0, 1537.0, 36900.0, 0.37])) for part in groups}
    scores = random_scores(groups, draw(st.integers(0, 10_000)))
    if ties and draw(st.booleans()):
        levels = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
        scores = {name: (importance * levels).round() * 0.1 + 0.7 for name, importance in scores.items()}
    return groups, scores, costs


def removable(groups: list[upop.Group], costs: dict[str, float], round_to: int) -> float:
    total = 0.0
    for part in groups:
        total += costs[part.name] * max(0, part.size - round_to if part.size >= round_to else 0)
    return total


@given(problems(), st.floats(0, 0.999), st.sampled_from([1, 2, 3, 8]))
@settings(max_examples=300, deadline=None)
def test_marked_cost_is_the_asked_share(problem: tuple, share: float, round_to: int) -> None:
    groups, scores, costs = problem
    found = budget.select(groups, scores, costs, share, round_to)
    total = sum(costs[part.name] * part.size for part in groups)
    marked = sum(costs[part.name] * int(found.marked[part.name].sum()) for part in groups)
    assert marked == pytest.approx(found.cost, rel=1e-12, abs=1e-12)
    target = min(share * total, removable(groups, costs, round_to))
    block = max(costs[part.name] * min(round_to, part.size) for part in groups)
    assert abs(marked - target) <= block / 2 + EPSILON * total


@given(problems(), st.floats(0, 0.999), st.sampled_from([1, 2, 3, 8]))
@settings(max_examples=300, deadline=None)
def test_no_group_becomes_empty_and_kept_sizes_are_aligned(problem: tuple, share: float, round_to: int) -> None:
    groups, scores, costs = problem
    found = budget.select(groups, scores, costs, share, round_to)
    for part in groups:
        gone = found.marked[part.name]
        assert gone.shape == (part.size,)
        kept = part.size - int(gone.sum())
        assert kept == part.size or (kept >= round_to and kept % round_to == 0)
        assert kept >= 1
        if gone.any() and not gone.all():  # the lowest scores stay
            assert scores[part.name][gone].min() >= scores[part.name][~gone].max()


@given(problems(), st.floats(0.01, 0.98), st.floats(0.01, 0.98))
@settings(max_examples=100, deadline=None)
def test_a_larger_share_marks_all_that_a_smaller_one_does(problem: tuple, one: float, two: float) -> None:
    groups, scores, costs = problem
    small = budget.select(groups, scores, costs, min(one, two)).marked
    large = budget.select(groups, scores, costs, max(one, two)).marked
    assert all(bool((large[part.name] | ~small[part.name]).all()) for part in groups)


@given(problems(ties=False), st.floats(0.01, 0.98))
@settings(max_examples=200, deadline=None)
def test_the_marked_channels_are_the_best_prefix_of_one_list(problem: tuple, share: float) -> None:
    groups, scores, costs = problem
    ranked = {}
    for kind in ("attention", "mlp"):
        values = [float(value) for part in groups if part.kind == kind for value in scores[part.name]]
        if values:
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
            for part in groups:
                if part.kind == kind:
                    centred = [(float(value) - mean) for value in scores[part.name]]
                    ranked[part.name] = [value / math.sqrt(variance) if variance else 0.0 for value in centred]
    channels = []
    for part in groups:
        lowest = min(range(part.size), key=lambda channel: ranked[part.name][channel])
        channels += [
            (ranked[part.name][channel], part.name, channel) for channel in range(part.size) if channel != lowest
        ]
    channels.sort(reverse=True)
    values = [value for value, _, _ in channels]
    assume(all(above - below > 1e-9 for above, below in itertools.pairwise(values)))
    target = share * sum(costs[part.name] * part.size for part in groups)
    spent = [0.0]
    for _, name, _ in channels:
        spent.append(spent[-1] + costs[name])
    gaps = sorted(abs(value - target) for value in spent)
    assume(len(gaps) == 1 or gaps[1] - gaps[0] > 1e-6)
    best = min(range(len(spent)), key=lambda count: abs(spent[count] - target))
    found = budget.select(groups, scores, costs, share)
    marked = {(part.name, int(channel)) for part in groups for channel in found.marked[part.name].nonzero()}
    assert marked == {(name, channel) for _, name, channel in channels[:best]}
    assert found.threshold == pytest.approx(values[best] if best < len(values) else -math.inf, abs=1e-9)


TOWERS = [
    group("a0", "attention", 16),
    group("m0", "mlp", 40),
    group("a1", "attention", 8),
    group("m1", "mlp", 24),
]
COSTS = {"a0": 24.0, "m0": 1.0, "a1": 36.0, "m1": 1.5}


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_shifting_and_scaling_the_scores_of_a_kind_changes_nothing(seed: int, share: float, round_to: int) -> None:
    scores = random_scores(TOWERS, seed)
    plain = budget.select(TOWERS, scores, COSTS, share, round_to)
    for kind, shift, scale in [("attention", 5.3, 1.0), ("attention", 0.0, 1e-6), ("mlp", -2.0, 1e4)]:
        moved = {
            part.name: scores[part.name] * scale + shift if part.kind == kind else scores[part.name] for part in TOWERS
        }
        found = budget.select(TOWERS, moved, COSTS, share, round_to)
        assert all(torch.equal(found.marked[name], gone) for name, gone in plain.marked.items())


def test_standardised_scores_have_mean_zero_and_unbiased_unit_deviation_per_kind() -> None:
    ranked = budget.standardise(TOWERS, random_scores(TOWERS, 0))
    for names in (("a0", "a1"), ("m0", "m1")):
        values = torch.cat([ranked[name] for name in names])
        assert float(values.mean()) == pytest.approx(0, abs=1e-14)
        assert float(values.std(unbiased=True)) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-20, 7e5])
def test_scores_that_are_all_equal_become_zero(value: float) -> None:
    scores = {part.name: torch.full((part.size,), value, dtype=torch.float64) for part in TOWERS}
    ranked = budget.standardise(TOWERS, scores)
    assert all(torch.equal(ranked[part.name], torch.zeros(part.size, dtype=torch.float64)) for part in TOWERS)


@pytest.mark.parametrize("round_to", [2, 3, 5, 7, 8])
def test_kept_sizes_stay_aligned_where_all_scores_of_a_group_are_equal(round_to: int) -> None:
    groups = [group("same", "mlp", 3 * round_to + 1), group("other", "mlp", 50)]
    for value in (0.1, 0.3, 1 / 3, 0.7, 1.1, 1e-3):
        scores = {
            "same": torch.full((groups[0].size,), value, dtype=torch.float64),
            "other": torch.arange(50).double(),
        }
        for share in torch.linspace(0, 0.95, 60).tolist():
            found = budget.select(groups, scores, {"same": 1.0, "other": 1.0}, share, round_to)
            kept = groups[0].size - int(found.marked["same"].sum())
            assert kept == groups[0].size or kept % round_to == 0


@given(problems(), st.floats(0.05, 0.95))
@settings(max_examples=200, deadline=None)
def test_the_published_selection(problem: tuple, share: float) -> None:
    groups, scores, costs = problem
    found = budget.select_as_published(groups, scores, costs, share)
    ranked = budget.standardise(groups, scores)
    ordered = sorted(
        ((float(value), costs[part.name]) for part in groups for value in ranked[part.name]),
        key=lambda channel: -channel[0],
    )
    target, spent, gaps = share * sum(cost for _, cost in ordered), 0.0, []
    for _, cost in ordered:
        spent += cost
        gaps.append(abs(spent - target))
    if len({value for value, _ in ordered}) == len(ordered):  # else the order within ties is torch's
        near = [ordered[place][0] for place, gap in enumerate(gaps) if gap <= min(gaps) + 1e-9 * spent]
        assert found.threshold in near
    for part in groups:
        values = ranked[part.name]
        expected = (values > found.threshold) & (values > values.min())
        assert torch.equal(found.marked[part.name], expected)
        assert not expected.all()
    assert found.cost == pytest.approx(sum(costs[part.name] * int(found.marked[part.name].sum()) for part in groups))


def test_the_schedule_is_the_recorded_one() -> None:
    recorded = json.loads((EXTRAS / "schedules.json").read_text())["pi"]
    assert recorded
    for name, values in recorded.items():
        ratio, steps = (float(part.partition("=")[2]) for part in name.split(","))
        found = [budget.progress(step, int(steps), ratio) for step in range(len(values))]
        assert found == pytest.approx(values, rel=1e-12), name


@given(st.floats(0.01, 0.99), st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_the_schedule_rises_to_the_ratio(ratio: float, steps: int) -> None:
    values = [budget.progress(step, steps, ratio) for step in range(steps)]
    assert values[-1] == ratio
    assert all(0 < value <= ratio for value in values)
    assert all(one <= two for one, two in itertools.pairwise(values))
    assert values[0] == pytest.approx(ratio * math.sin(math.pi / (2 * steps)), rel=1e-6)


@pytest.mark.parametrize("case", [VIT, NLVR], ids=lambda case: case.name)
@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("ratio", mostly_slow([0.1, 0.5, 0.75], 0.5))
def test_a_search_removes_what_was_asked(case: Family, cost: str, ratio: float) -> None:
    model, inputs = case.build(), case.inputs()
    groups = upop.find_groups(model)
    dense = upop.count_parameters(model) if cost == "params" else upop.count_macs(model, inputs)
    pruner = finished_pruner(model, inputs, ratio, 3, cost=cost, example=inputs)
    total = sum(pruner.costs[part.name] * part.size for part in groups)
    largest = max(pruner.costs.values())
    assert abs(pruner.kept_share() * total - (1 - ratio) * total) <= largest / 2 * (1 + 1e-9)
    plan = pruner.plan()
    asked = sum(pruner.costs[part.name] * (part.size - len(plan[part.name])) for part in groups)
    assert abs(asked - ratio * total) <= largest / 2 * (1 + 1e-9)
    pruner.shrink(verify=inputs)
    left = upop.count_parameters(model) if cost == "params" else upop.count_macs(model, inputs)
    assert dense - left == asked


@pytest.mark.parametrize("round_to", [2, 4, 8])
def test_an_aligned_search_keeps_multiples(round_to: int) -> None:
    model, inputs = NLVR.build(), NLVR.inputs()
    pruner = finished_pruner(
        model, inputs, 0.4, 3, round_to=round_to, exclude="*attn" if round_to == 8 else None, include="*m*"
    )
    plan, sizes = pruner.plan(), {part.name: part.size for part in pruner.groups}
    assert all(len(kept) == sizes[name] or len(kept) % round_to == 0 for name, kept in plan.items())
    total = sum(pruner.costs[name] * size for name, size in sizes.items())
    gone = sum(pruner.costs[name] * (size - len(plan[name])) for name, size in sizes.items())
    assert abs(gone - 0.4 * total) <= round_to * max(pruner.costs.values()) / 2 * (1 + 1e-9)
    pruner.shrink(verify=inputs)


def test_the_largest_reachable_ratio_is_reached_and_said() -> None:
    groups = [group("a", "attention", 4), group("m", "mlp", 10)]
    costs = {"a": 10.0, "m": 1.0}
    budget.check_reachable(groups, costs, 39 / 50)
    with pytest.raises(SettingError, match=r"ratio=0.79 cannot be reached.*at most 0.78 of the cost"):
        budget.check_reachable(groups, costs, 0.79)
    with pytest.raises(SettingError, match=r"block of 4 channels.*smaller round_to"):
        budget.check_reachable(groups, costs, 0.5, 4)
    marked = budget.select(groups, random_scores(groups, 0), costs, 39 / 50).marked
    assert [int((~gone).sum()) for gone in marked.values()] == [1, 1]


def test_progress_of_a_soft_search_as_seen_from_outside() -> None:
    model, inputs = NLVR.build(), NLVR.inputs()
    pruner = upop.Pruner(model, 0.5, 4, 2, progress="soft")
    assert (pruner.current_ratio, pruner.kept_share(), pruner.threshold, pruner.finished) == (
        0.0,
        1.0,
        None,
        False,
    )
    channels = sum(part.size for part in pruner.groups if part.kind == "mlp")
    assert pruner.mask_sum("mlp") == channels
    for step in range(4):
        before = pruner.masks
        outputs_of(model, inputs)
        model.zero_grad()
        torch.stack([value.square().sum() for value in [model(**inputs)]]).sum().backward()
        pruner.step()
        moved = any(not torch.equal(before[name], mask) for name, mask in pruner.masks.items())
        assert moved == (step in (0, 2, 3))
        assert pruner.steps_done == step + 1
        assert pruner.current_ratio == pytest.approx(0.5 * math.sin(math.pi * (step + 1) / 8))
        expected = torch.tensor(1 - pruner.current_ratio / 0.5, dtype=torch.float32).double()
        if moved:
            soft = torch.cat([mask[mask < 1] for mask in pruner.masks.values()])
            assert torch.equal(soft, expected.expand_as(soft))
    assert pruner.finished
    assert pruner.kept_share("vision") != pruner.kept_share("text")
    assert pruner.kept_share("other") == 1.0
    assert 0 < pruner.kept_share(kind="attention") < 1
    assert pruner.mask_sum("mlp") == sum(int(pruner.masks[u.name].sum()) for u in pruner.groups if u.kind == "mlp")
