"""Change of a module's class in place and back: the module, its parameters and its hooks stay.

A generated class puts a mixin in front of the module's own class. It keeps that class's name after a prefix. Code that
looks the class up by name (pipelines, model cards, ``architectures`` in a config) therefore still finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, ClassVar, cast

from torch import nn

from veneer.errors import TargetError
from veneer.model.cut_weight import is_part

_MADE_HERE = "_made_by_change_class"


class InPlace:
    """Base class of every mixin that changes a module's class in place.

    It allows copying and pickling although no Python module holds the generated class. ``swapped`` names the parameters
    that are read through ``effective``, so that an adapter can replace them.
    """

    name_prefix: ClassVar[str] = ""
    swapped: ClassVar[tuple[str, ...]] = ()

    def effective(self, parameter: str) -> Any:
        """Return the value of a swapped parameter that the module's forward reads."""
        raise NotImplementedError

    @classmethod
    def own_body(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Return attributes, such as ``forward``, for the class that `change_class` generates from this mixin and
        ``base``. Mixins that need them override this.
        """
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (mixin_of(type(self)), base_of(type(self)), type(self).swapped), self.__getstate__()


def change_class(module: nn.Module, mixin: type[InPlace], swapped: tuple[str, ...] = ()) -> None:
    """Put ``mixin`` in front of the module's own class. If the module has it already, extend its ``swapped``.

    Raises TargetError if torch.compile wraps the module, or if another library has replaced its forward: both would
    bypass the mixin.
    """
    if "_orig_mod" in module._modules:
        raise TargetError(
            "this model is compiled, and adapters would have no effect: attach them first, then torch.compile"
        )
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise TargetError(
            f"the forward of this {type(module).__name__} was replaced on the module itself (by a patching library); "
            "the adapter would have no effect. Attach adapters before patching, or remove the patch."
        )
    own = type(module)
    base = base_of(own) if issubclass(own, mixin) else own
    names = tuple(sorted({*swapped, *getattr(own, "swapped", ())}))
    module.__class__ = _class(cast(Hashable, mixin), cast(Hashable, base), names)
    _rebind_hooked_forward(module)


def restore_class(module: nn.Module) -> None:
    """Undo `change_class`. A class that another library has put in front since then stays there."""
    module.__class__ = _without_generated(type(module))
    _rebind_hooked_forward(module)


def base_of(cls: type) -> type[nn.Module]:
    """Return the class that a generated class was made from."""
    return cast("type[nn.Module]", _generated(cls).__bases__[1])


def plain_class(cls: type) -> type[nn.Module]:
    """Return the class that a module had before any mixin or another library's class was put in front."""
    return _without_generated(cls) if any(_MADE_HERE in vars(each) for each in cls.__mro__) else cls


def mixin_of(cls: type) -> type[InPlace]:
    """Return the mixin that a generated class was made with."""
    return cast("type[InPlace]", _generated(cls).__bases__[0])


def _generated(cls: type) -> type:
    """Return the class in a module's bases that `inplace` generated. The module's own class may be one that FSDP2 has
    derived from it.
    """
    return next(each for each in cls.__mro__ if _MADE_HERE in vars(each))


def _without_generated(cls: type) -> type[nn.Module]:
    if _MADE_HERE in vars(cls):
        return base_of(cls)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    front, behind = cls.__bases__
    return type(cls.__name__, (front, _without_generated(behind)), own)


@functools.cache
def _class(mixin: Hashable, base: Hashable, swapped: tuple[str, ...]) -> type[nn.Module]:
    mixin_class, base_class = cast("type[InPlace]", mixin), cast(type, base)
    body: dict[str, Any] = {name: _reading(name) for name in swapped}
    body |= mixin_class.own_body(base_class)
    body |= {"__module__": base_class.__module__, "__doc__": base_class.__doc__, "swapped": swapped, _MADE_HERE: True}
    return type(mixin_class.name_prefix + base_class.__name__, (mixin_class, base_class), body)


def _reading(name: str) -> property:
    """Return a property that reads the parameter ``name`` through the module's ``effective`` method. Its setter sets
    the module's parameter itself.

    If the parameter is a shard, it is returned unchanged, because FSDP2 expects its own object there. No computation
    reads a shard.
    """

    def read(module: Any) -> Any:
        own = module._parameters.get(name)
        return own if is_part(own) else module.effective(name)

    return property(read)


def _blank(mixin: type[InPlace], base: type[nn.Module], swapped: tuple[str, ...]) -> nn.Module:
    cls = _class(cast(Hashable, mixin), cast(Hashable, base), swapped)
    return cls.__new__(cls)


def _rebind_hooked_forward(module: nn.Module) -> None:
    """Make accelerate's hooks call the forward of the module's new class. They store the forward to call as
    ``_old_forward``.
    """
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)
