"""Describes the machine of a measurement."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Return processor, cores, threads, device, and versions of torch and Python."""
    place = torch.device(device)
    processor = _processor()
    return {
        "cpu": processor,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else processor,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
