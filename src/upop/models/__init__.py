"""The models that no library has, by the name under which they are saved: (class, class of its configuration)."""

from typing import Any

from upop.models.caption import BlipCaption, CaptionConfig
from upop.models.clip import ClipConfig, ClipRetrieval
from upop.models.nlvr import BlipNlvr, NlvrConfig
from upop.models.retrieval import BlipRetrieval, RetrievalConfig
from upop.models.vqa import BlipVqa, VqaConfig

MODELS: dict[str, tuple[Any, Any]] = {
    "blip-caption": (BlipCaption, CaptionConfig),
    "blip-nlvr": (BlipNlvr, NlvrConfig),
    "blip-retrieval": (BlipRetrieval, RetrievalConfig),
    "blip-vqa": (BlipVqa, VqaConfig),
    "clip-retrieval": (ClipRetrieval, ClipConfig),
}
