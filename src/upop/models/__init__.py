"""The models that no library has, by the name under which they are saved: (class, class of its configuration)."""

from typing import Any

from upop.models.nlvr import BlipNlvr, NlvrConfig

MODELS: dict[str, tuple[Any, Any]] = {"blip-nlvr": (BlipNlvr, NlvrConfig)}
