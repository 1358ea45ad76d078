"""All errors of the library, in one small family. Each is also the built-in error it specialises."""

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
    """An image or a label map cannot be read; a run may be told to do without a number of them (`skip_bad_images`).

    Attributes:
        image: the file.
        file: the annotation file, or the folder, that asks for it.
        sample: the number of the sample there.
        reason: what is wrong with it.
    """

    # One text is enough to make one, for a worker process's error is made anew from its text alone.
    @renamed_arguments(record="sample")
    def __init__(self, message: str, image: str = "", file: str = "", sample: int = -1, reason: str = "") -> None:
        super().__init__(message)
        self.image, self.file, self.sample, self.reason = image, file, sample, reason


class CheckpointError(UPopError, ValueError):
    """A checkpoint cannot be read, carries more than tensors, or does not fit the model."""


class MissingLibraryError(UPopError, ModuleNotFoundError):
    """A library that this needs is not installed; the message has the command that installs it."""


class DeviceError(UPopError, RuntimeError):
    """The asked-for device or number of processes is not there."""


class RunFolderError(UPopError, OSError):
    """A run folder cannot be written: no permission, no space, or not a folder."""


class TrainingError(UPopError, RuntimeError):
    """Training cannot go on: the loss or the gradients stay non-finite."""


class LostProcessError(TrainingError):
    """Another process of the run has ended, so that this one cannot go on; the cause is there, not here."""


class OutOfMemoryError(UPopError, MemoryError):
    """A step does not fit into memory; the message names the batch, and the settings that make it smaller."""


class PreemptedError(UPopError, RuntimeError):
    """The run was asked to end (SIGTERM) and did, after saving where it stands: `--resume` goes on from there."""

    exit_code = 75
    """What a command that ends so exits with: EX_TEMPFAIL of sysexits.h, "try again later"."""


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
