"""Rollouts: answers of the adapter in training are those of the same one saved, and depend on nothing beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.serve.conftest import METHODS, byte_tokenizer, make_model
from tests.unit.store.conftest import make_gguf
from transformers import AutoModelForCausalLM

from veneer import BitsAndBytesConfig, LoraConfig, LoRARequest, PeftModel, Rollouts, SamplingParams, get_peft_model
from veneer.errors import AdapterNameError, ConfigError, NonFiniteError
from veneer.learn.proof import require_same_policy
from veneer.learn.rollouts import DrawnPrompt
from veneer.plain.tensor_tree import bytes_of
from veneer.store.source import load_model

__all__ = ["make_gguf"]  # a fixture

NAMES = ("lora", "dora", "ia3", "oft", "bottleneck", "prefix", "prompt", "saved")
PROMPTS = [[5, 9, 200, 14, 3], [44] * 16, [7 * i % 251 for i in range(17)], [1]]  # to a page and beyond
DRAWS = SamplingParams(n=2, temperature=0.7, top_p=0.9, max_tokens=6)


def moved(model: PeftModel, size: float, seed: int) -> None:
    """A step of all adapters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if {"adapters", "copies"} & {*name.split(".")}:
                parameter += size * torch.randn_like(parameter)


def told(drawn: list[DrawnPrompt]) -> list[Any]:
    return [(a.token_ids, a.logprobs, a.kept, a.finish_reason) for each in drawn for a in each.answers]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """A model with an adapter of each method, away from its start."""
    made = get_peft_model(make_model(), METHODS[NAMES[0]](), NAMES[0])
    for name in NAMES[1:]:
        made.add_adapter(name, METHODS[name]())
    moved(made, 0.2, 1)
    return made


def test_live_adapters_answer_as_saved_ones_and_base_requests_as_the_base(model, tmp_path):
    own, bare = Rollouts(model.train(), byte_tokenizer()), Rollouts(make_model(), byte_tokenizer())
    how: dict[str, Any] = {"prompts": PROMPTS[::2], "params": replace(DRAWS, n=1, max_tokens=3), "key": (3, 1)}
    base = told(bare.draw(adapter=None, **how))
    for name in NAMES:
        own.hand_over(name)
    moved(model, 0.05, 2)
    model.save_pretrained(tmp_path, selected_adapters=list(NAMES))
    for number, name in enumerate(NAMES, start=1):
        live, saved = own.draw(adapter=name, **how), LoRARequest(name, number, str(tmp_path / name))
        bare.engine.add_adapter(saved)
        assert told(live) == told(bare.draw(adapter=saved, **how)) != base, name
        assert all(a.adapter.startswith("live-") for each in live for a in each.answers)
    assert told(own.draw(adapter=None, **how)) == base
    assert model.training
    assert not model.adapter_state.disabled
    scores = own.score([PROMPTS[2]], adapter="lora")
    assert scores == bare.score([PROMPTS[2]], adapter=LoRARequest("lora", 1, str(tmp_path / "lora")))
    assert len(scores[0]) == len(PROMPTS[2]) - 1


def test_a_rollout_depends_on_its_key_and_on_no_other(model):
    own = Rollouts(model, byte_tokenizer())
    other = Rollouts(model, byte_tokenizer(), max_num_batched_tokens=24, max_num_seqs=3, enable_prefix_caching=False)
    crowd = own.draw(PROMPTS * 4, DRAWS, adapter="lora", key=(7,), rows=range(16))
    assert len({each.answers for each in crowd[::4]}) > 1
    for row in (0, 5, 15):
        for engine in (own, other):
            alone = engine.draw([PROMPTS[row % 4]], DRAWS, adapter="lora", key=(7,), rows=[row])
            assert told(alone) == told([crowd[row]])
    backwards = other.draw(PROMPTS[::-1] * 4, DRAWS, adapter="lora", key=(7,), rows=range(15, -1, -1))
    assert told(backwards[::-1]) == told(crowd)
    assert told(own.draw(PROMPTS, DRAWS, adapter="lora", key=(8,))) != told(crowd[:4])


def test_an_engine_out_of_pages_preempts_and_draws_the_same(model):
    params, own = replace(DRAWS, n=1, max_tokens=23), Rollouts(model, byte_tokenizer())
    pages, adapter = own.engine.scheduler.pages, own.engine.versions.of(own.hand_over("lora")).n_bytes
    room = adapter + 4 * pages.page_bytes  # little more than one sequence
    small = Rollouts(model, byte_tokenizer(), kv_cache_memory_bytes=room, max_model_len=48)
    wanted = told(own.draw(PROMPTS * 2, params, adapter="lora", key=(7,)))
    assert told(small.draw(PROMPTS * 2, params, adapter="lora", key=(7,))) == wanted
    assert own.engine.scheduler.n_preemptions == 0
    assert small.engine.scheduler.n_preemptions > 0


def test_log_probabilities_are_those_of_a_training_pass_on_every_storage(tmp_path, make_gguf):
    file, dense = make_gguf("llama", "Q8_0")
    dense.save_pretrained(tmp_path / "dense")
    coded = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    for base in (
        dense,
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=coded),
        load_model(file, dtype="float32"),
    ):
        model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
        moved(model, 0.1, 4)
        own = Rollouts(model.train(), byte_tokenizer())
        for temperature in (0.7, 1.3):
            params = SamplingParams(temperature=temperature, max_tokens=9, ignore_eos=True)
            for each in own.draw(PROMPTS[1:], params, key=(2,)):
                answer, start = each.answers[0], len(each.prompt_ids) - 1
                with torch.no_grad():
                    logits = model(torch.tensor([each.prompt_ids + answer.token_ids])).logits[0, start:-1]
                passed = (logits.double() / temperature).log_softmax(dim=-1)
                scored = passed.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
                require_same_policy(torch.tensor([answer.logprobs]), scored[None], scored[None] < 1, [answer.token_ids])


def test_earlier_versions_leave_nothing_behind_and_the_base_stays(model):
    before = {
        name: p.clone() for name, p in model.named_parameters() if not {"adapters", "copies"} & {*name.split(".")}
    }
    own = Rollouts(model, byte_tokenizer())
    pages, pool, held = own.engine.scheduler.pages, own.engine.pool, set()
    for step in range(4):
        own.draw(PROMPTS, DRAWS, adapter="lora", key=(step,))
        assert own.hand_over("lora").version == own.hand_over("lora").version  # equal content is one version
        held.add((pages.n_cached, pages.n_held, len(pool.known), own.engine.runner.loaded == pool.known))
        moved(model, 0.01, step)
    assert len(held) == 1
    assert bytes_of(own.engine.runner.interpreter.versions) > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_base_that_was_moved_is_read_where_it_lies(model):
    """As by a trainer's preparation for several processes."""
    own = Rollouts(model, byte_tokenizer())
    before, engine = told(own.draw(PROMPTS, DRAWS, adapter="lora", key=(3,))), own.engine
    assert told(own.draw(PROMPTS, DRAWS, adapter="lora", key=(3,))) == before
    assert own.engine is engine
    for tensor in (*model.parameters(), *model.buffers()):
        given = tensor.data
        tensor.data = given.clone()
        given.fill_(7)
    assert told(own.draw(PROMPTS, DRAWS, adapter="lora", key=(3,))) == before
    assert own.engine is not engine


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_an_adapter_with_modules_of_its_own_does_not_move_the_base(name):
    drawn = []
    for memory in ("one", "beside"):
        base = make_model().requires_grad_(False)
        rollouts = Rollouts(base, byte_tokenizer(), memory=memory)
        engine = rollouts.engine
        torch.manual_seed(5)
        moved(get_peft_model(base, METHODS[name]()), 0.3, 7)
        drawn.append([each[0] for each in told(rollouts.draw(PROMPTS, DRAWS, key=(2,)))])
        assert rollouts.engine is engine
    assert drawn[0] == drawn[1]


def test_what_is_refused(model):
    own = Rollouts(model, byte_tokenizer())
    with pytest.raises(AdapterNameError, match="no adapter 'other' on this model: it has"):
        own.draw(PROMPTS, DRAWS, adapter="other")
    with pytest.raises(AdapterNameError, match=r"the model has none\. Give adapter=None for the base"):
        Rollouts(make_model(), byte_tokenizer()).draw(PROMPTS, DRAWS)
    with pytest.raises(ConfigError, match="policy_logprobs=True: the likeliest tokens are not drawn"):
        own.draw(PROMPTS, SamplingParams(temperature=0), adapter="lora")
    for name in ("lora", "prompt"):
        own.hand_over(name)
        parameter = next(p for n, p in model.named_parameters() if f"adapters.{name}." in n)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[1] = float("nan")
        with pytest.raises(NonFiniteError, match=f"the adapter '{name}' in training has values that are not finite"):
            own.hand_over(name)
        with torch.no_grad():
            parameter.copy_(kept)
