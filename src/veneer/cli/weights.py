"""The option ``--weights``: one number for each of several inputs."""

from __future__ import annotations

from veneer.errors import ConfigError


def weights_of(weights: str | None, n: int) -> list[float]:
    """The numbers, all 1 where the option is not given. Raises ConfigError unless there is one for each input."""
    given = [1.0] * n if weights is None else weights.replace(",", " ").split()
    try:
        numbers = [float(w) for w in given]
    except ValueError as error:
        raise ConfigError(f"--weights {weights!r} must be numbers separated by spaces or commas") from error
    if len(numbers) != n:
        raise ConfigError(f"--weights has {len(numbers)} numbers for {n} inputs: give one for each")
    return numbers
