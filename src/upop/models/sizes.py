"""What the configurations of all models check alike."""

from __future__ import annotations

from pydantic import BaseModel


def check_heads(config: BaseModel, *parts: str) -> None:
    """Raise ValueError if the width of a part ("vision", "text", ...) is no multiple of its number of heads."""
    for part in parts:
        width, heads = getattr(config, f"{part}_width"), getattr(config, f"{part}_heads")
        if width % heads:
            raise ValueError(f"{part}_width ({width}) is no multiple of {part}_heads ({heads})")
