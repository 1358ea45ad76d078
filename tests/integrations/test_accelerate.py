"""A plain loop on Accelerate, as README shows it, and torch.compile before and after the cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import upop
from integrations import ranks
from together import run_together


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Accelerate keeps the precision of the first accelerator for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_on_accelerate(classifier: Any, image_set: Any, precision: str) -> None:
    dense = upop.count_parameters(classifier)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(classifier, optimizer, DataLoader(image_set, batch_size=4))
    pruner = upop.Pruner(model, ratio=0.5, steps=3, interval=1)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                pruner.step()
            optimizer.step()
            optimizer.zero_grad()
    assert pruner.finished
    images = {"pixel_values": image_set[1]["pixel_values"].unsqueeze(0)}
    smaller = pruner.shrink(verify=images)  # in float32, though the loop computes in bfloat16
    assert smaller is accelerator.unwrap_model(model)
    assert upop.count_parameters(smaller) < 0.7 * dense
    assert ("_original_forward" in vars(smaller)) == (precision == "bf16")  # and goes on doing so


@pytest.mark.slow
def test_compiled_before_the_search_and_after_the_cut(classifier: Any, image_set: Any) -> None:
    compiled = torch.compile(classifier, backend="aot_eager")
    images = torch.stack([image_set[index]["pixel_values"] for index in range(4)])
    labels = torch.tensor([0, 1, 2, 0])
    pruner = upop.Pruner(compiled, ratio=0.5, steps=2, interval=1)
    for _ in range(2):
        compiled(pixel_values=images, labels=labels).loss.backward()
        pruner.step()
        compiled.zero_grad()
    masked = compiled.eval()(pixel_values=images).logits.detach()
    pruner.shrink(verify={"pixel_values": images})
    with torch.no_grad():
        found = compiled(pixel_values=images).logits  # the old wrapper sees the new, smaller layers
        torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()
        again = torch.compile(classifier, backend="aot_eager")(pixel_values=images).logits
        torch.testing.assert_close(again, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_on_accelerate_are_one(tmp_path: Path) -> None:
    """Each sees half of every batch; gradients are averaged before the cut and after it."""
    run_together(ranks.compress, tmp_path, processes=1)
    run_together(ranks.compress, tmp_path)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for each in two:
        assert each["plan"] == one["plan"]
        assert each["weights"].keys() == one["weights"].keys()
        for name, value in one["weights"].items():
            torch.testing.assert_close(each["weights"][name], value, rtol=1e-4, atol=1e-6)
