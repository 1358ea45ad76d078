"""Measures memory of steps and free memory, and explains out-of-memory errors."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upop.errors import OutOfMemoryError, UPopError
from upop.settings import RunSettings

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_CGROUP = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")
_LIMITS = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}
"""Files of a control group's memory, of both versions by their folder: the limit, the use, and what it is used for."""
_PASSES = ("batch_size_test", "rerank_batch", "rank_chunk", "window_batch")
"""Settings that limit the memory of an evaluation; a task has some of them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the machine is out of memory."""
    if isinstance(error, UPopError):
        return isinstance(error, OutOfMemoryError)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, Exception)
        and (should_reduce_batch_size(error) or os.strerror(errno.ENOMEM) in str(error))  # as of a file that is mapped
    )


@contextmanager
def explained_memory(
    settings: RunSettings, device: torch.device, *, evaluating: bool = False, saved: bool = True
) -> Iterator[None]:
    """Turn torch's out-of-memory errors within the block into an `OutOfMemoryError` that says what to change.

    Args:
        settings: of the run.
        device: of the run.
        evaluating: whether the block evaluates a model, instead of training one.
        saved: whether the run keeps checkpoints.

    Raises:
        OutOfMemoryError: there is not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        killed = "is killed by signal" in str(error)  # a worker process, by the system
        if isinstance(error, UPopError) or not (killed or is_out_of_memory(error)):
            raise
        advice = _workers(settings) if killed else _evaluation(settings) if evaluating else _training(settings)
        message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kept = f"Earlier results are in {settings.output_dir}; --resume continues from the last checkpoint."
        if not saved:
            kept = "--dry-run estimates what it takes. The model on disk is unchanged."
        raise OutOfMemoryError(f"Out of memory on {device}. {advice}\n{kept} Torch says: {message}") from error


def _training(settings: RunSettings) -> str:
    size, passes = settings.batch_size_train, settings.accumulate
    ways = []
    if size > 1:
        ways.append(
            f"batch_size_train={max(1, size // 2)} with accumulate={passes * 2 if size % 2 == 0 else passes * size} "
            "keeps the samples per step"
        )
    ways.append("batch_size_train=auto (--batch-size auto) finds the largest batch that fits")
    if not settings.amp:
        ways.append("amp (--amp) halves most activations")
    if not settings.grad_checkpointing:
        ways.append("grad_checkpointing (--grad-checkpointing) recomputes activations instead of storing them")
    return (
        f"Training uses batches of {size} samples (batch_size_train), {passes} per step. To save memory: "
        f"{'; '.join(ways)}."
    )


def _evaluation(settings: RunSettings) -> str:
    values = {name: getattr(settings, name) for name in _PASSES if hasattr(settings, name)}
    names = ", ".join(f"{name} (now {value})" for name, value in values.items())
    amp = "" if settings.amp else "; amp (--amp) halves most activations"
    return f"This happened in an evaluation. Lower {names}, which changes no result{amp}."


def _workers(settings: RunSettings) -> str:
    return (
        f"The system ended a worker process of a loader. Lower num_workers (now {settings.num_workers}), or "
        "batch_size_train and batch_size_test: each worker holds two batches."
    )


def free_bytes(device: torch.device) -> int:
    """Return the free bytes for this process, of its CUDA device or of the machine.

    The limits of a container and of the process (`ulimit -v`) count, and the training processes of a machine share its
    memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = int(psutil.virtual_memory().available)
    for folder, names in _groups():
        try:
            limit, used, parts = ((folder / name).read_text() for name in names)
            held = dict(line.split() for line in parts.splitlines())
            cached = int(held.get("total_inactive_file") or held["inactive_file"])
            left = min(left, int(limit) - int(used) + cached)
        except (OSError, ValueError, KeyError):  # no container, or one without a limit
            continue
    if resource is not None:
        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            left = min(left, max(0, most - psutil.Process().memory_info().vms))
    return left // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of the control groups that this process may be in, and the names of their files."""
    yield from ((_CGROUP / version, names) for version, names in _LIMITS.items())  # as a container sees its own
    try:
        lines = _OF_PROCESS.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, version, path = line.split(":", 2)
        if version in _LIMITS:
            yield _CGROUP / version / path.lstrip("/"), _LIMITS[version]


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now, libraries included."""
    return int(psutil.Process().memory_info().rss)


def format_bytes(count: int) -> str:
    """Return a number of bytes with its unit: 1.50 GiB, 12.00 MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the peak bytes of tensors created in `step`, without kernel workspaces."""
    alive = _Alive()
    with alive:
        step()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Tracks the storages of all created tensors until they are freed."""

    peak: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {id(part.untyped_storage()) for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and not part.is_meta and id(part.untyped_storage()) not in before:
                self._follow(part.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def freed(_: object) -> None:
            self._now -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self._now += size
        self.peak = max(self.peak, self._now)


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Return the bytes that a forward pass saves for backward, without the model's own tensors.

    That is the same on every device that runs the same kernels.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor  # kept alive, so that no other tensor reuses its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total
