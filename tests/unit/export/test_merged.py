"""Merging a checkpoint tensor by tensor gives the bits of merging in memory, in a fraction of the memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from launch import program
from models import gpt2_config, llama_config
from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.combine.task_vectors import TaskVectors
from veneer.contract import MethodConfig
from veneer.errors import CompositionError, FormatError
from veneer.export.combined import combine_checkpoints
from veneer.export.gguf.model import GgufOptions, export_gguf
from veneer.export.merged import MergeOptions, merge_checkpoint
from veneer.methods.bottleneck import BottleneckConfig
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec
from veneer.quant.int8 import Int8Spec
from veneer.store.merge_record import FILE

SIZES = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}


def llama(tie: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(tie_word_embeddings=tie))


def qwen2() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)
    )


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(gpt2_config())


def save_base(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def save_adapter(base: Path, config: MethodConfig, folder: Path) -> Path:
    """An adapter whose values are not neutral."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def merged_in_memory(base: Path, adapter: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def assert_same_model(output: Path, wanted: nn.Module) -> None:
    got = assert_same_weights(output, wanted)
    ids = torch.tensor([[3, 17, 41, 5, 29]])
    assert torch.equal(got(ids).logits, wanted.eval()(ids).logits)


def assert_same_weights(output: Path, wanted: nn.Module) -> nn.Module:
    got = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    expected = wanted.state_dict()
    assert got.state_dict().keys() == expected.keys()
    for name, value in got.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    return got


def test_tensors_that_transformers_renames_are_found(tmp_path: Path) -> None:
    """GPT-NeoX's head is ``embed_out`` in the files and ``lm_head`` in the model."""
    sizes = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
    base = save_base(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=3)), tmp_path / "base")
    adapter = save_adapter(base, LoraConfig(r=3, target_modules=["query_key_value", "lm_head"]), tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert "embed_out.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert_same_model(tmp_path / "out", merged_in_memory(base, adapter))


@pytest.mark.parametrize("n_rows", [71, 61])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 60]},
    ],
)
def test_a_resized_vocabulary_comes_with_the_adapter(
    how: dict[str, Any], tie: bool, n_rows: int, tmp_path: Path
) -> None:
    base = save_base(llama(tie), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(n_rows)
    model = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **how))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 17, n_rows - 1, 60, 29]])
    assert got.config.vocab_size == n_rows
    torch.testing.assert_close(got(ids).logits, model.merge_and_unload().eval()(ids).logits, rtol=0, atol=0)


def test_half_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(71)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(FormatError, match=r"shape \(71, 24\), but the model needs \(67, 24\)"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


LORA = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
CASES: dict[str, tuple[Any, MethodConfig]] = {
    "lora": (llama, LORA),
    "dora": (llama, LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["k_proj", "up_proj"])),
    "rslora with biases": (qwen2, LoraConfig(r=5, use_rslora=True, bias="all", target_modules=["v_proj"])),
    "ia3": (qwen2, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "conv1d": (gpt2, LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "head saved whole": (llama, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "embeddings": (llama, LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "q_proj"])),
    "tied, head adapted": (qwen2, LoraConfig(r=3, lora_alpha=7, target_modules=["lm_head", "q_proj"])),
    "tied, embeddings adapted": (qwen2, LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens"])),
    "tied, nothing of it adapted": (qwen2, LORA),
    "tie kept": (qwen2, LoraConfig(r=3, target_modules=["lm_head", "q_proj"], ensure_weight_tying=True)),
    "tie kept, saved whole": (qwen2, LoraConfig(r=3, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tie kept, rows": (qwen2, LoraConfig(r=3, trainable_token_indices=[2, 5])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_merging_in_memory(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    make, config = CASES[case]
    base = save_base(make(), tmp_path / "base", dtype)
    adapter = save_adapter(base, config, tmp_path / "adapter")
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    wanted = merged_in_memory(base, adapter)
    assert_same_model(tmp_path / "out", wanted)
    assert report.untied == (case in ("tied, head adapted", "tied, embeddings adapted"))
    assert not torch.equal(
        AutoModelForCausalLM.from_pretrained(base)(torch.tensor([[3]])).logits,
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[3]])).logits,
    )


def test_sharded_bases_and_sharded_results(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base", max_shard_size="12KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "out", MergeOptions(max_shard_bytes=9_000))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same_model(tmp_path / "out", merged_in_memory(base, adapter))


def test_a_base_saved_without_its_head(tmp_path: Path) -> None:
    model = gpt2()
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(base, LoraConfig(r=3, target_modules=["c_attn"]), tmp_path / "adapter")
    wanted = merged_in_memory(base, adapter)
    tensors = load_file(base / "model.safetensors")
    inner = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(inner, base / "model.safetensors", {"format": "pt"})
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(inner)
    assert_same_model(tmp_path / "out", wanted)


def test_the_dtype_asked_for_rounds_at_the_end(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "out", MergeOptions(dtype="bfloat16"))
    assert_same_weights(tmp_path / "out", merged_in_memory(base, adapter).to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("quantized", ["nf4", "fp4", "int8"])
def test_a_quantized_base_becomes_dense_in_16_bits(tmp_path: Path, quantized: str) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = {name: value for name, value in model.state_dict().items() if "_proj" not in name}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            shape = (module.out_features, module.in_features)
            layout = FourBitLayout(shape, quantized, 64, torch.float32) if quantized != "int8" else None
            spec = Int8Spec(shape) if layout is None else FourBitSpec(layout, double_quant=quantized == "nf4")
            parts = spec.quantize(module.weight.detach())
            tensors |= {f"{name}.{key}": value for key, value in spec.to_disk(parts).items()}
            module.weight.data = spec.bind(parts).dense(torch.float32)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": quantized != "int8"}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "small" / "model.safetensors", {"format": "pt"})

    merge_checkpoint(tmp_path / "small", adapter, tmp_path / "out")
    wanted = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.dtype == (torch.bfloat16 if "_proj" in name else torch.float32)
        assert torch.equal(value, wanted[name].to(value.dtype)), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_companions_come_along_and_the_adapters_own_win(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    for folder, text in ((base, "base's"), (adapter, "adapter's")):
        (folder / "chat_template.jinja").write_text(text)
    (base / "tokenizer.json").write_text("base's")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "adapter's"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "base's"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_an_output_that_holds_something_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older.safetensors").write_text("x")
    with pytest.raises(FormatError, match="is not empty"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["older.safetensors"]
    merge_checkpoint(base, adapter, tmp_path / "out", MergeOptions(overwrite=True))
    assert not (tmp_path / "out" / "older.safetensors").exists()


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    other = save_base(gpt2(), tmp_path / "other")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    with pytest.raises(FormatError, match=rf"(?s)does not fit the model {other}: it was trained on {base}: .*q_proj"):
        merge_checkpoint(other, adapter, tmp_path / "out")
    wider = LlamaForCausalLM(llama_config(hidden_size=48))
    with pytest.raises(FormatError, match="shape"):
        merge_checkpoint(save_base(wider, tmp_path / "wider"), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bottleneck_cannot_be_folded(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, BottleneckConfig(), tmp_path / "adapter")
    with pytest.raises(CompositionError, match="keep it beside the model"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_base_whose_files_name_tensors_otherwise_points_to_merging_in_memory(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors["model.blocks.0.up"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"no tensor 'model\.layers\.0\.mlp\.up_proj\.weight'.*merge_and_unload"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_progress_counts_the_tensors(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    told: list[tuple[int, int]] = []
    report = merge_checkpoint(base, adapter, tmp_path / "out", on_progress=lambda *event: told.append(event))
    assert told == [(i + 1, report.n_tensors) for i in range(report.n_tensors)]
    assert report.n_modules == 4
    assert report.n_bytes == 4 * sum(p.numel() for p in llama().parameters())


MEASURE = """
import sys
from pathlib import Path
from peak_memory import give_back_what_is_freed, high_water
from veneer.export.merged import MergeOptions, merge_checkpoint

give_back_what_is_freed()
warm, folder, dtype, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
merge_checkpoint(warm / "base", warm / "adapter", warm / "out")
before = high_water()
options = MergeOptions(dtype=dtype if dtype != "base" else None, max_shard_bytes=shard_bytes)
merge_checkpoint(folder / "base", folder / "adapter", folder / "out", options)
print(high_water() - before)
"""


@pytest.fixture(scope="module")
def three_large_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base in shards of one layer each (34 MB), and an adapter of all its matrices."""
    folder = tmp_path_factory.mktemp("large")
    config = llama_config(
        vocab_size=97,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.02)
    model.save_pretrained(folder / "base", max_shard_size=LARGE_SHARD)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder


LARGE_SHARD = 35_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
@pytest.mark.parametrize("dtype", ["base", "float32"])
def test_the_peak_of_memory_is_below_one_shard(tmp_path: Path, three_large_layers: Path, dtype: str) -> None:
    assert len(list((three_large_layers / "base").glob("*.safetensors"))) == 3
    base = save_base(llama(), tmp_path / "base", torch.bfloat16)
    save_adapter(base, LORA, tmp_path / "adapter")
    large = tmp_path / "large"
    large.mkdir()
    for part in ("base", "adapter"):
        (large / part).symlink_to(three_large_layers / part)
    done = program(MEASURE, tmp_path, large, dtype, LARGE_SHARD)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) < LARGE_SHARD


def siglip() -> SiglipForImageClassification:
    sizes = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 3}
    images = {**sizes, "image_size": 12, "patch_size": 4}
    return SiglipForImageClassification(SiglipConfig(text_config={**sizes, "vocab_size": 67}, vision_config=images))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=67, d_model=24, d_kv=8, d_ff=37, num_layers=2, num_heads=3))


def classifier() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(llama_config(num_labels=3))


def encoder() -> BertModel:
    return BertModel(BertConfig(**SIZES, num_attention_heads=3, max_position_embeddings=31))


def bare_gpt2() -> GPT2Model:
    return GPT2Model(gpt2_config())


OTHER_HEADS: dict[str, tuple[Any, MethodConfig]] = {
    "a convolution": (siglip, LoraConfig(r=3, lora_alpha=7, target_modules=["patch_embedding", "q_proj"])),
    "torch's attention": (siglip, LoraConfig(r=3, lora_alpha=7, target_modules=["head.attention", "q_proj"])),
    "an encoder-decoder": (t5, LoraConfig(r=3, target_modules=["lm_head", "q"], ensure_weight_tying=True)),
    "a classifier": (classifier, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["score"])),
    "an encoder without a head": (encoder, LoraConfig(r=3, target_modules=["query", "word_embeddings"])),
    "a decoder without a head": (bare_gpt2, LoraConfig(r=3, target_modules=["c_attn"])),
}


@pytest.mark.parametrize("case", OTHER_HEADS)
def test_models_of_other_tasks(tmp_path: Path, case: str) -> None:
    make, config = OTHER_HEADS[case]
    base = save_base(make(), tmp_path / "base")
    own = type(make())
    model = get_peft_model(own.from_pretrained(base), config)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    got = own.from_pretrained(tmp_path / "out").state_dict()
    before, wanted = own.from_pretrained(base).state_dict(), model.merge_and_unload().state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in got.items())
    assert any(not torch.equal(value, before[name]) for name, value in got.items())


@pytest.mark.parametrize("named", [["NoSuchModelForVision"], None])
def test_a_class_that_transformers_has_not_is_told(tmp_path: Path, named: list[str] | None) -> None:
    base = save_base(siglip(), tmp_path / "base")
    get_peft_model(siglip(), LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": named}))
    with pytest.raises(FormatError, match="which is no model of transformers: load the base yourself"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


def test_a_bare_base_gets_the_head_that_its_adapter_had(tmp_path: Path) -> None:
    base = save_base(qwen2(), tmp_path / "base")
    adapter = save_adapter(base, LORA, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2Model"]}))
    wanted = merged_in_memory(base, adapter)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", wanted)


def test_an_adapter_is_folded_in_once(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    first, second = (
        save_adapter(base, LoraConfig(r=3, target_modules=[name]), tmp_path / name) for name in ("q_proj", "v_proj")
    )
    merge_checkpoint(base, first, tmp_path / "one")
    merge_checkpoint(tmp_path / "one", second, tmp_path / "both")
    for folder, adapter in (("one", first), ("both", first), ("both", second)):
        with pytest.raises(CompositionError, match=rf"{folder} has .*_proj in it already .as .*/{adapter.name}, in"):
            merge_checkpoint(tmp_path / folder, adapter, tmp_path / "again")
    with pytest.raises(CompositionError, match=r"one has .*q_proj in it already"):
        export_gguf(tmp_path / "one", tmp_path / "again", GgufOptions(type="F16"), adapter=first)
    combine_checkpoints(tmp_path / "one", [(tmp_path / "one", 1.0)], tmp_path / "combined", TaskVectors())
    assert (tmp_path / "combined" / FILE).read_bytes() == (tmp_path / "one" / FILE).read_bytes()
    (tmp_path / "one" / FILE).write_text("[3]")
    with pytest.raises(FormatError, match="no list of merged adapters"):
        merge_checkpoint(tmp_path / "one", second, tmp_path / "again")
    assert not (tmp_path / "again").exists()
