"""The models that upop builds itself, by the name under which they are saved.

Each has the configuration of the dense model as `config`, whose class identifies the model.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from upop.libraries import naming_missing

_PLACES = {
    "blip-caption": ("caption", "BlipCaption", "CaptionConfig"),
    "blip-nlvr": ("nlvr", "BlipNlvr", "NlvrConfig"),
    "blip-retrieval": ("retrieval", "BlipRetrieval", "RetrievalConfig"),
    "blip-vqa": ("vqa", "BlipVqa", "VqaConfig"),
    "classifier": ("classifier", "build_classifier", "ClassifierConfig"),
    "clip-crossget": ("crossget", "CrossGetClip", "CrossGetConfig"),
    "clip-retrieval": ("clip", "ClipRetrieval", "ClipConfig"),
    "segmenter": ("segmenter", "Segmenter", "SegmenterConfig"),
}
"""Name -> module, class or function that builds the model, and class of its configuration."""


class _Models(Mapping[str, tuple[Callable[[Any], Any], type[Any]]]):
    """Name -> (builder, class of the configuration); a lookup imports the module."""

    def __getitem__(self, name: str) -> tuple[Callable[[Any], Any], type[Any]]:
        module, build, config = _PLACES[name]
        with naming_missing():
            found = import_module(f"{__name__}.{module}")
        return getattr(found, build), getattr(found, config)

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


MODELS = _Models()


def kind_of(model: Any) -> str | None:
    """Return the name in `MODELS` of a model that upop built, or None."""
    config = type(getattr(model, "config", None))
    here = (config.__module__.removeprefix(f"{__name__}."), config.__qualname__)
    return next((name for name, (module, _, kind) in _PLACES.items() if (module, kind) == here), None)
