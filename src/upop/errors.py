"""All errors of the library, in one small family. Each is also the built-in error it specialises."""

from upop.pruning.errors import (
    LayoutError,
    PlanError,
    SettingError,
    StepError,
    UPopError,
    VerificationError,
    nearest,
)


class DataError(UPopError, ValueError):
    """An annotation file, a record or an image is missing or malformed; the message names file and record."""


class CheckpointError(UPopError, ValueError):
    """A checkpoint cannot be read, carries more than tensors, or does not fit the model."""


class DeviceError(UPopError, RuntimeError):
    """The asked-for device or number of processes is not there."""


class RunFolderError(UPopError, OSError):
    """A run folder cannot be written: no permission, no space, or not a folder."""


class TrainingError(UPopError, RuntimeError):
    """Training cannot go on: the loss or the gradients stay non-finite."""


__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "LayoutError",
    "PlanError",
    "RunFolderError",
    "SettingError",
    "StepError",
    "TrainingError",
    "UPopError",
    "VerificationError",
    "nearest",
]
