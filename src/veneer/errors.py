"""Tree of veneer's exceptions. Each message says what was given, what is allowed, and what to do."""

from collections.abc import Iterable
from dataclasses import FrozenInstanceError


def listed(problems: Iterable[str], source: str = "", most: int | None = None, remedy: str = "") -> str:
    """Return one message for the problems of ``source``: their count, then each once on a line of its own, indented.

    A single problem stays on the line of its source. Beyond ``most`` lines, the rest is counted. ``remedy``: a sentence
    without its full stop, behind a single problem and else on the last line.
    """
    told = list(dict.fromkeys(problems))
    head = f"{source}: " if source else ""
    if len(told) == 1:
        return head + told[0] + (f". {remedy}" if remedy else "")
    more = [f"and {len(told) - most} more"] if most is not None and len(told) > most else []
    lines = [f"{len(told)} problems", *told[:most], *more]
    return head + "\n".join(lines).replace("\n", "\n  ") + (f"\n{remedy}" if remedy else "")


class VeneerError(Exception):
    """Base class of every error that veneer raises on purpose."""


class ConfigError(VeneerError, ValueError):
    """Value of a config, recipe or argument that is not allowed."""


class FrozenConfigError(ConfigError, FrozenInstanceError):
    """Assignment to a field of a config, which keeps its value."""


class TargetError(ConfigError):
    """Target pattern that matches no module, or one that a method cannot adapt."""


class NoStorageError(TargetError):
    """Model without storage, when a pass through it is needed to find the places of an adapter."""


class UnmeasuredError(VeneerError):
    """Rate of this machine that is needed for seconds, and that was not measured."""


class DescriptionError(VeneerError, ValueError):
    """Model that is no decoder that can be described."""


class AdapterNameError(ConfigError, KeyError):
    """Adapter name that is unknown, already used, or not allowed in the present state of the model."""

    __str__ = Exception.__str__  # KeyError would print the message quoted


class CompositionError(VeneerError, ValueError):
    """Records that cannot be folded, combined or active together."""


class ShapeError(VeneerError, ValueError):
    """Tensor whose shape or dtype does not fit."""


class TensorError(VeneerError, TypeError):
    """Tensor without plain values in memory, which are all that a kernel can read."""


class FormatError(VeneerError, ValueError):
    """File or folder that is damaged, contradicts itself, or does not fit the model."""


class DiskError(VeneerError, RuntimeError):
    """Failed write, because the disk is full or read-only. The previous content is untouched."""


class OutOfMemoryError(VeneerError, MemoryError):
    """Memory, or address space, that the system or a GPU does not give the process."""


class DeviceError(VeneerError, RuntimeError):
    """GPU that cannot be used, or that is lost in the middle of a computation."""


class QueueFullError(VeneerError, RuntimeError):
    """Request beyond what may wait. ``retry_seconds`` is the time after which to ask again."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class BackendError(VeneerError, RuntimeError):
    """Kernel back end that was requested by name and is not available."""


class OutdatedKernelsError(BackendError, AttributeError):
    """Compiled kernels that are older than the Python code which calls them."""


class DataError(VeneerError, ValueError):
    """Data set with rows that cannot be trained or evaluated on."""


class TrainingError(VeneerError, RuntimeError):
    """Training run that would do nothing, or that has failed."""


class DivergedError(TrainingError):
    """Loss or gradient that is not finite."""


class LostProcessError(TrainingError):
    """End of another process of a run that several train."""


class NonFiniteError(VeneerError, ValueError):
    """Tensor that holds NaN or infinity, when a finite number is needed."""


class ServingError(VeneerError, RuntimeError):
    """Failure or stop of the serving engine while a request was in progress."""


class Interrupted(KeyboardInterrupt):
    """Signal that asked a run to stop. Like KeyboardInterrupt it is no error; ``exit_code`` is the status that a shell
    expects.
    """

    def __init__(self, number: int, *told: str) -> None:
        super().__init__(*told)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit status: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class Paused(BaseException):
    """Pause of a run at a step, with a checkpoint. Like `Interrupted` it is no error. ``loss``: the run's loss then."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"paused after step {step}, loss {loss:.4f}")
        self.loss = loss
