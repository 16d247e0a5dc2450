"""Templates over the columns of a row, such as ``"Review: {text}"``."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError, DataError


class _Fields(string.Formatter):
    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if value is None:
            raise DataError(f"the field {field_name!r} of the template is empty (null): fill it, or leave the row out")
        return value, first


def fields_of(template: str) -> set[str]:
    """Return the columns that a template names. Return none if it cannot be parsed, for which
    `fill_template` raises.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError:
        return set()
    return {re.split(r"[.\[]", name, maxsplit=1)[0] for name in names}


def fill_template(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template such as ``"Review: {text}"`` with the columns of a row.

    Raises DataError if the row lacks a column or its value is empty, ConfigError if the template cannot be parsed.
    """
    try:
        return _Fields().vformat(template, (), row)
    except DataError:  # a ValueError too
        raise
    except KeyError as error:
        raise DataError(
            f"the template {template!r} asks for the field {error}, and there are {sorted(row)}: name one of these"
        ) from error
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the template {template!r} does not fit the columns {sorted(row)} ({type(error).__name__}: {error}); "
            "write {{ and }} for braces that are meant as such"
        ) from error
