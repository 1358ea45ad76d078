"""How the libraries of this field lay out attention and MLPs: one row per layout.

`find_units` walks a model and asks the table about every module. It never guesses: a module that no row names
gives no unit, and one that looks prunable is reported by `survey` with the reason why it was left alone.
To support another family, add a row to `LAYOUTS` (and a case to tests/pruning/families.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from upop.pruning.errors import LayoutError
from upop.pruning.units import Attribute, Skipped, Slice, Unit

_VISION_WORDS = ("visual", "vision", "image", "pixel")
_TEXT_WORDS = ("text", "language", "bert")


class _NotPrunableError(Exception):
    """Raised by a row for a module that it knows but that cannot be pruned; carries the reason."""


@dataclass(frozen=True)
class Layout:
    """One row: which classes it speaks of, and how to read a unit off one of them.

    Attributes:
        library: the top-level package that defines the classes ("timm", "transformers", ...).
        classes: the class names; subclasses do not count, since they may compute something else.
        modality: what the units carry, unless the module's path says otherwise.
        read: (model, name, module, modality) -> the unit; raises `_NotPrunableError` with the reason.
    """

    library: str
    classes: tuple[str, ...]
    modality: str
    read: Callable[[nn.Module, str, nn.Module, str], Unit]


@dataclass(frozen=True)
class Survey:
    """What `survey` found: the units, in forward order, and what was left alone and why."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]


def find_units(model: nn.Module) -> list[Unit]:
    """Return every unit of `model` that can be pruned, in forward order.

    A model that keeps momentum copies of its own modules names them in an attribute `momentum_twins`, a mapping from
    a module's name to its copy's: the copies make no units, and are cut with the modules that they copy.

    Raises:
        LayoutError: the model has none; the message lists what was looked at and why it was left alone.
    """
    found = survey(model)
    if not found.units:
        seen = "; ".join(f"{part.name}: {part.reason}" for part in found.skipped[:5])
        raise LayoutError(
            f"No prunable unit found in {type(model).__name__}. "
            + (f"Looked at {len(found.skipped)} places ({seen}). " if seen else "It holds no attention or MLP. ")
            + "Known layouts: "
            + ", ".join(f"{row.library} {'/'.join(row.classes)}" for row in LAYOUTS)
            + ". Add a row to upop.pruning.layouts.LAYOUTS for another one."
        )
    return list(found.units)


def survey(model: nn.Module) -> Survey:
    """Look at every module of `model` once; return the units and what was skipped."""
    table = {(row.library, name): row for row in LAYOUTS for name in row.classes}
    units: list[Unit] = []
    skipped: list[Skipped] = []
    twins: Mapping[str, str] = getattr(model, "momentum_twins", {})
    copies = tuple(f"{copy}." for copy in twins.values())
    for name, module in model.named_modules():
        if name.startswith(copies):
            continue  # cut with the module it copies
        row = table.get((_library(module), _class_name(module)))
        if row is not None:
            try:
                unit = row.read(model, name, module, _modality(name, row.modality))
                units.append(_with_twins(unit, twins))
            except _NotPrunableError as reason:
                skipped.append(Skipped(name, str(reason)))
        elif _looks_prunable(module):
            skipped.append(Skipped(name, f"no layout is known for {_library(module)} {_class_name(module)}"))
    claimed = {part.tensor.rpartition(".")[0] for unit in units for part in unit.slices}
    skipped = [part for part in skipped if not _is_claimed(model, part.name, claimed)]
    return Survey(tuple(units), tuple(skipped))


def _with_twins(unit: Unit, twins: Mapping[str, str]) -> Unit:
    """Return the unit with the same axis of its momentum copy, if the model keeps one."""
    slices = [
        replace(part, tensor=copy + part.tensor.removeprefix(original), follows=True)
        for original, copy in twins.items()
        for part in unit.slices
        if part.tensor.startswith(f"{original}.")
    ]
    attributes = [
        replace(attribute, module=copy + attribute.module.removeprefix(original))
        for original, copy in twins.items()
        for attribute in unit.attributes
        if attribute.module.startswith(f"{original}.")
    ]
    return replace(unit, slices=(*unit.slices, *slices), attributes=(*unit.attributes, *attributes))


def _library(module: nn.Module) -> str:
    return _true_class(module).__module__.partition(".")[0]


def _class_name(module: nn.Module) -> str:
    return _true_class(module).__name__


def _true_class(module: nn.Module) -> type:
    # Masked layers are subclasses made on the fly; the table speaks of the class that the library defined.
    kind = type(module)
    return getattr(kind, "unmasked_class", kind)


def _modality(name: str, default: str) -> str:
    if any(word in name for word in _VISION_WORDS):
        return "vision"
    if any(word in name for word in _TEXT_WORDS):
        return "text"
    return default


def _looks_prunable(module: nn.Module) -> bool:
    name = _class_name(module).lower()
    linears = sum(isinstance(child, nn.Linear) for child in module.children())
    return linears >= 2 and ("att" in name or "mlp" in name or "ffn" in name or "feedforward" in name)


def _is_claimed(model: nn.Module, name: str, claimed: set[str]) -> bool:
    children = [
        f"{name}.{child}" for child, part in model.get_submodule(name).named_children() if isinstance(part, nn.Linear)
    ]
    return bool(children) and all(child in claimed for child in children)


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise _NotPrunableError(f"expected a linear layer at {name}, found none") from None
    if not isinstance(layer, nn.Linear):
        raise _NotPrunableError(f"expected a linear layer at {name}, found {type(layer).__name__}")
    return layer


def _rows(model: nn.Module, name: str, *, outer: int = 1, inner: int = 1, query_groups: int = 0) -> list[Slice]:
    layer = _linear(model, name)
    tensors = [f"{name}.weight"] + ([f"{name}.bias"] if layer.bias is not None else [])
    return [Slice(tensor, 0, outer, inner, query_groups=query_groups) for tensor in tensors]


def _columns(name: str, *, outer: int = 1, inner: int = 1) -> Slice:
    return Slice(f"{name}.weight", 1, outer, inner, produces=False)


def _checked(model: nn.Module, unit: Unit) -> Unit:
    """Return the unit if every tensor has the length that the layout says."""
    for part in unit.slices:
        found = model.get_parameter(part.tensor).shape[part.dim]
        if found != part.length(unit.size):
            raise _NotPrunableError(
                f"{part.tensor} has {found} along dimension {part.dim}, expected {part.length(unit.size)} "
                f"({part.outer} x {unit.size} x {part.inner})"
            )
    return unit


def _mlp(model: nn.Module, name: str, first: str, second: str, modality: str) -> Unit:
    size = _linear(model, first).out_features
    _linear(model, second)
    return _checked(model, Unit(name, "mlp", modality, size, 1, (*_rows(model, first), _columns(second))))


def _fused_attention(
    model: nn.Module,
    name: str,
    qkv: str,
    output: str,
    heads: int,
    modality: str,
    attributes: tuple[Attribute, ...],
) -> Unit:
    size = _linear(model, qkv).out_features // (3 * heads)
    _linear(model, output)
    slices = (*_rows(model, qkv, outer=3 * heads, query_groups=heads), _columns(output, outer=heads))
    return _checked(model, Unit(name, "attention", modality, size, heads, slices, attributes))


def _split_attention(
    model: nn.Module,
    name: str,
    projections: tuple[str, str, str],
    output: str,
    heads: int,
    modality: str,
    attributes: tuple[Attribute, ...],
) -> Unit:
    query, key, value = projections
    size = _linear(model, query).out_features // heads
    _linear(model, output)
    slices = (
        *_rows(model, query, outer=heads, query_groups=heads),
        *_rows(model, key, outer=heads),
        *_rows(model, value, outer=heads),
        _columns(output, outer=heads),
    )
    # The query and the key come first and second: costs in FLOPs read the sequence lengths off them.
    return _checked(model, Unit(name, "attention", modality, size, heads, slices, attributes))


def _read_timm_attention(model: nn.Module, name: str, module: nn.Module, modality: str) -> Unit:
    for part, reason in (
        ("q_norm", "its queries and keys are normalised over head_dim"),
        ("norm", "its output is normalised over the pruned axis"),
    ):
        if not isinstance(getattr(module, part, nn.Identity()), nn.Identity):
            raise _NotPrunableError(reason)
    if getattr(module, "gate", None) is not None:
        raise _NotPrunableError("its output is gated per dimension")
    heads = module.num_heads
    assert isinstance(heads, int)
    attributes = (
        Attribute(name, "head_dim"),
        Attribute(name, "attn_dim", heads),
        Attribute(name, "scale", None),
    )
    return _fused_attention(model, name, _join(name, "qkv"), _join(name, "proj"), heads, modality, attributes)


def _read_timm_mlp(model: nn.Module, name: str, module: nn.Module, modality: str) -> Unit:
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        raise _NotPrunableError("its hidden layer is normalised over the pruned axis")
    return _mlp(model, name, _join(name, "fc1"), _join(name, "fc2"), modality)


def _read_blip_text_attention(model: nn.Module, name: str, module: nn.Module, modality: str) -> Unit:
    # NLVR's twin cross-attention names its halves self0 and self1, and their outputs dense0 and dense1.
    parent, _, leaf = name.rpartition(".")
    heads = module.num_attention_heads
    assert isinstance(heads, int)
    return _split_attention(
        model,
        name,
        (_join(name, "query"), _join(name, "key"), _join(name, "value")),
        _join(parent, f"output.dense{leaf.removeprefix('self')}"),
        heads,
        modality,
        (Attribute(name, "attention_head_size"), Attribute(name, "all_head_size", heads)),
    )


def _read_blip_text_mlp(model: nn.Module, name: str, _module: nn.Module, modality: str) -> Unit:
    parent = name.rpartition(".")[0]
    return _mlp(model, name, _join(name, "dense"), _join(parent, "output.dense"), modality)


def _read_clip_attention(model: nn.Module, name: str, module: nn.Module, modality: str) -> Unit:
    heads = module.num_heads
    assert isinstance(heads, int)
    return _split_attention(
        model,
        name,
        (_join(name, "q_proj"), _join(name, "k_proj"), _join(name, "v_proj")),
        _join(name, "out_proj"),
        heads,
        _clip_tower(module, modality),
        (Attribute(name, "head_dim"), Attribute(name, "scale", None)),
    )


def _read_clip_mlp(model: nn.Module, name: str, module: nn.Module, modality: str) -> Unit:
    return _mlp(model, name, _join(name, "fc1"), _join(name, "fc2"), _clip_tower(module, modality))


def _clip_tower(module: nn.Module, modality: str) -> str:
    # Both towers are made of the same classes; alone, only the configuration tells which one it is.
    return "text" if type(getattr(module, "config", None)).__name__ == "CLIPTextConfig" else modality


LAYOUTS: tuple[Layout, ...] = (
    Layout("timm", ("Attention",), "vision", _read_timm_attention),
    Layout("timm", ("Mlp",), "vision", _read_timm_mlp),
    Layout("transformers", ("BlipTextSelfAttention",), "text", _read_blip_text_attention),
    Layout("transformers", ("BlipTextIntermediate",), "text", _read_blip_text_mlp),
    Layout("transformers", ("CLIPAttention",), "vision", _read_clip_attention),
    Layout("transformers", ("CLIPMLP",), "vision", _read_clip_mlp),
)
