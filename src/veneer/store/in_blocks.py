"""Loader of models whose matrices stay in the blocks of a GGUF file, in transformers' registry of quantizers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

from veneer.disk.mapped import MappedFile
from veneer.errors import ConfigError, FormatError
from veneer.model.adapted.experts import put_in_codes
from veneer.model.quantized.embedding import CodedEmbedding
from veneer.model.quantized.module import CodedModule
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.quantized.stack import CodedStack
from veneer.plain.progress import waiting_for
from veneer.quant.ggml import GgmlSpec
from veneer.quant.stack import StackSpec
from veneer.store.gguf.blocks import BlockFile
from veneer.store.gguf.header import GgufTensor
from veneer.store.gguf.names import leaf_of
from veneer.store.gguf.parameters import GgufParameter
from veneer.store.gguf.rows import stored_rows
from veneer.store.quantization_config import QuantizationConfig
from veneer.store.quantizer import Deferred, VeneerQuantizer, watch_loading
from veneer.store.stacks_in_files import stacks_of

METHOD = "veneer_gguf"


class GgufBlocks(QuantizationConfig):
    """Quantization config of a model whose matrices stay in the blocks of ``file``."""

    def __init__(self, file: BlockFile) -> None:
        self.quant_method = cast(Any, METHOD)
        self.file = file
        _register()

    def to_dict(self) -> dict[str, Any]:
        """Return the ``quantization_config`` in the config of a loaded model: the method and the file's path."""
        return {"quant_method": METHOD, "file": str(self.file.path)}

    def __deepcopy__(self, memo: dict[int, Any]) -> GgufBlocks:
        return self


class GgufQuantizer(VeneerQuantizer):
    """Quantizer that maps the matrices of a GGUF file, and reads all other parameters."""

    def __init__(self, quantization_config: GgufBlocks, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.file, self.source = quantization_config.file, MappedFile(quantization_config.file.path)
        self.parameters: dict[str, GgufParameter] = {}
        self.coded: dict[str, GgufParameter] = {}  # by the name of the weight that stays in blocks
        self.tied: frozenset[str] = frozenset()  # names that get another's dense weight
        self.mapped: dict[str, Tensor] = {}  # head and table of one tensor share it
        self.n_filled = 0

    def _process_model_before_weight_loading(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        own = model.named_parameters(remove_duplicate=False)
        self.parameters = self.file.parameters({n: tuple(p.shape) for n, p in own if n in self.file.places})
        self.coded = put_in_blocks(model, self.parameters, self.source)
        self.tied = frozenset(model.all_tied_weights_keys)

    def open(self, files: Any) -> dict[str, Any]:
        """Return the parameters, unread; tensors that stay in blocks are empty until `fill` maps them."""
        dense = {n: p for n, p in self.parameters.items() if n not in self.coded and n not in self.tied}
        return {n: Deferred(p, self.problems) for n, p in dense.items()} | {n: torch.empty(0) for n in self.coded}

    @torch.no_grad()
    def fill(self, layer: CodedModule, name: str, value: Tensor, sources: list[str]) -> None:
        """Map a layer's blocks. Errors are collected for `finish`."""
        self.n_filled += 1
        waiting_for(f"reading the blocks of {self.file.path.name}, matrix {self.n_filled} of {len(self.coded)}")
        parameter = self.coded[name]
        try:
            rows = [self._rows(parameter, tensor) for tensor in parameter.tensors]
        except FormatError as error:
            self.problems.append(f"{name}: {error}")
            return
        if isinstance(layer, CodedStack):
            n_experts = layer.stack_spec.n_experts
            parts = layer.stack_spec.parts_of([{"weight": each.view(n_experts, -1, each.shape[1])} for each in rows])
        else:
            parts = {"weight": rows[0]}
        if parameter.order is not None:
            parts["order"] = parameter.order.int()
        layer.fill(layer.spec, {part: each.to(value.device) for part, each in parts.items()})

    def _rows(self, parameter: GgufParameter, tensor: GgufTensor) -> Tensor:
        """Return a tensor's blocks, row by row, mapped from the file."""
        if tensor.name not in self.mapped:
            stored = stored_rows(tensor, parameter.path)
            self.mapped[tensor.name] = self.source.tensor(stored.start, stored.nbytes).view(stored.shape)
        return self.mapped[tensor.name]

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def is_serializable(self) -> bool:
        raise ConfigError(
            f"this model's weights lie in the blocks of {self.file.path}, and are not saved: copy that file, or call "
            "model.dequantize() first to save a dense copy"
        )


def load_in_blocks(
    file: BlockFile, *, dtype: str | torch.dtype = "auto", scores: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model of a file, its matrices in the file's blocks, and transformers' report of the loading.

    With ``scores`` a new head scores each sequence.

    Raises FormatError if the file does not fit the model, or has been truncated since it was described.
    """
    config = copy.deepcopy(file.config)
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if scores else MODEL_FOR_CAUSAL_LM_MAPPING
    if scores:
        config.num_labels = 1
    model, report = cast(Any, mapping[type(config)]).from_pretrained(
        None, config=config, dtype=dtype, quantization_config=GgufBlocks(file), output_loading_info=True
    )
    if (file.folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(file.folder)
    model.config._name_or_path = model.name_or_path = str(file.folder)
    return model, report


def put_in_blocks(
    model: PreTrainedModel, parameters: Mapping[str, GgufParameter], source: MappedFile | None
) -> dict[str, GgufParameter]:
    """Replace linear layers, embeddings and stacks of experts by quantized modules, if their weights can stay in the
    file's blocks. The model has no storage yet.

    Return the parameters of these weights by name. A head and an embedding that share blocks are no longer tied by
    transformers.
    """
    tied, coded = model.all_tied_weights_keys, {}
    fitting = {path for path, module in model.named_modules() if _stays(module, parameters.get(f"{path}.weight"))}
    for path in sorted(fitting):
        name = f"{path}.weight"
        if tied.get(name, name).removesuffix(".weight") in fitting:  # else a head of a table that is read dense
            model.set_submodule(path, _coded(model.get_submodule(path), parameters[name], source))
            coded[name] = parameters[name]
    for name, (shape, dtype) in stacks_of(model).items():
        spec = _stack_spec(parameters.get(name), shape, dtype, source)
        if spec is not None:
            experts, _, key = name.rpartition(".")
            put_in_codes(model.get_submodule(experts), key, CodedStack(spec))
            coded[name] = parameters[name]
    for name in coded:
        tied.pop(name, None)
    return coded


def _stays(module: nn.Module, parameter: GgufParameter | None) -> bool:
    """Return True if a module's weight can stay in the quantized blocks of its GGUF file.

    This is so for the weight of a linear layer, and of an embedding that is used for look-ups only.
    """
    layer = type(module) in (nn.Linear, Conv1D) or _is_table(module)
    return layer and parameter is not None and parameter.kind is not None


def _coded(module: nn.Module, parameter: GgufParameter, source: MappedFile | None) -> CodedModule:
    """Return the quantized module that replaces a linear layer or an embedding. Its weight is not yet mapped from the
    file.
    """
    assert parameter.kind is not None
    o, i = parameter.tensors[0].shape
    dtype = cast(Tensor, module.weight).dtype
    spec = GgmlSpec((o, i), parameter.kind, dtype, reordered=parameter.order is not None, source=source)
    if isinstance(module, nn.Embedding):
        return CodedEmbedding(spec, dtype, module.padding_idx)
    return QuantLinear(spec, cast("nn.Parameter | None", module.bias), type(module))


def _stack_spec(
    parameter: GgufParameter | None, shape: tuple[int, int, int], dtype: torch.dtype, source: MappedFile | None
) -> StackSpec | None:
    """Return the format of a stack of experts whose quantized blocks can stay in the GGUF file, else None.

    The format has one entry for each tensor in the file, because files store gate and up matrices separately.
    """
    if parameter is None or not parameter.is_coded_stack:
        return None
    pieces = tuple(
        GgmlSpec((each.shape[1], each.shape[2]), each.type, dtype, source=source) for each in parameter.tensors
    )
    names = tuple(leaf_of(each.name).partition("_exps")[0] for each in parameter.tensors)
    spec = StackSpec(shape[0], pieces, names)
    return spec if spec.shape == shape else None


def _is_table(module: nn.Module) -> bool:
    """Return True for an embedding that can be read in quantized blocks: one that does not renormalize its rows."""
    return type(module) is nn.Embedding and module.max_norm is None


@functools.cache
def _register() -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = GgufBlocks
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = GgufQuantizer
    watch_loading()
