"""veneer's quantizer in transformers' registry: ``from_pretrained(…, quantization_config=…)``.

A model is built without weights, and its linear layers become `QuantLinear`. transformers' own loader knows every
renaming of checkpoint keys. It receives tensors that are read from disk one at a time and quantized at once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from veneer.disk.safetensors import DTYPE_NAMES
from veneer.errors import CompositionError, ConfigError, FormatError, NonFiniteError
from veneer.model.adapted.experts import CodedExperts, put_in_codes
from veneer.model.attach.attach import adapted_modules
from veneer.model.quantized.module import CodedModule
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.quantized.renamed import converter, renamer
from veneer.model.quantized.stack import CodedStack, as_maps, coded_stacks
from veneer.model.sharded.made_dense import make_dense
from veneer.store.block_by_block import Unread, load_in_turn, unread
from veneer.store.checkpoint import Checkpoint, Stored, is_finite
from veneer.store.quantization_config import QuantizationConfig, held_quantized, not_run_in_codes
from veneer.store.stacks_in_files import StackInFiles, leaves_dense, new_stacks, planned_stacks, stacks_in_files

METHOD = "veneer"
NAMES_TOLD = 4  # of layers with one problem
_LOG = logging.getLogger(__name__)


class Deferred(Unread):
    """Tensor of the checkpoint, read when transformers' loader slices it, whose values must be finite."""

    def __init__(self, stored: Stored, problems: list[str]) -> None:
        super().__init__(stored)
        self._problems = problems

    def read(self) -> Tensor:
        tensor = super().read()
        if is_finite(tensor):
            return tensor
        # noted, and raised with all others when everything has been read
        self._problems.append(f"tensor {self.stored.name!r} holds values that are not finite")
        return torch.zeros_like(tensor)


class Decoded:
    """Quantized weight of one expert, in a stack that cannot stay quantized. It is decoded to a dense tensor when
    transformers' loader slices it.

    Any other weight, which is not ``stacked``, is reported as a problem when it is read. It should have stayed
    quantized, or been stored dense.
    """

    def __init__(self, layer: str, stacked: bool, quantizer: VeneerQuantizer) -> None:
        self._layer, self._stacked, self._quantizer = layer, stacked, quantizer
        self._parts = quantizer.stored_parts[layer]

    def __getitem__(self, index: Any) -> Tensor:
        return self._quantizer.decoded(self._layer, self._parts, self._stacked)[index]

    def get_dtype(self) -> str:
        """Return the dtype's name as in safetensors files."""
        return DTYPE_NAMES[self._quantizer.dtype]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._quantizer.stored_shape(self._layer, self._parts))


class Quantize(ConversionOps):  # type: ignore[misc]
    """Step of transformers' loader that quantizes a layer's dense weight, or reads the stored codes."""

    def __init__(self, quantizer: VeneerQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        model: PreTrainedModel,
        missing_keys: set[str],
        **_: Any,  # transformers passes more than a step needs
    ) -> dict[str, Tensor]:
        """Set the weights of quantized layers from ``input_dict``, and return each layer's codes by parameter name.

        Stacks of experts are set here too, but not returned, because the model has no parameter of a stack's name for
        the loader to set.
        """
        result = {}
        for name, value in input_dict.items():
            layer = coded_module(model, name)
            assert layer is not None
            self.quantizer.fill(layer, name, value[0] if isinstance(value, list) else value, source_patterns)
            cast(Any, layer)._is_hf_initialized = True
            if isinstance(layer, CodedStack):
                missing_keys.discard(name)
            else:
                result[name] = layer.weight
        return result


def coded_module(model: nn.Module, name: str) -> CodedModule | None:
    """Return the module in codes whose weight has this name in a dense model: a layer, a table or a stack of experts.

    None if the parameter is dense.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    found = module if last == "weight" else module._modules.get(last)
    return found if isinstance(found, CodedModule) else None


class VeneerQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizer that loads a model in codes, from a dense checkpoint or from one that is stored quantized."""

    quantization_config: QuantizationConfig
    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.is_stored = bool(kwargs["pre_quantized"]) or quantization_config.is_stored
        # transformers' path for checkpoints that are quantized already would cast codes to the model's dtype
        self.pre_quantized = False
        self.problems: list[str] = []
        self._unquantized: list[str] = []
        self.stored_parts: dict[str, dict[str, Stored]] = {}
        self.stacks: dict[str, StackInFiles] = {}
        self._skip: list[str] = []
        self.dtype = torch.bfloat16
        self._model: PreTrainedModel | None = None  # while it is loaded

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        devices = kwargs.get("device_map")
        places = devices.values() if isinstance(devices, Mapping) else [devices]
        if "disk" in {str(place) for place in places}:
            raise ConfigError(
                "device_map puts modules on disk, which is not supported for quantized models: leave out 'disk'"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Return the given device map. Without one, return the current GPU, if any, as bitsandbytes does."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the model: ``dtype``, or bfloat16 if ``dtype`` is a one-byte type of codes."""
        return dtype if dtype.itemsize > 1 else torch.bfloat16

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return coded_module(model, param_name) is not None

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        self._model, self.dtype = model, model.dtype
        skip = self._skip = config.left_out(model, stored=self.is_stored)
        for path, module in list(model.named_modules()):
            if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, skip):
                layer = _empty_layer(path, module, config)
                if layer is not None:
                    model.set_submodule(path, layer)

    def open(self, files: list[str]) -> dict[str, Any]:
        """Return the tensors of the checkpoint, without reading their values.

        The tensors that make up a quantized weight are kept in ``stored_parts``. An empty tensor under the weight's
        name stands for them until `fill` reads them.
        """
        pickled = [file for file in files if not str(file).endswith(".safetensors")]
        if pickled:
            raise ConfigError(f"{pickled[0]} is a pickle, which can run any code: convert the model to safetensors")
        tensors = Checkpoint.from_files(files).tensors
        groups = self.quantization_config.grouped(tensors) if self.is_stored else {}
        taken = {name for parts in groups.values() for name in parts.values()}
        deferred: dict[str, Any] = {n: Deferred(t, self.problems) for n, t in tensors.items() if n not in taken}
        self.stored_parts = {n: {part: tensors[name] for part, name in parts.items()} for n, parts in groups.items()}
        self._code_stacks()
        in_stacks = {layer for stack in self.stacks.values() for layer in stack.layers}
        # an empty tensor stands for all of a layer's until `fill` reads them
        weights = [self.quantization_config.weight_name(layer) for layer in groups if layer not in in_stacks]
        deferred |= {name: torch.empty(0) for name in (*weights, *self.stacks)}
        if self.quantization_config.is_stored:
            deferred |= self._decoded_layers(in_stacks)
        if self.quantization_config.note is not None:
            _LOG.warning("%s", self.quantization_config.note)
        return deferred

    def plan_stacks(self, model: PreTrainedModel) -> None:
        """Replace stacks of experts by quantized modules without values, in a model for which no files are read. `open`
        does so from files.
        """
        plan = planned_stacks if self.is_stored else new_stacks
        for name, spec in plan(model, self.quantization_config, self._skip).items():
            _put_stack(model, name, CodedStack(spec))

    def _code_stacks(self) -> None:
        """Replace stacks of experts that are stored quantized, or are to be quantized, by quantized modules without
        values. `fill` loads the values later.
        """
        model = self._model
        assert model is not None  # it was made before its files are opened
        if not self.is_stored:
            self.plan_stacks(model)
            return
        self.stacks = stacks_in_files(model, self.quantization_config, self._skip, self.stored_parts)
        for name, stack in self.stacks.items():
            _put_stack(model, name, CodedStack(stack.spec))

    def _decoded_layers(self, in_stacks: Collection[str]) -> dict[str, Decoded]:
        """Return the checkpoint's quantized weights that are decoded on loading, because the model has no quantized
        layer for them. Stacks of experts ``in_stacks`` are left out.
        """
        model = self._model
        assert model is not None  # it was made before its files are opened
        to_own, is_stacked, prefix = renamer(model), converter(model), f"{model.base_model_prefix}."
        paths = {path for path, module in model.named_modules() if isinstance(module, QuantLinear)}
        found = {}
        for layer in [each for each in self.stored_parts if each not in in_stacks]:
            name = self.quantization_config.weight_name(layer)
            own = to_own(name).removesuffix(".weight")
            if not {own, own.removeprefix(prefix), prefix + own} & paths:
                found[name] = Decoded(layer, is_stacked(name), self)
        return found

    def stored_shape(self, layer: str, parts: Mapping[str, Stored]) -> tuple[int, ...]:
        """Return the shape of a stored weight."""
        found = self.quantization_config.stored_shape(layer, parts)
        assert found is not None  # asked of formats whose tensors tell it
        return found

    @torch.no_grad()
    def decoded(self, layer: str, parts: Mapping[str, Stored], stacked: bool) -> Tensor:
        """Return a weight that the files store quantized as a dense matrix.

        Errors are collected for `finish`, and zeros are returned. It is an error if ``config.json`` says that the layer
        is not quantized.
        """
        shape, model = self.stored_shape(layer, parts), cast(PreTrainedModel, self._model)
        try:
            if self.quantization_config.is_stack(layer) and not leaves_dense(model, self._skip, layer):
                raise not_run_in_codes(layer, parts)
            if not stacked or len(shape) != 2:
                raise held_quantized(layer, parts)
            return self.quantization_config.weight_of(layer, parts, shape, self.dtype).dense(self.dtype)
        except FormatError as error:
            self.problems.append(str(error))
            return torch.zeros(shape, dtype=self.dtype)

    @torch.no_grad()
    def fill(self, layer: CodedModule, name: str, value: Tensor, sources: list[str]) -> None:
        """Set a layer's weight: quantized from ``value``, or read from disk. Errors are collected for `finish`."""
        key = sources[0].removesuffix(".weight")
        try:
            if isinstance(layer, CodedStack):
                self._fill_stack(layer, name, value)
            elif self.is_stored:
                stored = self.stored_parts.get(key)
                if stored is None:
                    self._unquantized.append(name)
                    return
                name = f"{stored[min(stored)].path}: {name}"
                tensors = {key: tensor.read() for key, tensor in stored.items()}
                spec, parts = layer.spec.from_disk(tensors)
                layer.fill(spec, {part: tensor.to(value.device) for part, tensor in parts.items()})
                layer.carried = {key: tensor for key, tensor in tensors.items() if not spec.owns(key)}
            else:
                weight = value.T if cast(QuantLinear, layer).is_transposed else value
                layer.fill(layer.spec, layer.spec.quantize(weight))
        except (FormatError, NonFiniteError) as error:
            self.problems.append(f"{name}: {error}")

    def _fill_stack(self, stack: CodedStack, name: str, value: Tensor) -> None:
        if not self.is_stored:
            experts = cast(PreTrainedModel, self._model).get_submodule(name.rpartition(".")[0])
            stack.fill(stack.spec, stack.stack_spec.quantize(as_maps(experts, value)))
            return
        held = self.stacks[name]
        try:
            stack.take({key: tensor.read().to(value.device) for key, tensor in held.parts.items()})
        except FormatError as error:
            raise FormatError(f"{held.parts[min(held.parts)].path}: {error}") from error

    def finish(self, model: PreTrainedModel) -> None:
        """Raise one FormatError for all collected errors, layers without a weight included."""
        noted = " ".join(self.problems + self._unquantized)
        problems = self.problems + [f"{name} is not in the checkpoint" for name in _empty(model) if name not in noted]
        problems += self._unquantized_problem()
        if problems:
            raise FormatError(f"the model cannot be loaded: {'; '.join(problems)}. Fetch or save it again")

    def _unquantized_problem(self) -> list[str]:
        if not self._unquantized:
            return []
        n_more = len(self._unquantized) - NAMES_TOLD
        names = ", ".join(self._unquantized[:NAMES_TOLD]) + (f" and {n_more} more" if n_more > 0 else "")
        return [
            f"{names}: the checkpoint has no quantized tensors for these layers; a quantized layer has "
            f"{' or '.join(sorted(self.quantization_config.marks))}. Correct the modules that quantization_config "
            "leaves out, or fetch both files again"
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.stored_parts.clear()
        self.stacks.clear()
        self._model = None
        for layer in model.modules():
            if isinstance(layer, CodedModule) or coded_stacks(layer):
                layer.requires_grad_(False)  # biases too: they were loaded as fresh parameters
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if any(isinstance(module, QuantLinear | CodedExperts) for module in adapted_modules(model).values()):
            raise CompositionError(
                "the model carries adapters: merge_and_unload() or unload() them before dequantize()"
            )
        make_dense(model, dtype)
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def _put_stack(model: PreTrainedModel, name: str, stack: CodedStack) -> None:
    path, _, key = name.rpartition(".")
    put_in_codes(model.get_submodule(path), key, stack)


def _empty(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of weights that no tensor of the files has set, which transformers would leave uninitialised.

    Only quantized weights, and the other parameters of modules with quantized experts, are checked.
    """
    for path, module in model.named_modules():
        if isinstance(module, CodedModule) and not module.is_filled:
            yield path if isinstance(module, CodedStack) else f"{path}.weight"
        elif coded_stacks(module):
            own = module._parameters.items()
            yield from (f"{path}.{name}" for name, value in own if value is not None and value.is_meta)


def _empty_layer(path: str, module: nn.Module, config: QuantizationConfig) -> QuantLinear | None:
    weight = cast(Tensor, module.weight)
    rows, columns = weight.shape
    shape = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    spec = config.spec_of(path, shape, weight.dtype)
    return None if spec is None else QuantLinear(spec, cast(Any, module).bias, type(module))


@functools.cache
def register() -> None:
    """Register veneer's configs and loader with transformers, once, when the first config is made.

    Two functions of transformers are wrapped because they offer no hook. One decides between a given config and a
    quantized checkpoint's own; the other opens the checkpoint. Both wrappers act only on veneer's configs.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QuantizationConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = VeneerQuantizer
    merge = auto.AutoHfQuantizer.merge_quantization_configs

    @functools.wraps(merge)
    def merge_configs(stored: Any, asked: Any) -> Any:
        if not isinstance(asked, QuantizationConfig):
            return merge(stored, asked)
        return asked.merged_with(stored if isinstance(stored, dict) else stored.to_dict())

    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_configs)
    watch_loading()


@functools.cache
def watch_loading() -> None:
    """Wrap transformers' loader, once. With a quantizer of veneer, the loader reads the quantizer's tensors instead of
    the files. For a dense model, it passes on each loaded block (`blocks_handed_on`).
    """
    load = PreTrainedModel._load_pretrained_model

    @functools.wraps(load)
    def load_pretrained(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        quantizer = load_config.hf_quantizer
        tensors, is_own = state_dict, isinstance(quantizer, VeneerQuantizer)
        if tensors is None and (is_own or quantizer is None):
            tensors = quantizer.open(checkpoint_files) if is_own else unread(checkpoint_files)
        result = load_in_turn(load, model, tensors, checkpoint_files, load_config, *rest)
        if is_own:
            quantizer.finish(model)
        return result

    PreTrainedModel._load_pretrained_model = staticmethod(load_pretrained)
