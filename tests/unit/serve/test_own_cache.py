"""Models whose layers keep more than keys and values are served by transformers' own caches, one for each sequence."""

import pytest
import torch
import transformers
from tests.unit.serve.conftest import END, VOCAB
from transformers import AutoModelForCausalLM
from transformers.cache_utils import LinearAttentionLayer

from veneer import LLM, LoraConfig, LoRARequest, PrefixTuningConfig, PromptTuningConfig, SamplingParams, get_peft_model
from veneer.errors import TargetError
from veneer.model.batch.own_cache import KeptBytes, Way, kept_bytes, proved_way
from veneer.model.batch.paged import require_pageable
from veneer.serve.runners.own_cache_runner import OwnCacheRunner

WIDE = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": VOCAB, "eos_token_id": END}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 127}
DELTA = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 4}
TYPES = {
    "lfm2": lambda: transformers.Lfm2Config(
        **WIDE, **HEADS, layer_types=["conv", "full_attention"], block_multiple_of=4
    ),
    "qwen3_5_text": lambda: transformers.Qwen3_5TextConfig(
        **WIDE, **HEADS, **DELTA, layer_types=["linear_attention", "full_attention"]
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **WIDE, **HEADS, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=5, mamba_chunk_size=8
    ),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**WIDE, state_size=5, time_step_rank=3),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(
        vocab_size=VOCAB, n_positions=127, n_embd=24, n_layer=2, n_head=3, eos_token_id=END
    ),
    "mpt": lambda: transformers.MptConfig(
        d_model=24, n_heads=3, n_layers=2, expansion_ratio=2, max_seq_len=127, vocab_size=VOCAB, eos_token_id=END
    ),
}
WAYS = {"falcon_mamba": Way.ONE_BY_ONE, "openai-gpt": Way.ANEW}
PROMPTS = ["a dog", "what a state to be in", "one more of them, longer than the others are"]


def made(kind, dtype=torch.float32):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(TYPES[kind]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = END
    return model.to(dtype).eval()


def greedy(model, tokenizer, prompt, n=5):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=END)[0, ids.shape[1] :]
    return [token for token in out.tolist() if token != END]


def answers(llm, prompts, n=5, **how):
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=n), use_tqdm=False, **how)
    return [[token for token in output.outputs[0].token_ids if token != END] for output in outputs]


@pytest.mark.parametrize("kind", ["lfm2", "falcon_mamba", "openai-gpt"])
def test_answers_are_those_of_generate_alone_and_in_a_crowd(kind, tokenizer, caplog, tmp_path):
    model = made(kind)
    own = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    adapted = get_peft_model(made(kind), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    with_adapter = greedy(adapted.eval(), tokenizer, PROMPTS[1])
    llm = LLM(model, tokenizer=tokenizer, max_num_batched_tokens=11, max_num_seqs=2, general_runner=True)
    runner = llm.engine.runner
    assert isinstance(runner, OwnCacheRunner)
    assert runner.caching.way is WAYS.get(kind, Way.AT_ONCE)
    assert "keeps each sequence in a cache of transformers' own" in caplog.text
    assert answers(llm, PROMPTS[:1]) == own[:1]
    assert answers(llm, PROMPTS) == own  # three requests, two at a time, prompts in parts
    mixed = answers(llm, [PROMPTS[1]] * 2, lora_request=[LoRARequest("a", 1, str(tmp_path)), None])
    assert mixed == [with_adapter, own[1]]
    assert runner.n_held == 0


def test_a_state_that_is_below_rounding_is_known_from_the_config():
    for kind in ("lfm2", "falcon_h1", "qwen3_5_text"):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(TYPES[kind](), dtype=torch.bfloat16).eval()
        with pytest.raises(TargetError, match="keep more than keys and values"):
            require_pageable(model)


def test_the_way_of_a_small_model_is_found_in_float32():
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(TYPES["falcon_mamba"](), dtype=torch.bfloat16).eval()
    assert proved_way(model) is Way.ONE_BY_ONE


def test_models_that_predict_no_next_token_from_ids_alone_are_refused():
    xlnet = transformers.XLNetConfig(vocab_size=VOCAB, d_model=24, n_layer=1, n_head=3, d_inner=20)
    model = AutoModelForCausalLM.from_config(xlnet, dtype=torch.float32).eval()
    with pytest.raises(TargetError, match=r"masks of permutations\. Use model\.generate"):
        proved_way(model)
    xlm = AutoModelForCausalLM.from_config(transformers.XLMConfig(vocab_size=VOCAB, emb_dim=24, n_layers=1, n_heads=3))
    with pytest.raises(TargetError, match=r"in the place of a mask\. Use model\.generate"):
        proved_way(xlm)
    llama = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**WIDE, **HEADS, pad_token_id=0), dtype=torch.float32
    ).eval()
    llama.model.embed_tokens = torch.nn.Identity()
    with pytest.raises(TargetError, match="computes no logits from token ids alone"):
        proved_way(llama)


def test_bytes_of_a_sequence_are_those_of_its_cache():
    values = 2 * 8  # keys and values of the one layer with attention, one head of 8
    with torch.device("meta"):
        lfm2 = AutoModelForCausalLM.from_config(TYPES["lfm2"](), dtype=torch.float32)
        mamba = AutoModelForCausalLM.from_config(TYPES["falcon_mamba"](), dtype=torch.float32)
    counter = getattr(LinearAttentionLayer(), "cumulative_length_linear", None)  # since transformers 5.25
    n_counter = 0 if counter is None else counter.nbytes
    assert kept_bytes(lfm2, Way.AT_ONCE) == KeptBytes(4 * values, 4 * 24 * 3 + n_counter)  # a convolution of three
    assert kept_bytes(mamba, Way.ONE_BY_ONE) == KeptBytes(
        0, 2 * (4 * 44 * (4 + 5) + n_counter)
    )  # two layers of 44, 4 + 5 values
    assert kept_bytes(mamba, Way.ANEW) == KeptBytes(8)


def test_sequences_that_are_preempted_or_aborted_give_their_caches_back(tokenizer):
    model = made("lfm2")
    prompts = [PROMPTS[1], "which state to be in..", PROMPTS[2]]
    own = [greedy(model, tokenizer, prompt, 20) for prompt in prompts]
    kept = kept_bytes(model, Way.AT_ONCE)
    page = 16 * kept.position
    fixed = -(-kept.sequence // page)
    llm = LLM(
        model, tokenizer=tokenizer, max_model_len=66, kv_cache_memory_bytes=page * (2 * fixed + 5), general_runner=True
    )
    engine, runner = llm.engine, llm.engine.runner
    most = []
    run = runner.run
    runner.run = lambda plan: (most.append(runner.n_held), run(plan))[1]
    assert answers(llm, prompts, 20) == own
    assert engine.scheduler.n_preemptions > 0
    assert max(most) == 2  # a third has no memory for its state
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    asked = [engine.asked(None, each, SamplingParams(temperature=0, max_tokens=30)) for each in ids]
    for each in asked:
        engine.submit(each)
    engine.step()
    assert runner.n_held > 0
    for each in asked:
        engine.abort(each.id)
    while engine.has_work:
        engine.step()
    assert runner.n_held == 0
    assert engine.scheduler.pages.n_held == 0


def test_a_step_that_was_interrupted_is_run_again(tokenizer):
    model = made("falcon_h1")
    own = greedy(model, tokenizer, PROMPTS[1])
    llm = LLM(model, tokenizer=tokenizer)
    runner, seen = llm.engine.runner, []
    extend = runner.caching.extend

    def interrupted(held, tokens, **how):
        seen.append(tokens)
        if len(seen) == 2:
            raise KeyboardInterrupt
        found = extend(held, tokens, **how)
        if len(seen) in (5, 8):
            raise KeyboardInterrupt
        return found

    runner.caching.extend = interrupted
    engine = llm.engine
    asked = engine.asked(None, tokenizer(PROMPTS[1])["input_ids"], SamplingParams(temperature=0, max_tokens=5))
    engine.submit(asked)
    outputs = []
    while engine.has_work:
        try:
            outputs += engine.step()
        except KeyboardInterrupt:
            continue
    assert [token for token in outputs[-1].outputs[0].token_ids if token != END] == own
    assert len(seen) > 8


def test_virtual_tokens_stand_in_front_of_a_sequence_with_its_own_cache(tokenizer, tmp_path):
    for number, config in enumerate(
        (PromptTuningConfig(num_virtual_tokens=5), PrefixTuningConfig(num_virtual_tokens=3))
    ):
        model = get_peft_model(made("mpt"), config)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / str(number))
        own = greedy(model.eval(), tokenizer, PROMPTS[1])
        llm = LLM(made("mpt"), tokenizer=tokenizer, max_num_batched_tokens=4, general_runner=True)
        assert answers(llm, [PROMPTS[1]], lora_request=LoRARequest("a", 1, str(tmp_path / str(number)))) == [own]


def test_hidden_states_and_scores_come_from_a_cache_of_its_own(tokenizer):
    model = made("falcon_h1")
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, output_hidden_states=True)
    llm = LLM(model, tokenizer=tokenizer, max_num_batched_tokens=5)
    [found] = llm.embed([PROMPTS[1]], use_tqdm=False)
    expected = torch.nn.functional.normalize(whole.hidden_states[-1][0, -1], dim=0)
    torch.testing.assert_close(torch.tensor(found.outputs.embedding), expected, atol=1e-4, rtol=1e-3)
    [scored] = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    own = whole.logits[0].log_softmax(-1)
    for at, token in enumerate(ids[0].tolist()[1:]):
        assert scored.prompt_logprobs[at + 1][token].logprob == pytest.approx(float(own[at, token]), abs=1e-3)
