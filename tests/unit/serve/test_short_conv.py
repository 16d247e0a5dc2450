"""Models with short convolutions are served by their program: what a token leaves for them is in pages, as keys are."""

import pytest
import torch
from tests.unit.serve.test_own_cache import PROMPTS, answers, greedy, made

from veneer import LLM, LoraConfig, LoRARequest, get_peft_model
from veneer.serve.runners.program_runner import ProgramRunner


def saved(folder, config):
    adapted = get_peft_model(made("lfm2"), config)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("block", [16, 12])
def test_answers_are_those_of_generate_alone_in_a_crowd_and_cached(block, tokenizer, tmp_path):
    model = made("lfm2")
    prompts = [*PROMPTS, PROMPTS[2] + " and on", PROMPTS[2]]
    own = [greedy(model, tokenizer, prompt) for prompt in prompts]
    adapted = saved(tmp_path, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    with_adapter = greedy(adapted, tokenizer, PROMPTS[1])
    llm = LLM(model, tokenizer=tokenizer, max_num_batched_tokens=11, max_num_seqs=2, block_size=block)
    assert isinstance(llm.engine.runner, ProgramRunner)
    assert [answers(llm, [prompt])[0] for prompt in prompts] == own
    assert answers(llm, prompts) == own  # two at a time, prompts in parts, the last ones from the cache
    mixed = answers(llm, [PROMPTS[1]] * 2, lora_request=[LoRARequest("a", 1, str(tmp_path)), None])
    assert mixed == [with_adapter, own[1]]


def test_a_preempted_sequence_and_a_drafted_one_answer_as_alone(tokenizer):
    model = made("lfm2")
    prompts = [PROMPTS[1], "which state to be in..", PROMPTS[2]]
    own = [greedy(model, tokenizer, prompt, 20) for prompt in prompts]
    n_bytes = 16 * 4 * (2 * 16 + 24)  # of a page: keys and values of one layer, a head of 8 filled up, a convolution
    tight = LLM(model, tokenizer=tokenizer, max_model_len=66, kv_cache_memory_bytes=7 * n_bytes)
    assert answers(tight, prompts, 20) == own
    assert tight.engine.scheduler.n_preemptions > 0
    guessing = LLM(model, tokenizer=tokenizer, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    repeated = ["a dog a dog a dog a d"]
    assert answers(guessing, repeated, 20) == [greedy(model, tokenizer, repeated[0], 20)]


def test_a_row_has_its_bits_alone_and_in_a_crowd(tokenizer):
    llm = LLM(made("lfm2", torch.bfloat16), tokenizer=tokenizer)
    assert [answers(llm, [prompt], 12)[0] for prompt in PROMPTS] == answers(llm, PROMPTS, 12)
