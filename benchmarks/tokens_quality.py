"""How good a model is at equal multiply-adds: with fewer weights, with fewer tokens, and with both on one budget.

A small vision transformer learns generated scenes of five to nine shapes, at 112 pixels: which colour and which kind
are the commonest. It is then cut to a half, a third and a quarter of its multiply-adds by
`upop.calibrate_with_tokens`, whose shares are all weights, all tokens, or those that held-out batches choose; and each
is trained for as many steps, taught by the dense model. Runs that are done are kept, so that the command goes on where
it stopped.

    python benchmarks/tokens_quality.py --work /tmp/tokens-quality
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from upop.demo.classification_files import CLASSES, draw_scene_of
from upop.demo.draw import draw_scene
from upop.errors import SettingError
from upop.files import write_json
from upop.machine import machine
from upop.tokens.budget import SHARES

RESULT = Path(__file__).parent / "results" / "tokens_quality_cpu.json"
SIDE, BATCH = 112, 32
MODEL: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 14,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "num_classes": len(CLASSES),
}
ARMS: dict[str, tuple[float, ...]] = {"weights": (0.0,), "tokens": (1.0,), "both": SHARES}

Data = tuple[Tensor, Tensor]


def scenes(count: int, seed: int) -> Data:
    """Return images [count, 3, SIDE, SIDE] of uint8, and their classes."""
    draws = Random(seed)
    labels = [draws.randrange(len(CLASSES)) for _ in range(count)]
    drawn = [np.array(draw_scene(draw_scene_of(*CLASSES[label], draws), SIDE).convert("RGB")) for label in labels]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def pixels(images: Tensor) -> Tensor:
    """Return images as numbers from -1 to 1."""
    return images.float() / 127.5 - 1


def loss_of(model: nn.Module, batch: Data) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(model(pixels(batch[0])), batch[1])


def train(model: nn.Module, data: Data, steps: int, rate: float, seed: int, teacher: nn.Module | None = None) -> None:
    """Train for so many steps; the rate rises for a tenth of them, and falls as a cosine."""
    torch.manual_seed(seed)
    taught = None if teacher is None else upop.distill(model, copy.deepcopy(teacher))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    model.train()
    for step in range(steps):
        warm = max(1, steps // 10)
        scale = (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        rows = torch.randint(len(data[0]), (BATCH,))
        images = data[0][rows]
        if step % 2:
            images = images.flip(3)
        loss = loss_of(model, (images, data[1][rows]))
        total = loss if taught is None else loss + taught.loss()
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"  step {step} loss {loss.item():.3f}", flush=True)
    if taught is not None:
        taught.remove()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of right answers, in percent."""
    found = [model(pixels(part)).argmax(1) for part in data[0].split(100)]
    return float((torch.cat(found) == data[1]).float().mean() * 100)


def trained_dense(work: Path, data: Data, steps: int, seed: int) -> nn.Module:
    """Return the dense model, from a file if it is there."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **MODEL).eval()
    file = work / f"dense_{seed}_{steps}.pth"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model, data, steps, 1e-3, seed)
        torch.save(model.state_dict(), file)
    return model


def cut(dense: nn.Module, arm: str, factor: float, batches: list[Data]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model on its budget, and how this was shared."""
    model = copy.deepcopy(dense)
    started = time.process_time()
    shared = upop.calibrate_with_tokens(model, batches, {"macs": 1 / factor}, loss=loss_of, shares=ARMS[arm])
    candidates = {f"{each.share:g}": each.loss for each in shared.candidates}
    return model, {
        "share": shared.chosen.share,
        "removed": shared.chosen.removed,
        "losses": candidates,
        "seconds": time.process_time() - started,
    }


def main() -> None:
    """Measure what is not measured yet, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the dense models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1500, help="of the dense model")
    parser.add_argument("--recovery", type=int, default=200, help="steps after a cut")
    parser.add_argument("--factors", type=float, nargs="+", default=[2, 3, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found |= {"machine": machine(), "model": MODEL, "steps": arguments.steps, "recovery": arguments.recovery}
    runs: dict[str, Any] = found.setdefault("runs", {})
    data, test = scenes(4000, 1), scenes(1000, 2)
    for seed in arguments.seeds:
        dense = trained_dense(arguments.work, data, arguments.steps, seed)
        whole = upop.count_macs(dense, pixels(data[0][:1]))
        runs.setdefault(f"dense/{seed}", {"accuracy": accuracy(dense, test), "macs": whole})
        print(f"dense {runs[f'dense/{seed}']['accuracy']:.1f}", flush=True)
        batches = [(data[0][at : at + BATCH], data[1][at : at + BATCH]) for at in range(0, 16 * BATCH, BATCH)]
        for factor in arguments.factors:
            for arm in ARMS:
                name = f"{arm}/{factor:g}/{seed}"
                if name in runs:
                    continue
                try:
                    model, described = cut(dense, arm, factor, batches)
                except SettingError as error:
                    runs[name] = {"refused": str(error)}
                else:
                    described["accuracy_cut"] = accuracy(model, test)
                    train(model, data, arguments.recovery, 5e-4, seed, dense)
                    described |= {
                        "accuracy": accuracy(model, test),
                        "macs": upop.count_macs(model, pixels(data[0][:1])),
                    }
                    runs[name] = described
                    print(f"{name} {described}", flush=True)
                write_json(RESULT, found)


if __name__ == "__main__":
    main()
