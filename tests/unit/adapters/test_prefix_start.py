"""A prefix that starts from text acts as the text in front does, and equals PEFT's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

from veneer import (
    LoraConfig,
    PrefixTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from veneer.errors import ConfigError
from veneer.model.sites.virtual_tokens import cache_name

N, TEXT = 5, "red green blue one two three four"
DECODERS = ["llama", "qwen2", "gpt2", "gemma2"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i + 7 for i, w in enumerate(TEXT.split())} | {"<unk>": 1}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def prefixed(model: Any, **settings: Any) -> Any:
    return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM", **settings)).eval()


@pytest.mark.parametrize("family", DECODERS)
def test_it_acts_as_the_text_in_front(family: str, tiny: Any, ids: Any, tokenizer: Any) -> None:
    text = torch.tensor(tokenizer(TEXT)["input_ids"])[:N].expand(2, -1)
    short = ids[:, :3]  # all of it within the sliding window of Gemma 2
    with torch.no_grad():
        wanted = tiny(family)(torch.cat([text, short], dim=1)).logits[:, N:]
    model = prefixed(tiny(family))
    initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
    with torch.no_grad():
        torch.testing.assert_close(model(short).logits, wanted, rtol=2e-5, atol=2e-6)
        for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=29), DynamicCache(config=model.config)):
            named = {cache_name(model.forward): cache}
            got = model(short, **named, use_cache=True).logits
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", [None, "static", "dynamic", "hybrid"])
def test_every_cache_of_generate_gives_the_same_tokens(
    implementation: Any, tiny: Any, ids: Any, tokenizer: Any
) -> None:
    for family in ("llama", "gemma2"):
        model = prefixed(tiny(family))
        initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        wanted = model.generate(ids, **options, use_cache=False)
        assert torch.equal(model.generate(ids, **options, cache_implementation=implementation), wanted)


def test_peft_starts_the_same(tiny: Any, tokenizer: Any) -> None:
    ours = prefixed(tiny("qwen2"))
    config = peft.PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny("qwen2"), config).eval()
    peft.initialize_kv_prefix_from_text(theirs, tokenizer, text=TEXT, use_chat_template=False)
    got = initialize_kv_prefix_from_text(ours, tokenizer, text=TEXT)
    wanted = peft.get_peft_model_state_dict(theirs)["prompt_embeddings"]
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)


def test_a_template_puts_the_text_into_a_system_message(tiny: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ 'four ' + m['content'] }}{% endfor %}"
    model = prefixed(tiny())
    chat = initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
    plain = initialize_kv_prefix_from_text(model, tokenizer, text="four " + TEXT, use_chat_template=False)
    assert torch.equal(chat, plain)
    assert not torch.equal(chat, initialize_kv_prefix_from_text(model, tokenizer, text=TEXT, use_chat_template=False))


def test_what_cannot_start_from_text_says_why(tiny: Any, ids: Any, tokenizer: Any) -> None:
    model = prefixed(tiny())
    with pytest.raises(ConfigError, match="has 2 tokens and the prefix num_virtual_tokens=5"):
        initialize_kv_prefix_from_text(model, tokenizer, text="red blue")
    with pytest.raises(ConfigError, match="has 3 tokens"):
        initialize_kv_prefix_from_text(model, tokenizer, text=TEXT, max_length=3)
    cache = tiny()(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="has 2 rows and 13 positions"):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    with pytest.raises(ConfigError, match="prefix_projection"):
        initialize_kv_prefix_from_text(prefixed(tiny(), prefix_projection=True), tokenizer, text=TEXT)
    with pytest.raises(ConfigError, match="no prefix adapter"):
        initialize_kv_prefix_from_text(get_peft_model(tiny(), LoraConfig()), tokenizer, text=TEXT)


def test_the_mode_of_each_module_is_put_back_where_the_model_fails(tiny: Any, tokenizer: Any) -> None:
    model = prefixed(tiny()).train()
    model.base_model.eval()

    def fail(*args: Any) -> None:
        raise RuntimeError("broken off")

    model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
    assert (model.training, model.base_model.training) == (True, False)
