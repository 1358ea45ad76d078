"""LoRA: trains low-rank matrices beside frozen weights, and merges them at the end (Hu et al., 2021).

`peft` inserts them in place, so the model stays the same object and is saved as an ordinary model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from upop.errors import SettingError
from upop.libraries import naming_missing

_NAME = "default"


class Adapters:
    """The adapters of a model, on all linear layers except the output layer of the vocabulary.

    Args:
        model: changed in place; its own weights are frozen.
        rank: rank of the matrices.

    Raises:
        SettingError: the model has no linear layer.
        MissingLibraryError: peft is not installed.
    """

    def __init__(self, model: nn.Module, rank: int) -> None:
        with naming_missing():
            from peft import LoraConfig, inject_adapter_in_model
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
        if not names:
            raise SettingError(f"lora={rank} was given, and {type(model).__name__} has no linear layer. Leave it out.")
        self._model = model
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names)
        inject_adapter_in_model(config, model, _NAME)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Merge the adapters into the weights within the block, so that the model is an ordinary one."""
        layers = list(self._layers())
        before = [layer.get_base_layer().weight.data for _, layer in layers]
        self._add(layers)
        try:
            yield
        finally:
            for (name, layer), weight in zip(layers, before, strict=True):
                layer.get_base_layer().weight.data = weight  # exact, unlike subtracting the update again
                _set(self._model, name, layer)

    def merge(self) -> None:
        """Merge the adapters permanently, and unfreeze the weights."""
        self._add(list(self._layers()))
        self._model.requires_grad_(True)

    def _add(self, layers: list[tuple[str, Any]]) -> None:
        for name, layer in layers:
            base = layer.get_base_layer()
            learned: Tensor = layer.get_delta_weight(_NAME).detach()
            base.weight.data = base.weight.data + learned.to(base.weight.dtype)
            _set(self._model, name, base)

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        found = [(name, module) for name, module in self._model.named_modules() if isinstance(module, LoraLayer)]
        yield from found


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, module)
