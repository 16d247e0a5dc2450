"""Readers of ``quantization_config`` by ``quant_method``."""

from __future__ import annotations

from collections.abc import Callable

from veneer.store.quantized import awq, compressed_tensors, fp8, gptq, hqq, modelopt, mxfp4
from veneer.store.quantized.layers import Settings, StoredLayers

READERS: dict[str, Callable[[Settings], StoredLayers]] = {
    module.METHOD: module.read for module in (awq, compressed_tensors, fp8, gptq, hqq, modelopt, mxfp4)
}
