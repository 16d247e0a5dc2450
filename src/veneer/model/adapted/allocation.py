"""Creation of a new adapter's parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.contract import MethodConfig, Params, Shapes
from veneer.errors import FormatError
from veneer.plain.autocast import without_autocast
from veneer.records.sites import Site


@dataclass(frozen=True)
class Allocation:
    """Manner in which the parameters of a new adapter are created.

    If ``values``, they get the method's initial values; otherwise they are left uninitialized, to be loaded. If
    ``widen``, they are float32 beside a 16-bit base; otherwise they have the base's dtype.
    """

    values: bool = True
    widen: bool = True

    def parameters(
        self, method: MethodConfig, site: Site, device: torch.device, dtype: torch.dtype, start: Params | None = None
    ) -> nn.ParameterDict:
        """Return a method's new parameters for one adapted module (``site``) on a device.

        ``dtype`` is the base's dtype. The parameters have it too, unless ``widen`` makes 16-bit ones float32. If
        ``start`` is given, it holds the initial values, which were computed together with those of other modules.
        """
        values = start
        if values is None:
            with without_autocast(device):
                values = method.init(site) if self.values else _empties(method.shapes(site))
        kept, whole = torch.promote_types(dtype, torch.float32) if self.widen else dtype, method.packing.whole
        made = {name: value.to(device, whole.get(name, kept)) for name, value in values.items()}
        return nn.ParameterDict({name: nn.Parameter(value, name not in whole) for name, value in made.items()})


def _empties(shapes: Shapes) -> Params:
    return {name: _empty(name, shape) for name, shape in shapes.items()}


def _empty(name: str, shape: tuple[int, ...]) -> Tensor:
    """Allocate an uninitialized tensor for the parameter ``name``. Raises FormatError if memory does not suffice,
    because the sizes in a config have no limit.
    """
    try:
        return torch.empty(shape)
    except (RuntimeError, TypeError) as error:  # too much for this machine, or a size beyond 64 bits
        raise FormatError(
            f"{name} of shape {shape} does not fit into memory: correct the sizes in config.json, or use a larger "
            "machine"
        ) from error
