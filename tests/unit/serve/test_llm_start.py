"""`LLM`: the options and models that it starts with, and those that it refuses."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch

from veneer import LLM, LoraConfig, PeftModel, SamplingParams, get_peft_model
from veneer.errors import ConfigError, FormatError
from veneer.model.memory.give_back import SMAPS
from veneer.serve.runners.general_runner import GeneralRunner
from veneer.serve.runners.program_runner import ProgramRunner

from .conftest import METHODS, VOCAB, make_model
from .test_llm_exact import PROMPTS, answers, generated
from .test_own_cache import made


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported, only"),
        ({"quantization": "awq"}, "quantization='awq' is not supported, only"),
        ({"gpu_memory_utilization": 1.5}, "at most 1"),
        ({"max_loras": 3, "max_cpu_loras": 2}, "at least max_loras"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_model_len": 300}, "more than the model's context of 127"),
        ({"max_model_len": 99, "kv_cache_memory_bytes": 9000}, "fewer than max_model_len=99"),
        ({"kv_cache_memory_bytes": 7}, "do not hold one page"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_lora": 3}, "LLM has no field 'max_lora'; did you mean 'max_loras'"),
        ({"max_num_seqs": "x"}, "LLM: max_num_seqs='x' must be a whole number"),
        ({"swap_space": 3}, "swap_space is not offered"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_options_that_cannot_be_honoured(base_folder, options, said):
    with pytest.raises(ConfigError, match=said):
        LLM(base_folder, **options)


@pytest.mark.parametrize(("given", "most"), [({}, 34), ({"kv_cache_memory_bytes": 70_000}, 136)])
def test_cached_pages_leave_memory_that_nobody_gave_to_others(base_folder, monkeypatch, given, most):
    """Of the free memory they take a quarter, and of a chosen budget all."""
    monkeypatch.setattr("veneer.serve.start.free_memory", lambda device: 100_000)
    llm = LLM(base_folder, max_model_len=16, block_size=4, gpu_memory_utilization=0.7, max_num_seqs=99, **given)
    pages = llm.engine.scheduler.pages
    assert (pages.n_bytes, pages.page_bytes) == (70_000, 512)
    for i in range(VOCAB):
        prompts = [{"prompt_token_ids": [(i + j * k) % VOCAB for j in range(15)]} for k in range(1, 4)]
        llm.generate(prompts, SamplingParams(max_tokens=1))
    assert pages.n_cached == most


def test_models_that_cannot_be_served(tokenizer, base_folder):
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        LLM(make_model())
    for option in ({"dtype": "bfloat16"}, {"quantization": "bitsandbytes"}):
        with pytest.raises(ConfigError, match=f"{next(iter(option))}='.*' is for a model that is loaded here"):
            LLM(make_model(), tokenizer=tokenizer, **option)
    with pytest.raises(FormatError, match="no config"):
        LLM(Path(base_folder).parent)


def test_a_chat_template_is_the_engines_alone(tokenizer, base_folder):
    before = tokenizer.chat_template
    for model in (make_model(), base_folder):
        llm = LLM(model, tokenizer=tokenizer, chat_template="{{ messages[0]['content'] }}!")
        asked = SamplingParams(temperature=0, max_tokens=7)
        [output] = llm.chat([{"role": "user", "content": "x"}], asked, use_tqdm=False)
        assert (output.prompt, tokenizer.chat_template) == ("x!", before)


@pytest.mark.parametrize(("block", "told"), [(13, True), (32, False)])
def test_pages_that_the_kernels_do_not_take_are_told(block, told, tokenizer, caplog):
    LLM(make_model(), tokenizer=tokenizer, block_size=block)
    assert ("block_size=13 is no multiple of 16" in caplog.text) == told


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
@pytest.mark.parametrize("tie", [False, True])
def test_the_file_of_a_started_model_is_not_resident(tie, adapters, tokenizer, tmp_path):
    """The weights have been packed; what comes later, DoRA's norms and parts that need the table, is right without."""
    model: Any = make_model()
    model.config.tie_word_embeddings = tie
    model.tie_weights()
    model.save_pretrained(tmp_path)
    names = [name for name in METHODS if not (tie and name in ("head", "saved"))]
    llm = LLM(tmp_path, tokenizer=tokenizer)
    file = [m for m in psutil.Process().memory_maps(grouped=False) if m.path == str(tmp_path / "model.safetensors")]
    assert [place.rss for place in file] == [0]  # the table of embeddings holds it
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert answers(llm, PROMPTS) == expected
    for name in names:
        model = PeftModel.from_pretrained(model, adapters[name].path, adapter_name=name)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(names))]
    each = [generated(model, p, adapter_names=[name]) for p, name in zip(prompts, names, strict=True)]
    assert answers(llm, prompts, [adapters[name] for name in names]) == each


def test_each_part_of_a_start_is_named_while_it_is_waited_for(base_folder, monkeypatch):
    named, waits = list[str](), list[str]()

    @contextmanager
    def waited(what: str):
        waits.append(what)
        yield

    monkeypatch.setattr("veneer.serve.runners.program_runner.waiting_for", named.append)
    monkeypatch.setattr("veneer.serve.llm.waits_told", waited)
    LLM(base_folder)
    assert waits == [f"loading {base_folder}"]
    assert "by the model's own code" in named[0]
    n = len(named) - 2
    assert named[1:-1] == [f"packing the base: {i} of {n} products" for i in range(1, n + 1)]
    assert named[-1].startswith("comparing the program")


def trained(model):
    """The model, its adapter away from where it was."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    return model.train()


@pytest.mark.parametrize(("kind", "general"), [("llama", False), ("llama", True), ("lfm2", False)])
def test_an_engine_on_an_adapted_model_answers_as_its_base(kind, general, adapters, tokenizer):
    """Neither an adapter that acts, nor one that is trained later, nor one that is switched off changes answers."""
    names, prompts, other = ("saved", "prompt"), PROMPTS[:3], adapters["dora"]
    make = make_model if kind == "llama" else lambda: made(kind)
    own = [generated(make(), prompt) for prompt in prompts]
    served = PeftModel.from_pretrained(make_model(), other.path)
    everywhere = LoraConfig(r=3, target_modules="all-linear")
    for number, config in enumerate([METHODS[name]() for name in names] if kind == "llama" else [everywhere]):
        model = trained(get_peft_model(make(), config)) if number % 2 == 0 else get_peft_model(make(), config)
        llm = LLM(model, tokenizer=tokenizer, general_runner=general)
        assert kind != "llama" or isinstance(llm.engine.runner, GeneralRunner if general else ProgramRunner)
        assert answers(llm, prompts) == own
        trained(model)
        assert answers(llm, prompts[::-1]) == own[::-1]
        model.disable_adapter_layers()
        if kind == "llama":  # the adapter is made for it
            assert answers(llm, prompts[:1], [other]) == [generated(served, prompts[0])] != own[:1]


def test_models_whose_base_cannot_be_told_are_refused(tokenizer):
    merged = get_peft_model(make_model(), METHODS["lora"]())
    merged.merge_adapter()
    with pytest.raises(ConfigError, match=r"adapters \['default'\] are merged into the model's weights: call unmerge"):
        LLM(merged, tokenizer=tokenizer)
    foreign = make_model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["q_proj"]), foreign)
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj has an adapter of the library peft"):
        LLM(foreign, tokenizer=tokenizer)
    for model in (peft.get_peft_model(make_model(), peft.LoraConfig(r=3, target_modules=["q_proj"])), torch.nn.ReLU()):
        with pytest.raises(ConfigError, match=r"is not a model of transformers: give a folder, or a PreTrainedModel"):
            LLM(model, tokenizer=tokenizer)
