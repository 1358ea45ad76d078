"""Accuracy of a small pruned vision transformer, by method, on images that are drawn on the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gpu.sections import Measurement
from upop.distillation import distill
from upop.pruning import Pruner, count_parameters, find_groups, plan_by_magnitude, shrink

SAYS = """A vision transformer tells the kind and colour of the largest shape among others, in noise (24 classes;
images are drawn as they are needed, and none comes twice). Every method gets equally many steps under one schedule,
the search counted, and equally many parameters; accuracy on 4,096 images, in percent."""
COLOURS, KINDS = 6, 4
_SHAPES = 4


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        image: side of an image in pixels.
        width: of the transformer.
        depth: of the transformer.
        dense: training steps of the dense model.
        steps: training steps of every compression.
        batch: images per step.
        tested: images that accuracy is measured on.
        seeds: how many times everything is done.
    """

    image: int = 64
    width: int = 192
    depth: int = 6
    dense: int = 3000
    steps: int = 300
    batch: int = 256
    tested: int = 4096
    seeds: int = 3


SMALL = Size(image=16, width=24, depth=2, dense=4, steps=16, batch=4, tested=16, seeds=1)


def draw(samples: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images [samples, 3, size, size] in about [-1, 1], and the class of the largest shape in each, [samples].

    A disc, a square, a ring or a diamond in one of six colours; three smaller shapes and noise lie under it.
    """
    device = generator.device
    axis = torch.linspace(-1, 1, size, device=device)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    palette = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], device=device)
    images = 0.3 * torch.randn(samples, 3, size, size, device=device, generator=generator)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    for number in range(_SHAPES):
        kind = (drawn(samples) * KINDS).long()
        colour = (drawn(samples) * COLOURS).long()
        radius = (0.3 + 0.1 * drawn(samples, 1, 1)) if number == _SHAPES - 1 else 0.1 + 0.1 * drawn(samples, 1, 1)
        y, x = (1.2 * drawn(samples, 1, 1) - 0.6 for _ in range(2))
        down, right = (rows - y).abs() / radius, (columns - x).abs() / radius
        far = (down.square() + right.square()).sqrt()
        inside = torch.stack([far < 1, torch.maximum(down, right) < 0.86, (far < 1) & (far > 0.6), down + right < 1.2])
        mine = inside[kind, torch.arange(samples, device=device)].unsqueeze(1)
        images = torch.where(mine, 2 * palette[colour].view(-1, 3, 1, 1) - 1 + 0.1 * images, images)
    return images, kind * COLOURS + colour


class Bench:
    """One trained dense model, and the ways to compress it."""

    def __init__(self, size: Size, device: torch.device, seed: int) -> None:
        self.size, self.device, self.seed = size, device, seed
        torch.manual_seed(seed)
        heads = max(1, size.width // 32)
        made: dict[str, Any] = {"img_size": size.image, "patch_size": 8, "embed_dim": size.width, "depth": size.depth}
        self.dense: nn.Module = timm.create_model(
            "deit_tiny_patch16_224", **made, num_heads=heads, num_classes=COLOURS * KINDS
        ).to(device)
        self._train(self.dense, size.dense, 1e-3)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1000 * self.seed + stream)

    def _train(
        self,
        model: nn.Module,
        steps: int,
        rate: float,
        *,
        search: Callable[[nn.Module], Pruner] | None = None,
        taught: Any = None,
    ) -> None:
        """Train with one warm-up and one cosine over all steps; a search cuts the model when it is finished."""
        generator = self._generator(1)
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
        pruner = search(model) if search else None
        model.train()
        for number in range(steps):
            images, labels = draw(self.size.batch, self.size.image, generator)
            for group in optimizer.param_groups:
                warm = min(1.0, (number + 1) / (0.05 * steps))
                group["lr"] = rate * warm * (1 + math.cos(math.pi * number / steps)) / 2
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            if taught is not None:
                loss = loss + taught.loss()
            optimizer.zero_grad()
            loss.backward()
            if pruner is not None:
                pruner.step()
            optimizer.step()
            if pruner is not None and pruner.finished:
                pruner.shrink()
                optimizer, pruner = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05), None

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on images that no training saw, in percent."""
        generator, right = self._generator(2), 0
        model.eval()
        for _ in range(self.size.tested // self.size.batch):
            images, labels = draw(self.size.batch, self.size.image, generator)
            right += int((model(images).argmax(-1) == labels).sum())
        return 100 * right / (self.size.tested // self.size.batch * self.size.batch)

    def compress(self, method: str, ratio: float) -> dict[str, float]:
        """Compress a copy of the dense model; return its accuracy and parameters."""
        model, steps = copy.deepcopy(self.dense), self.size.steps
        if method.startswith("upop"):
            taught = distill(model, teacher=copy.deepcopy(self.dense)) if "teacher" in method else None
            search = max(16, steps // 10)
            self._train(model, steps, 5e-4, search=lambda each: Pruner(each, ratio, search), taught=taught)
            if taught is not None:
                taught.remove()
        elif method == "one first-order cut":
            self._train(model, steps, 5e-4, search=lambda each: Pruner(each, ratio, 1, correct=False))
        else:
            shrink(model, plan_by_magnitude(model, ratio))
            self._train(model, steps, 5e-4)
        return self.measured(model)

    def measured(self, model: nn.Module) -> dict[str, float]:
        """Return a model's accuracy and parameters."""
        return {"accuracy": self.accuracy(model), "parameters (k)": count_parameters(model) / 1000}


METHODS = ("upop, with teacher", "upop", "one first-order cut", "magnitude")


def accuracies(size: Size, device: torch.device) -> Iterator[Measurement]:
    """Yield, for every ratio and method, what measures it over all seeds; the dense models are trained first."""
    benches: list[Bench] = []

    def dense() -> dict[str, float]:
        benches.extend(Bench(size, device, seed) for seed in range(size.seeds))
        assert all(find_groups(bench.dense) for bench in benches)
        return _over(
            [
                {"accuracy": bench.accuracy(bench.dense)} | {"parameters (k)": count_parameters(bench.dense) / 1000}
                for bench in benches
            ]
        )

    def compressed(method: str, ratio: float) -> dict[str, float]:
        return _over([bench.compress(method, ratio) for bench in benches])

    yield {"smaller": "1x", "method": "dense"}, dense
    for ratio in (0.75, 0.5):
        for method in METHODS:
            yield (
                {"smaller": f"{1 / (1 - ratio):.0f}x", "method": method},
                partial(compressed, method, ratio),
            )


def _over(found: list[dict[str, float]]) -> dict[str, float]:
    if not found:
        raise RuntimeError("there is no dense model")
    accuracy = torch.tensor([each["accuracy"] for each in found])
    return {
        "accuracy": float(accuracy.mean()),
        "spread": float(accuracy.std()) if len(found) > 1 else 0.0,
        "seeds": len(found),
        "parameters (k)": sum(each["parameters (k)"] for each in found) / len(found),
    }
