"""Exceptions raised on purpose, one family.

    BlockSkipError (ValueError)
    +-- InvalidInputError       a setting, picture, caption or selection that cannot be used
    +-- UnsupportedModelError   the model is not a supported diffusion transformer
    +-- CacheError              stored residuals that are stale, truncated, damaged or for something else
    +-- CheckpointError         a training state that belongs to another run
    +-- StorageError            a file that cannot be written
    +-- LoraFileError           a LoRA that does not fit the model or cannot be read
    +-- PatchAdapterError       patch adapters that do not fit the model or cannot be read
    +-- TrainingError           training cannot continue (a loss that is not finite, a failed self-check)
    +-- OutOfMemoryError        a device ran out of memory; defined in hosts, because it also derives from theirs
    +-- UncountableError        memory could not be counted; defined beside the counting in hosts, and caught by all who count

Every message is one or two sentences: what was expected, what was received, what to do.
"""

PUBLIC_NAME = "BlockSkip"


class BlockSkipError(ValueError):
    """Base class of everything that this package raises on purpose.

    A host shows the full name of an exception to users. Ours is "BlockSkip.InvalidInputError", without the module's
    path, which would be the path of the folder in which the pack is installed.
    """

    __module__ = PUBLIC_NAME

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = PUBLIC_NAME


class InvalidInputError(BlockSkipError):
    """A setting or an input that cannot be used."""


class UnsupportedModelError(BlockSkipError):
    """The model is not a diffusion transformer of a supported family."""


class CacheError(BlockSkipError):
    """Stored residuals that must not be used."""


class CheckpointError(BlockSkipError):
    """A training state that must not be used."""


class StorageError(BlockSkipError):
    """A file that cannot be written."""


class LoraFileError(BlockSkipError):
    """A LoRA that does not fit the model, or a file that cannot be read."""


class PatchAdapterError(BlockSkipError):
    """Patch adapters that do not fit the model, or a file that cannot be read."""


class TrainingError(BlockSkipError):
    """Training that cannot continue."""
