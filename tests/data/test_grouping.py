"""Batches of conversations of similar length: nothing is left out, and little of a batch is padding."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from chat_models import llama
from upop.data.grouping import IMAGE_TOKENS, ImageTokens, LengthSampler
from upop.runs.devices import make_accelerator
from upop.runs.loaders import make_loader, set_epoch
from upop.tasks import find_task
from upop.tasks.chat import ChatSettings

BATCH = 8


def drawn() -> list[int]:
    """Lengths as conversations have them: most are short, some are very long."""
    spread = torch.randn(9003, generator=torch.Generator().manual_seed(0)) * 0.8
    return (200 * spread.exp()).clamp(8, 2048).long().tolist()


def padding(lengths: list[int], order: list[int]) -> float:
    """Return the share of all tokens that is padding, in batches of 8."""
    batches = [[lengths[n] for n in order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def test_batches_of_similar_length_have_little_padding() -> None:
    lengths = drawn()
    sampler = LengthSampler(lengths, BATCH, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1)).tolist()
    assert padding(lengths, shuffled) > 0.4
    assert padding(lengths, order) < 0.05
    # The long ones are spread over the epoch, not all at its end or its beginning.
    first, last = order[: len(order) // 2], order[len(order) // 2 :]
    means = [sum(lengths[n] for n in half) / len(half) for half in (first, last)]
    assert 0.7 < means[0] / means[1] < 1.4


def test_every_epoch_has_an_order_of_its_own_that_its_number_decides() -> None:
    lengths = drawn()
    one, other = LengthSampler(lengths, BATCH, seed=0), LengthSampler(lengths, BATCH, seed=0)
    first = list(one)
    one.set_epoch(1)
    other.set_epoch(1)
    assert list(one) == list(other) != first
    assert list(LengthSampler(lengths, BATCH, seed=1)) != first


def test_a_prepared_loader_groups_by_length_in_every_epoch(tmp_path: Path) -> None:
    model, data = llama(tmp_path / "model"), tmp_path / "rows.jsonl"
    rows = [{"question": "red " * (1 + 12 * (number % 2)), "answer": "yes"} for number in range(24)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shared: dict[str, Any] = {"hold_out": 0, "num_workers": 0, "device": "cpu", "batch_size_train": 4}
    settings = ChatSettings(pretrained=str(model), data=str(data), output_dir=tmp_path / "out", **shared)
    task: Any = find_task("chat")
    accelerator = make_accelerator(settings)
    loader: Any = accelerator.prepare(make_loader(task, settings, "train"))
    widths = []
    for epoch in range(2):
        set_epoch(loader, epoch)
        batches = [batch["attention_mask"] for batch in loader]
        assert all(bool(mask.all()) for mask in batches) and len(batches) == 6
        widths.append([mask.shape[1] for mask in batches])
    assert widths[0] != widths[1] and sorted(widths[0]) == sorted(widths[1])


def test_images_count_as_many_tokens_as_the_processor_says(tmp_path: Path) -> None:
    def patches(image_sizes: list[tuple[int, int]]) -> dict[str, list[int]]:
        return {"num_image_tokens": [height * width // 64 for height, width in image_sizes]}

    for number, size in enumerate(((80, 16), (8, 8))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"nothing")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    sized = ImageTokens(SimpleNamespace(_get_num_multimodal_tokens=patches))
    assert [sized.of([file]) for file in files] == [20, 1, IMAGE_TOKENS]
    assert sized.of(files[:2]) == 21 and sized.of([files[0].read_bytes()]) == 20
    same = ImageTokens(SimpleNamespace(_get_num_multimodal_tokens=lambda image_sizes: {"num_image_tokens": [9]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upop.data.grouping.opened", lambda *_: pytest.fail("an image is read"))
        assert same.of(files) == 27
        assert ImageTokens(object()).of(files[:1]) == IMAGE_TOKENS
