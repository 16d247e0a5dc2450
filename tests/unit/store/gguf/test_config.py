"""Configs of GGUF files: the model computes what the file says, or the file is refused by the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter, RopeScalingType
from transformers import AutoModelForCausalLM

from veneer.errors import FormatError
from veneer.store.gguf.config import GgufContents, mended_config, unplaced_tensors
from veneer.store.gguf.model import convert_gguf

from .gguf_families import COMMON, HEADS, LAYER_NORM, RMS, THETA, VOCAB, WIDTH, add_factors, tiny, write

IDS = torch.arange(90)[None] * 37 % VOCAB
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 3.0, "original_max_position_embeddings": 32}
FULL_YARN = {**YARN, "attention_factor": 1.25, "beta_fast": 20.0, "beta_slow": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": THETA, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.125 * i for i in range(9)], "long_factor": [1.5 + 0.75 * i for i in range(9)],
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": THETA}
DECODER = {**COMMON, **RMS}
EXPERTS = {**DECODER, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 56, "rope_parameters": YARN}
GEMMA2 = {
    **DECODER, "head_dim": 26, "query_pre_attn_scalar": 26, "attn_logit_softcapping": 7.0,
    "final_logit_softcapping": 5.0, "sliding_window": 9,
}  # fmt: skip
GEMMA3 = {
    **DECODER, "num_hidden_layers": 7, "head_dim": 26, "query_pre_attn_scalar": 26, "sliding_window": 9,
    "final_logit_softcapping": 5.0, "rope_parameters": {
        "full_attention": {**LINEAR, "rope_theta": 900.0}, "sliding_attention": PLAIN,
    },
}  # fmt: skip
PHI3 = {**DECODER, "original_max_position_embeddings": 40, "rope_parameters": LONGROPE}
STABLELM = {**COMMON, "layer_norm_eps": 3e-4}
STARCODER2 = {**COMMON, "norm_epsilon": 3e-4, "rope_parameters": PLAIN}
SHORT = {"vocab_size": VOCAB, "hidden_size": WIDTH, **LAYER_NORM}


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Any]:
    """A model's file, converted and loaded again; ``more`` adds to the file."""

    def convert(family: str, model: Any, more: Callable[[GGUFWriter], None] = lambda writer: None) -> Any:
        write(tmp_path / "tiny.gguf", family, model, more)
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "folder", attn_implementation="eager").eval()

    return convert


@torch.no_grad()
def assert_same_logits(model: Any, loaded: Any) -> None:
    """At short lengths and at lengths behind the original one, which some scalings tell apart."""
    for length in (7, 90):
        expected = model(IDS[:, :length]).logits
        torch.testing.assert_close(loaded(IDS[:, :length]).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {**DECODER, "rope_parameters": LLAMA3}),
        ("llama", {**DECODER, "rope_parameters": LINEAR, "head_dim": 26}),
        ("llama", {**DECODER, "rope_parameters": FULL_YARN, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {**DECODER, "rope_parameters": YARN, "head_dim": 26}),
        ("qwen3", {**DECODER, "rope_parameters": FULL_YARN, "head_dim": 26, "attention_bias": True}),
        ("qwen2moe", {**EXPERTS, "shared_expert_intermediate_size": 72}),
        ("qwen3moe", {**EXPERTS, "head_dim": 26, "norm_topk_prob": True}),
        ("gemma2", GEMMA2),
        ("gemma2", {**GEMMA2, "num_hidden_layers": 46, "query_pre_attn_scalar": WIDTH // HEADS}),
        ("gemma3", GEMMA3),
        ("phi3", PHI3),
        ("phi3", {**PHI3, "sliding_window": 29, "rope_parameters": {**LONGROPE, "attention_factor": 1.25}}),
        ("phi3", {**PHI3, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75}}),
        ("gpt2", {**SHORT, "n_layer": 3, "n_head": HEADS, "n_positions": 96, "n_inner": 120}),
        ("stablelm", {**STABLELM, "use_qkv_bias": True, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
        ("stablelm", {
            **STABLELM, "use_parallel_residual": True, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75},
        }),
        ("starcoder2", STARCODER2),
        ("starcoder2", {**STARCODER2, "use_bias": False}),
        ("nemotron", {**COMMON, "norm_eps": 3e-4, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}}),
        ("falcon", {
            **SHORT, "num_hidden_layers": 3, "num_attention_heads": HEADS, "ffn_hidden_size": 120,
            "max_position_embeddings": 96, "rope_parameters": PLAIN,
        }),
        ("bloom", {**SHORT, "n_layer": 3, "n_head": HEADS}),
    ],
)  # fmt: skip
def test_the_loaded_model_computes_what_the_written_one_does(
    converted: Callable[..., Any], family: str, settings: dict[str, Any]
) -> None:
    model = tiny(family, **settings)
    assert_same_logits(model, converted(family, model))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_widths_and_heads_that_a_file_leaves_out_follow_from_those_it_has(
    converted: Callable[..., Any], family: str
) -> None:
    """Older files, SmolLM2's among them, hold no width of a head."""

    def left_out(writer: GGUFWriter) -> None:
        for name in ("attention.key_length", "attention.value_length", "attention.head_count_kv"):
            writer.kv_data[0].pop(f"{family}.{name}", None)

    model = tiny(family, **{**DECODER, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS})
    assert_same_logits(model, converted(family, model, left_out))


def test_llama_3_s_scaling_comes_back_as_its_parameters(converted: Callable[..., Any]) -> None:
    scaling = {**LLAMA3, "factor": 32.0, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
    model = tiny("llama", **DECODER, head_dim=64, rope_parameters=scaling)
    assert converted("llama", model).config.rope_parameters == scaling


def test_factors_that_no_llama_has_are_taken_one_by_one(converted: Callable[..., Any]) -> None:
    factors = [1.0 + 0.25 * (i % 5) for i in range(WIDTH // HEADS // 2)]
    same = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0, "factor": 1.0}
    model = tiny("llama", **DECODER, rope_parameters={
        "rope_type": "longrope", "rope_theta": THETA, "original_max_position_embeddings": 96, **same,
    })  # fmt: skip
    assert_same_logits(model, converted("llama", model, lambda writer: add_factors(writer, rope_freqs=factors)))


def test_factors_of_one_scale_nothing(converted: Callable[..., Any]) -> None:
    model = tiny("llama", **DECODER, rope_parameters=PLAIN)
    loaded = converted("llama", model, lambda writer: add_factors(writer, rope_freqs=[1.0] * 12))
    assert loaded.config.rope_parameters["rope_type"] == "default"
    assert_same_logits(model, loaded)


@pytest.mark.parametrize("pattern", [3, [True, False, False, True, True, False, True]])
def test_windows_stand_on_the_layers_that_the_file_names(
    converted: Callable[..., Any], pattern: int | list[bool]
) -> None:
    slides = [(layer + 1) % 3 != 0 for layer in range(7)] if pattern == 3 else pattern
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    model = tiny("gemma3", **{**GEMMA3, "layer_types": types})
    loaded = converted("gemma3", model, lambda writer: writer.add_sliding_window_pattern(pattern))
    assert_same_logits(model, loaded)


def test_a_file_without_a_table_is_read_as_transformers_reads_it_unless_it_scales() -> None:
    config = object()
    plain = GgufContents(architecture="mamba", pairs={}, shapes={"token_embd.weight": (3, 5)}, factors={})
    assert mended_config(config, plain) is config
    assert unplaced_tensors(config, plain) == []
    scaled = GgufContents(architecture="gpt-oss", pairs={"rope.scaling.type": "yarn"}, shapes={}, factors={})
    with pytest.raises(FormatError, match=r"gpt-oss file.*rope\.scaling\.type 'yarn'"):
        mended_config(config, scaled)


def key(name: str, value: float | bool) -> Callable[[GGUFWriter], None]:
    """Writes a key, over what stands there."""

    def add(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop(f"{writer.arch}.{name}", None)
        whole = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        whole(f"{writer.arch}.{name}", value)

    return add


def scaled(kind: RopeScalingType, **more: float) -> Callable[[GGUFWriter], None]:
    def add(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        for name, value in more.items():
            key(f"rope.scaling.{name}", value)(writer)

    return add


def factors_and(more: Callable[[GGUFWriter], None], **factors: list[float]) -> Callable[[GGUFWriter], None]:
    def add(writer: GGUFWriter) -> None:
        add_factors(writer, **factors)
        more(writer)

    return add


def nothing(writer: GGUFWriter) -> None: ...


TWELVE = [1.0] * 6 + [4.0] * 6


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (key("logit_scale", 0.25), r"logit_scale 0\.25"),
        (key("attention.scale", 0.5), r"attention\.scale 0\.5"),
        (key("embedding_scale", 12.0), r"embedding_scale 12"),
        (key("residual_scale", 0.25), r"residual_scale 0\.25"),
        (key("attention.sliding_window", 11), r"attention\.sliding_window 11"),
        (key("attn_logit_softcapping", 30.0), r"attn_logit_softcapping 30"),
        (key("expert_count", 8), r"lacks the tensors of \['model\.layers\.0\.mlp\.gate\.weight'"),
        (key("attention.causal", False), r"attention\.causal False"),
        (key("rope.scale_linear", 4.0), r"rope\.scale_linear 4"),
        (key("some.later_invention", 3), r"some\.later_invention 3"),
        (key("rope.dimension_count", 12), r"rope\.dimension_count 12, but a head is 24 wide"),
        (key("attention.value_length", 32), r"attention\.value_length 32, but a head is 24 wide"),
        (lambda w: w.add_string("llama.rope.scaling.type", "dynamic"), r"rope\.scaling\.type 'dynamic' is none of"),
        (scaled(RopeScalingType.YARN, factor=4.0), r"original_context_length is missing beside .*'yarn'"),
        (
            scaled(RopeScalingType.YARN, factor=4.0, original_context_length=32, yarn_ext_factor=0.5),
            r"yarn_ext_factor 0\.5 is not 1",
        ),
        (scaled(RopeScalingType.LINEAR, factor=4.0, attn_factor=2.0), r"attn_factor 2\.0 is only for .*'longrope'"),
        (scaled(RopeScalingType.LONGROPE), r"rope_factors_short\.weight and rope_factors_long\.weight are missing"),
        (factors_and(nothing, rope_factors_long=TWELVE), r"rope_factors_short\.weight are missing"),
        (factors_and(nothing, rope_factors_long=TWELVE, rope_factors_short=TWELVE), r"original_context_length is miss"),
        (factors_and(scaled(RopeScalingType.LINEAR, factor=4.0), rope_freqs=TWELVE), r"transformers applies only one"),
        (factors_and(nothing, rope_freqs=[1.0, 2.0]), r"2 factors for 12 frequencies"),
    ],
)  # fmt: skip
def test_what_the_model_would_not_compute_is_refused_by_name(
    converted: Callable[..., Any], spoil: Callable[[GGUFWriter], None], reason: str
) -> None:
    model = tiny("llama", **DECODER, head_dim=24, rope_parameters=PLAIN)
    with pytest.raises(FormatError, match=reason):
        converted("llama", model, spoil)


@pytest.mark.parametrize(
    "harmless",
    [
        key("logit_scale", 1.0), key("expert_count", 0), key("attention.causal", True),
        scaled(RopeScalingType.NONE, finetuned=False), scaled(RopeScalingType.LINEAR, factor=1.0),
    ],
)  # fmt: skip
def test_keys_that_change_nothing_are_passed_over(
    converted: Callable[..., Any], harmless: Callable[[GGUFWriter], None]
) -> None:
    model = tiny("llama", **DECODER, rope_parameters=PLAIN)
    assert_same_logits(model, converted("llama", model, harmless))


def test_tensors_without_a_place_in_the_model_are_refused(converted: Callable[..., Any]) -> None:
    model = tiny("llama", **DECODER, rope_parameters=PLAIN)
    with pytest.raises(FormatError, match=r"blk\.1\.attn_q_norm\.weight.*LlamaForCausalLM has no place"):
        converted("llama", model, lambda w: w.add_tensor("blk.1.attn_q_norm.weight", torch.ones(24).numpy()))


def test_a_falcon_of_several_key_value_heads_is_refused(converted: Callable[..., Any]) -> None:
    model = tiny("falcon", **SHORT, num_hidden_layers=2, num_attention_heads=HEADS, rope_parameters=PLAIN)

    with pytest.raises(FormatError, match=r"head_count_kv 2 \(only 1 is known\)"):
        converted("falcon", model, key("attention.head_count_kv", 2))


def test_rotary_factors_are_refused_where_positions_do_not_rotate(converted: Callable[..., Any]) -> None:
    model = tiny("bloom", **SHORT, n_layer=2, n_head=HEADS)
    with pytest.raises(FormatError, match=r"the tensor rope_freqs\.weight"):
        converted("bloom", model, lambda writer: add_factors(writer, rope_freqs=TWELVE))
