"""Five generated tasks at 112 pixels, and small dense models of them that a CPU trains in minutes.

Their image towers are trained first: at each of the 64 patches of an image they imitate the features of the demo's
model (assets/shapes-nlvr, 9 patches of a cell each) for the patch's cell. Visual reasoning and VQA
then also start from the demo's text layers, whose keys and values read the new tower through the linear map of that
imitation.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import upop
from dense_tasks import settings_of
from upop.data.transforms import eval_transform
from upop.demo.classification_files import CLASSES, draw_scene_of
from upop.demo.draw import draw_scene
from upop.demo.scenes import GRID, Scene, sample_scene
from upop.models.blip import BlipConfig, build_vision_encoder
from upop.runs.devices import make_accelerator, to_device
from upop.runs.evaluation import evaluate
from upop.runs.loaders import SeededDataset, make_loader

ASSET = Path(__file__).parents[1] / "assets" / "shapes-nlvr"
PIXELS, PATCH, WIDTH, BATCH = 112, 14, 64, 16
_VISION = {"patch_size": PATCH, "vision_width": WIDTH, "vision_depth": 6, "vision_heads": 4, "vision_mlp": 4 * WIDTH}
_TEXT = {"text_width": 96, "text_heads": 3, "text_mlp": 384, "max_positions": 64}
_BLIP: dict[str, Any] = {**_VISION, **_TEXT, "dropout": 0.0, "drop_path": 0.0}


@dataclass(frozen=True)
class Kind:
    """A task of this benchmark.

    Attributes:
        samples: of the training set that is written.
        pool: training samples that are kept in memory.
        steps: of the dense model.
        rate: its highest learning rate; recovery takes a half of it.
        scored: most samples of the test split.
        settings: beside those of configs/shapes/.
    """

    samples: int
    pool: int
    steps: int
    rate: float
    scored: int
    settings: dict[str, Any]


KINDS = {
    "classification": Kind(
        4000,
        2000,
        700,
        1e-3,
        400,
        {
            "model": _VISION,
            "architecture": "vit_tiny_patch16_224",
        },
    ),
    "nlvr": Kind(6000, 1500, 200, 5e-4, 300, {"model": {**_BLIP, "text_depth": 4, "merge_from": 0}}),
    "caption": Kind(8000, 2000, 400, 1e-3, 200, {"model": {**_BLIP, "text_depth": 2}, "num_beams": 1}),
    "vqa": Kind(6000, 2000, 400, 1e-3, 300, {"model": {**_BLIP, "text_depth": 4}, "val_file": "vqa_val"}),
    "retrieval-crossget": Kind(
        8000,
        2000,
        400,
        1e-3,
        300,
        {
            "model": {**_VISION, "text_width": 64, "text_depth": 2, "text_heads": 4, "text_mlp": 256, "embed_dim": 64}
            | {"max_positions": 64},
            "reduce": "none",
        },
    ),
}
_LOOKING = 600
"""Steps of learning to look."""


class Bench:
    """A task in memory, with its dense model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.kind, self.folder = name, KINDS[name], folder
        more = {"image_size": PIXELS, "num_workers": 0, "device": "cpu", "augment": False, **self.kind.settings}
        more |= {"batch_size_train": BATCH, "batch_size_test": 100, "init_lr": self.kind.rate}
        self.task, self.settings = settings_of(name, folder, self.kind.samples, pixels=PIXELS, **more)
        self.accelerator: Accelerator = make_accelerator(self.settings)
        loader = make_loader(self.task, self.settings, "train")
        numbers = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        self.collate: Any = loader.collate_fn
        self.samples = [_small(loader.dataset[number]) for number in numbers[: self.kind.pool].tolist()]
        self._test = self.accelerator.prepare(self._loader("test" if name != "vqa" else "val"))
        self.dense = self._dense()

    def _loader(self, split: str) -> DataLoader[Any]:
        loader = make_loader(self.task, self.settings, split)
        samples: Any = loader.dataset.samples  # type: ignore[attr-defined]
        if len(samples) <= self.kind.scored or self.name.startswith("retrieval"):
            return loader
        fewer = SeededDataset(samples.without(range(self.kind.scored, len(samples))), self.settings.seed)
        return DataLoader(fewer, self.settings.batch_size_test, collate_fn=loader.collate_fn)

    def batches(self, seed: int, size: int = BATCH) -> Iterator[dict[str, Any]]:
        """Go through the samples again and again, each time in a new order that `seed` decides."""
        draws = torch.Generator().manual_seed(seed)
        while True:
            for numbers in torch.randperm(len(self.samples), generator=draws).split(size):
                if len(numbers) == size:
                    rows = [_large(self.samples[number]) for number in numbers.tolist()]
                    yield to_device(self.collate(rows), self.accelerator.device)

    def loss(self, model: nn.Module, batch: Any, settings: Any = None) -> Tensor:
        """Return the mean loss of a batch."""
        return self.task.loss(model, batch, settings or self.settings, 1.0)

    def example(self, count: int = 1) -> dict[str, Tensor]:
        """Return the inputs of some samples, at most a batch; texts are as long as the longest of a batch."""
        whole = self.task.inputs(next(self.batches(0)))
        if self.name != "nlvr":
            return {key: value[:count] for key, value in whole.items()}
        pairs = whole["images"].unflatten(0, (2, -1))[:, :count]  # all first images come before all second ones
        words = {key: value[:count] for key, value in whole.items() if key != "images"}
        return {"images": pairs.flatten(0, 1), **words}

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of the test split, in percent."""
        return evaluate(self.accelerator, self.task, self.settings, model, self._test)[0]

    @property
    def metric(self) -> str:
        """Name of the deciding metric."""
        return "exact" if self.name == "caption" else self.task.metric

    def train(
        self,
        model: nn.Module,
        steps: int,
        rate: float,
        seed: int,
        teacher: nn.Module | None = None,
        settings: Any = None,
    ) -> float:
        """Train a model in place, with a teacher if given; return the loss of the last steps."""
        torch.manual_seed(seed)
        taught = None if teacher is None else upop.distill(model, copy.deepcopy(teacher))
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        batches, mean = self.batches(seed), 0.0
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * _scale(step, steps)
            loss = self.loss(model, next(batches), settings)
            mean = loss.item() if not step else 0.95 * mean + 0.05 * loss.item()
            total = loss if taught is None else loss + taught.loss()
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if teacher is None and step % 50 == 49:
                print(f"  {self.name} step {step + 1} loss {mean:.3f}", flush=True)
        if taught is not None:
            taught.remove()
        model.eval()
        return mean

    def _dense(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.task.build(self.settings).eval()
        file = self.folder / f"{self.name}-dense.pth"
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model
        begin(model, self.name, self.folder)
        began = time.process_time()
        self.train(model, self.kind.steps, self.kind.rate, 0)
        print(f"{self.name} dense, {time.process_time() - began:.0f} s: {self.quality(model)}", flush=True)
        torch.save(model.state_dict(), file)
        return model


def _scale(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))


def _small(sample: Any) -> Any:
    return _with_images(sample, torch.float16)


def _large(sample: Any) -> Any:
    return _with_images(sample, torch.float32)


def _with_images(sample: Any, dtype: torch.dtype) -> Any:
    """Return a sample whose images have another precision."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dim() > 2 else value

    if isinstance(sample, dict):
        return {key: cast(value) for key, value in sample.items()}
    return type(sample)(cast(value) for value in sample)


# Learning to look.


def begin(model: Any, name: str, folder: Path) -> None:
    """Give a model a trained image tower, and the demo's text layers if they fit."""
    file = folder / "tower.pth"
    if not file.exists():
        torch.save(look(build_vision_encoder(BlipConfig(image_size=PIXELS, **_BLIP))), file)
    found = torch.load(file, weights_only=True)
    if name.startswith("retrieval"):
        _take_tower(model.vision_model, found["tower"])
        return
    getattr(model, "visual_encoder", model).load_state_dict(found["tower"], strict=False)
    if name in ("nlvr", "vqa"):
        asset: Any = upop.load(ASSET)
        _take_text(model.text_encoder, asset.text_encoder, found["weight"], found["bias"])
        if name == "nlvr":
            model.cls_head.load_state_dict(asset.cls_head.state_dict())


def _take_tower(tower: Any, state: dict[str, Tensor]) -> None:
    """Load timm's weights into CLIP's tower, whose norm before the first layer gets the scale of what it sees."""
    places = state["pos_embed"][0]
    new = {
        "embeddings.class_embedding": state["cls_token"].flatten(),
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": torch.cat([places[:1], places[1:] + state["patch_embed.proj.bias"]]),
        "pre_layrnorm.weight": places.std(1).mean().expand(WIDTH),
        "post_layernorm.weight": state["norm.weight"],
        "post_layernorm.bias": state["norm.bias"],
    }
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    for number in range(_VISION["vision_depth"]):
        old, layer = f"blocks.{number}.", f"encoder.layers.{number}."
        for part in ("weight", "bias"):
            for theirs, ours in {**names, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
                new[f"{layer}{ours}.{part}"] = state[f"{old}{theirs}.{part}"]
            for ours, value in zip("qkv", state[f"{old}attn.qkv.{part}"].chunk(3), strict=True):
                new[f"{layer}self_attn.{ours}_proj.{part}"] = value
    tower.load_state_dict(new, strict=False)


def _take_text(text: nn.Module, known: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Load the demo's text layers; keys and values of images read `weight @ x + bias` of the new tower's x."""
    state, wanted = known.state_dict(), text.state_dict()
    for name in list(state):
        kept = name.replace("self0", "self").replace("dense0", "dense")
        if "crossattention" in name and kept in wanted and name not in wanted:  # one image in place of two
            state[kept] = state.pop(name)
    for name in list(state):
        if ".crossattention." in name and name.endswith(("key.weight", "value.weight")):
            offset = name.replace(".weight", ".bias")
            state[offset] = state[offset] + state[name] @ bias
            state[name] = state[name] @ weight
    text.load_state_dict({name: value for name, value in state.items() if name in wanted}, strict=False)


def look(tower: Any) -> dict[str, Any]:
    """Train an image tower to imitate the demo's at each patch; return its state, and the linear map behind it."""
    torch.manual_seed(0)
    asset: Any = upop.load(ASSET)
    images, small = _scenes(2400)
    head = nn.Linear(WIDTH, 96)
    weights = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.02)
    side = PIXELS // PATCH
    centres = ((torch.arange(side) + 0.5) / side * GRID).long()
    cells = torch.cat([torch.zeros(1, dtype=torch.long), 1 + (centres[:, None] * GRID + centres[None, :]).flatten()])
    with torch.no_grad():
        wanted = torch.cat([asset.visual_encoder(part) for part in small.split(200)])
    began, tower = time.process_time(), tower.train()
    for step in range(_LOOKING):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * _scale(step, _LOOKING)
        rows = torch.randint(len(images), (32,))
        loss = F.mse_loss(head(tower(images[rows].float())), wanted[rows][:, cells]) / wanted.var()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"  looking, step {step + 1}: {loss.item():.3f} of the variance", flush=True)
    print(f"looking took {time.process_time() - began:.0f} s", flush=True)
    return {"tower": tower.state_dict(), "weight": head.weight.detach(), "bias": head.bias.detach()}


def _scenes(count: int) -> tuple[Tensor, Tensor]:
    """Return images of scenes at 112 pixels (half precision), and as the demo's model sees them."""
    draws = Random("tokens")
    finish, seen = eval_transform(PIXELS), eval_transform(48)

    def scene(number: int) -> Scene:
        return draw_scene_of(*draws.choice(CLASSES), draws) if number % 3 == 0 else sample_scene(draws)

    scenes = [scene(number) for number in range(count)]
    large = torch.stack([finish(draw_scene(each, PIXELS)).half() for each in scenes])
    return large, torch.stack([seen(draw_scene(each, 64)) for each in scenes])
