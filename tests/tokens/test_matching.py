"""Matching and merging by themselves: what holds for any tokens. What was published is compared in tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from upop.tokens.matching import cosine, match, merge, removable, unmerge


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
