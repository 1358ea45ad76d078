"""Where a run computes: one device, or one per process under torchrun."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed

from upop.errors import DeviceError
from upop.settings import RunSettings


def make_accelerator(settings: RunSettings) -> Accelerator:
    """Return the accelerator of a run, with seeds set; torchrun's environment decides about processes.

    Raises:
        DeviceError: the asked-for device is not there, or there are more processes than GPUs.
    """
    _check(settings.device)
    # The accelerator's state outlives a run, and a second run in the same process may want other settings.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        gradient_accumulation_steps=settings.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
    )
    set_seed(settings.seed)
    return accelerator


def autocast(accelerator: Accelerator, settings: RunSettings) -> torch.autocast:
    """Return the context of forward passes: bfloat16 autocast where `amp` asks for it.

    Accelerate's own mixed precision would patch the model's forward for good, and a cut must be verified in float32.
    """
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.amp)


def align_for(device: torch.device, settings: RunSettings) -> int:
    """Return what kept sizes are multiples of: as set, or what runs fast on the device where the model is made."""
    if settings.align is not None:
        return settings.align
    # Tensor cores and fused attention take sizes in eights; the published ranking knows single entries alone.
    return 8 if device.type == "cuda" and settings.cost != "reference" else 1


def _check(device: str) -> None:
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise DeviceError("--device cuda was asked for, and torch sees no CUDA device here. Use --device cpu or auto.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps was asked for, and torch sees no MPS device here. Use --device cpu or auto.")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if has_cuda and device in ("auto", "cuda") and local > torch.cuda.device_count():
        raise DeviceError(
            f"torchrun started {local} processes on this machine, which has {torch.cuda.device_count()} CUDA devices. "
            "Start at most one per device (--nproc_per_node), or use --device cpu."
        )
