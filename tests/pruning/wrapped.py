"""A small transformer under all that wraps models, or takes weights from layers."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

WIDTH = 24


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 3, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.attn, self.n2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class Net(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.emb, self.blocks, self.head = nn.Linear(6, WIDTH), nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 4)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for block in self.blocks:
            run = torch.utils.checkpoint.checkpoint if self.checkpointed else lambda part, *given, **_: part(*given)
            x = run(block, x, use_reentrant=False)
        return self.head(x.mean(1))


def net(**settings: Any) -> Any:
    torch.manual_seed(0)
    return Net(**settings)


def changed(change: Callable[[Any], Any]) -> Any:
    """Return a model of whose first block something was changed."""
    model = net()
    change(model.blocks[0])
    return model


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Eight(nn.Linear):
    """Whole numbers for weights, as bitsandbytes keeps them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        numbers = (layer.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.LazyLinear(48), nn.LazyLinear(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Convolutional(nn.Module):
    """Batch norms between convolutions, and a block behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(WIDTH, 48, 1), nn.Conv2d(48, WIDTH, 1)
        self.along, self.norms = nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.ModuleList([nn.BatchNorm2d(48)] * 2)
        self.block, self.head = Block(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.narrow(F.relu(self.norms[1](self.along(F.relu(self.norms[0](self.wide(x)))))))
        return self.head(self.block(x.flatten(2).transpose(1, 2)).mean(1))


def with_mlp(mlp: nn.Module) -> Any:
    def change(block: Any) -> None:
        block.mlp = mlp

    return changed(change)


def lazy(*, called: bool) -> Any:
    model = with_mlp(Lazy())
    if called:
        model(torch.randn(2, 7, 6))
    return model


def compiled(part: str) -> Any:
    model = net()
    if part == "whole":
        return torch.compile(model, backend="eager")
    if part == "block":
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    else:
        model.blocks[0].compile(backend="eager")
    return model


def offloaded(*, removed: bool) -> Any:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = net()
    cpu_offload(model, execution_device="cpu")
    if removed:
        remove_hook_from_submodules(model)
    return model


def adapted(state: str) -> Any:
    """Return a model with LoRA; "scaled" has a number for each rank between the factors, as AdaLoRA trains them."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    layers = ["qkv", "fc1"]
    scaled = AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=layers) if state == "scaled" else None
    model = get_peft_model(net(), scaled or LoraConfig(r=2, target_modules=layers))
    if state == "merged":
        model.merge_adapter()
    return model.merge_and_unload() if state == "unloaded" else model


def pruned(block: Any) -> None:
    prune.random_unstructured(block.mlp.fc1, "weight", 0.3)
    prune.ln_structured(block.attn.qkv, "weight", 0.3, 2, 0)


def pruned_for_good(block: Any) -> None:
    pruned(block)
    prune.remove(block.mlp.fc1, "weight")
    prune.remove(block.attn.qkv, "weight")


def around_itself(block: Any) -> None:
    mlp = block.mlp
    mlp.forward = lambda x: mlp.fc2(F.relu(mlp.fc1(x)))


def replaced(block: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))

    block.mlp.forward = types.MethodType(forward, block.mlp)


def tied(part: str) -> Any:
    model = net()
    one, other = model.blocks
    if part == "weight":
        other.mlp.fc1.weight = one.mlp.fc1.weight
    else:
        other.mlp = one.mlp
    return model


def holding(value: Any) -> Any:
    model = net()
    model.kept = value
    return model


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return net()


def quantised(block: Any) -> None:
    block.mlp = torch.ao.quantization.quantize_dynamic(block.mlp, {nn.Linear}, dtype=torch.qint8)


def eight(block: Any) -> None:
    block.mlp.fc1, block.mlp.fc2 = Eight(block.mlp.fc1), Eight(block.mlp.fc2)


def of_one_process(folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


WHOLE: dict[str, Callable[[], Any]] = {
    "plain": net,
    "pruned for good": lambda: changed(pruned_for_good),
    "lazy, called": lambda: lazy(called=True),
    "hooks of Accelerate removed": lambda: offloaded(removed=True),
    "compiled": lambda: compiled("whole"),
    "compiled block": lambda: compiled("block"),
    "compiled in place": lambda: compiled("in place"),
    "DataParallel": lambda: nn.DataParallel(net()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(net()),
    "checkpointed": lambda: net(checkpointed=True),
    "another forward": lambda: changed(replaced),
    "a forward around its module": lambda: changed(around_itself),
    "holds a lock": lambda: holding(threading.Lock()),
    "one module twice": lambda: tied("module"),
    "a hook": lambda: changed(lambda block: block.mlp.fc1.register_forward_hook(lambda *given: given[-1] * 2)),
    "adapters merged away": lambda: adapted("unloaded"),
    "frozen": lambda: net().requires_grad_(False),
    "inference mode": in_inference_mode,
}
"""Models of which everything can be cut."""

BARRED: dict[str, tuple[Callable[[], Any], str]] = {
    "torch.nn.utils.prune": (lambda: changed(pruned), "prune.remove"),
    "old weight norm": (lambda: changed(lambda block: nn.utils.weight_norm(block.mlp.fc1)), "weight_norm"),
    "weight norm": (
        lambda: changed(lambda block: parametrizations.weight_norm(block.mlp.fc1)),
        "remove_parametrizations",
    ),
    "old spectral norm": (
        lambda: changed(lambda block: nn.utils.spectral_norm(block.mlp.fc2)),
        "remove_spectral_norm",
    ),
    "spectral norm": (
        lambda: changed(lambda block: parametrizations.spectral_norm(block.mlp.fc1)),
        "remove_parametrizations",
    ),
    "parametrized": (
        lambda: changed(lambda block: parametrize.register_parametrization(block.mlp.fc1, "weight", Halved())),
        "remove_parametrizations",
    ),
    "orthogonal": (
        lambda: changed(lambda block: parametrizations.orthogonal(block.attn.proj)),
        "remove_parametrizations",
    ),
    "hooks of Accelerate": (lambda: offloaded(removed=False), "remove_hook_from_submodules"),
    "TorchScript": (lambda: with_mlp(torch.jit.script(MLP())), "TorchScript"),
    "quantised by torch": (lambda: changed(quantised), "before it is quantised"),
    "whole numbers": (lambda: changed(eight), "before it is quantised"),
    "one weight twice": (lambda: tied("weight"), "are one tensor"),
}
"""Models of which something cannot be cut, each with a part of the reason."""
