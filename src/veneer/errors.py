"""One tree of exceptions. Each message says what was given, what is allowed, and what to do."""

from dataclasses import FrozenInstanceError


class VeneerError(Exception):
    """Anything that veneer raises on purpose."""


class ConfigError(VeneerError, ValueError):
    """A config, recipe or argument holds a value that is not allowed."""


class FrozenConfigError(ConfigError, FrozenInstanceError):
    """Somebody sets a field of a config, which stays as it was made."""


class TargetError(ConfigError):
    """A target pattern matches no module, or one that a method cannot adapt."""


class NoStorageError(TargetError):
    """A model has no storage, and a pass through it is needed to find the places of an adapter."""


class DescriptionError(VeneerError, ValueError):
    """A model is no decoder that can be described."""


class AdapterNameError(ConfigError, KeyError):
    """An adapter name is unknown, already taken, or not allowed in the state that the model is in."""

    __str__ = Exception.__str__  # KeyError would print the message quoted


class CompositionError(VeneerError, ValueError):
    """Records that cannot be folded, combined or active together."""


class ShapeError(VeneerError, ValueError):
    """A tensor has a shape or dtype that does not fit."""


class TensorError(VeneerError, TypeError):
    """A tensor has no plain values in memory, which is all that a kernel can read."""


class FormatError(VeneerError, ValueError):
    """A file or folder is damaged, lies about itself, or does not fit the model."""


class DiskError(VeneerError, RuntimeError):
    """Something could not be written: the disk is full or read-only. What was there before is untouched."""


class OutOfMemoryError(VeneerError, MemoryError):
    """The system gives the process no more memory, or no more addresses for it."""


class BackendError(VeneerError, RuntimeError):
    """A kernel back end was asked for by name and is not available."""


class DataError(VeneerError, ValueError):
    """A data set holds rows that cannot be trained or evaluated on."""


class TrainingError(VeneerError, RuntimeError):
    """A training run would do nothing, or has gone wrong."""


class DivergedError(TrainingError):
    """A loss or a gradient that is not finite."""


class NonFiniteError(VeneerError, ValueError):
    """A tensor holds NaN or infinity where a finite number is needed."""


class ServingError(VeneerError, RuntimeError):
    """The engine that answers requests has broken down, or was stopped while one was on its way."""


class Interrupted(KeyboardInterrupt):
    """A signal asked a run to stop. Like KeyboardInterrupt it is no error; ``exit_code`` is what a shell expects."""

    def __init__(self, number: int, *told: str) -> None:
        super().__init__(*told)
        self.number = number

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number
