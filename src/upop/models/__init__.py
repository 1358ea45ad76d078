"""The models that upop builds itself, by the name under which they are saved: how one is made, and from what.

A model carries the configuration that it was made from, before pruning, as `config`; its class tells models apart.
"""

from collections.abc import Callable
from typing import Any

from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.classifier import ClassifierConfig, build_classifier
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.segmenter import Segmenter, SegmenterConfig
from upop.models.vqa import BlipVqa, VqaConfig

MODELS: dict[str, tuple[Callable[[Any], Any], type[Any]]] = {
    "blip-caption": (BlipCaption, CaptionConfig),
    "blip-nlvr": (BlipNlvr, NlvrConfig),
    "blip-retrieval": (BlipRetrieval, RetrievalConfig),
    "blip-vqa": (BlipVqa, VqaConfig),
    "classifier": (build_classifier, ClassifierConfig),
    "clip-retrieval": (ClipRetrieval, ClipConfig),
    "segmenter": (Segmenter, SegmenterConfig),
}


def kind_of(model: Any) -> str | None:
    """Return the name in `MODELS` of a model that upop built, or None."""
    config = type(getattr(model, "config", None))
    return next((name for name, (_, known) in MODELS.items() if known is config), None)
