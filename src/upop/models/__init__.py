"""The models that upop builds itself, by the name under which they are saved.

A model carries the configuration that it was made from, before pruning, as `config`; its class tells models apart.
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
"""Name -> its module here, what builds it there, and the class of its configuration."""


class _Models(Mapping[str, tuple[Callable[[Any], Any], type[Any]]]):
    """Name -> (what builds it, the class of its configuration), imported when it is asked for."""

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
