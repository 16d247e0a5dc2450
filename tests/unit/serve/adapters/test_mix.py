"""Weighted mixes of adapters: what they answer, who shares them, and what cannot be mixed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from tests.unit.serve.conftest import make_model, save_adapter

from veneer import LLM, LoraConfig, LoRARequest, PeftModel, SamplingParams
from veneer.errors import CompositionError, ConfigError, FormatError, VeneerError

PROMPTS = [list(b"the cat sat"), [7], list(b"a longer prompt than those, by far")]
LENGTH = 9
Parts = Sequence[tuple[LoRARequest, float]]


def mix_of(parts: Parts, name: str = "mix") -> LoRARequest:
    return LoRARequest.mix(name, 99, parts)


def answers(llm: LLM, adapter: LoRARequest | None) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, lora_request=adapter, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def scores(llm: LLM, adapter: LoRARequest | None) -> list[torch.Tensor]:
    """Log-probabilities of all ids behind each prompt."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    outputs = llm.generate(PROMPTS, params, lora_request=adapter, use_tqdm=False)
    found = [output.outputs[0].logprobs[0] for output in outputs]
    return [torch.tensor([p.logprob for _, p in sorted(each.items())]) for each in found]


def generated(model: Any) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


def biased_model() -> Any:
    """A model whose layers have biases."""
    model = make_model("gpt2")
    torch.manual_seed(17)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 1):
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def summed(parts: Parts, made: Callable[[], Any] = make_model) -> Any:
    """A model whose parameters are the base's and the weighted changes of each adapter's merged model, added up."""
    base = made()
    own = {name: value.clone() for name, value in base.state_dict().items()}
    total = {name: value.double() for name, value in own.items()}
    biased = set[str]()
    for request, weight in parts:
        merged = PeftModel.from_pretrained(made(), request.path).merge_and_unload().state_dict()
        biased |= merged.keys() - own.keys()
        for name, value in merged.items():
            before = own.get(name, torch.zeros_like(value))
            total[name] = total.get(name, torch.zeros_like(value).double()) + weight * (value - before).double()
    for name in biased:  # layers that had none
        owner = base.get_submodule(name.rpartition(".")[0])
        owner.bias = torch.nn.Parameter(torch.zeros_like(total[name], dtype=torch.float32))
    base.load_state_dict({name: value.float() for name, value in total.items()})
    return base


@pytest.mark.parametrize("general", [False, True])
def test_a_mix_is_pefts_weighted_adapter(adapters, tokenizer, general):
    model: Any = peft.PeftModel.from_pretrained(make_model(), adapters["lora"].path, adapter_name="a")
    model.load_adapter(adapters["rslora"].path, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    expected = generated(model.eval())
    llm = LLM(make_model(), tokenizer=tokenizer, general_runner=general)
    mix = mix_of([(adapters["lora"], 0.7), (adapters["rslora"], 0.3)])
    assert answers(llm, mix) == expected
    alone = [answers(llm, adapter) for adapter in (None, adapters["lora"], adapters["rslora"])]
    assert expected not in alone  # which tells them apart


@pytest.mark.parametrize(
    "parts",
    [
        [("lora", 0.7), ("rslora", -0.4)],
        [("lora_bias", 0.6), ("lora", 0.9)],
        [("lora_bias", 1.7)],
        [("adalora", 0.8), ("vera", 1.3), ("head", 0.45)],
        [("vera", 0.3), ("rslora", 1.1)],
    ],
    ids=str,
)
def test_what_the_parts_change_adds_up(adapters, tokenizer, parts):
    given = [(adapters[name], weight) for name, weight in parts]
    reference, llm = summed(given), LLM(make_model(), tokenizer=tokenizer)
    assert answers(llm, mix_of(given)) == generated(reference)
    for found, expected in zip(
        scores(llm, mix_of(given)), scores(LLM(reference, tokenizer=tokenizer), None), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert llm.engine.runner.general is None  # by the program


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_add_up(tokenizer, tmp_path, bias):
    """On a model that has biases of its own, which count once; those of norms are no update of a layer."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["c_attn", "c_proj"], bias=bias)
    parts = []
    for seed, weight in ((31, 0.7), (32, 0.55)):
        folder = save_adapter(tmp_path / str(seed), config, family="gpt2", seed=seed)
        parts.append((LoRARequest(f"a{seed}", seed, str(folder)), weight))
    llm = LLM(biased_model(), tokenizer=tokenizer)
    if bias == "all":
        with pytest.raises(CompositionError, match=r"replaces values of the base at transformer\.h\.0\.ln_1\.bias"):
            answers(llm, mix_of(parts))
        return
    reference = summed(parts, biased_model)
    assert answers(llm, mix_of(parts)) == generated(reference)
    for found, expected in zip(
        scores(llm, mix_of(parts)), scores(LLM(reference, tokenizer=tokenizer), None), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_one_batch_holds_mixes_their_parts_and_the_base(adapters, tokenizer):
    llm = LLM(make_model(), tokenizer=tokenizer, max_num_batched_tokens=5)
    one = mix_of([(adapters["lora"], 0.7), (adapters["rslora"], 0.3)], "one")
    two = mix_of([(adapters["lora"], 0.2), (adapters["vera"], 0.9)], "two")
    asked = [one, None, two, adapters["lora"], adapters["prefix"], one]
    params = SamplingParams(temperature=0, max_tokens=LENGTH)
    alone = [
        llm.generate(PROMPTS[0], params, lora_request=each, use_tqdm=False)[0].outputs[0].token_ids for each in asked
    ]
    together = llm.generate([PROMPTS[0]] * len(asked), params, lora_request=asked, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == alone
    assert len({tuple(each) for each in alone}) == len(asked) - 1
    assert together[0].lora_request == one


def test_equal_mixes_are_one_version_in_any_order(adapters, tokenizer, tmp_path):
    llm = LLM(make_model(), tokenizer=tokenizer)
    a, b = adapters["lora"], adapters["rslora"]
    copied = LoRARequest("copy", 7, str(shutil.copytree(a.path, tmp_path / "copy")))
    equal = [[(a, 0.7), (b, 0.3)], [(b, 0.3), (a, 0.7)], [(copied, 0.7), (b, 0.3)], [(a, 0.5), (b, 0.3), (copied, 0.2)]]
    found = [answers(llm, mix_of(parts, f"mix {i}")) for i, parts in enumerate(equal)]
    assert found == [found[0]] * len(equal)
    assert len(llm.engine.runner.loaded) == 1
    assert llm.engine.versions.of(mix_of(equal[0])).rank == 5
    others = [[(a, 0.3), (b, 0.7)], [(a, 0.7)], [(a, 0.7), (b, 0.3), (adapters["vera"], 0.1)]]
    ids = {llm.engine.versions.of(mix_of(parts)).id for parts in (equal[0], *others)}
    assert len(ids) == 4


def test_new_files_of_a_part_are_another_mix(adapters, tokenizer, tmp_path):
    llm = LLM(make_model(), tokenizer=tokenizer)
    config = LoraConfig(r=3, target_modules="all-linear")
    part = LoRARequest("part", 3, str(save_adapter(tmp_path / "part", config, seed=21)))
    mix = mix_of([(part, 0.7), (adapters["rslora"], 0.3)])
    first, version = answers(llm, mix), llm.engine.versions.of(mix)
    shutil.rmtree(part.path)
    save_adapter(tmp_path / "part", config, seed=22)
    with pytest.raises(FormatError, match="replaced while a request waited for it"):
        llm.engine.versions.require_unchanged(version)
    assert answers(llm, mix) != first
    assert len(llm.engine.runner.loaded) == 1


def test_files_that_go_while_an_adapter_waits_end_its_requests_alone(tokenizer, tmp_path, monkeypatch):
    llm = LLM(make_model(), tokenizer=tokenizer)
    folder = save_adapter(tmp_path / "part", LoraConfig(r=3, target_modules="all-linear"), seed=21)

    def gone(version):
        raise FileNotFoundError(f"{version.folder}: it went")

    monkeypatch.setattr(llm.engine.versions, "require_unchanged", gone)
    with pytest.raises(FormatError, match=r"cannot be read: .*it went"):
        answers(llm, LoRARequest("part", 3, str(folder)))
    assert answers(llm, None)


def test_a_mix_is_added_pinned_and_removed_like_an_adapter(adapters, tokenizer):
    llm = LLM(make_model(), tokenizer=tokenizer, max_loras=1, max_lora_rank=3)
    mix = mix_of([(adapters["lora"], 0.7), (adapters["rslora"], 0.3)])  # each within the rank, their sum beyond it
    assert llm.llm_engine.add_lora(mix)
    llm.llm_engine.pin_lora(99)
    assert llm.llm_engine.list_loras() == {99}
    with pytest.raises(ConfigError, match="1 of them pinned"):
        answers(llm, adapters["lora"])
    assert llm.llm_engine.remove_lora(99)
    assert llm.engine.runner.loaded == frozenset()
    with pytest.raises(ConfigError, match="adapter 'adalora' has rank 4 and max_lora_rank is 3"):
        answers(llm, mix_of([(adapters["lora"], 0.7), (adapters["adalora"], 0.3)]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dora", "scales the inputs or outputs"),
        ("ia3", "scales the inputs or outputs"),
        ("oft", "rotates the inputs or outputs"),
        ("bottleneck", "has a bottleneck"),
        ("prefix", "has virtual tokens"),
        ("prompt", "has virtual tokens"),
        ("ptuning", "has virtual tokens"),
        ("saved", "replaces values of the base at"),
    ],
)
def test_what_has_no_sum_is_refused(adapters, tokenizer, name, said):
    llm = LLM(make_model(), tokenizer=tokenizer)
    before = answers(llm, adapters["lora"])
    mix = mix_of([(adapters["lora"], 0.7), (adapters[name], 0.3)])
    with pytest.raises(CompositionError, match=f"{name} {said}.*ask for this adapter by itself"):
        answers(llm, mix)
    assert "mix" not in llm.engine.pool.names
    assert answers(llm, adapters["lora"]) == before


@pytest.mark.parametrize("name", ["dora", "ia3", "bottleneck", "prefix", "prompt", "saved"])
def test_what_has_no_sum_is_refused_by_the_general_runner(adapters, tokenizer, name):
    llm = LLM(make_model(), tokenizer=tokenizer, general_runner=True)
    before = answers(llm, adapters["lora"])
    with pytest.raises(CompositionError, match=f"/{name}, .* cannot be summed in a mix: ") as caught:
        answers(llm, mix_of([(adapters["lora"], 0.7), (adapters[name], 0.3)]))
    assert "'v" not in str(caught.value)  # a part's name in the engine
    assert answers(llm, adapters["lora"]) == before
    assert llm.engine.runner.loaded == {llm.engine.versions.of(adapters["lora"]).id}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "there are no parts"),
        ([("lora", 0.7)], "must be a pair of a LoRARequest"),
        ([(LoRARequest("a", 1, "x"), "0.7")], "the weight '0.7' of 'a' must be a finite number"),
        ([(LoRARequest("a", 1, "x"), float("nan"))], "the weight nan of 'a' must be"),
        ([(LoRARequest("a", 1, "x"), True)], "the weight True of 'a' must be"),
        ([(LoRARequest.mix("m", 2, [(LoRARequest("a", 1, "x"), 0.7)]), 0.3)], "that is no mix"),
    ],
)
def test_what_is_no_mix_is_told(parts, said):
    with pytest.raises(ConfigError, match=said):
        mix_of(parts)


def test_a_mix_has_no_folder_and_needs_those_of_its_parts(adapters, tokenizer, tmp_path):
    part = (adapters["lora"], 0.7)
    with pytest.raises(ConfigError, match="beside parts: give one of them"):
        LoRARequest("mix", 1, "folder", parts=(part,))
    llm = LLM(make_model(), tokenizer=tokenizer)
    with pytest.raises(VeneerError, match="nowhere"):
        answers(llm, mix_of([part, (LoRARequest("gone", 2, str(tmp_path / "nowhere")), 0.3)]))


def test_a_mix_of_one_adapter_is_that_adapter(adapters, tokenizer):
    llm = LLM(make_model(), tokenizer=tokenizer)
    assert answers(llm, mix_of([(adapters["lora"], 1.0)])) == answers(llm, adapters["lora"])
