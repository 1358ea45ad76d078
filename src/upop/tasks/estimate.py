"""Estimates the memory of pruning and recovery on one device, from a checkpoint's shapes and a batch of samples.

No weights are loaded. It estimates the phase that needs most: finding the groups, which proves them on copies
with numbers; scoring and correction, or training; and the proof of the cut, on a copy in float64 of a model that is
small enough. It counts weights, gradients, optimizer state, the teacher, activations, logits and these copies. On a CPU
the process adds what it holds without the model, and the allocator keeps some of what was freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upop.checkpoints.opening import open_checkpoint
from upop.errors import OutOfMemoryError, SettingError, UPopError
from upop.pruning.axes.tried import MOST_MEMORY
from upop.pruning.moments import least_allowed
from upop.pruning.shrink import MOST_COPIED
from upop.runs.loaders import first_samples, make_loader
from upop.runs.memory import format_bytes, free_bytes, resident_bytes
from upop.runs.task import Task
from upop.tasks.row_settings import RowSettings

_HIDDEN = ("hidden_size", "d_model", "embed_dim")
_LAYERS = ("num_hidden_layers", "depth", "encoder_layers")
_INNER = ("intermediate_size", "encoder_ffn_dim", "mlp_dim")
_PER_HIDDEN, _PER_INNER = 10, 4
"""Numbers per token that a layer saves for its backward pass, as multiples of its hidden and inner width."""
_SIZES = {"float32": 4, "bfloat16": 2}
_OPTIMIZER = {"adamw": None, "adamw8bit": 1, "paged_adamw8bit": 0}
"""Bytes per weight of each of the optimizer's two moments; None is the size of a weight. Paged ones are on the CPU."""
_ADAPTED = 0.01
"""Share of the weights that LoRA's adapters are."""
_VERIFIED = 2
"""Samples on which a cut is verified."""
_FLOAT64 = 8
_HELD_OUTPUTS = {True: 28, False: 12}
"""Bytes per output of verifying a cut: with a copy in float64, whose outputs are held three times, or without."""
_KEPT_FREE = 0.1
"""Share of the tensors' peak that the allocator of a CPU keeps besides, freed or in parts too small for others."""
_LOADED_LATER = 160 * 2**20
"""Bytes that a run takes beside what this process holds: tracing, figures, and what they import."""


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
        outputs: numbers in the outputs of the samples on which a cut is verified.
        largest: bytes of the largest weight.
        state: bytes of optimizer state per weight.
        batch: samples in a forward pass.
        recomputed: whether activations are recomputed (grad_checkpointing).
        teacher: whether the dense model is a teacher.
        device: of the run.
        process: bytes that the process holds without the model: Python, libraries and data.
    """

    parameters: int
    size: int
    towers: tuple[Tower, ...]
    logits: int
    outputs: int
    largest: int
    state: float
    batch: int
    recomputed: bool
    teacher: bool
    device: torch.device
    process: int

    @property
    def weights(self) -> int:
        """Bytes of the dense model."""
        return self.parameters * self.size

    @property
    def reading(self) -> int:
        """Bytes of the copies with numbers on which groups are proved, in the memory of the CPU.

        All of the model where that fits, in float64 or float32; of a larger one, a layer of each tower.
        """
        for size in (_FLOAT64, 4):
            if 2 * size * self.parameters <= MOST_MEMORY:
                return 2 * size * self.parameters
        layers = sum(4 * tower.hidden**2 + 3 * tower.hidden * tower.inner for tower in self.towers)
        return min(MOST_MEMORY, 2 * _FLOAT64 * layers)

    @property
    def proof(self) -> int:
        """Bytes of verifying a cut: outputs, and a copy in float64 of a model that is small enough."""
        precise = self.parameters <= MOST_COPIED and self.size < _FLOAT64
        return self.outputs * _HELD_OUTPUTS[precise] + (_FLOAT64 * self.parameters if precise else 0)

    def least(self, *, trained: bool, adapters: bool = False) -> int:
        """Return the bytes that a run surely needs beside what the process holds now.

        These are weights, gradients, optimizer and teacher, or the weights and their copy for the proof of the groups.
        """
        return max(self._kept(trained=trained, adapters=adapters), self.weights + self._read_here // 2)

    def _kept(self, *, trained: bool, adapters: bool) -> int:
        if not trained:
            return self.weights
        learned = int((_ADAPTED if adapters else 1.0) * self.parameters * (self.size + self.state))
        return self.weights + learned + (self.weights if self.teacher else 0)

    def one_shot(self) -> int:
        """Return the bytes of pruning without training: a gradient is freed once its importance is computed."""
        activations = sum(tower.kept(self.size, recomputed=True) for tower in self.towers)
        moments = sum(2 * 4 * tower.layers * (tower.hidden**2 + tower.inner**2) for tower in self.towers)
        corrected = min(moments, least_allowed(self.weights, self.device))
        scoring = corrected + self.largest + activations + self.logits
        return self._peak(self.weights + max(scoring, self.proof, self._read_here))

    def recovery(self, *, adapters: bool) -> int:
        """Return the bytes of training: of all weights, or of LoRA adapters."""
        activations = sum(tower.kept(self.size, recomputed=self.recomputed) for tower in self.towers)
        held = self._kept(trained=True, adapters=adapters)
        first = self.weights + self._read_here
        return self._peak(max(held + max(activations + self.logits, self.proof), first))

    @property
    def _read_here(self) -> int:
        return self.reading if self.device.type == "cpu" else 0

    def _peak(self, tensors: int) -> int:
        return self.process + int((1 + _KEPT_FREE) * tensors) if self.device.type == "cpu" else tensors

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
            *self._beside(),
            f"Free now: {format_bytes(free_bytes(self.device))}.",
        ]
        return "\n".join(lines)

    def _beside(self) -> list[str]:
        copies = format_bytes(self.reading)
        if self.device.type != "cpu":
            return [
                "Estimated peaks of one device. They count tensors; kernels and fragmentation need somewhat more.",
                f"Before, finding what can be cut takes {copies} of the machine's memory beside the weights.",
            ]
        held, proof = format_bytes(self.process), format_bytes(self.proof)
        return [
            f"Estimated peaks of the process; {held} of each are Python, libraries and data. The rest are tensors.",
            f"Beside the weights, finding what can be cut takes {copies}, and verifying a cut {proof}.",
            f"{_KEPT_FREE:.0%} is added for what the allocator keeps.",
        ]


def estimate(task: Task[Any], settings: RowSettings) -> Estimate:
    """Estimate the memory for the model in `pretrained` with batches of `data`.

    Raises:
        SettingError: no model is given, or it is not one of transformers.
        DataError: the data are not valid.
    """
    return _estimate(task, settings, first_samples(make_loader(task, settings, "train"), settings.batch_size_train))


def check_memory(
    task: Task[Any], settings: RowSettings, *, trained: bool, notify: Callable[[str], None] = lambda _: None
) -> None:
    """Refuse a run that surely does not fit, and warn of one that may not, before it reads weights or data.

    Nothing is said about a model whose sizes are not known before it is loaded, nor about one that is sharded.

    Args:
        task: of the run.
        settings: of the run.
        trained: whether weights are trained.
        notify: called with the warning.

    Raises:
        OutOfMemoryError: what it surely needs is more than what is free on the device.
    """
    if settings.sharding != "none":
        return
    try:
        found = _estimate(task, settings, {})
    except UPopError:  # said where the model is loaded
        return
    adapters, free = settings.lora is not None, free_bytes(found.device)
    needed = found.least(trained=trained, adapters=adapters)
    expected = (found.recovery(adapters=adapters) if trained else found.one_shot()) - found.process
    if max(needed, expected) <= free:
        return
    ways = ["--set precision=bfloat16 halves weights"] if found.size > _SIZES["bfloat16"] else []
    ways += ["--method one-shot --lora 16 trains adapters alone"] if trained and not adapters else []
    advice = " ".join(f"{way}." for way in [*ways, "--dry-run lists what needs memory"])
    model = f"{settings.pretrained} ({found.parameters / 1e6:,.1f} M parameters)"
    there = f"{format_bytes(free)} are free on {found.device}"
    if needed > free:
        raise OutOfMemoryError(f"{model} needs at least {format_bytes(needed)}, and {there}. {advice}")
    notify(f"{model} is estimated to need {format_bytes(expected)} without activations, and {there}. {advice}")


def _estimate(task: Task[Any], settings: RowSettings, batch: Mapping[str, Tensor]) -> Estimate:
    if not settings.pretrained:
        raise SettingError("No model is given. Set --model to a folder or a name on the hub.")
    checkpoint = open_checkpoint(settings.pretrained)
    if checkpoint.library != "transformers":
        raise SettingError(
            f"{checkpoint.path} is not a folder of transformers; the estimate needs the sizes in its config.json. Give "
            "such a folder."
        )
    shapes = checkpoint.meta_state()
    precision = getattr(settings, "precision", "auto")
    size = _SIZES.get(precision) or max(value.element_size() for value in shapes.values())
    state = _OPTIMIZER[getattr(settings, "optimizer", "adamw")]
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    return Estimate(
        parameters=sum(value.numel() for value in shapes.values()),
        size=size,
        towers=_towers(checkpoint.config, batch),
        logits=_logits(checkpoint.config, batch, size),
        outputs=_outputs(checkpoint.config, batch),
        largest=max(value.numel() for value in shapes.values()) * size,
        state=2 * (size if state is None else state),
        batch=min(settings.batch_size_train, len(next(iter(batch.values()), ()))),
        recomputed=settings.grad_checkpointing,
        teacher=any(task.distill_options(settings).values()),
        device=torch.device("cuda" if cuda else "cpu"),
        process=resident_bytes() + _LOADED_LATER,
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
    if not _is_answered(batch):
        return 0
    positions = int((batch["labels"] >= 0).any(0).sum()) * len(batch["labels"])
    return positions * _words(config) * (size + 2 * 4)


def _outputs(config: Mapping[str, Any], batch: Mapping[str, Tensor]) -> int:
    """Return how many logits the samples have on which a cut is verified, those of all positions."""
    return batch["input_ids"][:_VERIFIED].numel() * _words(config) if _is_answered(batch) else 0


def _is_answered(batch: Mapping[str, Tensor]) -> bool:
    return "labels" in batch and batch["labels"].dim() == 2


def _words(config: Mapping[str, Any]) -> int:
    return _number(config.get("text_config") or config, "vocab_size") or _number(config, "vocab_size") or 0
