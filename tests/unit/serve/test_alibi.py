"""Models whose attention has a bias by position (ALiBi) are served by their program, with pages, cache and drafts."""

from typing import Any

import pytest
import torch
import transformers
from tests.unit.serve.conftest import END, VOCAB, make_model, save_adapter
from tests.unit.serve.test_own_cache import PROMPTS, answers, greedy

from veneer import (
    LLM,
    LoraConfig,
    LoRARequest,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    SamplingParams,
)
from veneer.serve.runners.program_runner import ProgramRunner

SIZES: dict[str, Any] = {"hidden_size": 24, "vocab_size": VOCAB, "eos_token_id": END, "bos_token_id": END}
TYPES = {
    "bloom": transformers.BloomConfig(n_layer=2, n_head=3, **SIZES),
    "mpt": transformers.MptConfig(
        d_model=24, n_heads=3, n_layers=2, expansion_ratio=2, max_seq_len=127, vocab_size=VOCAB, eos_token_id=END
    ),
    "falcon": transformers.FalconConfig(
        alibi=True, multi_query=False, parallel_attn=False, num_attention_heads=3, num_hidden_layers=2, **SIZES
    ),
}
CONFIGS = {
    "lora": lambda: LoraConfig(r=3, target_modules="all-linear"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
}


def served(family, tokenizer, dtype=torch.float32, **how):
    llm = LLM(make_model(TYPES[family]).to(dtype), tokenizer=tokenizer, max_model_len=100, **how)
    assert isinstance(llm.engine.runner, ProgramRunner)
    return llm


@pytest.mark.parametrize("family", TYPES)
def test_answers_are_those_of_generate_alone_in_a_crowd_and_cached(family, tokenizer):
    prompts = [*PROMPTS, PROMPTS[2] + " and on", PROMPTS[2]]
    own = [greedy(make_model(TYPES[family]), tokenizer, prompt, 20) for prompt in prompts]
    llm = served(family, tokenizer, max_num_batched_tokens=11, max_num_seqs=2)
    assert [answers(llm, [prompt], 20)[0] for prompt in prompts] == own
    again = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert [[t for t in each.outputs[0].token_ids if t != END] for each in again] == own
    assert again[-1].num_cached_tokens > 0
    guessing = served(family, tokenizer, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    repeated = "a dog a dog a dog a d"
    assert answers(guessing, [repeated], 20) == [greedy(make_model(TYPES[family]), tokenizer, repeated, 20)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", TYPES)
def test_adapters_are_mixed_with_the_base(family, kind, tokenizer, tmp_path):
    """Virtual tokens too: they have positions, and so a bias."""
    save_adapter(tmp_path, CONFIGS[kind](), TYPES[family])
    adapted = PeftModel.from_pretrained(make_model(TYPES[family]), str(tmp_path)).eval()
    own = [greedy(adapted, tokenizer, PROMPTS[1]), greedy(make_model(TYPES[family]), tokenizer, PROMPTS[1])]
    llm = served(family, tokenizer, max_num_batched_tokens=7)
    assert answers(llm, [PROMPTS[1]] * 2, lora_request=[LoRARequest("a", 1, str(tmp_path)), None]) == own


@pytest.mark.parametrize("family", TYPES)
def test_a_row_has_its_bits_alone_and_in_a_crowd(family, tokenizer):
    llm = served(family, tokenizer, torch.bfloat16, enable_prefix_caching=False)
    asked = SamplingParams(temperature=0, max_tokens=7, logprobs=2)
    crowd = llm.generate(PROMPTS, asked, use_tqdm=False)
    for prompt, output in zip(PROMPTS, crowd, strict=True):
        [alone] = llm.generate([prompt], asked, use_tqdm=False)
        assert alone.outputs[0].logprobs == output.outputs[0].logprobs


@pytest.mark.parametrize("family", TYPES)
def test_pages_in_plain_torch_have_the_bias_too(family, tokenizer):
    """The kernels' pages hold a multiple of 16 tokens."""
    own = [greedy(make_model(TYPES[family]), tokenizer, prompt) for prompt in PROMPTS]
    assert answers(served(family, tokenizer, block_size=12, max_num_batched_tokens=11), PROMPTS) == own
