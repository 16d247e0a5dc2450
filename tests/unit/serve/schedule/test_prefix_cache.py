"""The prefix cache: what it finds, what it never finds, and that no bit of an answer depends on it."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import pytest
import torch
from tests.unit.serve.conftest import FAMILIES, METHODS, make_model, save_adapter

from veneer import LLM, LoraConfig, LoRARequest, SamplingParams
from veneer.errors import ConfigError
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.pages import Pages
from veneer.serve.schedule.prefix_cache import Tail, key_of, root_of

HEADER = [(5 * i * i + 3 * i) % 251 + 1 for i in range(53)]
TAILS = [[(11 * i + 7 * n) % 251 + 1 for i in range(n)] for n in (3, 17, 8, 1)]
ROUNDED = ("oft", "lokr")  # torch computes a part of their rows, which depends on the rows beside them
GREEDY = SamplingParams(temperature=0, max_tokens=9, logprobs=3)


def engine(tokenizer: Any, family: str = "llama", dtype: torch.dtype = torch.float32, **how: Any) -> LLM:
    return LLM(make_model(family).to(dtype), tokenizer=tokenizer, **how)


def asked(llm: LLM, prompts: Any, params: Any = GREEDY, adapters: Any = None) -> list[Any]:
    return llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)


def told(outputs: list[Any]) -> list[Any]:
    """All tokens and log-probabilities, to the bit."""
    return [[(o.token_ids, o.logprobs, o.text) for o in output.outputs] for output in outputs]


def cached(outputs: list[Any]) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


def watched(llm: LLM) -> Counter[str]:
    """The number of tokens that the engine computes from here on, by request."""
    found, commit = Counter[str](), llm.engine.scheduler.commit

    def counting(plan: Any, sampled: Any) -> Any:
        found.update({s.request_id: len(s.tokens) for s in plan.sequences})
        return commit(plan, sampled)

    llm.engine.scheduler.commit = counting  # type: ignore[method-assign]
    return found


# No bit depends on it.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])  # experts see all rows
def test_answers_with_the_cache_are_those_without(family, dtype, tokenizer):
    """Header, then turns behind it, in chunks: windows of five and seven positions are long passed."""
    how = {"max_num_batched_tokens": 29, "family": family, "dtype": dtype}
    with_it, without = engine(tokenizer, **how), engine(tokenizer, **how, enable_prefix_caching=False)
    prompts = [HEADER + tail for tail in TAILS]
    first = asked(without, prompts)
    assert told(asked(with_it, prompts)) == told(first)
    again = asked(with_it, prompts)
    assert told(again) == told(first)
    assert all(n >= (len(prompt) - 1) // 16 * 16 for n, prompt in zip(cached(again), prompts, strict=True))
    turns = [prompt + output.outputs[0].token_ids + TAILS[1] for prompt, output in zip(prompts, first, strict=True)]
    later = asked(with_it, turns)
    assert told(later) == told(asked(without, turns))
    # all but the last token of an answer, which was drawn and not read
    read = [len(prompt) + len(output.outputs[0].token_ids) - 1 for prompt, output in zip(prompts, first, strict=True)]
    assert cached(later) == read
    assert len({tuple(output.outputs[0].token_ids) for output in first}) > 2


def test_every_method_shares_with_itself_alone(adapters, tokenizer):
    """An adapter of every method and the base behind one header, twice."""
    how = {"max_num_batched_tokens": 61}
    with_it, without = engine(tokenizer, **how), engine(tokenizer, **how, enable_prefix_caching=False)
    names = [None, *METHODS, None, *METHODS]
    prompts = [HEADER + TAILS[i % len(TAILS)] for i in range(len(names))]
    requests = [adapters.get(name) for name in names]
    expected = told(asked(without, prompts, adapters=requests))
    outputs = asked(with_it, prompts, adapters=requests)
    for found in (told(outputs), told(asked(with_it, prompts, adapters=requests))):
        for name, own, other in zip(names, found, expected, strict=True):
            assert own[0][0] == other[0][0]
            assert name in ROUNDED or own == other
    # the first of each version reads the header, the second finds it, but for the virtual tokens in front of it
    assert cached(outputs[: len(names) // 2]) == [0] * (len(names) // 2)
    assert all(n >= 32 for n in cached(outputs[len(names) // 2 :]))


@pytest.mark.parametrize("general", [False, True])
def test_other_pages_and_other_runners_share_too(general, adapters, tokenizer):
    how = {"block_size": 3, "general_runner": general, "max_num_batched_tokens": 17}
    llm = engine(tokenizer, **how)
    requests = [None, adapters["lora"], adapters["prompt"], adapters["prefix"]]
    prompts = [HEADER[:20] + tail for tail in TAILS]
    expected = asked(engine(tokenizer, **how, enable_prefix_caching=False), prompts, adapters=requests)
    for _ in range(2):
        found = asked(llm, prompts, adapters=requests)
        assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    assert min(cached(found)) >= 18


def test_log_probabilities_of_a_prompt_are_read_though_its_pages_are_there(tokenizer):
    params = SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=2)
    llm = engine(tokenizer, max_num_batched_tokens=23)
    expected = asked(engine(tokenizer, enable_prefix_caching=False), [HEADER], params)[0]
    asked(llm, [HEADER])
    scored = asked(llm, [HEADER], params)[0]
    assert (scored.prompt_logprobs, scored.num_cached_tokens) == (expected.prompt_logprobs, 0)
    assert len(scored.prompt_logprobs) == len(HEADER)


def test_draws_are_the_same(tokenizer):
    """Seeds, penalties and a bias: the cache holds keys and values, and nothing of a draw."""
    params = SamplingParams(
        temperature=1.3, top_p=0.9, repetition_penalty=1.3, seed=5, max_tokens=11, n=3, logprobs=2, logit_bias={7: 2.0}
    )
    llm = engine(tokenizer)
    expected = told(asked(engine(tokenizer, enable_prefix_caching=False), [HEADER], params))
    assert [told(asked(llm, [HEADER], params)) for _ in range(2)] == [expected] * 2


# What is read once.


def test_answers_to_one_prompt_read_it_once(tokenizer):
    llm = engine(tokenizer)
    counts = watched(llm)
    [output] = asked(llm, [HEADER], SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=2, ignore_eos=True))
    assert sorted(counts.values()) == [6, 6, 6, 54]  # 48 of 53 are full pages, and one token is decoded
    assert output.num_cached_tokens == 0


def test_prompts_behind_one_header_read_it_once(tokenizer):
    """All arrive in one step; the header takes two."""
    llm = engine(tokenizer, max_num_batched_tokens=40)
    counts = watched(llm)
    prompts = [[*HEADER, 7 * i + 1, 3] for i in range(9)]
    outputs = asked(llm, prompts, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    assert sorted(counts.values()) == [7 + 8] * 8 + [55 + 8]
    assert sorted(cached(outputs)) == [0] + [48] * 8


def test_a_later_turn_reads_what_is_new_in_it_alone(tokenizer):
    """It goes on in the page in which the last turn ended; a second one behind the same turn finds full pages."""
    llm = engine(tokenizer)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    [first] = asked(llm, [HEADER], params)
    turns = [[*HEADER, *first.outputs[0].token_ids, 9 + i, 3, 8] for i in range(2)]
    outputs = asked(llm, turns, params)
    assert cached(outputs) == [53 + 5, 48]
    assert llm.reset_prefix_cache()
    asked(llm, [HEADER], params)
    other = [*HEADER[:50], 1, 2, 3, 4, 5]
    assert cached(asked(llm, [other], params)) == [50]  # as far as a page is as wanted, its tokens are not read
    without = engine(tokenizer, enable_prefix_caching=False)
    for prompt in (*turns, other):
        assert told(asked(without, [prompt])) == told(asked(llm, [prompt]))


def test_virtual_tokens_are_written_once(tmp_path, tokenizer):
    """37 of them: two pages are shared by all requests of a version, the rest stands in front of each one's tokens."""
    from veneer import PrefixTuningConfig, PromptTuningConfig

    configs = (PrefixTuningConfig(num_virtual_tokens=37), PromptTuningConfig(num_virtual_tokens=37))
    for number, config in enumerate(configs, start=1):
        request = LoRARequest(f"v{number}", number, str(save_adapter(tmp_path / str(number), config, seed=number)))
        llm = engine(tokenizer)
        written, put = list[int](), llm.engine.runner._put_front

        def counting(version: str, first: int, rows: Any, put: Any = put, written: list[int] = written) -> None:
            written.append(rows.n_rows)
            put(version, first, rows)

        llm.engine.runner._put_front = counting
        prompts = [[3 * i + 5, 9, 11] for i in range(5)]
        expected = told(asked(engine(tokenizer, enable_prefix_caching=False), prompts, adapters=request))
        outputs = asked(llm, prompts, adapters=request)
        assert (told(outputs), sorted(written), cached(outputs)) == (expected, [5, 5, 5, 5, 37], [0] * 5)


def test_the_cache_is_switched_off_and_reset(tokenizer):
    off, llm = engine(tokenizer, enable_prefix_caching=False), engine(tokenizer)
    assert [cached(asked(off, [HEADER])) for _ in range(2)] == [[0], [0]]
    assert [cached(asked(llm, [HEADER])) for _ in range(2)] == [[0], [52]]
    assert llm.reset_prefix_cache() is True
    pages = llm.engine.scheduler.pages
    assert (pages.n_cached, pages.n_free) == (0, pages.n_pages)
    assert [cached(asked(llm, [HEADER])) for _ in range(2)] == [[0], [52]]


def test_tokens_sought_and_found_are_counted(tokenizer):
    llm = engine(tokenizer, disable_log_stats=False)
    asked(llm, [HEADER]), asked(llm, [HEADER])
    counts = {metric.name: metric.value for metric in llm.get_metrics() if "prefix_cache" in metric.name}
    assert counts == {"vllm:prefix_cache_queries": 106, "vllm:prefix_cache_hits": 52}


# What is never found: the peers' faults.


def test_another_adapter_finds_nothing(adapters, tmp_path, tokenizer):
    """One layout, one rank, one prompt; under a name that is used again, too (vLLM #42125, llama.cpp #26207)."""
    folder = tmp_path / "again"
    shutil.copytree(adapters["lora"].path, folder)
    llm, request = engine(tokenizer), LoRARequest("again", 1, str(folder))
    first = asked(llm, [HEADER], adapters=request)
    assert cached(asked(llm, [HEADER])) == [0]  # the base
    assert cached(asked(llm, [HEADER], adapters=adapters["lora"])) == [52]  # the same content, under its own name
    other = save_adapter(tmp_path / "other", METHODS["lora"](), seed=77)
    for file in other.iterdir():
        shutil.copy(file, folder / file.name)
    second = asked(llm, [HEADER], adapters=request)
    assert cached(second) == [0]
    fresh = engine(tokenizer, enable_prefix_caching=False)
    assert told(second) == told(asked(fresh, [HEADER], adapters=request)) != told(first)
    assert cached(asked(llm, [HEADER], adapters=adapters["lora"])) == [52]  # the first content, which kept that name


def test_a_version_that_was_unloaded_finds_its_pages(adapters, tokenizer):
    llm = engine(tokenizer, max_loras=1)
    first = asked(llm, [HEADER], adapters=adapters["lora"])
    asked(llm, [HEADER], adapters=adapters["ia3"])
    again = asked(llm, [HEADER], adapters=adapters["lora"])
    assert (told(again), cached(again)) == (told(first), [52])


def test_mixes_share_with_equal_mixes_alone(adapters, tokenizer):
    def mix(name: str, number: int, *parts: tuple[str, float]) -> LoRARequest:
        return LoRARequest.mix(name, number, [(adapters[part], weight) for part, weight in parts])

    llm = engine(tokenizer)
    one = mix("one", 21, ("lora", 0.7), ("rslora", 0.3))
    first = asked(llm, [HEADER], adapters=one)
    assert cached(asked(llm, [HEADER], adapters=mix("other", 22, ("lora", 0.3), ("rslora", 0.7)))) == [0]
    assert cached(asked(llm, [HEADER], adapters=adapters["lora"])) == [0]
    same = asked(llm, [HEADER], adapters=mix("same", 23, ("rslora", 0.3), ("lora", 0.7)))
    assert (cached(same), told(same)) == ([52], told(first))


def test_salts_part_requests(tokenizer):
    llm = engine(tokenizer)
    salted = [{"prompt_token_ids": HEADER, "cache_salt": salt} for salt in ("a", "b", "a")]
    for prompt, expected in zip([HEADER, *salted, HEADER], [0, 0, 0, 52, 52], strict=True):
        assert cached(asked(llm, [prompt])) == [expected]


@pytest.mark.parametrize(
    ("salt", "said"), [("x" * 2**20, "has 1048576 characters"), ("", "has 0 characters"), (7, "is a int")]
)
def test_salts_that_are_refused(salt, said, tokenizer):
    llm = engine(tokenizer)
    with pytest.raises(ConfigError, match=f"cache_salt {said}: it must be text of 1 to 1024 characters") as error:
        asked(llm, [{"prompt": "x", "cache_salt": salt}])
    assert len(str(error.value)) < 200
    with pytest.raises(ConfigError, match="may have cache_salt; not"):
        asked(llm, [{"cache_salt": "x"}])
    assert told(asked(llm, [{"prompt": "x", "cache_salt": "\ud800"}])) == told(asked(llm, ["x"]))


def test_keys_tell_roots_and_places_apart():
    assert len({root_of(None), root_of("v"), root_of("v", "s"), root_of(None, "s"), root_of("s"), root_of("None")}) == 6
    root = root_of("v")
    assert key_of(key_of(root, [1, 2]), [3]) != key_of(key_of(root, [1]), [2, 3]) != key_of(root, [1, 2, 3])


# What goes out.


def published(pages: Pages, holder: str, tokens: list[int], n_uses: int = 1) -> list[bytes]:
    """A sequence whose blocks are computed, used and left."""
    keys, parent = [], root_of(None)
    for at in range(0, len(tokens), pages.block):
        keys.append(parent := key_of(parent, tokens[at : at + pages.block]))
    for _ in range(n_uses):
        found = pages.share(holder, keys)
        assert pages.grow(holder, len(tokens))
        pages.count_use(holder)
        pages.publish(holder, keys, found)
        pages.release(holder)
    return keys


def test_ends_go_out_before_beginnings_and_what_is_used_often_last():
    pages = Pages(5, 2)
    often = published(pages, "often", [1, 2, 3, 4], n_uses=3)
    once = published(pages, "once", [5, 6, 7, 8, 9, 10])
    assert pages.n_cached == 5
    assert pages.grow("new", 2)
    assert (pages.n_found(often), pages.n_found(once)) == (2, 2)
    assert pages.grow("new", 6)
    assert (pages.n_found(often), pages.n_found(once)) == (2, 0)
    assert pages.grow("new", 10)
    assert not pages.grow("new", 11)
    assert pages.n_cached == 0


def test_what_was_used_often_once_goes_out_in_the_end():
    """The age grows with what goes out, so that one use now outweighs many long ago."""
    pages = Pages(3, 2)
    often = published(pages, "often", [1, 2], n_uses=4)
    for i in range(3, 23):
        published(pages, "once", [i, i])
    assert pages.n_found(often) == 0


def test_cached_pages_and_idle_adapters_go_out_by_one_measure():
    """Uses times seconds over bytes: a page is worth 0.4 a use here, and an adapter of twenty bytes 0.1 or 0.5."""
    for seconds, gone in ((1.0, ["adapter"]), (5.0, [])):
        pages = Pages(4, 2, page_bytes=10, n_bytes=50)
        pages.worth.token_seconds = 2.0
        pool = AdapterPool(memory=pages)
        pool.bind("adapter", AdapterVersion(id="adapter", folder="x", n_bytes=20))
        assert pool.begin_load(["adapter"]) == "adapter"
        pool.loaded("adapter", seconds * 2)
        tokens = published(pages, "cached", [1, 2])
        assert pool.make_room("new", 6)
        assert (list(pool.going), pages.n_found(tokens)) == (gone, len(gone))
        assert pages.grow("new", 6)
    pages.release("new")
    twice = published(pages, "cached", [1, 2], n_uses=2)
    pool.bind("other", AdapterVersion(id="other", folder="y", n_bytes=20))
    assert pages.grow("new", 4)
    assert pool.begin_load(["other"]) == "other"  # what is used twice stays, though it is a page
    assert (list(pool.going), pages.n_found(twice)) == (["adapter"], 1)


def test_no_more_pages_are_cached_than_allowed():
    """Pages that are used often stay, and other pages take no new memory."""
    pages = Pages(50, 2, most_cached=3)
    for i in range(5, 15):
        often = published(pages, "often", [1, 2, 3, 4], n_uses=2)
        published(pages, "once", [i, i, i, i])
        assert (pages.n_cached, pages.n_found(often)) == (3, 2)
    assert pages.free_bytes - len(pages._kept) == 50 - 5


def test_equal_pages_that_were_computed_apart_become_one():
    pages, keys = Pages(7, 2), [key_of(root_of(None), [1, 2])]
    assert pages.grow("a", 3)
    assert pages.grow("b", 3)
    pages.publish("a", keys, 0), pages.publish("b", keys, 0)
    assert pages.table("a")[0] == pages.table("b")[0]
    assert pages.table("a")[1] != pages.table("b")[1]
    assert (pages.n_held, pages.n_free) == (3, 4)
    pages.release("a")
    assert (pages.n_held, pages.n_cached) == (2, 0)
    pages.release("b")
    assert (pages.n_held, pages.n_cached, pages.n_free) == (0, 1, 6)


def test_pages_of_a_sequence_that_began_before_a_reset_are_not_found():
    """The blocks behind a forgotten one have no parent in the cache."""
    pages, keys = Pages(7, 2), [key_of(root_of(None), [1, 2])]
    keys.append(key_of(keys[0], [3, 4]))
    assert pages.grow("a", 4)
    pages.publish("a", keys[:1], 0)
    pages.reset()
    pages.publish("a", keys, 1)
    assert pages.n_found(keys) == 0
    pages.release("a")
    assert (pages.n_cached, pages.n_free) == (0, 7)


@pytest.mark.parametrize("rewritable", [True, False])
def test_first_pages_from_before_a_reset_are_not_found(rewritable):
    """Neither a full one nor a partly filled one; what its holder begins anew is."""
    root = root_of(None)
    pages, full, tail = Pages(7, 4, rewritable=rewritable), key_of(root, [1, 2, 3, 4]), Tail(root, 0, 0, (5, 6, 7))
    assert pages.grow("full", 4)
    assert pages.grow("part", 3)
    pages.reset()
    pages.publish("full", [full], 0)
    pages.release("full")
    pages.release("part", tail)
    assert (pages.n_found([full]), pages.take_tail("next", tail), pages.n_free) == (0, 0, 7)
    assert pages.grow("part", 3)
    pages.release("part", tail)
    assert pages.take_tail("next", tail) == 3


def test_pages_of_a_version_that_is_gone_are_given_back(adapters, tmp_path, tokenizer):
    llm = engine(tokenizer)
    asked(llm, [HEADER])
    pages = llm.engine.scheduler.pages
    of_base = pages.n_cached
    invoked = LoraConfig(r=3, target_modules=["q_proj"], alora_invocation_tokens=HEADER[33:35])
    alora = LoRARequest("alora", 99, str(save_adapter(tmp_path / "alora", invoked)))
    for request in (adapters["lora"], adapters["prefix"], alora):
        asked(llm, [HEADER, HEADER + TAILS[0]], adapters=request)
        assert pages.n_cached > of_base
        llm.llm_engine.remove_lora(request.adapter_id)
        assert (pages.n_cached, pages.n_held) == (of_base, 0)
    assert cached(asked(llm, [HEADER])) == [52]
