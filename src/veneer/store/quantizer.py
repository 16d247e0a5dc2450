"""veneer's quantizer in transformers' registry: ``from_pretrained(…, quantization_config=BitsAndBytesConfig(…))``.

A model is built without weights, and its linear layers become `QuantLinear`. transformers' own loader knows every
renaming of checkpoint keys. It receives tensors that are read from disk one at a time and quantized at once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from veneer.disk.safetensors import DTYPE_NAMES, StoredTensor
from veneer.errors import CompositionError, ConfigError, FormatError, NonFiniteError
from veneer.model.attach import adapted_modules
from veneer.model.quant_linear import QuantLinear
from veneer.quant.spec import StorageSpec
from veneer.store.checkpoint import Checkpoint, is_finite

METHOD = "veneer"
ON_DISK = "bitsandbytes"
# what bitsandbytes stores beside a weight
COMPANION = re.compile(r"(?P<layer>.+)\.(weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format)")


class QuantizationConfig(Protocol):
    """Part of a quantization config used in loading."""

    llm_int8_skip_modules: list[str] | None

    def spec(self, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec:
        """Return the storage format of a weight of this shape (o, i) and dtype."""

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any], asked: Self | None = None) -> Self:
        """Return the config of an already quantized checkpoint, from its ``config.json``."""


class Deferred:
    """Tensor of the checkpoint, read when transformers' loader slices it."""

    def __init__(self, stored: StoredTensor, problems: list[str]) -> None:
        self._stored, self._problems = stored, problems

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._stored.read()
        if not is_finite(tensor):
            # noted, and raised with all others when everything has been read
            self._problems.append(f"tensor {self._stored.name!r} holds values that are not finite")
            tensor = torch.zeros_like(tensor)
        return tensor[index]

    def get_dtype(self) -> str:
        """Return the dtype's name in the file format."""
        return DTYPE_NAMES[self._stored.dtype]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._stored.shape)


class Quantize(ConversionOps):  # type: ignore[misc]
    """Step of transformers' loader that quantizes a layer's dense weight, or reads the stored codes."""

    def __init__(self, quantizer: VeneerQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        model: PreTrainedModel,
        **_: Any,  # transformers passes more than a step needs
    ) -> dict[str, Tensor]:
        """Return the codes by parameter name; the layer already has its other tensors."""
        result = {}
        for name, value in input_dict.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, QuantLinear)
            self.quantizer.fill(layer, name, value[0] if isinstance(value, list) else value, source_patterns)
            cast(Any, layer)._is_hf_initialized = True
            result[name] = layer.weight
        return result


class VeneerQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizer that loads a model in 4 or 8 bits, from a dense checkpoint or one saved by bitsandbytes or veneer."""

    quantization_config: QuantizationConfig
    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.is_stored = bool(kwargs["pre_quantized"])
        # transformers' path for checkpoints that are quantized already would cast codes to the model's dtype
        self.pre_quantized = False
        self.problems: list[str] = []
        self.stored_parts: dict[str, dict[str, StoredTensor]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        devices = kwargs.get("device_map")
        places = devices.values() if isinstance(devices, Mapping) else [devices]
        if "disk" in {str(place) for place in places}:
            raise ConfigError("device_map puts modules on disk, which quantized models cannot be: leave out 'disk'")

    def update_device_map(self, device_map: Any) -> Any:
        """Return the current GPU, if there is one and no device map is given, as bitsandbytes does."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantLinear)

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, model._keep_in_fp32_modules, add_default_skips=not self.is_stored
        )
        if config.llm_int8_skip_modules is not None:
            # readers of the saved model take this list as it is, without the head
            config.llm_int8_skip_modules = sorted(skip)
        for path, module in list(model.named_modules()):
            if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, skip):
                model.set_submodule(path, _empty_layer(module, config))

    def open(self, files: list[str]) -> dict[str, Any]:
        """Return the tensors of the checkpoint, unread. Parts of a quantized weight are kept for its layer."""
        pickled = [file for file in files if not str(file).endswith(".safetensors")]
        if pickled:
            raise ConfigError(f"{pickled[0]} is a pickle, which can run any code: convert the model to safetensors")
        tensors = Checkpoint.from_files(files).tensors
        deferred: dict[str, Any] = {}
        for name, stored in tensors.items():
            match = COMPANION.fullmatch(name) if self.is_stored else None
            layer = match["layer"] if match else name.removesuffix(".weight")
            if match and f"{layer}.weight" in tensors:
                self.stored_parts.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = stored
            else:
                deferred[name] = Deferred(stored, self.problems)
        for layer, parts in self.stored_parts.items():
            parts["weight"] = tensors[f"{layer}.weight"]
            deferred[f"{layer}.weight"] = torch.empty(0)  # stands for all of them until `fill` reads them
        return deferred

    @torch.no_grad()
    def fill(self, layer: QuantLinear, name: str, value: Tensor, sources: list[str]) -> None:
        """Set a layer's weight: quantized from ``value``, or read from disk. Errors are collected for `finish`."""
        key = sources[0].removesuffix(".weight")
        try:
            if self.is_stored:
                if key not in self.stored_parts:
                    raise FormatError("it has no quantized tensors in the checkpoint")
                name = f"{self.stored_parts[key]['weight'].path}: {name}"
                spec, parts = layer.spec.from_disk({k: t.read() for k, t in self.stored_parts[key].items()})
                layer.fill(spec, {part: tensor.to(value.device) for part, tensor in parts.items()})
            else:
                weight = value.T if layer.is_transposed else value
                layer.fill(layer.spec, layer.spec.quantize(weight))
        except (FormatError, NonFiniteError) as error:
            self.problems.append(f"{name}: {error}")

    def finish(self, model: PreTrainedModel) -> None:
        """Raise one FormatError for all collected errors, layers without a weight included."""
        empty = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and not m.is_filled]
        noted = " ".join(self.problems)
        problems = self.problems + [f"{name}.weight is not in the checkpoint" for name in empty if name not in noted]
        if problems:
            raise FormatError(f"the model cannot be loaded: {'; '.join(problems)}")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.stored_parts.clear()
        for layer in model.modules():
            if isinstance(layer, QuantLinear):
                layer.requires_grad_(False)  # biases too: they were loaded as fresh parameters
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        layers = [(path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear)]
        held = adapted_modules(model)
        if any(path in held for path, _ in layers):
            raise CompositionError(
                "the model carries adapters: merge_and_unload() or unload() them before dequantize()"
            )
        for path, layer in layers:
            model.set_submodule(path, layer.to_dense(dtype))
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def _empty_layer(module: nn.Module, config: QuantizationConfig) -> QuantLinear:
    weight = cast(Tensor, module.weight)
    rows, columns = weight.shape
    shape = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return QuantLinear(config.spec(shape, weight.dtype), cast(Any, module).bias, type(module))


@functools.cache
def register(config: type[QuantizationConfig]) -> None:
    """Register this config class and loader with transformers, once, when the first config is made.

    Two functions of transformers are wrapped because they offer no hook. One decides between a given config and a
    quantized checkpoint's own; the other opens the checkpoint. Both wrappers act only on veneer's config.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = VeneerQuantizer
    merge = auto.AutoHfQuantizer.merge_quantization_configs
    load = PreTrainedModel._load_pretrained_model

    @functools.wraps(merge)
    def merge_configs(stored: Any, asked: Any) -> Any:
        if not isinstance(asked, config):
            return merge(stored, asked)
        values = stored if isinstance(stored, dict) else stored.to_dict()
        if str(values.get("quant_method", ON_DISK)) not in (ON_DISK, METHOD):
            raise ConfigError(
                f"the checkpoint is quantized with {values['quant_method']!r}, which is not the format of "
                "bitsandbytes: leave quantization_config out"
            )
        return config.from_stored(values, asked)

    @functools.wraps(load)
    def load_pretrained(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        quantizer = load_config.hf_quantizer
        if not isinstance(quantizer, VeneerQuantizer):
            return load(model, state_dict, checkpoint_files, load_config, *rest)
        tensors = quantizer.open(checkpoint_files) if state_dict is None else state_dict
        result = load(model, tensors, checkpoint_files, load_config, *rest)
        quantizer.finish(model)
        return result

    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_configs)
    PreTrainedModel._load_pretrained_model = staticmethod(load_pretrained)
