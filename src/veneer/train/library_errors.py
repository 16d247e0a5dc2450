"""Reports errors of transformers and TRL to a user in one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from veneer.errors import ConfigError, VeneerError
from veneer.recipe.advice import in_recipe_words
from veneer.recipe.recipe import LIBRARY_ERRORS

_OWN = Path(__file__).parents[1]


@contextmanager
def refusals_told() -> Iterator[None]:
    """Enter a context that turns errors of a trainer's constructor into ConfigError. Errors of veneer's
    own code stay.
    """
    try:
        yield
    except VeneerError:
        raise
    except LIBRARY_ERRORS as error:
        place = _last_place(error.__traceback__)
        if place.is_relative_to(_OWN):
            raise
        told = in_recipe_words(str(error)) or "without a word"
        raise ConfigError(
            f"the trainer cannot be made with these settings: {_package(place)} says {type(error).__name__}: {told}"
        ) from error


def _last_place(traceback: TracebackType | None) -> Path:
    """Return the source file of a traceback's innermost frame, or an empty path without a traceback."""
    place = Path()
    while traceback is not None:
        place, traceback = Path(traceback.tb_frame.f_code.co_filename), traceback.tb_next
    return place


def _package(place: Path) -> str:
    """Return the name of the package that a file belongs to."""
    _, found, inside = place.as_posix().rpartition("site-packages/")
    return inside.partition("/")[0] if found else "Python"
