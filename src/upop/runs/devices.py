"""The devices of a run: one, or one per process under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import Tensor

from upop.errors import DeviceError, UPopError
from upop.pruning.round_to import RoundTo
from upop.settings import RunSettings

# How long processes wait for one that works alone, on a download or on scoring captions. A process that dies is noticed
# at once.
PATIENCE = timedelta(minutes=30)

Decision = TypeVar("Decision")


def make_accelerator(settings: RunSettings) -> Accelerator:
    """Return the accelerator of a run, and set seeds; the environment of torchrun determines the processes.

    Raises:
        DeviceError: the requested device is missing, there are more processes than GPUs, or sharding is requested with
            a single process.
    """
    _check(settings.device)
    # The accelerator's state outlives a run, and a second run in the same process may want other settings.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        gradient_accumulation_steps=settings.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if settings.sharding == "fsdp" and accelerator.num_processes == 1:
        raise DeviceError(
            "--fsdp shards weights over several processes, and there is only one. Start the command with "
            "torchrun --nproc_per_node N, with N of at least 2, or leave --fsdp out."
        )
    set_seed(settings.seed)
    return accelerator


def agreed(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """Return a decision of the main process on all processes, since it alone sees all files that it wrote.

    Args:
        accelerator: of the run.
        decide: called on the main process only; its result must be picklable.

    Raises:
        UPopError: raised by `decide`, on all processes.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UPopError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(Decision, outcome[0])


def autocast(accelerator: Accelerator, settings: RunSettings) -> torch.autocast:
    """Return the context of forward passes: bfloat16 autocast if `amp` is set.

    Accelerate's mixed precision would patch the forward pass permanently, but a cut must be verified in float32.
    """
    return autocast_on(accelerator.device, settings)


def autocast_on(device: torch.device, settings: RunSettings) -> torch.autocast:
    """Return the context of forward passes on a device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.amp)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def alone(device: torch.device) -> Accelerator:
    """Return a substitute for the accelerator that works in a single process."""
    return cast(Accelerator, _Alone(device))


class _Alone:
    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gather(self, values: Any) -> Any:
        return values

    def gather_for_metrics(self, values: Any) -> Any:
        return values

    def reduce(self, value: Tensor, _how: str) -> Tensor:
        return value


def round_to_for(device: torch.device, settings: RunSettings) -> RoundTo:
    """Return `round_to`: as set, or the value that is fast on the device of the model."""
    if settings.round_to is not None:
        return settings.round_to
    # Tensor cores and fused attention need multiples of eight; the published ranking removes single channels.
    return 8 if device.type == "cuda" and settings.cost != "reference" else 1


def _check(device: str) -> None:
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise DeviceError("--device cuda was given, but torch sees no CUDA device. Use --device cpu or auto.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps was given, but torch sees no MPS device. Use --device cpu or auto.")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if has_cuda and device in ("auto", "cuda") and local > torch.cuda.device_count():
        raise DeviceError(
            f"torchrun started {local} processes on this machine, which has {torch.cuda.device_count()} CUDA devices. "
            "Start at most one per device (--nproc_per_node), or use --device cpu."
        )
