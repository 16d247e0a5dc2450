"""Programs: what can be said in them, that they compute what the model computes, and what is done about the rest."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.unit.model.blueprint.families import FAMILIES as DESCRIBED
from tests.unit.model.blueprint.families import model_of
from tests.unit.serve.conftest import END, SHAPE, VOCAB, make_model, save_adapter

from veneer import LLM, BottleneckConfig, LoraConfig, LoRARequest, PeftModel, SamplingParams, get_peft_model
from veneer.errors import DescriptionError, FormatError
from veneer.model.blueprint.describe import describe
from veneer.model.program.program import compile_program
from veneer.model.quantized.packed_linear import PackedLinear
from veneer.model.quantized.stack import PackedExpertStack
from veneer.serve.program.effects import UnsaidError
from veneer.serve.runners.general_runner import GeneralRunner
from veneer.serve.runners.program_runner import ProgramRunner, proved

LEFT = {"phi3, long": "beyond 11", "phi3, short": "beyond 23"}
LENGTH = 64
PROMPTS = [[7 * i * i % 251 + 1 for i in range(1, n + 1)] for n in (5, 13, 2, 9)]


@pytest.mark.parametrize("family", DESCRIBED)
def test_every_family_that_is_described_has_a_program(family):
    """Its logits are the model's own, at both ends of the context; or the part that has no instruction is named."""
    model = model_of(family, torch.float32)
    if family in LEFT:
        with pytest.raises(DescriptionError, match=LEFT[family]):
            proved(model, LENGTH)
    else:
        proved(model, min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH))


def test_frequencies_that_do_not_depend_on_the_length_within_the_context():
    proved(model_of("phi3, short", torch.float32), 23)


def test_more_positions_than_the_table_has():
    decoder = describe(model_of("opt", torch.float32))
    compile_program(decoder, 64)
    with pytest.raises(DescriptionError, match="66 positions"):
        compile_program(decoder, 65)


def test_a_program_is_data():
    program = compile_program(describe(make_model()), 100)
    assert program == compile_program(describe(make_model(seed=8)), 100)
    assert len(program.groups) == 9  # four of each layer, and the head
    assert len(program.sites) == 4
    assert program.numbers_per_position == 2 * 2 * 8


def test_a_model_that_differs_from_its_description_is_seen(monkeypatch):
    """Its attention scale is off by a fifth, which nothing but the values tells."""
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.2
    proved(model, 100)  # the scale is read
    forward = type(model).forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(DescriptionError, match="away from the model's own"):
        proved(model, 100)


def generated(model: Any, prompt: list[int], **how: Any) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, **how)
    return out[0, len(prompt) :].tolist()


def answers(llm: LLM, prompts: Any, adapters: Any = None) -> Any:
    asked = SamplingParams(temperature=0, max_tokens=7)
    outputs = llm.generate(prompts, asked, lora_request=adapters, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def tied_model() -> Any:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | {"tie_word_embeddings": True}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = END
    return model.eval()


OWN = {
    "rows": {"trainable_token_indices": [1, 98, END], "target_modules": ["q_proj"]},
    "rows of both": {
        "trainable_token_indices": {"embed_tokens": [1, 98], "lm_head": [7, 11]},
        "target_modules": ["q_proj"],
    },
    "norms and a layer": {"modules_to_save": ["norm", "input_layernorm", "gate_proj"], "target_modules": ["q_proj"]},
    "embeddings": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "both ends": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
    "kept tied": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True},
}  # fmt: skip
LEFT_TO_THE_OTHER = {"tied": {"kept tied"}, "apart": set[str]()}


@pytest.mark.parametrize("ends", ["tied", "apart"])
def test_what_adapters_have_of_their_own(ends, tokenizer, tmp_path, caplog):
    """Whole parameters and single rows, all in one batch; what the program has no place for takes the other way."""
    make = tied_model if ends == "tied" else make_model
    cases = {name: case for name, case in OWN.items() if name != "kept tied" or ends == "tied"}
    requests, model = [], make()
    for number, (name, case) in enumerate(cases.items(), start=1):
        folder = _saved(tmp_path / str(number), make(), LoraConfig(r=2, **case), number)
        requests.append(LoRARequest(name, number, str(folder)))
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=str(number))
    prompts = [PROMPTS[i % 4] for i in range(len(cases))]
    expected = [generated(model, p, adapter_names=[str(i)]) for i, p in enumerate(prompts, start=1)]
    assert len({tuple(answer) for answer in expected}) == len(cases)
    llm = LLM(make(), tokenizer=tokenizer, max_num_batched_tokens=11)
    with caplog.at_level("INFO", logger="veneer.serve"):
        assert answers(llm, [*prompts, PROMPTS[0]], [*requests, None])[:-1] == expected
    general = llm.engine.runner.general
    assert len(general.loaded if general else ()) == len(LEFT_TO_THE_OTHER[ends])
    assert ("take the general runner" in caplog.text) == bool(general)


def _saved(folder: Any, model: Any, config: LoraConfig, seed: int) -> Any:
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_their_own(bias, tokenizer, tmp_path):
    """GPT-2 has biases in its layers, stored the other way round, and in its norms."""
    config = LoraConfig(r=2, bias=bias, target_modules=["c_attn", "c_proj"])
    folder = save_adapter(tmp_path / "x", config, family="gpt2")
    model = PeftModel.from_pretrained(make_model("gpt2"), str(folder))
    expected = [generated(model, prompt) for prompt in PROMPTS]
    llm = LLM(make_model("gpt2"), tokenizer=tokenizer)
    assert answers(llm, PROMPTS, [LoRARequest("x", 1, str(folder))] * 4) == expected
    assert expected != answers(llm, PROMPTS)
    assert llm.engine.runner.general is None


@pytest.mark.parametrize("family", ["gemma2", "phi", "neox", "gpt2"])
@pytest.mark.parametrize("placement", ["serial", "parallel"])
def test_bottlenecks_beside_norms_and_in_parallel_blocks(family, placement, tokenizer, tmp_path):
    config = BottleneckConfig(reduction_factor=3, placement=placement, after_attention=True)
    folder = _saved(tmp_path / "x", _other(family), config, 3)
    model = PeftModel.from_pretrained(_other(family), str(folder))
    expected = [generated(model, prompt) for prompt in PROMPTS]
    llm = LLM(_other(family), tokenizer=tokenizer, max_num_batched_tokens=5)
    assert answers(llm, PROMPTS, LoRARequest("x", 1, str(folder))) == expected
    assert expected != answers(llm, PROMPTS)
    assert isinstance(llm.engine.runner, ProgramRunner)


def _other(family: str) -> Any:
    """A model of this family with the tests' vocabulary."""
    if family in ("gemma2", "gpt2"):
        return make_model(family)
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3}
    kind = {"phi": transformers.PhiConfig, "neox": transformers.GPTNeoXConfig}[family]
    config = kind(**sizes, vocab_size=VOCAB, max_position_embeddings=127, bos_token_id=END, eos_token_id=END)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_model_without_a_program_is_served_all_the_same(tokenizer, caplog):
    """Its positions' frequencies depend on the length of a sequence."""
    config = transformers.LlamaConfig(**SHAPE | {"max_position_embeddings": 31})
    config.rope_parameters = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 523.0}
    llm = LLM(transformers.LlamaForCausalLM(config).eval(), tokenizer=tokenizer, max_model_len=31)
    assert isinstance(llm.engine.runner, ProgramRunner)
    other_units = transformers.GptOssConfig(
        **SHAPE | {"num_local_experts": 3, "num_experts_per_tok": 2, "swiglu_limit": 9.0}
    )
    model = transformers.GptOssForCausalLM(other_units).eval()
    with caplog.at_level("WARNING", logger="veneer.serve"):
        llm = LLM(model, tokenizer=tokenizer)
    assert isinstance(llm.engine.runner, GeneralRunner)
    assert llm.engine.settings.why_general in caplog.text
    assert answers(llm, PROMPTS) == [generated(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_companions(dtype, adapters, base_folder):
    """Log-probabilities of an answer alone and beside fourteen others of all methods, bit for bit."""
    llm = LLM(base_folder, dtype=dtype, enable_prefix_caching=False)  # which cuts prompts elsewhere: LoKr's rows round
    names = [None, *adapters, None, "lora"]
    asked = SamplingParams(temperature=0, max_tokens=7, logprobs=3)
    prompts = [PROMPTS[i % 4] for i in range(len(names))]
    requests = [None if name is None else adapters[name] for name in names]
    together = llm.generate(prompts, asked, lora_request=requests, use_tqdm=False)
    for prompt, request, other in zip(prompts, requests, together, strict=True):
        [alone] = llm.generate([prompt], asked, lora_request=request, use_tqdm=False)
        assert alone.outputs[0].token_ids == other.outputs[0].token_ids
        if request is None or request.name != "vera":  # whose shared matrices are not packed
            assert alone.outputs[0].logprobs == other.outputs[0].logprobs


def test_a_model_of_its_own_keeps_one_copy_of_its_weights(base_folder, adapters, tokenizer):
    """And adapters that read weights, or have some of their own, are loaded all the same."""
    llm = LLM(base_folder)
    layer = llm.engine.runner.model.model.layers[0].self_attn.q_proj
    assert "weight" not in dict(layer.named_parameters())
    torch.testing.assert_close(layer.weight, make_model().model.layers[0].self_attn.q_proj.weight, rtol=0, atol=0)
    given = make_model()
    other = LLM(given, tokenizer=tokenizer)
    assert "model.layers.0.self_attn.q_proj.weight" in dict(given.named_parameters())
    for name in ("dora", "ia3", "saved", "head", "lora_bias"):
        assert answers(llm, PROMPTS, adapters[name]) == answers(other, PROMPTS, adapters[name])
    general = LLM(base_folder, general_runner=True)
    assert answers(llm, PROMPTS) == answers(general, PROMPTS)


def test_a_model_that_has_no_program_after_all_keeps_its_weights(base_folder, adapters, monkeypatch):
    """They were given up for packed ones, and its logits turn out to be others."""
    kind = transformers.LlamaForCausalLM
    forward, expected = kind.forward, answers(LLM(base_folder), PROMPTS, adapters["saved"])

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(kind, "forward", changed)
    llm = LLM(base_folder)
    model: Any = llm.engine.runner.model
    assert isinstance(llm.engine.runner, GeneralRunner)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    own = dict(make_model().named_parameters())
    assert {name: p.is_contiguous() for name, p in model.named_parameters()} == dict.fromkeys(own, True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, own[name], rtol=0, atol=0)
    assert answers(llm, PROMPTS, adapters["saved"]) == expected


def experts_model(activation: str = "silu") -> Any:
    """Experts gated by relu run the model's own code."""
    torch.manual_seed(3)
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
    config = transformers.Qwen2MoeConfig(**SHAPE, **sizes, shared_expert_intermediate_size=20, hidden_act=activation)
    model = transformers.Qwen2MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_an_adapter_of_a_shared_expert_changes_its_own_rows_alone(tokenizer, tmp_path):
    """The program has it as it has any other layer."""
    requests, alone = [], []
    for number, names in enumerate((["q_proj"], ["shared_expert.down_proj", "shared_expert.up_proj"]), start=1):
        folder = _saved(tmp_path / str(number), experts_model(), LoraConfig(r=3, target_modules=names), number)
        requests.append(LoRARequest(str(number), number, str(folder)))
        adapted = PeftModel.from_pretrained(experts_model(), str(folder))
        alone.append([generated(adapted, prompt) for prompt in PROMPTS])
    llm = LLM(experts_model(), tokenizer=tokenizer, max_num_batched_tokens=11)
    base = answers(llm, PROMPTS)
    assert answers(llm, PROMPTS, requests[0]) == alone[0]
    assert llm.engine.runner.general is None
    everyone = [*[None] * 4, *[requests[0]] * 4, *[requests[1]] * 4]
    assert answers(llm, PROMPTS * 3, everyone) == [*base, *alone[0], *alone[1]]
    assert llm.engine.runner.general is None
    assert len({str(each) for each in (base, *alone)}) == 3


def test_adapters_of_experts_are_served_beside_others(tokenizer, tmp_path):
    """In one pass: an expert adds the pairs of a row's own adapter."""
    llm = LLM(experts_model(), tokenizer=tokenizer, max_num_batched_tokens=11)
    own, requests = [answers(llm, PROMPTS[:1])[0]], [None]
    for number, targets in enumerate((["q_proj"], None, "all-linear"), start=1):
        experts = None if number == 1 else ["all-experts"]
        config = LoraConfig(r=3, target_modules=targets, target_parameters=experts)
        folder = _saved(tmp_path / str(number), experts_model(), config, number)
        own.append(generated(PeftModel.from_pretrained(experts_model(), str(folder)), PROMPTS[0]))
        requests.append(LoRARequest(str(number), number, str(folder)))
    assert answers(llm, PROMPTS[:1] * 4, requests) == own
    assert len({str(each) for each in own}) == 4
    assert llm.engine.runner.general is None


@pytest.mark.parametrize("general", [False, True])
def test_an_adapter_of_experts_where_weights_were_given_up(general, tokenizer, tmp_path, monkeypatch):
    """The program adapts layers and experts that are packed alone, and so does the general runner."""

    def unsaid(*_: Any, **__: Any) -> None:
        raise UnsaidError("an update of something else")

    if general:
        monkeypatch.setattr("veneer.serve.program.effects._put", unsaid)
    experts_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    llm = LLM(tmp_path / "base")
    base = answers(llm, PROMPTS)
    layer = llm.engine.runner.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, PackedLinear)
    experts = llm.engine.runner.model.model.layers[0].mlp.experts
    assert isinstance(experts.down_proj, PackedExpertStack)
    assert not list(experts.parameters())
    config = LoraConfig(r=3, target_modules=["shared_expert.down_proj", "q_proj"], target_parameters=["all-experts"])
    folder = _saved(tmp_path / "a", experts_model(), config, 1)
    adapted = PeftModel.from_pretrained(experts_model(), str(folder))
    expected = [generated(adapted, prompt) for prompt in PROMPTS]
    assert answers(llm, PROMPTS, LoRARequest("a", 1, str(folder))) == expected
    assert (llm.engine.runner.general is not None) == general
    assert expected != base
    assert answers(llm, PROMPTS) == base


def test_a_file_with_a_tensor_too_many_is_one_error_where_weights_were_given_up(base_folder, adapters, tmp_path):
    """Its request is told what is left over, and the engine goes on."""
    folder = save_adapter(tmp_path / "a", LoraConfig(r=3, target_modules=["q_proj"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["junk"] = torch.ones(3, 5)
    save_file(tensors, folder / "adapter_model.safetensors")
    llm = LLM(base_folder)
    base = answers(llm, PROMPTS)
    with pytest.raises(FormatError, match="junk"):
        answers(llm, PROMPTS, LoRARequest("a", 1, str(folder)))
    assert answers(llm, PROMPTS) == base
    assert answers(llm, PROMPTS, adapters["lora"]) != base


def test_a_mix_with_a_part_that_the_program_has_no_place_for(tokenizer, tmp_path):
    """The model itself adds up, while a mix without such a part goes by the program."""
    adapted: Any = experts_model("relu")
    requests = []
    for number, names in enumerate((["q_proj"], ["shared_expert.down_proj", "v_proj"]), start=1):
        config = LoraConfig(r=3, target_modules=names)
        folder = _saved(tmp_path / str(number), experts_model("relu"), config, number)
        requests.append(LoRARequest(str(number), number, str(folder)))
        adapted = PeftModel.from_pretrained(adapted, str(folder), adapter_name=str(number))
    adapted.add_weighted_adapter(["1", "2"], [0.7, 0.3], "both", "cat")
    adapted.set_adapter("both")
    expected = [generated(adapted, prompt) for prompt in PROMPTS]
    llm = LLM(experts_model("relu"), tokenizer=tokenizer)
    small = LoRARequest.mix("small", 3, [(requests[0], 0.4)])
    before = answers(llm, PROMPTS, small)
    assert llm.engine.runner.general is None
    both = LoRARequest.mix("both", 4, [(requests[0], 0.7), (requests[1], 0.3)])
    together = answers(llm, PROMPTS * 2, [*[both] * len(PROMPTS), *[small] * len(PROMPTS)])
    assert together == [*expected, *before]
    assert llm.engine.runner.general.loaded == {llm.engine.versions.of(both).id}


def test_the_base_of_a_model_with_an_adapter_is_the_base(tokenizer):
    """An adapter that does nothing when the engine starts, and something later."""
    adapted = get_peft_model(experts_model(), LoraConfig(r=3, target_modules=["shared_expert.down_proj"]))
    llm = LLM(adapted, tokenizer=tokenizer)
    assert isinstance(llm.engine.runner, ProgramRunner)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    model = experts_model()
    assert answers(llm, PROMPTS) == [generated(model, prompt) for prompt in PROMPTS]
    assert answers(llm, PROMPTS) != [generated(adapted, prompt) for prompt in PROMPTS]
