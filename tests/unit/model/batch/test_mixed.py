"""Mixed batches: every row of a batch is what its adapter gives alone, whatever the others are."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    DynamicCache,
    MistralConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from models import gpt2_config, llama_config
from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.errors import AdapterNameError, CompositionError, ConfigError, ShapeError
from veneer.methods.bottleneck import BottleneckConfig
from veneer.methods.ia3 import IA3Config
from veneer.methods.lora import LoraConfig
from veneer.methods.prefix import PrefixTuningConfig
from veneer.methods.prompt import PromptTuningConfig
from veneer.methods.ptuning import PromptEncoderConfig
from veneer.methods.vera import VeraConfig
from veneer.model.adapted.routing import Routing
from veneer.model.fused.decoder import fuse

VOCAB = 67
LLAMA = llama_config(vocab_size=VOCAB, num_attention_heads=6, num_key_value_heads=2, attention_bias=True)
Q, ALL = ["q_proj", "down_proj"], "all-linear"
METHODS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=Q),
    "rslora": lambda: LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=ALL, bias="all"),
    "dora": lambda: LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "o_proj"]),
    "lora_bias": lambda: LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=["embed_tokens", "q_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: VeraConfig(r=5, target_modules=["q_proj", "v_proj"]),
    "bottleneck": lambda: BottleneckConfig(reduction_factor=5),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
    "prefix-mlp": lambda: PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=11),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4),
    "ptuning": lambda: PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=11),
    "saved": lambda: LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj"], modules_to_save=["lm_head", "norm"]),
}
NAMES = [*METHODS, "__base__"]


def mixed_model(names: list[str], **changes: Any) -> PeftModel:
    """A model with these adapters, all away from their start."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float64, **changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    for name in names:
        if name != "__base__":
            model = get_peft_model(model, METHODS[name](), name)
    model.set_requires_grad([name for name in names if name != "__base__"])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def batch(n_rows: int) -> dict[str, Tensor]:
    """Prompts with padding on the left of every second row."""
    ids = torch.randint(3, VOCAB, (n_rows, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[::2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: PeftModel, name: str, row: dict[str, Tensor], call: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return call(**row)
    model.set_adapter(name)
    return call(**row)


def rows_of(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    n = len(inputs["input_ids"])
    return [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(n)]


@pytest.fixture(scope="module")
def everything() -> PeftModel:
    return mixed_model(NAMES)


def real(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[mask.bool()]


def test_each_row_is_what_its_adapter_gives_alone(everything):
    names, inputs = [*NAMES, "lora"], batch(len(NAMES) + 1)
    mixed = everything(**inputs, adapter_names=names).logits
    for name, row, got in zip(names, rows_of(inputs), mixed, strict=True):
        want = alone(everything, name, row, everything).logits
        torch.testing.assert_close(
            real(got[None], row["attention_mask"]), real(want, row["attention_mask"]), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_the_sum_of_the_rows_own(reentrant):
    """Also where the rows are computed again in the backward pass, which runs after the call."""
    names = ["lora", "__base__", "bottleneck", "dora", "saved", "prefix", "prompt", "lora", "prefix-mlp"]
    model, inputs = mixed_model(list(dict.fromkeys(names))).train(), batch(len(names))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(call: Any) -> dict[str, Tensor]:
        model.zero_grad()
        call()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def one_by_one() -> None:
        for name, row, label in zip(names, rows_of(inputs), labels, strict=True):
            loss = alone(model, name, row, model).logits[0]
            if name != "__base__":
                torch.nn.functional.cross_entropy(loss[:-1], label[1:], reduction="sum").backward()

    want = gradients(one_by_one)
    model.set_requires_grad([name for name in dict.fromkeys(names) if name != "__base__"])  # also those not active
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    logits = model(**inputs, adapter_names=names, use_cache=False).logits
    got = gradients(
        lambda: torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        ).backward()
    )
    assert set(want) == set(got)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_gives_each_row_what_it_gives_alone(everything, beams):
    names, inputs = NAMES, batch(len(NAMES))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    mixed = everything.generate(**inputs, **options, adapter_names=names)
    for name, row, got in zip(names, rows_of(inputs), mixed, strict=True):
        want = alone(everything, name, row, lambda **row: everything.generate(**row, **options))
        assert torch.equal(got, want[0]), name
    assert (
        len(
            {
                tuple(row[7:].tolist())
                for row in everything.generate(
                    **{k: v[:1].expand(len(names), -1) for k, v in inputs.items()}, **options, adapter_names=names
                )
            }
        )
        > 2
    )


def test_fused_blocks_give_each_row_what_the_general_path_gives():
    names, inputs = ["lora", "__base__", "ia3"], batch(3)
    model = mixed_model(names).float()
    with torch.no_grad():
        want = model(**inputs, use_cache=False, adapter_names=names).logits
        assert fuse(model)
        got = model(**inputs, use_cache=False, adapter_names=names).logits
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[shown], want[shown], rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_rows_of_its_adapter_alone():
    model = mixed_model(["lora"])
    model.add_adapter(
        "dropped", LoraConfig(r=3, lora_alpha=5, target_modules=Q, lora_dropout=0.5, init_lora_weights=False)
    )
    model.train()
    names, inputs = ["lora", "dropped", "__base__"], batch(3)
    first, second = (model(**inputs, adapter_names=names).logits.detach() for _ in range(2))
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.allclose(first[1], second[1])


def test_a_classifier_of_each_rows_own():
    torch.manual_seed(5)
    small = BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37
    )
    base = AutoModelForSequenceClassification.from_config(small, dtype=torch.float64).eval()
    for name in ("one", "two"):
        model: Any = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False), name)
    model.set_requires_grad(["one", "two"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    names, inputs = ["two", "__base__", "one"], batch(3)
    mixed = model(**inputs, adapter_names=names).logits
    for name, row, got in zip(names, rows_of(inputs), mixed, strict=True):
        torch.testing.assert_close(got, alone(model, name, row, model).logits[0], rtol=1e-9, atol=1e-9)


def test_peft_gives_the_same_for_a_mixed_batch_of_lora(tmp_path):
    model = mixed_model(["lora", "rslora"])
    model.delete_adapter("rslora")  # PEFT mixes no biases
    model.add_adapter("other", LoraConfig(r=5, lora_alpha=3, target_modules=ALL, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float64)
    plain.load_state_dict(mixed_model(["lora"]).unload().state_dict())
    theirs = peft.PeftModel.from_pretrained(plain.eval(), tmp_path / "lora", "lora", autocast_adapter_dtype=False)
    theirs.load_adapter(tmp_path / "other", "other", autocast_adapter_dtype=False)
    theirs.eval()
    names, inputs = ["other", "lora", "__base__", "lora"], batch(4)
    ours = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(theirs(**inputs, adapter_names=names).logits, ours, rtol=1e-9, atol=1e-9)


def test_the_state_is_what_it_was_after_a_call_that_fails(everything):
    everything.set_adapter("ia3")
    inputs = batch(2)
    with pytest.raises(IndexError):
        everything(input_ids=inputs["input_ids"] + VOCAB, adapter_names=["lora", "dora"])
    after = everything(**inputs).logits
    want = everything(**inputs, adapter_names=["ia3", "ia3"]).logits
    torch.testing.assert_close(after, want, rtol=1e-9, atol=1e-9)


def test_a_disabled_adapter_stays_disabled(everything):
    inputs = batch(2)
    with everything.disable_adapter():
        plain = everything(**inputs).logits
        assert torch.equal(everything(**inputs, adapter_names=["lora", "dora"]).logits, plain)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ("lora", ConfigError, "must be a list with one adapter name for each row"),
        ([], ConfigError, "must be a list"),
        (["lora", "absent"], AdapterNameError, "holds ['absent'], which are not loaded; loaded: "),
        (["lora"], ShapeError, "holds 1 names for a batch of 2 rows"),
        (["lora"] * 3, ShapeError, "holds 3 names for a batch of 2 rows"),
    ],
)
def test_names_that_do_not_fit_are_refused(everything, names, error, words):
    for call in (everything, everything.generate):
        with pytest.raises(error) as caught:
            call(**batch(2), adapter_names=names)
        assert words in str(caught.value)


def test_merged_adapters_and_rows_exclude_each_other():
    model = mixed_model(["lora", "vera"])
    model.merge_adapter(["lora"])
    with pytest.raises(CompositionError, match=r"\['lora'\] are merged into the weights, which all rows share"):
        model(**batch(2), adapter_names=["lora", "vera"])


def test_reading_a_weight_for_all_rows_that_rows_have_copies_of_is_refused(everything):
    with everything.adapter_state.route(Routing(("saved", "lora"))):
        with pytest.raises(CompositionError, match=r"lm_head\.weight is read for all rows at once"):
            _ = everything.lm_head.weight
        assert everything.lm_head.bias is None


FAMILIES = {
    "gpt2": gpt2_config(vocab_size=VOCAB, n_positions=40),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=24, word_embed_proj_dim=24, ffn_dim=37, num_hidden_layers=2, num_attention_heads=3
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_other_families_and_caches(family, cache):
    """Positions that are learned and given (GPT-2), and learned and counted in the mask (OPT)."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float64).eval()
    for name in ("prefix", "prompt"):
        model = get_peft_model(model, METHODS[name](), name)
    model.set_requires_grad(["prefix", "prompt"])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.randn_like(parameter)
    names, inputs = ["prompt", "__base__", "prefix"], batch(3)
    mixed = model(**inputs, adapter_names=names).logits
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = model.generate(**inputs, **options, cache_implementation=cache, adapter_names=names)
    for name, row, got, text in zip(names, rows_of(inputs), mixed, texts, strict=True):
        want = alone(model, name, row, model).logits
        torch.testing.assert_close(
            real(got[None], row["attention_mask"]), real(want, row["attention_mask"]), rtol=1e-8, atol=1e-8
        )
        generated = alone(model, name, row, lambda **row: model.generate(**row, **options))
        assert torch.equal(text, generated[0]), name


def test_without_a_mask_and_on_from_a_cache(everything):
    names, inputs = ["prefix", "lora", "prompt"], batch(3)
    ids, cache = inputs["input_ids"], DynamicCache(config=everything.config)
    whole = everything(input_ids=ids, adapter_names=names).logits
    for index, name in enumerate(names):
        want = alone(everything, name, {"input_ids": ids[index : index + 1]}, everything).logits
        torch.testing.assert_close(whole[index], want[0], rtol=1e-9, atol=1e-9)
    everything(input_ids=ids[:, :5], cache=cache, use_cache=True, adapter_names=names)
    rest = {"input_ids": ids[:, 5:], "cache": cache, "adapter_names": names}
    with pytest.raises(
        ConfigError, match="give attention_mask and position_ids to a forward pass that continues from a cache"
    ):
        everything(**rest)
    with pytest.raises(ConfigError, match="start from an empty cache"):
        everything(**{**rest, "adapter_names": names[::-1]})
    places = torch.arange(5, 7).expand(3, -1)
    continued = everything(**rest, attention_mask=torch.ones_like(ids), position_ids=places).logits
    torch.testing.assert_close(continued, whole[:, 5:], rtol=1e-9, atol=1e-9)


def test_an_encoder_decoder_takes_prompts_row_by_row():
    torch.manual_seed(5)
    small = T5Config(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=37, num_layers=2, num_heads=3, decoder_start_token_id=0)
    model: Any = T5ForConditionalGeneration(small).double().eval()
    model = get_peft_model(model, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4), "prompt")
    model.add_adapter("lora", LoraConfig(r=3, init_lora_weights=False))
    with torch.no_grad():
        for parameter in model.prompt_adapter.parameters():
            parameter += torch.randn_like(parameter)
    names, inputs = ["lora", "prompt", "__base__"], batch(3)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    mixed = model(**inputs, labels=inputs["input_ids"], adapter_names=names).logits
    texts = model.generate(**inputs, **options, adapter_names=names)
    for name, row, got, text in zip(names, rows_of(inputs), mixed, texts, strict=True):
        want = alone(model, name, row | {"labels": row["input_ids"]}, model).logits
        torch.testing.assert_close(got, want[0], rtol=1e-9, atol=1e-9)
        assert torch.equal(text, alone(model, name, row, lambda **row: model.generate(**row, **options))[0])


def test_prompts_of_different_counts_are_refused_where_they_would_be_wrong():
    small = BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=37
    )
    encoder: Any = AutoModelForSequenceClassification.from_config(small, dtype=torch.float64).eval()
    for name, n in (("three", 3), ("five", 5), ("also three", 3)):
        encoder = get_peft_model(encoder, PromptTuningConfig(num_virtual_tokens=n), name)
    names, inputs = ["three", "also three"], batch(2)
    mixed = encoder(**inputs, adapter_names=names).logits
    for name, row, got in zip(names, rows_of(inputs), mixed, strict=True):
        torch.testing.assert_close(got, alone(encoder, name, row, encoder).logits[0], rtol=1e-9, atol=1e-9)
    with pytest.raises(CompositionError, match=r"\('three': 3, 'five': 5\}|no causal decoder"):
        encoder(**inputs, adapter_names=["three", "five"])
    bart: Any = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=24,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
        )
    )
    bart = get_peft_model(bart, PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(CompositionError, match="counts positions itself and takes no position_ids"):
        bart(**inputs, labels=inputs["input_ids"], adapter_names=["default", "__base__"])
    kept: Any = mixed_model(["lora"])
    kept.add_adapter("kept", PromptTuningConfig(num_virtual_tokens=3, keep_virtual_logits=True))
    with pytest.raises(CompositionError, match=r"\['kept'\] set keep_virtual_logits"):
        kept(**inputs, adapter_names=["lora", "kept"])
    window: Any = AutoModelForCausalLM.from_config(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            sliding_window=4,
        )
    )
    for name in ("prefix", "prompt"):
        window = get_peft_model(window, METHODS[name](), name)
    with pytest.raises(CompositionError, match="a sliding window would count wrong distances"):
        window(**inputs, adapter_names=["prefix", "prompt"])


def test_one_kind_of_virtual_tokens_can_go_while_the_other_stays():
    model = mixed_model(["prefix", "prompt"])
    inputs, options = batch(2), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.set_adapter("prefix")
    before = model.generate(**inputs, **options)
    model.delete_adapter("prompt")
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), before)
    assert "_prepare_cache_for_generation" in vars(model)
    assert "_prepare_cache_for_generation" not in vars(model.unload())


def test_rows_of_routed_experts_are_refused():
    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.experts[0](x[:1]), self.experts[1](x[1:])])

    model: Any = get_peft_model(Mixture(), LoraConfig(r=3, target_modules=["0", "1"]))
    with pytest.raises(CompositionError, match=r"experts\.0 belongs to one of several experts"):
        model(torch.ones(3, 5), adapter_names=["default", "__base__", "default"])


def test_a_module_that_does_not_see_the_rows_is_refused():
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES["gpt2"]).eval()
    model = get_peft_model(model, LoraConfig(target_modules=["wpe"]))
    with pytest.raises(ShapeError, match=r"transformer\.wpe receives 1 rows, but adapter_names has 2 entries"):
        model(input_ids=batch(2)["input_ids"], adapter_names=["default", "__base__"])


def test_a_renamed_adapter_is_the_same_adapter():
    names, inputs = ["lora", "prefix", "bottleneck", "saved"], batch(4)
    model = mixed_model(names)
    model.set_adapter("lora")
    want, held = model(**inputs, adapter_names=names).logits, {id(p) for p in model.parameters()}
    for name in names:
        model.rename_adapter(name, f"new-{name}")
    assert model.active_adapter == "new-lora"
    assert list(model.peft_config) == [f"new-{name}" for name in names]
    assert torch.equal(model(**inputs, adapter_names=[f"new-{name}" for name in names]).logits, want)
    assert {id(p) for p in model.parameters()} == held
    for old, new, words in (("lora", "x", "no adapter is named 'lora'"), ("new-lora", "new-saved", "is there already")):
        with pytest.raises(AdapterNameError, match=words):
            model.rename_adapter(old, new)
