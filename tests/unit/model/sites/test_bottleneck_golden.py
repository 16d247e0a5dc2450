"""The same weights give the outputs of AdapterHub's adapters (tests/golden/adapters)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from veneer import BottleneckConfig, get_peft_model

GOLDEN = Path(__file__).parents[3] / "golden" / "adapters" / "bottlenecks.safetensors"
TENSORS = load_file(GOLDEN)
with safe_open(GOLDEN, "pt") as file:
    SIZES = json.loads(file.metadata()["sizes"])
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_attention_heads=3, num_key_value_heads=1)),
    "bert": lambda: BertModel(BertConfig(**SIZES, num_attention_heads=3, max_position_embeddings=17)),
}
CONFIGS = {
    "houlsby": BottleneckConfig.houlsby(reduction_factor=4),
    "pfeiffer": BottleneckConfig.pfeiffer(reduction_factor=4),
    "parallel": BottleneckConfig.parallel(reduction_factor=4),
}
ENDS = {"down.weight": "adapter_down.0.weight", "down.bias": "adapter_down.0.bias", "up.weight": "adapter_up.weight"}
ENDS |= {"up.bias": "adapter_up.bias"}


def stored(case: str) -> dict[str, Tensor]:
    return {key.split(":")[1]: value for key, value in TENSORS.items() if key.startswith(f"{case}:")}


def theirs(key: str, family: str) -> str:
    """Return their name for a key of our file, ``base_model.model.layers.0.adapter_mlp.down.weight``."""
    layer = key.split("layer")[1].split(".")[1]
    where, end = key.split(".adapter_")[1].split(".", 1)
    places = {
        ("llama", "attention"): f"layers.{layer}.attention_adapters",
        ("llama", "mlp"): f"layers.{layer}.output_adapters",
        ("bert", "attention"): f"encoder.layer.{layer}.attention.output",
        ("bert", "mlp"): f"encoder.layer.{layer}.output",
    }
    return f"{places[family, where]}.adapters.a.{ENDS[end]}"


PRE_NORM = ("llama", "parallel")  # where they read another input, see below


@pytest.mark.parametrize(("family", "method"), [(f, m) for f in MODELS for m in CONFIGS if (f, m) != PRE_NORM])
def test_equals_adapterhub(family: str, method: str, tmp_path: Path) -> None:
    weights = stored(f"{family}/{method}")
    base: nn.Module = MODELS[family]().eval()
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    with torch.no_grad():
        plain = base(TENSORS["ids"]).last_hidden_state
    model = get_peft_model(base, CONFIGS[method])
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    model.load_state_dict({key: weights[theirs(key, family)] for key in keys})
    with torch.no_grad():
        found = model.eval()(TENSORS["ids"]).last_hidden_state
    assert len(keys) == (16 if method == "houlsby" else 8)
    assert float((found - plain).norm() / plain.norm()) > 0.01
    torch.testing.assert_close(found, weights["output"], rtol=1e-5, atol=1e-5)


def test_on_a_pre_norm_decoder_their_parallel_bottleneck_reads_the_stream_before_the_norm() -> None:
    """The feed-forward part itself reads the stream behind the norm, and so does our bottleneck."""
    weights = stored("llama/parallel")
    model = MODELS["llama"]().eval()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    stream = {}
    for i, layer in enumerate(model.layers):
        part = {end: weights[f"layers.{i}.output_adapters.adapters.a.{name}"] for end, name in ENDS.items()}

        def keep(module: nn.Module, given: tuple[Tensor, ...], i: int = i) -> None:
            stream[i] = given[0]

        def add(module: nn.Module, given: object, out: Tensor, i: int = i, part: dict[str, Tensor] = part) -> Tensor:
            inner = nn.functional.relu(nn.functional.linear(stream[i], part["down.weight"], part["down.bias"]))
            return out + 4 * nn.functional.linear(inner, part["up.weight"], part["up.bias"])

        layer.post_attention_layernorm.register_forward_pre_hook(keep)
        layer.mlp.register_forward_hook(add)
    with torch.no_grad():
        found = model(TENSORS["ids"]).last_hidden_state
    torch.testing.assert_close(found, weights["output"], rtol=1e-5, atol=1e-5)
