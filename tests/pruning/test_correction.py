"""The correction of layers that read what goes: never worse on samples that it did not see, however few it saw."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import upop
from pruning.families import loss_of
from tiers import mostly_slow
from upop.pruning.correction import RIDGES

WIDTH, HIDDEN, WORDS = 16, 96, 60
MLP = "encoder.layer.0.intermediate"

Cut = tuple[nn.Module, upop.Plan]


def encoder(dropout: float = 0.0) -> nn.Module:
    """A BERT whose hidden neurons are many beside its width, so that they resemble each other as in trained models."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": HIDDEN}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = BertModel(BertConfig(vocab_size=WORDS, **sizes, **drops), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def sentences(count: int, seed: int, length: int = 6) -> dict[str, Tensor]:
    """Sentences of few different words each, so that their tokens resemble each other, and padding behind them."""
    draws = torch.Generator().manual_seed(seed)
    own = torch.randint(1, WORDS, (count, 2), generator=draws)
    ids = own.gather(1, torch.randint(2, (count, length), generator=draws))
    lengths = torch.randint(2, length + 1, (count, 1), generator=draws)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    states = model(**batch).last_hidden_state
    return loss_of((states * batch["attention_mask"].unsqueeze(-1)).sum(1))


def pairs(model: nn.Module, dense: nn.Module, reader: str, batch: dict[str, Tensor], columns: Tensor) -> list[Tensor]:
    """What a layer of the dense model gives, and what that of `model` makes of the `columns` of the same inputs."""
    seen: list[Tensor] = []
    hook = dense.get_submodule(reader).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        dense.eval()(**batch)
        hook.remove()
        inputs = seen[0][batch["attention_mask"].bool()]
        new, old = model.get_submodule(reader), dense.get_submodule(reader)
        return [old(inputs), nn.functional.linear(inputs[:, columns], new.weight, new.bias)]


def off(model: nn.Module, plan: upop.Plan, dense: nn.Module, group: upop.Group, batch: dict[str, Tensor]) -> float:
    """Mean square of what a cut group's reader is off, on what it is given in the dense model, not rotated."""
    part = group.online[-1]
    columns = part.index(torch.tensor(plan[group.name]), group.size)
    wanted, found = pairs(model, dense, part.tensor.removesuffix(".weight"), batch, columns)
    return float((wanted - found).square().mean())


def calibrated(dense: nn.Module, group: str, batches: list[dict[str, Tensor]], **settings: Any) -> Cut:
    model = copy.deepcopy(dense)
    plan = upop.calibrate(model, batches, 0.5, loss=loss, stages=1, include=group, rotate=False, **settings)
    return model, plan


def searched(dense: nn.Module, group: str, batches: list[dict[str, Tensor]], **settings: Any) -> Cut:
    model = copy.deepcopy(dense)
    pruner = upop.Pruner(model, 0.5, len(batches), len(batches), include=group, rotate=False, **settings)
    take(model, pruner, batches)
    return pruner.shrink(), pruner.plan()


def take(model: nn.Module, pruner: upop.Pruner, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        pruner.step()


@pytest.mark.filterwarnings("ignore:The correction changed nothing")
@pytest.mark.parametrize(
    ("count", "cut"),
    mostly_slow(itertools.product([1, 2, 4, 8], [calibrated, searched]), (1, searched), (4, calibrated)),
)
def test_with_fewer_tokens_than_inputs_it_never_hurts(count: int, cut: Callable[..., Cut]) -> None:
    dense, held_out = encoder(), sentences(200, seed=99)
    batches = [sentences(count, seed=seed) for seed in range(2)]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) < HIDDEN
    for group in upop.find_groups(dense):
        errors = [
            off(*cut(dense, group.name, batches, correct=correct), dense, group, held_out) for correct in (True, False)
        ]
        assert errors[0] <= errors[1] * 1.000001, group.name


@pytest.mark.filterwarnings("ignore:The correction changed nothing")
@pytest.mark.parametrize(
    ("count", "weak_hurts", "helps"),
    mostly_slow([(1, True, False), (2, True, True), (32, False, True)], (2, True, True)),
)
def test_how_strongly_it_holds_to_the_old_weights_follows_from_the_data(
    count: int, weak_hurts: bool, helps: bool
) -> None:
    """A ridge of 1e-3 for all layers, which was the default once, fits noise where little was seen."""
    dense, held_out, name = encoder(), sentences(200, seed=99), "encoder.layer.1.attention.self"
    group = next(group for group in upop.find_groups(dense) if group.name == name)
    batches = [sentences(count, seed=seed) for seed in range(2)]
    settings: list[dict[str, Any]] = [{"ridge": 1e-3}, {}, {"correct": False}]
    weak, chosen, nothing = (
        off(*calibrated(dense, name, batches, **each), dense, group, held_out) for each in settings
    )
    assert (weak > 1.2 * nothing) is weak_hurts
    assert (chosen < 0.5 * nothing) is helps
    assert chosen < weak or not weak_hurts


def kept_outputs(seen: list[tuple[Tensor, Tensor]], batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What a layer was given and what it gave, of the tokens that are no padding, [tokens, ...]."""
    masks = [batch["attention_mask"].bool() for batch in batches]
    rows, outputs = zip(*((one[mask], two[mask]) for (one, two), mask in zip(seen, masks, strict=True)), strict=True)
    return torch.cat(rows), torch.cat(outputs)


def test_it_looks_at_the_model_without_dropout_and_padding_and_leaves_no_trace() -> None:
    """What a layer is given in evaluation mode, of the tokens that count, is what it is corrected for."""
    model, batches = encoder(dropout=0.3), [sentences(4, seed=seed) for seed in range(3)]
    name = f"{MLP.rpartition('.')[0]}.output.dense"
    drawn, old = [], model.get_submodule(name).weight.detach().clone()
    for correct in ("auto", True, False):
        twin = copy.deepcopy(model).train()
        twin.register_buffer("calls", torch.zeros(()))
        pruner = upop.Pruner(twin, 0.5, 3, 3, correct=correct, include=MLP)
        reader = twin.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        hook = reader.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output.detach())))
        twin.register_forward_pre_hook(lambda module, _: setattr(module, "calls", module.calls + 1))
        torch.manual_seed(1)
        take(twin, pruner, batches)
        drawn.append(torch.rand(1))
        hook.remove()
        assert all(module.training for module in twin.modules())
        assert twin.calls == len(batches)
        change, moved = reader.weight.detach() - old, pruner.masks[MLP] == 0
        if correct:
            with torch.no_grad():  # only the layer itself was changed, which is looked at by what it is given
                expected = [copy.deepcopy(model).eval() for _ in batches]
                clean: list[tuple[Tensor, Tensor]] = []
                for each, given in zip(expected, batches, strict=True):
                    each.get_submodule(name).register_forward_hook(
                        lambda _, args, output, clean=clean: clean.append((args[0], output))
                    )
                    each(**given)
            (rows, outputs), (_, noisy) = kept_outputs(clean, batches), kept_outputs(seen[:1], batches[:1])
            usual = noisy.square().sum(1).log().mean().exp()
            weights = (usual / outputs.square().sum(1)).clamp_max(1).sqrt().unsqueeze(1)
            rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).double() * weights
            stays = torch.cat([~moved, torch.tensor([True])]).nonzero().flatten()
            ours, aim = rows[:, stays], rows[:, :-1][:, moved] @ old.double()[:, moved].t()
            force = (
                ours[:, :-1].square().sum(0).mean() * torch.cat([torch.ones(len(stays) - 1), torch.zeros(1)])
            ).double()
            found = [torch.linalg.solve(ours.t() @ ours + (r * force).diag(), ours.t() @ aim)[:-1].t() for r in RIDGES]
            assert any(torch.allclose(change[:, ~moved], each.float(), rtol=1e-3, atol=1e-4) for each in found)
            assert change.abs().max() > 1e-2
        else:
            assert not change.any()
        pruner.remove()
        assert not any(layer._forward_hooks for layer in twin.modules())
    assert drawn[0] == drawn[1] == drawn[2]


def test_it_says_when_nothing_could_be_corrected() -> None:
    """One batch alone tells nothing of others."""
    model = encoder()
    pruner = upop.Pruner(model, 0.5, 8, 8, rotate=False)
    before = copy.deepcopy(model.state_dict())
    assert not pruner.corrections
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(7):
            pruner.skip()
        take(model, pruner, [sentences(4, seed=0)])
    (described,) = [each for each in caught if "correction" in str(each.message)]
    assert str(described.message).startswith("The correction changed nothing")
    assert "Search over more steps" in str(described.message)
    assert described.filename == __file__
    assert set(pruner.corrections.values()) == {1.0}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["one buffer", "two buffers"])
def test_buffers_that_a_training_writes_to_again_are_no_loss(way: str) -> None:
    """One that is the same all along is kept from the first step on; of two in turn a stage may lose some."""
    found = []
    for buffers in (None, [sentences(4, seed=0) for _ in range(1 + (way == "two buffers"))]):
        model = encoder()
        pruner = upop.Pruner(model, 0.5, 8, 4)
        for step in range(8):
            given = sentences(4, seed=step)
            if buffers:
                held = buffers[step % len(buffers)]
                for name, value in given.items():
                    held[name].copy_(value)
                given = held
            take(model, pruner, [given])
        found.append((pruner.corrections, model.state_dict()))
    assert found[0][0].keys() == found[1][0].keys() and min(found[1][0].values()) < 1
    if way == "one buffer":
        assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_a_loss_to_buffers_is_named() -> None:
    model, held = encoder(), [sentences(4, seed=seed) for seed in range(4)]
    pruner = upop.Pruner(model, 0.5, 8, 8)
    with pytest.warns(UserWarning, match="changed nothing.*batches.*tensors"):
        for step in range(8):
            model.zero_grad()
            loss = model(**held[step % 4]).last_hidden_state.square().mean()
            loss.backward()
            if step == 7:  # all but the first were given as they are
                for each in held:
                    each["input_ids"].copy_(each["input_ids"].flip(0))
            pruner.step()


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_a_model_that_is_converted_within_a_stage_is_corrected(precision: torch.dtype) -> None:
    model = encoder()
    pruner = upop.Pruner(model, 0.5, 4, 4, include=MLP)
    states = torch.randn(4, 8, 24, WIDTH, generator=torch.Generator().manual_seed(0))
    for step, given in enumerate(states):
        if step == 2:
            model.to(precision)
        model.zero_grad()
        model(inputs_embeds=given.to(model.dtype)).last_hidden_state[:, 0].square().sum().backward()
        pruner.step()
    assert pruner.corrections[MLP] < 1
    assert next(pruner.shrink().parameters()).dtype == precision


def test_a_model_that_runs_in_training_mode_alone_is_corrected() -> None:
    class OnlyTrained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            if not self.training:
                raise KeyError("targets")
            return loss(self.encoder, batch)

    model = OnlyTrained().train()
    pruner = upop.Pruner(model, 0.5, 2, 2, include=f"encoder.{MLP}")
    for seed in range(2):
        model.zero_grad()
        model(sentences(16, seed=seed)).backward()
        pruner.step()
    assert pruner.corrections[f"encoder.{MLP}"] < 1
    pruner.shrink()
