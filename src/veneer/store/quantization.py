"""Quantization of a base model at load time: the fields of transformers' bitsandbytes config, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import torch
from transformers import PreTrainedModel

from veneer.errors import ConfigError
from veneer.ops.four_bit import FourBitLayout
from veneer.ops.four_bit_codes import QUANT_TYPES
from veneer.quant.four_bit import FourBitSpec
from veneer.quant.int8 import Int8Spec
from veneer.quant.spec import StorageSpec
from veneer.store.checkpoint import Stored
from veneer.store.quantization_config import QuantizationConfig, left_dense
from veneer.store.quantized.readers import READERS
from veneer.store.quantizer import METHOD, register

ON_DISK = "bitsandbytes"
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what bitsandbytes stores beside a weight
COMPANION = re.compile(r"(?P<layer>.+)\.(weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format)")
# said twice, or about the container of the bytes, which each tensor tells itself
IGNORED_ON_DISK = ("quant_method", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_storage")


# not frozen: transformers' mixin is a dataclass that is not
@dataclass(init=False, repr=False, eq=False)
class BitsAndBytesConfig(QuantizationConfig):
    """``quantization_config`` of ``from_pretrained`` that loads a model in 4 or 8 bits.

    ``load_in_4bit`` goes with ``bnb_4bit_quant_type`` ("fp4", or "nf4" as in QLoRA) and ``bnb_4bit_use_double_quant``;
    the alternative is ``load_in_8bit``. ``bnb_4bit_compute_dtype`` is the dtype of products; None takes the dtype of
    the input. ``llm_int8_skip_modules`` names modules to keep in 16 bits. The head and the embeddings always are.
    ``bnb_4bit_quant_storage`` must be uint8, the dtype of codes. ``llm_int8_threshold`` is kept for other readers of a
    saved model: activations are never quantized here, so there are no outliers to separate.

    Raises ConfigError for unknown fields and values and for fields that contradict each other, all in one message.
    """

    marks = ("weight.absmax", "SCB")

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | None = None

    def __init__(self, **values: Any) -> None:
        known = {spec.name: spec.default for spec in fields(self)}
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise ConfigError(f"BitsAndBytesConfig has no field {', '.join(unknown)}; it has {', '.join(known)}")
        for name, value in (known | values).items():
            setattr(
                self, name, _dtype(value) if name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage") else value
            )
        self.quant_method = cast(Any, METHOD)
        problems = self._problems()
        if problems:
            raise ConfigError("BitsAndBytesConfig: " + "; ".join(problems))
        register()

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any], asked: BitsAndBytesConfig | None = None) -> Self:
        """Return the config of a checkpoint that bitsandbytes or veneer saved quantized, from its ``config.json``.

        ``asked`` gives the compute dtype. Raises ConfigError if it asks for a bit width other than the checkpoint's.
        """
        values = {key: value for key, value in stored.items() if key not in IGNORED_ON_DISK}
        config = cls(**{"load_in_8bit": not values.get("load_in_4bit", False)} | values)
        if asked is not None:
            if asked.load_in_4bit != config.load_in_4bit:
                bits = {True: "4", False: "8"}
                raise ConfigError(
                    f"the checkpoint is quantized to {bits[config.load_in_4bit]} bits and "
                    f"{bits[asked.load_in_4bit]} are asked for: load the 16-bit model, or ask for what is stored"
                )
            config.bnb_4bit_compute_dtype = asked.bnb_4bit_compute_dtype
        return config

    def merged_with(self, stored: Mapping[str, Any]) -> Self:
        method = str(stored.get("quant_method", ON_DISK))
        if method not in (ON_DISK, METHOD):
            advice = (
                "leave quantization_config out (load_in_4bit=False), and it is read as it is"
                if method in READERS
                else f"load a 16-bit copy of the model, or one quantized with {', '.join(READERS)}"
            )
            raise ConfigError(
                f"the checkpoint is quantized with {method!r}, which is not the format of bitsandbytes: {advice}"
            )
        return self.from_stored(stored, self)

    def left_out(self, model: PreTrainedModel, *, stored: bool) -> list[str]:
        skip = left_dense(model, self.llm_int8_skip_modules, also_head=not stored)
        if self.llm_int8_skip_modules is not None:
            # readers of the saved model take this list as it is, without the head
            self.llm_int8_skip_modules = sorted(skip)
        return skip

    def grouped(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        known = dict.fromkeys(names)
        for name in known:
            match = COMPANION.fullmatch(name)
            if match and f"{match['layer']}.weight" in known:
                parts = found.setdefault(match["layer"], {"weight": f"{match['layer']}.weight"})
                parts[name.removeprefix(f"{match['layer']}.")] = name
        return found

    def stored_shape(self, layer: str, parts: Mapping[str, Stored]) -> tuple[int, ...] | None:
        return parts["weight"].shape if self.load_in_8bit else None

    def spec_of(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec:
        if self.load_in_8bit:
            return Int8Spec(shape, dtype)
        layout = FourBitLayout(shape, self.bnb_4bit_quant_type, dtype=dtype)
        return FourBitSpec(layout, self.bnb_4bit_use_double_quant, self.bnb_4bit_compute_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the ``quantization_config`` of a saved model, which transformers reads as its bitsandbytes config."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        compute = self.bnb_4bit_compute_dtype
        return values | {
            "quant_method": ON_DISK,
            "_load_in_4bit": self.load_in_4bit,
            "_load_in_8bit": self.load_in_8bit,
            "bnb_4bit_compute_dtype": None if compute is None else str(compute).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }

    def _problems(self) -> list[str]:
        found = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(spec.default, bool) and not isinstance(value, bool):
                found.append(f"{spec.name}={value!r} must be True or False")
        if bool(self.load_in_4bit) == bool(self.load_in_8bit):
            found.append("exactly one of load_in_4bit and load_in_8bit must be True")
        if self.bnb_4bit_quant_type not in QUANT_TYPES:
            found.append(f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r} must be one of {list(QUANT_TYPES)}")
        if self.bnb_4bit_compute_dtype not in (None, *COMPUTE_DTYPES):
            found.append(f"bnb_4bit_compute_dtype={self.bnb_4bit_compute_dtype!r} must be float32, bfloat16 or float16")
        if self.bnb_4bit_quant_storage not in (None, torch.uint8):
            found.append(f"bnb_4bit_quant_storage={self.bnb_4bit_quant_storage!r} must be uint8")
        if self.llm_int8_enable_fp32_cpu_offload or self.llm_int8_has_fp16_weight:
            found.append("llm_int8_enable_fp32_cpu_offload and llm_int8_has_fp16_weight are not offered")
        threshold = self.llm_int8_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold < 0:
            found.append(f"llm_int8_threshold={threshold!r} must be a number of at least 0")
        skip = self.llm_int8_skip_modules
        if skip is not None and not (isinstance(skip, list | tuple) and all(isinstance(name, str) for name in skip)):
            found.append(f"llm_int8_skip_modules={skip!r} must be a list of module names")
        return found


def _dtype(value: object) -> object:
    """Return the torch dtype that a string names, as in config files ("bfloat16", "torch.bfloat16"). Any other value is
    returned unchanged.
    """
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return found if isinstance(found, torch.dtype) else value
