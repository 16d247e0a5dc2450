"""Options of ``veneer plan``: sizes with units, the options of each question, and invalid values.

All options are checked before torch and transformers are imported, which takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from veneer.errors import ConfigError
from veneer.plan.advice import TASKS
from veneer.plan.cards import card_problem
from veneer.recipe.adapter import names_of
from veneer.recipe.distributed_part import PLANNED
from veneer.recipe.key_checks import perhaps
from veneer.recipe.known import declared_methods
from veneer.recipe.parts import ModelPart

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MOST_UNITS = 1e9  # of a size, whatever its unit
PLAN, FIT, SERVE, ADVICE = "the plan itself", "--fit", "--serve", "--advice"
READ_BY = {
    "--method": (PLAN, FIT, SERVE),
    "--rank": (PLAN, FIT, SERVE),
    "--targets": (PLAN, FIT, SERVE),
    "--quantization": (PLAN, FIT, SERVE),
    "--length": (PLAN, FIT),
    "--batch": (PLAN, FIT),
    "--write": (FIT,),
    "--card": (PLAN, FIT, SERVE),
    "--memory": (SERVE,),
    "--processes": (PLAN,),
    "--strategy": (PLAN,),
    "--shard": (PLAN,),
    "--bandwidth": (PLAN,),
    "--rows": (PLAN, ADVICE),
    "--tokens": (ADVICE,),
    "--task": (ADVICE,),
    "--png": (PLAN,),
    "--no-time": (PLAN, FIT),
}


COUNTS = ("--rows", "--tokens", "--processes", "--shard", "--rank", "--length", "--batch")
_NAMES = {"--rank": "--rank (--r)"}  # of options with two
OF_SEVERAL = ("--strategy", "--shard", "--bandwidth")


def bytes_from(text: str, option: str) -> int:
    """Return ``24GB``, ``80GiB``, ``500 MB`` as bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or not 0 < float(match[1]) < _MOST_UNITS:
        raise ConfigError(
            f"{option} {text!r:.40} is no size: write a number above 0 with MB, GB, MiB or GiB, such as 24GB"
        )
    return int(float(match[1]) * unit)


def unread(asked: Mapping[str, bool], given: Mapping[str, Any]) -> list[str]:
    """Return the problems of given options that the ``asked`` question does not read.

    An option that is None is not given.
    """
    chosen = [name for name, is_asked in asked.items() if is_asked]
    found = []
    if len(chosen) > 1:
        found.append(f"{' and '.join(chosen)} answer questions of their own: give one of them")
    reads = chosen or [PLAN]
    for option, value in given.items():
        readers = READ_BY[option]
        if value is None or any(mode in readers for mode in reads):
            continue
        if chosen and PLAN in readers:
            found.append(f"{option} is not read by {chosen[0]}: leave it out")
        else:
            also = f". The settings of a run that fit into it: --fit {value}" if option == "--memory" else ""
            found.append(f"{option} is read by {readers[0]} alone: add {readers[0]}, or leave it out{also}")
    return found


def wrong(given: Mapping[str, Any]) -> list[str]:
    """Return the problems of ``given`` options with invalid values."""
    found = [
        f"{_NAMES.get(name, name)} {given[name]} must be at least 1"
        for name in COUNTS
        if given[name] is not None and given[name] < 1
    ]
    if given["--bandwidth"] is not None and not given["--bandwidth"] > 0:
        found.append(f"--bandwidth {given['--bandwidth']} must be above 0")
    for name, values in _choices().items():
        value = given[name]
        if value is not None and value not in values:
            found.append(f"{name} {value!r} must be one of {', '.join(values)}{perhaps(value, values)}")
    problem = None if given["--card"] is None else card_problem(given["--card"])
    return found if problem is None else [*found, f"--card {problem}"]


def _choices() -> dict[str, Sequence[str]]:

    return {
        "--method": names_of(declared_methods()),
        "--quantization": get_args(ModelPart.model_fields["quantization"].annotation),
        "--strategy": PLANNED,
        "--task": TASKS,
    }
