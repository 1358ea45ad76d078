"""What all readers of layouts share: which layers can be cut, and how a layer's tensors become slices."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.sharded import unsharded_class
from upop.pruning.units import Slice, Unit

_VISION_WORDS = ("visual", "vision", "image", "pixel")
_TEXT_WORDS = ("text", "language", "bert")
# What a model of this library is, where neither names nor inputs say it.
_MODALITIES = {"timm": "vision", "torchvision": "vision", "open_clip": "text", "transformers": "text"}
# Modules that a fine-tuning library puts around a layer keep the layer under one of these names.
_WRAPPED = ("base_layer", "lora_A", "original_module")


class NotPrunableError(Exception):
    """Raised by a reader for a module that it recognises but that cannot be pruned; carries the reason."""


def true_class(module: nn.Module) -> type:
    """Return the class that the library defined, whatever masks, cuts or sharding made of it."""
    kind: type = type(module)
    while True:
        below = kind.__dict__.get("unmasked_class") or kind.__dict__.get("uncut_class") or unsharded_class(kind)
        if below is None:
            return kind
        kind = below


def forward_of(module: nn.Module) -> object:
    """Return the forward that runs when the module is called, as its library wrote it."""
    own = getattr(true_class(module), "forward", None)
    given = module.__dict__.get("forward", own)
    return own if getattr(given, "__func__", None) is own else given


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether something put another forward on the module than its class has; hooks that were taken off leave that."""
    return forward_of(module) is not getattr(true_class(module), "forward", None)


def library_of(module: nn.Module) -> str:
    """Return the top-level package that defines the module's class."""
    return true_class(module).__module__.partition(".")[0]


def join(parent: str, child: str) -> str:
    """Return the dotted name of `child` inside `parent`; a leading "^" leaves the innermost module first."""
    while child.startswith("^"):
        parent, child = parent.rpartition(".")[0], child[1:]
    return f"{parent}.{child}" if parent else child


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is transformers' Conv1D: a linear layer whose weight is [inputs, outputs]."""
    return true_class(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_pointwise(layer: nn.Module) -> bool:
    """Whether the layer is a convolution of 1 x 1, which is a linear layer over channels."""
    return (
        isinstance(layer, nn.Conv2d)
        and forward_of(layer) is nn.Conv2d.forward
        and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
    )


def is_projection(module: object) -> bool:
    """Whether the module takes one axis to another by a weight that can be cut, or is a wrapper around such a one."""
    return isinstance(module, nn.Module) and (
        isinstance(module, nn.Linear) or is_transposed(module) or is_pointwise(module) or _obstacle(module) is not None
    )


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """Return the projection called `name`.

    Raises:
        NotPrunableError: there is none, or it cannot be cut (quantized, wrapped by an adapter, parametrized).
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise NotPrunableError(f"expected a linear layer at {name}, found none") from None
    obstacle = _obstacle(layer)
    if obstacle:
        raise NotPrunableError(f"{name} {obstacle}")
    if not (isinstance(layer, nn.Linear) or is_transposed(layer) or is_pointwise(layer)):
        raise NotPrunableError(f"expected a linear layer at {name}, found {type(layer).__name__}")
    return layer


def _obstacle(layer: nn.Module) -> str | None:
    """Say why a layer that was, or stands for, a linear one cannot be cut."""
    hooked = hooks_of_accelerate(layer)
    if hooked is not None:
        return hooked
    computed = computed_tensor(layer)
    if computed is not None:
        return computed
    if any(name in layer._modules for name in _WRAPPED):
        return f"is wrapped by an adapter ({type(layer).__name__}); merge it into the weights first"
    quantized = any(word in type(layer).__name__ for word in ("4bit", "8bit", "QuantLinear", "QLinear", "Quantized"))
    quantized |= hasattr(layer, "in_features") and ".quantized." in f"{type(layer).__module__}."  # torch's own
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.Linear) and weight is not None:
        quantized |= not weight.is_floating_point() or weight.dim() != 2 or weight.element_size() < 2
        quantized |= weight.shape != (layer.out_features, layer.in_features)
        # Tensor subclasses of quantization libraries look like ordinary floats from outside.
        quantized |= type(weight.data).__name__ not in ("Tensor", "FakeTensor", "DTensor")
    if quantized:
        return f"is quantized ({type(layer).__name__}); prune before quantizing"
    if isinstance(layer, nn.Linear) and not (_has_linears_forward(layer) or _computes_linearly(layer)):
        return f"is a {type(layer).__name__}, whose forward is not that of torch.nn.Linear"
    return None


def computed_tensor(module: nn.Module) -> str | None:
    """Say what to do where a weight or bias is no parameter, but computed from others at every call."""
    if "parametrizations" in module._modules:
        return "is parametrized; remove the parametrization first"
    for leaf in ("weight", "bias"):
        if leaf not in module._parameters and {f"{leaf}_orig", f"{leaf}_g"} & module._parameters.keys():
            return (
                f"has a {leaf} that is computed from other tensors (torch.nn.utils.prune, weight_norm or "
                "spectral_norm); make it a parameter first: torch.nn.utils.prune.remove, remove_weight_norm or "
                "remove_spectral_norm"
            )
    return None


def hooks_of_accelerate(module: nn.Module) -> str | None:
    """Say what to do where Accelerate spread a model over devices, by a forward of its own on every module."""
    if not hasattr(module, "_hf_hook"):
        return None
    return (
        "carries hooks of Accelerate, which spread the model over devices (device_map) or offload it; call "
        "accelerate.hooks.remove_hook_from_submodules(model) and put it on one device, or shard it by fully_shard"
    )


def _has_linears_forward(layer: nn.Module) -> bool:
    return forward_of(layer) is nn.Linear.forward


_linear: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _computes_linearly(layer: nn.Linear) -> bool:
    """Whether a layer with a forward of its own computes what torch's does: it is tried with small weights."""
    if has_foreign_forward(layer):
        return False
    if layer not in _linear:
        _linear[layer] = _try_linear(layer)
    return _linear[layer]


@torch.no_grad()
def _try_linear(layer: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # models may be built with another one as the default
        weight, bias, inputs = (torch.rand(shape, generator=generator) - 0.5 for shape in ((3, 2), (3,), (4, 5, 2)))
    twin: Any = copy.copy(layer)
    twin.__class__ = true_class(layer)  # without masks
    given = {"weight": weight, "bias": bias if layer._parameters.get("bias") is not None else None}
    if layer._parameters.keys() - given.keys() or layer._modules or layer._buffers:
        return False  # it has more than weights
    twin.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(value, requires_grad=False) for name, value in given.items()
    }
    twin.in_features, twin.out_features = 2, 3
    expected = torch.nn.functional.linear(inputs, weight, given["bias"])
    for training in (True, False):
        twin.training = training
        try:
            found = twin.forward(inputs)
        except Exception:
            return False
        if not isinstance(found, Tensor) or found.shape != expected.shape or not torch.allclose(found, expected):
            return False
    return True


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return how many inputs and outputs a projection has."""
    weight = layer._parameters["weight"]
    assert weight is not None
    outputs, inputs = weight.shape[:2]
    return (outputs, inputs) if is_transposed(layer) else (inputs, outputs)


def rows_of(model: nn.Module, name: str, **axis: Any) -> list[Slice]:
    """Return the slices of what a projection produces: of its weight, and of its bias if it has one.

    `axis` are fields of `Slice`.
    """
    layer = layer_at(model, name)
    transposed = is_transposed(layer)
    axis = {"direct": not (isinstance(layer, nn.Linear) and _has_linears_forward(layer)), **axis}
    slices = [Slice(f"{name}.weight", int(transposed), **axis)]
    if layer._parameters.get("bias") is not None:
        slices.append(Slice(f"{name}.bias", 0, **axis))
    return slices


def columns_of(model: nn.Module, name: str, **axis: Any) -> Slice:
    """Return the slice of what a projection consumes; `axis` are fields of `Slice`."""
    transposed = is_transposed(layer_at(model, name))
    return Slice(f"{name}.weight", int(not transposed), produces=False, **axis)


def checked(model: nn.Module, unit: Unit) -> Unit:
    """Return the unit if every tensor has the length that the layout says.

    Raises:
        NotPrunableError: one has not.
    """
    for part in unit.slices:
        module = model.get_submodule(part.tensor.rpartition(".")[0])
        leaf = part.tensor.rpartition(".")[2]
        tensor: Tensor | None = module._parameters.get(leaf, module._buffers.get(leaf))
        assert tensor is not None
        if tensor.shape[part.dim] != part.length(unit.size):
            raise NotPrunableError(
                f"{part.tensor} has {tensor.shape[part.dim]} along dimension {part.dim}, expected "
                f"{part.length(unit.size)} ({unit.size} x {part.length(1)})"
            )
    return unit


def modality_of(model: nn.Module, name: str) -> str:
    """Return "vision", "text" or "other" for the module called `name`.

    Names of towers decide; then the module's configuration; then the input of the innermost model around it; then
    the library.
    """
    if found := _in_words(name):
        return found
    around = list(_ancestors(model, name))
    for module in around[:1]:
        if found := _in_words(type(getattr(module, "config", None)).__name__.lower()):
            return found
    for module in around:
        main = getattr(module, "main_input_name", None)
        if isinstance(main, str):
            return "vision" if "pixel" in main else "text" if main == "input_ids" else "other"
    return _MODALITIES.get(library_of(around[0]), _MODALITIES.get(library_of(model), "other"))


def _in_words(name: str) -> str | None:
    if any(word in name for word in _VISION_WORDS):
        return "vision"
    return "text" if any(word in name for word in _TEXT_WORDS) else None


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the module called `name` and those around it, from the inside out."""
    while name:
        yield model.get_submodule(name)
        name = name.rpartition(".")[0]
    yield model
