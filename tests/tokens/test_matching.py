"""Matching and merging by themselves: what holds for any tokens. What was published is compared in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from upop.tokens.matching import cosine, match, merge, removable, unmerge


def step_by_step(
    keys: list[list[float]],
    guide: list[float],
    tokens: list[list[float]],
    size: list[float],
    kept: set[int],
    asked: int,
) -> tuple[list[list[float]], list[float]]:
    """Merge the tokens of one row as the published code does it, written out for single numbers.

    Args:
        keys: of every token.
        guide: the query that says what matters.
        tokens: what is merged.
        size: of every token.
        kept: the protected positions.
        asked: how many tokens should go.
    """

    def along(one: list[float], other: list[float]) -> float:
        length = math.sqrt(sum(each * each for each in one) * sum(each * each for each in other))
        return sum(each * its for each, its in zip(one, other, strict=True)) / length

    count, least = len(keys), -math.inf
    alike = [[least] * count for _ in keys]
    for one in range(count):
        for other in range(one + 1, count):
            if not {one, other} & kept:
                alike[one][other] = alike[other][one] = along(keys[one], keys[other])
    nearest = sorted(range(count), key=lambda place: -max(alike[place]))
    reach = [
        max((alike[each][later] for later in nearest[nearest.index(each) + 1 :]), default=least)
        for each in range(count)
    ]
    worth = [along(key, guide) for key in keys]
    order = sorted(range(count), key=lambda place: worth[place] - reach[place])
    goes, stays = order[: min(asked, (count - len(kept)) // 2)], order[min(asked, (count - len(kept)) // 2) :]
    into = {each: max(stays, key=lambda place: alike[each][place]) for each in goes}
    merged, sizes = [], []
    for place in sorted(stays):
        total, factor = size[place], 1.0
        added = [0.0] * len(tokens[place])
        for source in (each for each in goes if into[each] == place):
            weights = math.exp(worth[source]), math.exp(worth[place])
            factor += 2 * weights[1] / sum(weights) - 1
            added = [
                old + 2 * weights[0] / sum(weights) * size[source] * new
                for old, new in zip(added, tokens[source], strict=True)
            ]
            total += size[source]
        merged.append(
            [(size[place] * factor * old + new) / total for old, new in zip(tokens[place], added, strict=True)]
        )
        sizes.append(total)
    return merged, sizes


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("tokens", "width", "asked", "ends"), [(7, 4, 2, 1), (24, 16, 7, 2), (31, 4, 40, 3)])
def test_tokens_merge_as_written_out_step_by_step(tokens: int, width: int, asked: int, ends: int, equal: bool) -> None:
    """The first token is protected, and the last ones; with `equal`, cosines are exact quarters, so that many tie."""
    draws = torch.Generator().manual_seed(tokens)

    def some_of(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=draws)
        return drawn.sign() if equal else drawn

    keys, guide, states = some_of(3, tokens, width), some_of(3, width), torch.randn(3, tokens, 4, generator=draws)
    size = torch.randint(1, 5, (3, tokens), generator=draws).double()
    kept = {0, *range(tokens - ends + 1, tokens)}
    protected = torch.tensor([place in kept for place in range(tokens)])
    remove = removable(tokens, len(kept), asked)
    found = match(keys.double(), cosine(keys.double(), guide.double()), remove, protected)
    merged, sizes = merge(states.double(), size, found)
    for row in range(3):
        parts = (keys[row].tolist(), guide[row].tolist(), states[row].tolist(), size[row].tolist())
        wanted, total = step_by_step(*parts, kept, asked)
        torch.testing.assert_close(merged[row], torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=1e-6)
        assert sizes[row].tolist() == total


def some(batch: int = 3, tokens: int = 12, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    keys = torch.randn(batch, tokens, width, dtype=torch.float64)
    protected = torch.arange(tokens) == 0
    return keys, cosine(keys, keys[:, 0]), protected


@pytest.mark.parametrize(
    ("tokens", "protected", "asked", "removed"),
    [(18, 2, 4, 4), (12, 2, 99, 5), (3, 2, 2, 0), (9, 3, 99, 3), (4, 0, 1, 1)],
)
def test_at_most_half_of_the_free_tokens_go(tokens: int, protected: int, asked: int, removed: int) -> None:
    assert removable(tokens, protected, asked) == removed


def test_a_row_is_matched_alike_alone_and_in_a_batch() -> None:
    keys, importance, protected = some()
    together = match(keys, importance, 5, protected)
    for row in range(len(keys)):
        alone = match(keys[row : row + 1], importance[row : row + 1], 5, protected)
        assert torch.equal(alone.source[0], together.source[row])
        assert torch.equal(alone.target[0], together.target[row])


def test_equal_tokens_go_in_the_order_of_their_positions() -> None:
    keys = torch.ones(1, 9, 4)
    found = match(keys, torch.zeros(1, 9), 4, torch.arange(9) == 0)
    # The last of the ranks reaches for nobody, so that it stays; all others are as near to it as to each other.
    assert found.source.tolist() == [[1, 2, 3, 4]]
    assert found.kept.tolist() == [[0, 5, 6, 7, 8]]
    assert found.target.tolist() == [[1, 1, 1, 1]]


def test_means_keep_the_sum_of_all_tokens() -> None:
    keys, importance, protected = some()
    size = torch.randint(1, 4, keys.shape[:2]).double()
    found = match(keys, importance, 5, protected, weighted=False)
    merged, sizes = merge(keys, size, found)
    torch.testing.assert_close((merged * sizes.unsqueeze(2)).sum(1), (keys * size.unsqueeze(2)).sum(1))
    assert torch.equal(sizes.sum(1), size.sum(1))
    assert torch.equal(merged[:, 0], keys[:, 0])


def test_merged_tokens_come_back_to_all_their_places() -> None:
    keys, importance, protected = some()
    found = match(keys, importance, 5, protected)
    merged, _ = merge(keys, torch.ones(keys.shape[:2]).double(), found)
    back = unmerge(merged, found)
    assert back.shape == keys.shape
    for row in range(len(keys)):
        assert torch.equal(back[row, found.kept[row]], merged[row])
        assert torch.equal(back[row, found.source[row]], merged[row, found.target[row]])


def test_empty_tokens_go_first_and_leave_no_trace() -> None:
    keys, importance, protected = some()
    empty = torch.arange(12) >= torch.tensor([[9], [6], [12]])
    found = match(keys, importance, 4, protected, empty=empty)
    size = (~empty).double()
    merged, sizes = merge(keys, size, found)
    assert found.source[0, :3].tolist() == [9, 10, 11]
    assert found.source[1].tolist() == [6, 7, 8, 9]
    assert torch.equal(merged[1, :6], keys[1, :6])
    assert sizes.sum(1).tolist() == [9, 6, 12]
    other = keys.clone()
    other[empty] = torch.randn(int(empty.sum()), keys.shape[2]).double()
    again = match(other, importance, 4, protected, empty=empty)
    assert torch.equal(again.source, found.source)
    assert torch.equal(merge(other, size, again)[0][0, :8], merged[0, :8])


def test_gradients_go_through_the_tokens_alone() -> None:
    keys, importance, protected = some()
    tokens, guides = keys.clone().requires_grad_(), keys.clone().requires_grad_()
    found = match(guides, importance, 3, protected)
    merge(tokens, torch.ones(keys.shape[:2]).double(), found)[0].sum().backward()
    assert tokens.grad is not None
    assert guides.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_decides_as_the_cpu_does() -> None:
    torch.manual_seed(1)
    keys = torch.randint(-2, 3, (8, 60, 4)).float() + 0.5  # few values, many ties
    importance = cosine(keys, keys[:, 0])
    protected = torch.arange(60) == 0
    here = match(keys.double(), importance.double(), 20, protected)
    there = match(keys.double().cuda(), importance.double().cuda(), 20, protected.cuda())
    assert torch.equal(here.kept, there.kept.cpu())
