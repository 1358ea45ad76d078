"""BLIP for retrieval: what training does, as recorded and beyond; queues, negatives, momentum copies, re-ranking."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs
import upop
from parity.cases import Recorded, all_recorded
from together import run_script
from upop.errors import SettingError
from upop.models import contrast
from upop.models.contrast import NO_ID, draw_negatives, draw_noise
from upop.models.rerank import candidates, match_pairs
from upop.models.retrieval import BlipRetrieval, RetrievalConfig

RECORDED = [found for found in all_recorded() if found.task == "retrieval"]
SIZES = {
    **runs.TOWERS,
    "image_size": 32,
    "vocab_size": 60,
    "max_positions": 16,
    "embed_dim": 12,
    "queue_size": 10,
}


def tiny(seed: int = 0, **sizes: Any) -> BlipRetrieval:
    """A small model with random biases and norms, and momentum copies of their own."""
    torch.manual_seed(seed)
    model = BlipRetrieval(RetrievalConfig(**{**SIZES, **sizes}))
    for name, parameter in model.named_parameters():
        if name != "temp":
            nn.init.normal_(parameter, mean=1.0 if "norm" in name.lower() and "weight" in name else 0.0, std=0.15)
    return model


def pairs(count: int, ids: list[int] | None = None, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 50, (count, 7), generator=draw)
    mask = torch.ones_like(words)
    mask[::2, 5:] = 0
    numbers = torch.arange(count) if ids is None else torch.tensor(ids)
    images = torch.randn(count, 3, 32, 32, generator=draw)
    return {"images": images, "input_ids": words, "attention_mask": mask, "ids": numbers}


def queues(model: BlipRetrieval) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "queue" in name}


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda found: found.folder.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_recorded_training_pass(recorded: Recorded, dtype: torch.dtype, tolerance: float) -> None:
    expected = recorded.read("dense_out")
    prefix = "f64/train/" if dtype == torch.float64 else "f32/train/"
    model = recorded.load("dense.pth").to(dtype).train()
    batch = {**recorded.batch(0, dtype), "alpha": recorded.config["distill_alpha"], "draws": expected[f"{prefix}draws"]}
    losses = model(**batch)
    assert isinstance(model, BlipRetrieval)
    found = {
        "loss_ita": losses.contrastive,
        "loss_itm": losses.matching,
        "after_image_queue": model.image_queue,
        "after_text_queue": model.text_queue,
        "after_temp": model.temp,
        "after_idx_queue": model.idx_queue,
        "after_ptr": model.ptr_queue,
    }
    assert {f"{prefix}{name}" for name in found} | {f"{prefix}draws"} == {k for k in expected if k.startswith(prefix)}
    for name, value in found.items():
        torch.testing.assert_close(
            value.detach(), expected[f"{prefix}{name}"], rtol=tolerance, atol=tolerance, msg=name
        )


def test_evaluation_changes_nothing() -> None:
    model = tiny().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**pairs(4), alpha=0.4)
    model(**{name: part for name, part in pairs(4).items() if name != "ids"})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_comparison_is_that_of_single_pairs() -> None:
    model = tiny().eval()
    batch = pairs(3)
    texts = {name: part[:2] for name, part in batch.items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model(batch["images"], **texts)
        assert found.logits.shape == (3, 2, 2)
        for image in range(3):
            for text in range(2):
                one = {name: part[text : text + 1] for name, part in texts.items()}
                single = model(batch["images"][image : image + 1], **one)
                torch.testing.assert_close(found.logits[image, text], single.logits[0, 0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found.image_features[image], single.image_features[0])


def test_padding_makes_no_difference() -> None:
    model = tiny().eval()
    batch = pairs(2)
    del batch["ids"]
    longer = {name: F.pad(part, (0, 4)) if name != "images" else part for name, part in batch.items()}
    with torch.no_grad():
        for short, long in zip(model(**batch), model(**longer), strict=True):
            torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)


# --- queues and momentum copies


def test_queue_takes_batches_that_do_not_divide_it() -> None:
    model = tiny().train()  # room for 10
    for step in range(3):
        model(**pairs(4, ids=[10 * step + number for number in range(4)], seed=step))
    # The third batch went on at the front, over the oldest ones.
    assert model.idx_queue[0].tolist() == [22, 23, 2, 3, 10, 11, 12, 13, 20, 21]
    assert model.ptr_queue.tolist() == [2]


def test_queue_holds_the_momentum_features() -> None:
    model = tiny().train()
    batch = pairs(4)
    model(**batch)
    with torch.no_grad():
        image = model.encode_image(batch["images"], momentum=True)[1]
        text = model.encode_text(batch["input_ids"], batch["attention_mask"], momentum=True)[1]
    torch.testing.assert_close(model.image_queue[:, :4], image.t())
    torch.testing.assert_close(model.text_queue[:, :4], text.t())
    assert model.idx_queue[0, 4:].eq(NO_ID).all()


def test_queue_smaller_than_the_batch_is_refused() -> None:
    with pytest.raises(SettingError, match=r"queue_size is 10.*12 samples.*Set queue_size to 12"):
        tiny().train()(**pairs(12))


def test_remade_queues_are_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny()
    model.remake_queues(6)
    assert model.image_queue.shape == (12, 6)
    assert model.idx_queue.eq(NO_ID).all()
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(6))
    upop.save(model, tmp_path / "saved")
    again = upop.load(tmp_path / "saved")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_momentum_copies_follow_slowly() -> None:
    model = tiny(momentum=0.75).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(**pairs(4))
    for name, copy_name in (("visual_encoder.norm.bias", "visual_encoder_m.norm.bias"), ("text_proj.weight",) * 2):
        copy_name = copy_name.replace("text_proj.", "text_proj_m.")
        expected = 0.75 * before[copy_name] + 0.25 * before[name]
        torch.testing.assert_close(model.get_parameter(copy_name).detach(), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not {name for name in trained if name.split(".")[0].endswith("_m")}
    assert len({name for name, _ in model.named_parameters()} - trained) == len(trained) - 3  # temp and itm_head


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = tiny().train()
    sum(model(**pairs(4), alpha=0.4)).backward()
    assert not [name for name, part in model.named_parameters() if part.requires_grad and part.grad is None]


def test_temperature_is_kept_in_its_range() -> None:
    for value, kept in ((0.9, 0.5), (1e-5, 1e-3), (0.07, 0.07)):
        model = tiny().train()
        model.temp.data.fill_(value)
        model(**pairs(4))
        assert float(model.temp.detach()) == pytest.approx(kept)


def test_captions_of_one_image_are_all_right_answers() -> None:
    """With targets that count only the pair itself, the loss would be another."""
    model = tiny().train()
    batch = pairs(4, ids=[5, 5, 6, 7])
    with torch.no_grad():
        model.update_momentum(model.config.momentum)  # as the pass does
        image, text = model.encode_image(batch["images"])[1], model.encode_text(*_words(batch))[1]
        image_m = model.encode_image(batch["images"], momentum=True)[1]
        text_m = model.encode_text(*_words(batch), momentum=True)[1]
        targets = torch.zeros(4, 14)
        targets[:2, :2] = 0.5
        targets[2, 2] = targets[3, 3] = 1
        expected = [
            -(targets * F.log_softmax(query @ torch.cat([keys.t(), queue], 1) / 0.07, 1)).sum(1).mean()
            for query, keys, queue in ((image, text_m, model.text_queue), (text, image_m, model.image_queue))
        ]
        found = model.contrastive_loss(image, text, image_m, text_m, batch["ids"], 0.0, 1 / model.temp)
    torch.testing.assert_close(found, sum(expected) / 2)


def _words(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"]


# --- hard negatives


def test_drawn_partners_are_wrong_and_follow_the_similarities() -> None:
    logits = torch.tensor([[9.0, 2.0, 1.0, 0.0]]).repeat(20000, 1)
    same = torch.tensor([[True, False, False, False]]).repeat(20000, 1)
    drawn, paired = draw_negatives(logits, same, 1 - torch.rand(20000, 4))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert paired.all()
    assert shares[0] == 0
    torch.testing.assert_close(shares[1:], torch.softmax(logits[0, 1:], 0), rtol=0, atol=0.02)


def test_a_partner_is_found_where_the_softmax_underflows() -> None:
    """At temperature 0.001 the weights of all wrong ones are exactly 0, which crashes the published draw."""
    logits = torch.tensor([[1000.0, -1000.0, -990.0]])
    assert torch.softmax(logits, 1)[0, 1:].eq(0).all()
    drawn, paired = draw_negatives(logits, torch.tensor([[True, False, False]]), 1 - torch.rand(1, 3))
    assert drawn.item() == 2
    assert paired.all()


@pytest.mark.parametrize("ids", [[3], [3, 3, 3]], ids=["batch of one", "one image alone"])
def test_a_batch_without_hard_negatives_adds_no_matching_loss_and_says_so_once(ids: list[int]) -> None:
    model = tiny().train()
    with pytest.warns(UserWarning, match="no hard negative"):
        losses = model(**pairs(len(ids), ids=ids))
    assert float(losses.matching.detach()) == 0
    sum(losses).backward()
    assert model.itm_head.weight.grad is not None
    assert model.visual_encoder.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**pairs(len(ids), ids=ids))


def test_only_the_pairs_without_hard_negatives_are_left_out() -> None:
    """Pairs with draws of their own count as ever; a matching loss of all would differ."""
    model = tiny().train()
    batch = pairs(3)
    draws = torch.tensor([1, 2, 0, 2, 0, 1])
    whole = model.eval()(**batch, draws=draws).matching
    states = model.encode_image(batch["images"])[0]
    logits = torch.cat(
        [
            model.match(states, *_words(batch)),
            model.match(states[draws[:3]], *_words(batch)),
            model.match(states, *(part[draws[3:]] for part in _words(batch))),
        ]
    )
    labels = torch.tensor([1] * 3 + [0] * 6)
    torch.testing.assert_close(whole, F.cross_entropy(logits, labels))


def test_noise_is_the_same_for_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    alone = draw_noise(6, 6, torch.device("cpu"))
    assert alone.min() > 0
    parts = []
    for rank in range(2):
        monkeypatch.setattr(contrast, "processes", lambda: 2)
        monkeypatch.setattr(contrast, "rank", lambda rank=rank: rank)
        torch.manual_seed(5)
        parts.append(draw_noise(3, 6, torch.device("cpu")))
    assert torch.equal(torch.cat(parts, 1), alone)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Two gloo processes train three steps: losses, hard negatives, queues and weights are those of one process."""
    script = Path(__file__).with_name("retrieval_ranks.py")
    for processes in (1, 2):
        run_script(script, tmp_path / f"{processes}.pt", processes=processes)
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert one["drawn"].shape == (3, 2, 6)
    assert torch.equal(one["drawn"], two["drawn"])
    assert (one["drawn"][:, :, :3] >= 3).any()  # from the other process's half
    assert set(one["state"]) == set(two["state"])
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-9, atol=1e-9)


# --- pruning


def test_momentum_copies_are_cut_from_their_own_weights(tmp_path: Path) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = upop.find_groups(model)
    assert len(groups) == 2 * 2 + 2 * 3
    assert not [group.name for group in groups if group.name.split(".")[0].endswith("_m")]
    plan = {group.name: list(range(1, 1 + group.size // 2)) for group in groups}
    batch = {name: part for name, part in pairs(2).items() if name != "ids"}
    upop.shrink(model, plan, verify=batch)
    for tower in ("visual_encoder", "visual_encoder_m"):
        name = f"{tower}.blocks.0.mlp.fc1.weight"
        torch.testing.assert_close(model.state_dict()[name], before[name][1:25])
    for tower in ("text_encoder", "text_encoder_m"):
        name = f"{tower}.encoder.layer.1.crossattention.self.key.weight"
        kept = [head * 16 + channel for head in range(2) for channel in range(1, 9)]
        torch.testing.assert_close(model.state_dict()[name], before[name][kept])
    assert not any(copy.requires_grad for _, copy in model.momentum_pairs())
    assert [online.shape for online, _ in model.momentum_pairs()] == [copy.shape for _, copy in model.momentum_pairs()]
    upop.save(model, tmp_path / "small")
    again = upop.load(tmp_path / "small")
    assert isinstance(again, BlipRetrieval)
    first, second = (kind.train()(**pairs(4), draws=torch.tensor([1, 2, 3, 0] * 2)) for kind in (model, again))
    torch.testing.assert_close(tuple(first), tuple(second))


# --- re-ranking


def naive(model: BlipRetrieval, states: Tensor, words: tuple[Tensor, Tensor], images: Tensor, texts: Tensor) -> Tensor:
    """One pair at a time."""
    logits = [
        model.match(states[image : image + 1], *(part[text : text + 1] for part in words))[0, 1]
        for image, text in zip(images.tolist(), texts.tolist(), strict=True)
    ]
    return torch.stack(logits)


@pytest.mark.parametrize("batch", [1, 3, 8, 256])
def test_pairs_in_batches_are_single_pairs(batch: int) -> None:
    model = tiny().eval()
    data = pairs(9)
    lengths = torch.tensor([7, 3, 5, 7, 2, 4, 7, 6, 3])
    words = data["input_ids"], (torch.arange(7) < lengths.unsqueeze(1)).long()
    # Images with one, some and all of the texts, in no order, and one without any.
    chosen = [(0, text) for text in range(9)] + [(3, 4)] + [(5, text) for text in (8, 1, 2)] + [(2, 2), (2, 7)]
    images, texts = torch.tensor(chosen)[torch.randperm(len(chosen))].t()
    sizes: list[int] = []

    def counted(states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        sizes.append(len(input_ids))
        return model.match(states, input_ids, attention_mask)

    with torch.no_grad():
        states = model.encode_image(data["images"])[0]
        found = match_pairs(counted, states, *words, images, texts, batch=batch)
        torch.testing.assert_close(found, naive(model, states, words, images, texts), rtol=1e-5, atol=1e-5)
    assert max(sizes) <= batch


def test_no_pairs_give_no_logits() -> None:
    model = tiny().eval()
    nothing = torch.empty(0, dtype=torch.long)
    assert match_pairs(model.match, torch.empty(0, 5, 24), *_words(pairs(2)), nothing, nothing, batch=4).shape == (0,)


def test_candidates_are_the_most_similar_and_never_more_than_there_are() -> None:
    queries, keys = torch.randn(3000, 4), torch.randn(7, 4)
    numbers, scores = candidates(queries, keys, 3)
    torch.testing.assert_close(scores, (queries @ keys.t()).sort(1, descending=True).values[:, :3])
    torch.testing.assert_close((queries @ keys.t()).gather(1, numbers), scores)
    assert candidates(queries, keys, 100)[0].shape == (3000, 7)
