"""What a cut without training and the correction hold at once, and that holding less changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import upop
from tiers import mostly_slow
from upop.errors import SettingError, StepError
from upop.pruning import dense, moments, recompute
from upop.pruning.scores import signed

WORDS = 40


def decoder() -> LlamaForCausalLM:
    """A decoder that keeps keys and values for the next token unless it is told not to."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=WORDS))


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    ids = [torch.randint(WORDS, (4, 9), generator=draws) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def calibrated(model: nn.Module, **settings: Any) -> upop.Plan:
    return upop.calibrate(model, batches(), 0.4, stages=2, **settings)


def same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerance)


def test_gradients_are_freed_one_by_one_and_scores_are_those_of_whole_gradients() -> None:
    """A score of one's own sees each weight once with the gradient that a backward pass leaves in the end."""
    model, held = decoder(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(each.grad is not None for each in model.parameters()))
        )
    seen: list[tuple[Tensor, Tensor]] = []

    def importance(weight: Tensor, gradient: Tensor) -> Tensor:
        seen.append((weight.clone(), gradient.clone()))
        return signed(weight, gradient)

    reference = copy.deepcopy(model)
    upop.calibrate(model, batches(1), 0.4, stages=1, importance=importance)
    assert max(held) == 1
    assert len(held) == len(seen)  # of the weights that could go; nothing else got a gradient
    reference(**batches(1)[0]).loss.backward()
    whole = [each for each in reference.parameters() if each.grad is not None]
    for weight, gradient in seen:
        fitting = [each for each in whole if each.shape == weight.shape and torch.equal(each, weight)]
        assert any(torch.equal(each.grad, gradient) for each in fitting)


def test_activations_that_are_computed_again_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, plans, models = [], [], []
    for most in (recompute._SMALL, 0):
        monkeypatch.setattr(recompute, "_SMALL", most)
        model, calls = decoder(), []
        # The first layer tells how much is kept; the last one is run again.
        model.model.layers[-1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        plans.append(calibrated(model, correct=False, verify=False))
        runs.append(len(calls))
        models.append(model)
        assert model.config.use_cache is True
        assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert runs[1] > runs[0]
    assert plans[0] == plans[1]
    same(*models)


class Counting(nn.Module):
    """A layer that keeps something between calls, and gives something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        return inputs + self.down(torch.relu(self.up(inputs))) * (1 + self.calls)


class Stack(nn.Module):
    """Layers in a row; `again` is how torch computes them again by itself: None does not."""

    def __init__(self, layer: type[nn.Module], again: bool | None = None, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = layer()
        self.layers = nn.ModuleList([first, first if shared else layer(), first if shared else layer()])
        self.into, self.again = nn.Linear(8, 8), again

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.into(inputs)
        for layer in self.layers:
            plain = self.again is None or not torch.is_grad_enabled()
            states = layer(states) if plain else checkpoint(layer, states, use_reentrant=self.again)
        return states


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = inputs + self.down(torch.relu(self.up(inputs)))
        return states


def rows() -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, generator=draws) for _ in range(2)]


def test_a_layer_that_cannot_be_run_again_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_SMALL", 0)
    model = Stack(Counting)
    assert len(upop.calibrate(model, rows(), 0.4, stages=1, example=rows()[0], verify=False)) == 3


@pytest.mark.filterwarnings("ignore:The correction changed nothing")
@pytest.mark.parametrize("shared", mostly_slow([False, True], False))
def test_checkpoints_of_ones_own_of_either_kind_give_the_same(shared: bool) -> None:
    """Old ones take no list of inputs; a layer that is shared gets its gradient in several parts from them."""
    models = [Stack(Block, again, shared) for again in (None, False, True)]
    squares = lambda weight, gradient: (weight * gradient).square().sum(1)  # noqa: E731  # not that of parts, added up
    plans = [upop.calibrate(each, rows(), 0.4, stages=1, example=rows()[0], importance=squares) for each in models]
    assert plans[0] == plans[1] == plans[2]
    assert sum(map(len, plans[0].values())) < sum(
        group.size for group in upop.find_groups(Stack(Block, None, shared), rows()[0])
    )


@pytest.mark.parametrize("search", mostly_slow([False, True], False))
def test_a_few_layers_at_a_time_are_corrected_as_all_at_once(search: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_SMALL", 0)
    monkeypatch.setattr(moments, "_SHARE", 10**9)
    models, runs = [], []
    for correct in (True, "auto"):
        model = decoder().double()
        calls: list[int] = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        if search:
            pruner = upop.Pruner(model, 0.4, 4, 2, correct=correct)
            for batch in batches(4):
                model.zero_grad()
                model(**batch).loss.backward()
                pruner.step()
            assert any(left < 1 for left in pruner.corrections.values())
            pruner.remove()
        else:
            calibrated(model, correct=correct)
        models.append(model)
        runs.append(len(calls))
    assert runs[1] > runs[0]
    same(*models, rtol=1e-7, atol=1e-9)


def test_what_is_neither_yes_nor_no_nor_auto_is_refused() -> None:
    with pytest.raises(SettingError, match="correct is True, False or \"auto\"; found 'never'"):
        upop.Pruner(decoder(), 0.5, 4, correct="never")  # type: ignore[arg-type]


def test_a_large_model_is_put_back_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_SMALL", 0)
    model, calls = decoder(), []
    before = copy.deepcopy(model.state_dict())

    def failing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(0)
        loss: Tensor = model(**batch).loss
        return loss * (float("nan") if len(calls) == 9 else 1)

    with pytest.raises(StepError, match="is not finite"):
        upop.calibrate(model, batches(), 0.4, stages=3, loss=failing)
    assert len(calls) >= 9
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    calibrated(model)
