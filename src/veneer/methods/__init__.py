"""One file per method, found by its name: dropping ``x.py`` here adds the method.

A file offers subclasses of the four contracts in `core.method`. A variant of LoRA (a file with a `SWITCH`) is a
function on LoRA's record instead: see `methods.lora`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

from veneer.core.method import MethodConfig


@functools.cache
def all_methods() -> dict[str, type[MethodConfig]]:
    """Every method in this folder, by its ``peft_type``."""
    found: dict[str, type[MethodConfig]] = {}
    for module_info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        module = importlib.import_module(module_info.name)
        found |= {value.peft_type: value for value in vars(module).values() if _is_method(value, module.__name__)}
    return found


def _is_method(value: object, module_name: str) -> bool:
    """Whether it is a config of its own: defined in that module, with nothing left abstract."""
    own = inspect.isclass(value) and issubclass(value, MethodConfig) and value.__module__ == module_name
    return own and not inspect.isabstract(value) and hasattr(value, "peft_type")
