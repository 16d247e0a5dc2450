"""Module with a frozen weight in a storage format. The format's tensors are buffers and have its keys in the state
dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer.errors import FormatError
from veneer.model.cut_weight import is_part, whole
from veneer.quant.spec import StorageSpec
from veneer.records.frozen import FrozenWeight


class CodedModule(nn.Module):
    """Module whose weight W (o, i) is in the storage format of ``spec``.

    The tensors of the format are buffers, ``weight`` first; until `fill` sets them, the weight is on the meta device.
    Casting the module (``.half()``, ``.to(dtype)``) leaves the format unchanged: its scales are part of the weight.
    ``carried`` are tensors beside the weight that no value here depends on, such as scales of activations. They are
    saved as they were read.
    """

    weight: Tensor

    def __init__(self, spec: StorageSpec) -> None:
        super().__init__()
        self.spec = spec
        self.carried: dict[str, Tensor] = {}
        for name, (dtype, shape) in spec.part_layout().items():
            empty = torch.empty(shape, dtype=dtype, device="meta") if name == "weight" else None
            self.register_buffer(name, empty)

    @property
    def is_filled(self) -> bool:
        """Return True if the weight has been set."""
        return not self.weight.is_meta

    def bound(self) -> FrozenWeight:
        """Return the weight in its storage format, with the tensors that the module holds now: shards, if it is
        sharded.
        """
        return self.spec.bind(self.parts())

    def gathered(self) -> FrozenWeight:
        """Return the weight in its storage format. Tensors that are sharded over processes are gathered."""
        return self.spec.bind(self._shaped({name: whole(part) for name, part in self.parts().items()}))

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors of the storage format that have been set."""
        held = self._buffers
        if "weight" not in held:  # frozen parameters: see `freeze_parts`
            held = {**held, **self._parameters}
        return self._shaped({name: t for name in self.spec.part_layout() if (t := held.get(name)) is not None})

    def _shaped(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors in the format's shapes. Modules whose `freeze_parts` changes shapes override this."""
        return parts

    def freeze_parts(self) -> None:
        """Register the format's tensors as frozen parameters, since FSDP shards only parameters; single numbers stay
        buffers.
        """
        for name, part in self.parts().items():
            if part.numel() > 1:
                del self._buffers[name]
                self._parameters[name] = nn.Parameter(part, requires_grad=False)  # adapters may read `weight` otherwise

    def fill(self, spec: StorageSpec, parts: dict[str, Tensor]) -> None:
        """Set the layer's weight. Raises FormatError if the spec is for another shape."""
        if spec.shape != self.spec.shape:
            raise FormatError(
                f"a weight of shape {spec.shape} does not fit a layer {self.spec.shape}: quantize the weight of this "
                "layer"
            )
        for name in self.spec.part_layout():
            del self._buffers[name]
        self.spec = spec
        for name in spec.part_layout():
            self.register_buffer(name, parts[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the format's tensors with the module, and keep their dtypes."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        names = self.spec.part_layout()
        kept = {name: self._buffers.pop(name) for name in names if name in self._buffers}
        cut = {name: self._parameters.pop(name) for name in names if name in self._parameters}  # FSDP moves them
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters |= cut
            for name, tensor in kept.items():
                self._buffers[name] = None if tensor is None else move(tensor)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        bias = self._parameters.get("bias")
        if bias is not None:
            destination[f"{prefix}bias"] = bias if keep_vars else bias.detach()
        if not self.is_filled:
            disk = {"weight": self.weight}
        elif is_part(self.weight):  # as FSDP2 has it: each process its own part
            disk = self.parts()
        else:
            disk = self.spec.to_disk(self.parts())
        destination |= {prefix + key: tensor for key, tensor in (disk | self.carried).items()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        known = {key for key in own if self.spec.owns(key)}
        if known:
            try:
                spec, parts = self.spec.from_disk(own)
                device = torch.device("cpu") if self.weight.is_meta else self.weight.device
                self.fill(spec, {name: part.to(device, copy=True) for name, part in parts.items()})
            except FormatError as error:
                error_msgs.append(f"{prefix}weight: {error}")
        else:
            missing_keys.append(f"{prefix}weight")
        held = own.keys() & self.carried.keys()
        self.carried |= {key: own[key].clone() for key in held}
        known |= held
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in known}
        kept = {name: self._buffers.pop(name) for name in self.spec.part_layout()}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._buffers |= kept
