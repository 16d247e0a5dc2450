"""Virtual tokens in front of transformers' caches that keep old keys and values in few bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import QuantizedLayer

from models import llama_config
from veneer import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from veneer.errors import ConfigError

N, VOCAB, D = 5, 67, 24
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": llama_config(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=4
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=3, n_head=3, bos_token_id=1, eos_token_id=2),
}
METHODS = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
BACKENDS = {
    "quanto": ("optimum.quanto", {"nbits": 4, "q_group_size": 8, "residual_length": 4}),
    "hqq": ("hqq", {"nbits": 8, "q_group_size": 8, "residual_length": 4, "axis_key": 1, "axis_value": 1}),
}
IDS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(4))
N_NEW = 9


class Rounding(QuantizedLayer):
    """A stand-in for the packages' codes: multiples of one 4096th of the largest value."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:
        step = tensor.abs().max() / 2**12
        return (tensor / step).round().to(torch.int16), step

    def _dequantize(self, qtensor: Any) -> Tensor:
        return qtensor[0] * qtensor[1]


class RoundingCache(QuantizedCache):
    def __init__(self, config: PreTrainedConfig) -> None:
        layers = [Rounding(residual_length=4) for _ in range(config.num_hidden_layers)]
        super(QuantizedCache, self).__init__(layers=layers)


def adapted(family: str, method: str) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    model = get_peft_model(model, METHODS[method](num_virtual_tokens=N)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.7 * torch.randn(parameter.shape)
    return model


def answer(model: PeftModel, cache: Any = None) -> Tensor:
    options = {} if cache is None else {"cache": cache}
    return model.generate(IDS, max_new_tokens=N_NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["stand-in", *BACKENDS])
def test_generating_with_a_quantized_cache(family: str, method: str, backend: str) -> None:
    package, options = BACKENDS.get(backend, ("torch", {}))
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    model = adapted(family, method)
    cache = RoundingCache(model.config) if backend == "stand-in" else QuantizedCache(backend, model.config, **options)
    expected = answer(model)
    assert torch.equal(answer(model, cache), expected)
    assert cache.get_seq_length() == N + IDS.shape[1] + N_NEW - 1
    if backend != "stand-in":
        by_name = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **options}}
        found = model.generate(IDS, max_new_tokens=N_NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **by_name)
        assert torch.equal(found, expected)


def test_the_prefix_is_what_the_cache_holds_first() -> None:
    """Both of the layer's stores are read: what is in codes, and what still waits beside them."""
    model = adapted("llama", "prefix")
    cache = RoundingCache(model.config)
    with torch.no_grad():
        found = model(IDS, cache=cache).logits
        expected = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, expected, atol=5e-2)


def test_fp8_takes_its_scale_from_the_prefix_and_is_refused() -> None:
    model = adapted("llama", "prefix")
    with pytest.raises(
        ConfigError, match=r"backend 'fp8' derives its scale from the first values, those of the prefix"
    ):
        answer(model, QuantizedCache("fp8", model.config))
    with model.disable_adapter():
        answer(model, QuantizedCache("fp8", model.config))
    answer(adapted("llama", "prompt"), QuantizedCache("fp8", model.config))
