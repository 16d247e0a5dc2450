"""Tiny models as GGUF files, written with the gguf package: the layout and the names are those of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models import gpt2_config

MERGES = ["1 2", "h e"]
SPECIAL = ["<|end|>", "<|start|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "12", "he"]
SIZES = {"vocab_size": len(TOKENS), "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
GROUPED = {"num_key_value_heads": 1, "intermediate_size": 160, "max_position_embeddings": 37, "eos_token_id": 0}


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED, bos_token_id=1)).eval()


def tiny_qwen2() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **GROUPED, tie_word_embeddings=True)).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    config = gpt2_config(vocab_size=len(TOKENS), n_embd=96, n_positions=37, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def tiny_qwen3() -> Qwen3ForCausalLM:
    """Heads of another width than hidden_size / heads, and than the family's usual one."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **GROUPED, head_dim=40, bos_token_id=1)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gpt2": tiny_gpt2,
}


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A function that writes a tiny model of a family and gives the path and the model."""

    def make(family: str, kind: str = "F32", pre: str | None = "default", name: str = "tiny.gguf") -> tuple[Path, Any]:
        torch.manual_seed(7)
        model = MODELS[family]()
        with torch.no_grad():  # values that are not neutral: biases are zero and norms are one by default
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        path = tmp_path / name
        write_gguf(path, family, model, gguf.GGMLQuantizationType[kind], pre)
        return path, model

    return make


def write_gguf(path: Path, family: str, model: Any, kind: gguf.GGMLQuantizationType, pre: str | None) -> None:
    writer = gguf.GGUFWriter(path, family)
    _write_shape(writer, model.config)
    if pre is not None:
        _write_tokenizer(writer, pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = _as_llama_cpp(family, name, parameter.detach(), model.config).contiguous().numpy()
        _write_tensor(writer, f"{names.get_name(stem)}.{suffix}", values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)


def _write_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    if kind == gguf.GGMLQuantizationType.F32 or values.ndim == 1:
        writer.add_tensor(name, values.astype(np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _as_llama_cpp(family: str, name: str, values: torch.Tensor, config: Any) -> torch.Tensor:
    """The weight in llama.cpp's layout: Llama's rotary halves interleaved, GPT-2's Conv1D transposed."""
    if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return values.reshape(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return values.T if family == "gpt2" and name.endswith(transposed) else values
