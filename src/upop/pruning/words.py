"""Names of groups for people: the modality, and the class of a module before it was changed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from upop.pruning.sharded import unsharded_class

_VISION_WORDS = ("visual", "vision", "image", "pixel")
_TEXT_WORDS = ("text", "language", "bert")
# What a model of this library is, where neither names nor inputs say it.
_MODALITIES = {"timm": "vision", "torchvision": "vision", "open_clip": "text", "transformers": "text"}


def true_class(module: nn.Module) -> type:
    """Return the original class of a module, before masks, cuts or sharding replaced it."""
    kind: type = type(module)
    while True:
        below = kind.__dict__.get("unmasked_class") or kind.__dict__.get("uncut_class") or unsharded_class(kind)
        if below is None:
            return kind
        kind = below


def library_of(module: nn.Module) -> str:
    """Return the top-level package that defines the module's class."""
    return true_class(module).__module__.partition(".")[0]


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
    """Yield the module called `name` and its ancestors, from the inside out."""
    while name:
        yield model.get_submodule(name)
        name = name.rpartition(".")[0]
    yield model
