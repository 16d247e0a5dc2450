"""Bytes of a served sequence in a plan: those that the engine counts, whatever the layers keep."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.models import byte_tokenizer
from transformers import AutoModelForCausalLM

from veneer import LLM
from veneer.model.batch.own_cache import KeptBytes
from veneer.plan.serving import Serving, kept_in_serving

WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
DELTA = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(**WIDE, **HEADS),
    "deepseek_v3": transformers.DeepseekV3Config(**WIDE, **LATENT, **MIXTURE, num_attention_heads=2),
    "gpt_oss": transformers.GptOssConfig(**WIDE, **HEADS, num_local_experts=4, num_experts_per_tok=2),
    "mamba2": transformers.Mamba2Config(
        **WIDE, num_heads=4, head_dim=16, state_size=5, n_groups=1, chunk_size=8
    ),
    "qwen3_next": transformers.Qwen3NextConfig(
        **WIDE, **HEADS, **DELTA, layer_types=["linear_attention", "full_attention"], num_experts=4,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2,
    ),
}  # fmt: skip


@given(st.integers(0, 5000), st.integers(1, 90), st.integers(1, 19), st.integers(0, 400), st.integers(1, 700),
       st.integers(1, 300))  # fmt: skip
def test_adapters_that_fit_leave_the_tokens_their_room_and_one_more_does_not(room, page, block, sequence, adapter, n):
    server = Serving(base=0, reserve=0, room=room, page=page, block=block, sequence=sequence, adapter=adapter)
    fit = server.adapters(n)
    assert fit == 0 or server.tokens(fit) >= n
    assert server.tokens(fit + 1) < n
    assert (server.tokens(0) >= n) == (server.sequences(n) >= 1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_plan_counts_what_the_engine_counts(kind):
    config = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    pages = LLM(model, tokenizer=byte_tokenizer(), max_model_len=64).engine.scheduler.pages
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    planned, block = kept_in_serving(empty)
    assert isinstance(planned, KeptBytes)
    fixed = -(-planned.sequence // (block * planned.position)) if planned.position else 0
    assert (block * planned.position + planned.page or planned.sequence) == pages.page_bytes
    assert fixed == pages.n_fixed


def test_a_server_whose_tokens_take_nothing_holds_sequences():
    state = Serving(base=0, reserve=0, room=1000, page=0, block=16, sequence=300, adapter=100)
    assert (state.tokens(0), state.tokens(7), state.tokens(8), state.sequences(2048)) == (None, None, 0, 3)
    both = Serving(base=0, reserve=0, room=1000, page=20, block=16, sequence=300, adapter=100)
    assert (both.tokens(0), both.tokens(6), both.sequences(17), both.adapters(17)) == (560, 80, 2, 6)
