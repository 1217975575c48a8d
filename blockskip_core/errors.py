"""Exceptions raised on purpose, one family.

    BlockSkipError (ValueError)
    +-- InvalidInputError       a setting, picture, caption or selection that cannot be used
    +-- UnsupportedModelError   the model is not a diffusion transformer that we know
    +-- CacheError              stored residuals that are stale, foreign, truncated or damaged
    +-- CheckpointError         a training state that belongs to another run
    +-- StorageError            a disk that refuses to write
    +-- LoraFileError           a LoRA that does not fit the model or cannot be read
    +-- TrainingError           training cannot continue (a loss that is not finite, a failed self-check)
    +-- OutOfMemoryError        a device without memory left; defined in hosts, because it is also one of theirs

Every message is one or two sentences: what was expected, what came, what to do.
"""


class BlockSkipError(ValueError):
    """Base class of everything that this package raises on purpose."""


class InvalidInputError(BlockSkipError):
    """A setting or an input that cannot be used."""


class UnsupportedModelError(BlockSkipError):
    """The model is not a diffusion transformer that an adapter exists for."""


class CacheError(BlockSkipError):
    """Stored residuals that must not be used."""


class CheckpointError(BlockSkipError):
    """A training state that must not be used."""


class StorageError(BlockSkipError):
    """A disk that refuses to write."""


class LoraFileError(BlockSkipError):
    """A LoRA that does not fit the model, or a file that cannot be read."""


class TrainingError(BlockSkipError):
    """Training that cannot continue."""
