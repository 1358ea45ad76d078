"""Compress a timm model to half of its prunable parameters while it is fine-tuned, then save and load it."""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import upop


def main() -> None:
    """Train, cut, continue training, save, load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("output/fine_tuned"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # Your model, trained on your task: timm.create_model("deit_small_patch16_224", pretrained=True), for example.
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    # Your batches: pairs of images and labels.
    loader = [(torch.rand(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(arguments.steps)]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    before = upop.count_parameters(model)
    compression = upop.Compression(model, ratio=0.5, steps=arguments.steps)
    for images, labels in loader:
        loss = compression.loss(F.cross_entropy(model(images), labels))
        loss.backward()
        compression.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
    compression.finish()
    print(f"{before:,} parameters before, {upop.count_parameters(model):,} now")

    upop.save(model, arguments.out)
    again = upop.load(arguments.out)
    model.eval()
    again.eval()
    with torch.no_grad():
        far = float((again(images) - model(images)).abs().max())
    print(f"saved into {arguments.out}; loaded, its outputs differ by {far:.1g}")


if __name__ == "__main__":
    main()
