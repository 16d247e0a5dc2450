"""Models with scans are served by their program: a page keeps the state after the last token written into it."""

from copy import deepcopy

import pytest
import torch
import transformers
from tests.tiny_types import tiny_model
from tests.unit.serve.conftest import END
from tests.unit.serve.test_own_cache import DELTA, HEADS, PROMPTS, TYPES, WIDE, answers, greedy, made

from veneer import (
    LLM,
    IA3Config,
    LoraConfig,
    LoRARequest,
    PrefixTuningConfig,
    PromptTuningConfig,
    SamplingParams,
    get_peft_model,
)
from veneer.errors import ConfigError
from veneer.serve.runners.program_runner import ProgramRunner

LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
TYPES |= {
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(
        **WIDE, **HEADS, **LAYERS, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=6,
        linear_value_head_dim=5, linear_conv_kernel_dim=3, pad_token_id=None,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**WIDE, **HEADS, **DELTA, **LAYERS, mlp_only_layers=[0, 1]),
}  # fmt: skip
KINDS = ["qwen3_5_text", "olmo_hybrid", "qwen3_next"]
LONG = "a long one that goes on and on until it has filled more pages than one, as every long one does"


def saved(folder, kind, config):
    adapted = get_peft_model(made(kind), config)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("block", [16, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_generate_alone_in_a_crowd_and_cached(kind, block, tokenizer, tmp_path):
    model = made(kind)
    prompts = [*PROMPTS, LONG, LONG + " and on", LONG]
    own = [greedy(model, tokenizer, prompt) for prompt in prompts]
    adapted = saved(tmp_path, kind, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    with_adapter = greedy(adapted, tokenizer, PROMPTS[1])
    llm = LLM(model, tokenizer=tokenizer, max_num_batched_tokens=11, max_num_seqs=2, block_size=block)
    assert isinstance(llm.engine.runner, ProgramRunner)
    assert [answers(llm, [prompt])[0] for prompt in prompts] == own
    assert answers(llm, prompts) == own  # two at a time, prompts in parts, the last ones from the cache
    mixed = answers(llm, [PROMPTS[1]] * 2, lora_request=[LoRARequest("a", 1, str(tmp_path)), None])
    assert mixed == [with_adapter, own[1]]


def test_a_page_has_256_tokens_unless_another_number_is_asked_for(tokenizer):
    pages = LLM(made("qwen3_5_text"), tokenizer=tokenizer).engine.scheduler.pages
    state = 4 * (2 * 8 * 4 + 3 * (2 * 8 + 8))  # matrices of two heads, and three inputs of the convolution
    assert (pages.block, pages.page_bytes) == (256, 256 * 4 * 2 * 16 + state)
    assert LLM(made("qwen3_5_text"), tokenizer=tokenizer, block_size=32).engine.scheduler.pages.block == 32


def test_a_preempted_sequence_answers_as_alone(tokenizer):
    model = made("qwen3_5_text")
    prompts = [PROMPTS[1], "which state to be in..", PROMPTS[2]]
    own = [greedy(model, tokenizer, prompt, 20) for prompt in prompts]
    sizes = {"block_size": 16, "max_model_len": 66}
    page = LLM(model, tokenizer=tokenizer, **sizes).engine.scheduler.pages.page_bytes
    tight = LLM(model, tokenizer=tokenizer, kv_cache_memory_bytes=7 * page, **sizes)
    assert answers(tight, prompts, 20) == own
    assert tight.engine.scheduler.n_preemptions > 0


def test_nothing_is_guessed(tokenizer):
    """A guess that turns out wrong could not be taken back."""
    model, guesses = made("qwen3_5_text"), {"method": "ngram", "num_speculative_tokens": 3}
    llm = LLM(model, tokenizer=tokenizer, speculative_config=guesses, disable_log_stats=False)
    prompt = "a dog a dog a dog a d"
    assert answers(llm, [prompt], 20) == [greedy(model, tokenizer, prompt, 20)]


def test_a_later_turn_goes_on_from_the_answer(tokenizer):
    model = made("olmo_hybrid")
    llm = LLM(model, tokenizer=tokenizer)
    [first] = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=7, ignore_eos=True), use_tqdm=False)
    ids = [*first.prompt_token_ids, *first.outputs[0].token_ids, 5, 3]
    later = {"prompt_token_ids": ids}
    [second] = llm.generate([later], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    out = model.generate(torch.tensor([ids]), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=END)
    fresh = LLM(model, tokenizer=tokenizer, enable_prefix_caching=False)
    [alone] = fresh.generate([later], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert list(second.outputs[0].token_ids) == list(alone.outputs[0].token_ids)
    assert len(out[0]) == len(ids) + 4
    assert second.num_cached_tokens == len(ids) - 3  # the last drawn token was not computed


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_bits_alone_and_in_a_crowd(kind, tokenizer):
    llm = LLM(made(kind, torch.bfloat16), tokenizer=tokenizer, block_size=16)
    prompts = [*PROMPTS, LONG, LONG[:40]]
    sampled = SamplingParams(temperature=0.9, seed=4, max_tokens=12, logprobs=3)
    alone = [llm.generate([prompt], sampled, use_tqdm=False)[0].outputs[0] for prompt in prompts]
    for one, other in zip(alone, llm.generate(prompts, sampled, use_tqdm=False), strict=True):
        assert one.token_ids == other.outputs[0].token_ids
        assert one.logprobs == other.outputs[0].logprobs


def test_adapters_of_three_methods_in_a_batch(tokenizer, tmp_path):
    kind = "qwen3_5_text"
    configs = {
        "lora": LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
        "dora": LoraConfig(r=2, use_dora=True, target_modules="all-linear", init_lora_weights=False),
        "ia3": IA3Config(target_modules=["in_proj_z", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    own, asked = [], []
    for number, (name, config) in enumerate(configs.items(), start=1):
        adapted = get_peft_model(made(kind), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad and name == "ia3":
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
        adapted.save_pretrained(tmp_path / name)
        own.append(greedy(adapted.eval(), tokenizer, PROMPTS[2]))
        asked.append(LoRARequest(name, number, str(tmp_path / name)))
    model = made(kind)
    llm = LLM(model, tokenizer=tokenizer)
    found = answers(llm, [PROMPTS[2]] * 4, lora_request=[*asked, None])
    assert found == [*own, greedy(model, tokenizer, PROMPTS[2])]
    assert isinstance(llm.engine.runner, ProgramRunner)
    assert llm.engine.runner.general is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_was_interrupted_is_computed_again(when, tokenizer):
    model = made("qwen3_5_text")
    own = [greedy(model, tokenizer, prompt) for prompt in (LONG, PROMPTS[1])]
    llm = LLM(model, tokenizer=tokenizer, block_size=16, max_num_batched_tokens=40)
    runner, engine, n_steps, answered = llm.engine.runner, llm.engine, [], []
    compute = runner.compute

    def interrupted(plan, greedy):
        n_steps.append(plan)
        if len(n_steps) in (2, 5) and when == "before":
            raise KeyboardInterrupt
        found = compute(plan, greedy)
        if len(n_steps) in (2, 5):
            raise KeyboardInterrupt
        return found

    runner.compute = interrupted
    for prompt in (LONG, PROMPTS[1]):
        ids = tokenizer(prompt)["input_ids"]
        engine.submit(engine.asked(None, ids, SamplingParams(temperature=0, max_tokens=5)))
    while engine.has_work:
        try:
            answered += engine.step()
        except KeyboardInterrupt:
            assert when
    last = {output.request_id: output.outputs[0].token_ids for output in answered}
    assert [[token for token in tokens if token != END] for tokens in last.values()] == own
    again = answers(llm, [LONG, PROMPTS[1]])  # what is cached is right
    assert again == own


@pytest.mark.parametrize("drafts", [None, {"method": "ngram", "num_speculative_tokens": 3}])
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_virtual_tokens_take_a_cache_of_transformers_beside_the_program(kind, drafts, tokenizer, tmp_path):
    """They share no pages, neither in a batch nor afterwards; all others do."""
    configs = PrefixTuningConfig(num_virtual_tokens=3), PromptTuningConfig(num_virtual_tokens=5)
    adapted = [get_peft_model(made(kind), config).eval() for config in configs]
    for n, model in enumerate(adapted):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=2.0)  # so that answers depend on them
        model.save_pretrained(tmp_path / str(n))
    requests = [LoRARequest(str(n), n + 1, str(tmp_path / str(n))) for n in range(len(configs))]
    prompts = [LONG, PROMPTS[2]]
    own = [greedy(model, tokenizer, prompt, 20) for model in (*adapted, made(kind)) for prompt in prompts]
    assert len({tuple(each) for each in own[::2]}) == 3
    tight = {"block_size": 16, "max_num_batched_tokens": 40, "max_num_seqs": 3, "speculative_config": drafts}
    llm = LLM(made(kind), tokenizer=tokenizer, **tight)
    for _ in range(2):
        asked = [request for request in (*requests, None) for _ in prompts]
        assert answers(llm, prompts * 3, 20, lora_request=asked) == own
    assert isinstance(llm.engine.runner, ProgramRunner)
    assert llm.engine.runner.general.n_held == 0
    [again] = llm.generate([LONG], SamplingParams(max_tokens=1), use_tqdm=False)
    [apart] = llm.generate([LONG], SamplingParams(max_tokens=1), use_tqdm=False, lora_request=requests[0])
    assert again.num_cached_tokens >= 16
    assert apart.num_cached_tokens == 0


def test_memory_for_less_than_a_page(tokenizer):
    with pytest.raises(ConfigError, match="do not hold one page of 256 positions"):
        LLM(made("qwen3_5_text"), tokenizer=tokenizer, kv_cache_memory_bytes=1000)


def test_conversations_that_begin_alike_all_go_on_from_their_answers(tokenizer):
    model = made("qwen3_5_text")
    llm, fresh = LLM(model, tokenizer=tokenizer), LLM(model, tokenizer=tokenizer, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    begin = tokenizer(LONG)["input_ids"]
    asked = [[*begin, *more] for more in ([7], [7, 9], [8, 4, 6])]
    for turn in range(3):
        prompts = [{"prompt_token_ids": ids} for ids in asked]
        found, alone = (each.generate(prompts, sampling, use_tqdm=False) for each in (llm, fresh))
        answers = [list(output.outputs[0].token_ids) for output in found]
        assert answers == [list(output.outputs[0].token_ids) for output in alone]
        if turn:
            assert [output.num_cached_tokens for output in found] == [len(ids) - 3 for ids in asked]
        asked = [[*ids, *own, 5 + turn, 3] for ids, own in zip(asked, answers, strict=True)]


@pytest.mark.parametrize("model_type", ["llava", "qwen3_5"])
def test_an_adapter_of_a_model_with_images_runs_on_the_program_for_text(model_type, tokenizer, tmp_path):
    """Its parts in the tower that reads images, and the projection's own weight, have no effect on tokens."""
    model, _ = tiny_model(model_type)
    towers = [name for name, _ in model.named_modules() if "projector" in name or "merger" in name]
    adapted = get_peft_model(deepcopy(model), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    saved_alone = get_peft_model(
        deepcopy(model), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=towers[:1], init_lora_weights=False)
    )
    for name, each in (("a", adapted), ("b", saved_alone)):
        each.save_pretrained(tmp_path / name)
    llm = LLM(model, tokenizer=tokenizer, max_model_len=64)
    own = [greedy(each.eval(), tokenizer, PROMPTS[1]) for each in (adapted, saved_alone, model)]
    assert len({tuple(each) for each in own}) == 3
    requests = [LoRARequest(name, i + 1, str(tmp_path / name)) for i, name in enumerate("ab")]
    assert answers(llm, [PROMPTS[1]] * 3, lora_request=[*requests, None]) == own
    assert len(llm.engine.runner.interpreter.versions) == 2
