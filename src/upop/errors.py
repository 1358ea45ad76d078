"""The errors of the library, each derived from `UPopError` and from the built-in error that it specialises."""

from upop.pruning.deprecated import renamed_arguments, renamed_attributes
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
    """An annotation file, a sample or an image is missing or malformed; the message names file and sample."""


@renamed_attributes(record="sample")
class BadImageError(DataError):
    """An image or a label map cannot be read; `skip_bad_images` tolerates some of them.

    Attributes:
        image: the file.
        file: the annotation file or folder that refers to it.
        sample: number of its sample.
        reason: the problem.
    """

    # The message alone must suffice: errors of worker processes are rebuilt from it.
    @renamed_arguments(record="sample")
    def __init__(self, message: str, image: str = "", file: str = "", sample: int = -1, reason: str = "") -> None:
        super().__init__(message)
        self.image, self.file, self.sample, self.reason = image, file, sample, reason


class CheckpointError(UPopError, ValueError):
    """A checkpoint cannot be read, carries more than tensors, or does not fit the model."""


class MissingLibraryError(UPopError, ModuleNotFoundError):
    """A required library is not installed; the message has the command to install it."""


class DeviceError(UPopError, RuntimeError):
    """The requested device or number of processes is not available."""


class RunFolderError(UPopError, OSError):
    """A run directory cannot be written: no permission, no space, or not a folder."""


class TrainingError(UPopError, RuntimeError):
    """Training cannot continue: loss or gradients remain non-finite."""


class LostProcessError(TrainingError):
    """Another process of the run has ended, so this one cannot continue; the cause is in that process."""


class OutOfMemoryError(UPopError, MemoryError):
    """A step does not fit into memory; the message names the batch, and settings that reduce memory."""


class PreemptedError(UPopError, RuntimeError):
    """The run got SIGTERM, saved a checkpoint and ended; `--resume` continues from there."""

    exit_code = 75
    """Exit code of a command: EX_TEMPFAIL of sysexits.h, "try again later"."""


__all__ = [
    "BadImageError",
    "CheckpointError",
    "DataError",
    "DeviceError",
    "LayoutError",
    "LostProcessError",
    "MissingLibraryError",
    "OutOfMemoryError",
    "PlanError",
    "PreemptedError",
    "RunFolderError",
    "SettingError",
    "StepError",
    "TrainingError",
    "UPopError",
    "VerificationError",
    "nearest",
]
