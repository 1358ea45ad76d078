"""Estimates the memory of pruning and recovery on one device, from a checkpoint's shapes and a batch of samples.

No weights are loaded. The estimate counts weights, gradients, optimizer state, the teacher, activations and logits, but
no kernel workspaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upop.checkpoints.opening import open_checkpoint
from upop.errors import SettingError
from upop.runs.loaders import first_samples, make_loader
from upop.runs.memory import format_bytes
from upop.runs.task import Task
from upop.tasks.row_settings import RowSettings

_HIDDEN = ("hidden_size", "d_model", "embed_dim")
_LAYERS = ("num_hidden_layers", "depth", "encoder_layers")
_INNER = ("intermediate_size", "encoder_ffn_dim", "mlp_dim")
_PER_HIDDEN, _PER_INNER = 10, 4
"""Numbers per token that a layer saves for its backward pass, as multiples of its hidden and inner width."""
_OPTIMIZER = {"adamw": None, "adamw8bit": 1, "paged_adamw8bit": 0}
"""Bytes per weight of each of the optimizer's two moments; None is the size of a weight. Paged ones are on the CPU."""
_CORRECTED = 0.25
"""Share of the weights that the correction holds at once."""


@dataclass(frozen=True)
class Tower:
    """A stack of layers: their number and widths, and the tokens of a batch that pass through them."""

    layers: int
    hidden: int
    inner: int
    tokens: int

    def kept(self, size: int, *, recomputed: bool) -> int:
        """Return the bytes of activations saved for the backward pass; `size` is the bytes of a number."""
        layer = self.tokens * (_PER_HIDDEN * self.hidden + _PER_INNER * self.inner) * size
        return self.layers * self.tokens * self.hidden * size + layer if recomputed else self.layers * layer


@dataclass(frozen=True)
class Estimate:
    """Peak memory of one device.

    Attributes:
        parameters: of the dense model.
        size: bytes of a weight.
        towers: of the model, with the tokens of a batch.
        logits: bytes of a batch's logits, and of what their loss saves.
        largest: bytes of the largest weight.
        state: bytes of optimizer state per weight.
        batch: samples in a forward pass.
        recomputed: whether activations are recomputed (grad_checkpointing).
        teacher: whether the dense model is a teacher.
    """

    parameters: int
    size: int
    towers: tuple[Tower, ...]
    logits: int
    largest: int
    state: float
    batch: int
    recomputed: bool
    teacher: bool

    @property
    def weights(self) -> int:
        """Bytes of the dense model."""
        return self.parameters * self.size

    def one_shot(self) -> int:
        """Return the bytes of pruning without training: a gradient is freed once its importance is computed."""
        activations = sum(tower.kept(self.size, recomputed=True) for tower in self.towers)
        return int(self.weights * (1 + _CORRECTED)) + self.largest + activations + self.logits

    def recovery(self, *, adapters: bool) -> int:
        """Return the bytes of training: of all weights, or of LoRA adapters."""
        activations = sum(tower.kept(self.size, recomputed=self.recomputed) for tower in self.towers)
        trained = 0.01 if adapters else 1.0
        learned = int(trained * self.parameters * (self.size + self.state))
        teacher = self.weights if self.teacher else 0
        return self.weights + learned + teacher + activations + self.logits

    def described(self) -> str:
        """Return the estimate as lines of text."""
        kinds = {4: "float32", 2: "bfloat16"}
        tokens = " + ".join(f"{tower.tokens:,}" for tower in self.towers)
        again = "recomputed" if self.recomputed else "stored (--grad-checkpointing recomputes them)"
        teacher = " with the dense model as teacher" if self.teacher else ""
        full, adapted = (format_bytes(self.recovery(adapters=adapters)) for adapters in (False, True))
        kind = kinds.get(self.size, f"{self.size} bytes each")
        lines = [
            f"{self.parameters / 1e6:,.1f} M parameters, {format_bytes(self.weights)} in {kind}",
            f"a batch of {self.batch} has {tokens} tokens",
            f"pruning without training (upop prune): {format_bytes(self.one_shot())}",
            f"recovery of all weights{teacher}: {full}; activations are {again}",
            f"recovery by LoRA{teacher}: {adapted}",
            "An estimate for one device. It counts tensors; kernels and fragmentation need somewhat more.",
        ]
        return "\n".join(lines)


def estimate(task: Task[Any], settings: RowSettings) -> Estimate:
    """Estimate the memory for the model in `pretrained` with batches of `data`.

    Raises:
        SettingError: no model is given, or it is not one of transformers.
        DataError: the data are not valid.
    """
    if not settings.pretrained:
        raise SettingError("No model is given. Set --model to a folder or a name on the hub.")
    checkpoint = open_checkpoint(settings.pretrained)
    if checkpoint.library != "transformers":
        raise SettingError(
            f"{checkpoint.path} is not a folder of transformers; the estimate needs the sizes in its config.json. Give "
            "such a folder."
        )
    shapes = checkpoint.meta_state()
    sizes = {"float32": 4, "bfloat16": 2}
    precision = getattr(settings, "precision", "auto")
    size = sizes.get(precision) or max(value.element_size() for value in shapes.values())
    batch = first_samples(make_loader(task, settings, "train"), settings.batch_size_train)
    state = _OPTIMIZER[getattr(settings, "optimizer", "adamw")]
    return Estimate(
        parameters=sum(value.numel() for value in shapes.values()),
        size=size,
        towers=_towers(checkpoint.config, batch),
        logits=_logits(checkpoint.config, batch, size),
        largest=max(value.numel() for value in shapes.values()) * size,
        state=2 * (size if state is None else state),
        batch=min(settings.batch_size_train, len(next(iter(batch.values())))),
        recomputed=settings.grad_checkpointing,
        teacher=any(task.distill_options(settings).values()),
    )


def _towers(config: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tower, ...]:
    """Return the towers that a configuration describes, each with the tokens of a batch."""
    parts = [config.get("vision_config"), config.get("text_config") or config]
    tokens = [_patches(parts[0] or config, batch), batch["input_ids"].numel() if "input_ids" in batch else 0]
    if "input_ids" not in batch:  # an image model
        parts, tokens = [config], tokens[:1]
    return tuple(
        Tower(layers, hidden, inner, count)
        for part, count in zip(parts, tokens, strict=True)
        if part and count
        for layers, hidden, inner in [_widths(part)]
    )


def _widths(part: Mapping[str, Any]) -> tuple[int, int, int]:
    hidden = _number(part, *_HIDDEN) or 768
    layers = _number(part, *_LAYERS) or 12
    return layers, hidden, _number(part, *_INNER) or 4 * hidden


def _number(part: Mapping[str, Any], *names: str) -> int | None:
    found = [part[name] for name in names if part.get(name) is not None]
    value = found[0][-1] if found and isinstance(found[0], list) else found[0] if found else None
    return value if isinstance(value, int) else None


def _patches(part: Mapping[str, Any], batch: Mapping[str, Tensor]) -> int:
    images = batch.get("pixel_values")
    if images is None:
        return 0
    if images.dim() == 2:  # flattened patches, [patches, values], as in Qwen-VL
        return images.shape[0]
    side = _number(part, "patch_size") or 16
    return images.numel() // images.shape[-3] // side**2


def _logits(config: Mapping[str, Any], batch: Mapping[str, Tensor], size: int) -> int:
    if "labels" not in batch or batch["labels"].dim() != 2:
        return 0
    words = _number(config.get("text_config") or config, "vocab_size") or _number(config, "vocab_size") or 0
    positions = int((batch["labels"] >= 0).any(0).sum()) * len(batch["labels"])
    return positions * words * (size + 2 * 4)
