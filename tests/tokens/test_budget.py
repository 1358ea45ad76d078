"""One budget for tokens and weights: it is kept, shared by measured loss, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs
import upop
from tiers import mostly_slow
from upop.errors import SettingError
from upop.runs.tokens import check_shared_budget, share_budget
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.settings import read_settings
from upop.tasks import find_task
from upop.tokens.budget import Candidate
from upop.tokens.encoders import removed_tokens

Batch = tuple[Tensor, Tensor]


def dense() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def batches(count: int = 4) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(2, 3, 64, 64), torch.randint(5, (2,))) for _ in range(count)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_a_budget_is_kept_by_fewer_tokens_and_weights_and_the_lowest_loss_decides(tmp_path: Path) -> None:
    model, image = dense(), batches()[0][0]
    before = upop.count_macs(model, image)
    shared = upop.calibrate_with_tokens(model, batches(), {"macs": 0.5}, loss=loss, shares=(0.0, 0.6))
    assert [each.share for each in shared.candidates] == [0.0, 0.6]
    assert not any(shared.candidates[0].removed[0])
    assert shared.chosen.loss == min(each.loss for each in shared.candidates if each.loss is not None)
    assert upop.count_macs(model, image) / before == pytest.approx(0.5, abs=0.01)
    merging = [each for each in (removed_tokens(model) or []) if any(each)]
    assert merging == [each for each in shared.chosen.removed if any(each)]
    with torch.no_grad():
        torch.testing.assert_close(upop.load(upop.save(model, tmp_path / "half"))(image), model(image))


def test_tokens_take_what_hurts_less_by_them() -> None:
    """Images of equal patches have nothing to lose in tokens, where weights have."""
    model = dense()
    model.pos_embed.data[:, 1:] = model.pos_embed.data[:, 1:2]  # type: ignore[union-attr, index]
    flat = [(torch.randn(2, 3, 1, 1).expand(2, 3, 64, 64), each[1]) for each in batches()]
    with torch.no_grad():
        wanted = model(flat[0][0])
    shared = upop.calibrate_with_tokens(model, [each[0] for each in flat], {"macs": 0.7}, shares=(0.0, 1.0))
    assert (shared.chosen.share, shared.plan) == (1.0, None)
    with torch.no_grad():
        torch.testing.assert_close(model(flat[0][0]), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("target", "given", "described"),
    [
        ({"params": 0.5}, {}, "does not limit them"),
        ({"macs": 0.01}, {"shares": (1.0,)}, "cannot be reached"),
        ({"macs": 0.5}, {"shares": (2.0,)}, "from 0 to 1"),
        ({"macs": 0.5}, {"count": 1}, "held_out"),
        ({"macs": 0.5}, {"shares": ()}, "must be a list of numbers"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused_and_change_nothing(
    target: Any, given: dict[str, Any], described: str
) -> None:
    model = dense()
    before = model.state_dict()
    count = given.pop("count", 4)
    with pytest.raises(SettingError, match=described):
        upop.calibrate_with_tokens(model, batches(count), target, loss=loss, **given)
    assert removed_tokens(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_merges_already_has_no_budget_to_share() -> None:
    model = upop.merge_tokens(dense(), 4)
    with pytest.raises(SettingError, match=r"merges tokens already.*Remove merging first"):
        upop.calibrate_with_tokens(model, batches(), {"macs": 0.5}, loss=loss)
    assert removed_tokens(model) == [[4, 4]]


class Given:
    """What a run's settings say of its budget."""

    def __init__(self, tokens: Any, target: Any) -> None:
        self.tokens, self.target, self.budget = tokens, target, {"target": target}


@pytest.mark.parametrize("tokens", [4, "auto"])
def test_a_budget_out_of_reach_is_refused_before_anything_runs(tokens: Any) -> None:
    model, image = dense(), batches()[0][0]
    check: Any = check_shared_budget
    check(model, Given(tokens, {"macs": 0.6}), image)
    with pytest.raises(SettingError, match=r"target params=0.001 cannot be reached"):
        check(model, Given(tokens, {"macs": 0.6, "params": 0.001}), image)
    assert removed_tokens(model) is None


def test_the_first_process_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Candidate(0.5, [[7, 7]], 3_000_000, 0.1)  # what it sends
    monkeypatch.setattr("upop.runs.tokens._SHARES", (0.5,))
    monkeypatch.setattr("upop.runs.tokens.broadcast_object_list", lambda sent: sent.__setitem__(0, other))
    model, share = dense(), cast("Any", share_budget)
    notes: list[str] = []
    share(model, Given("auto", {"macs": 0.6}), batches()[0][0], batches, loss, notes.append)
    assert removed_tokens(model) == [[7, 7]]
    assert "token merging saves 50%" in notes[0]


@pytest.mark.parametrize("name", mostly_slow(["caption", "nlvr", "retrieval", "segmentation", "vqa"], "segmentation"))
def test_a_task_is_compressed_and_evaluated_with_fewer_tokens(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    model = {**runs.TINY[name]["model"], "patch_size": 8}
    config = runs.make_task(name, tmp_path, model=model, examples=0, epochs=2)

    def settings(**given: Any) -> Any:
        return read_settings(task.settings, config, given)

    results = compress(task, settings(tokens=[3, 2], target="macs=0.6", output_dir=tmp_path / "out"))
    assert results is not None
    first, second = results.models
    assert second.gmacs / first.gmacs == pytest.approx(0.6, abs=0.01)
    assert removed_tokens(upop.load(tmp_path / "out" / "best")) == [[3, 2]]
    again = evaluate_checkpoint(
        task, settings(pretrained=str(tmp_path / "out" / "best"), output_dir=tmp_path / "again")
    )
    assert again is not None
    assert again.models[0].gmacs == second.gmacs
    assert again.models[0].metrics == second.metrics


@pytest.mark.slow
def test_a_task_shares_its_budget_by_itself(tmp_path: Path) -> None:
    task = find_task("classification")
    config = runs.make_task("classification", tmp_path, examples=0, epochs=2)
    settings = read_settings(
        task.settings, config, {"tokens": "auto", "target": "macs=0.6", "output_dir": tmp_path / "out"}
    )
    results = compress(task, settings)
    assert results is not None
    assert results.models[1].gmacs / results.models[0].gmacs == pytest.approx(0.6, abs=0.01)
    with pytest.raises(SettingError, match="nothing is compressed"):
        evaluate_checkpoint(task, settings)
    with pytest.raises(SettingError, match=r"tokens: auto.*macs"):
        read_settings(task.settings, config, {"tokens": "auto"})
