"""The snippets that everybody learns fine-tuning from, with the import line changed, on a tiny model.

Argument names are today's: ``eval_strategy``, ``warmup_steps`` (a share below one), ``processing_class``, and
``max_length``, ``packing`` and ``dataset_text_field`` in ``SFTConfig``.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from models import llama_config
from veneer import (
    LLM,
    BitsAndBytesConfig,
    IA3Config,
    LoraConfig,
    LoRARequest,
    PeftModel,
    PrefixTuningConfig,
    SamplingParams,
    SFTConfig,
    SFTTrainer,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from veneer.model.quantized.quant_linear import QuantLinear

D, FF, LAYERS, KV, VOCAB = 64, 96, 2, 32, 55  # KV: 2 of 4 heads, 16 wide
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 41, 2, 33, 17, 9], [8, 8, 40, 1, 54, 3]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 16-bit weights in a folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    names = {w: i for i, w in enumerate(["<unk>", "<end>", *(f"w{i}" for i in range(VOCAB - 2))])}
    words = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(3)
    config = llama_config(
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        bos_token_id=1,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def load(base: Path, **how: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, **how)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def lora_parameters(r: int) -> int:
    return r * LAYERS * (2 * (D + D) + 2 * (D + KV) + 3 * (D + FF))


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


def test_1_lora_on_all_linear_layers(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=SEVEN,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(base), lora_config)
    model.print_trainable_parameters()
    trained = lora_parameters(16)
    everything = sum(p.numel() for p in model.parameters())
    line = (
        f"trainable params: {trained:,} || all params: {everything:,} || trainable%: {100 * trained / everything:.4f}"
    )
    assert capsys.readouterr().out.splitlines()[0] == line


def test_2_four_bit_base(base: Path) -> None:
    model = load(base, quantization_config=nf4(), device_map="auto")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 7 * LAYERS
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN, task_type="CAUSAL_LM"))
    plain = logits(load(base))
    assert 0 < (logits(model) - plain).norm() / plain.norm() < 0.3
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_3_prefix_tuning(base: Path, tmp_path: Path) -> None:
    prefix_config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=20,
        prefix_projection=True,
    )
    model = get_peft_model(load(base, dtype=torch.float32), prefix_config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert model.eval().generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 8)
    trained = logits(model)
    model.save_pretrained(tmp_path / "prefix")
    stored = load_file(tmp_path / "prefix" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {"prompt_embeddings": (20, 2 * LAYERS * KV)}
    theirs = peft.PeftModel.from_pretrained(load(base, dtype=torch.float32), tmp_path / "prefix")
    torch.testing.assert_close(logits(theirs), trained, rtol=1e-4, atol=1e-4)
    assert (trained - logits(load(base, dtype=torch.float32))).norm() > 0.1 * trained.norm()


def test_4_ia3(base: Path) -> None:
    ia3_config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    model = get_peft_model(load(base), ia3_config)
    assert model.get_nb_trainable_parameters()[0] == LAYERS * (2 * KV + FF)


def test_5_merge_and_save(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(base, dtype=torch.float32), LoraConfig(r=3, lora_alpha=5, target_modules=SEVEN))
    randomize(model)
    adapted = logits(model)
    merged_model = model.merge_and_unload()
    merged_model.save_pretrained(tmp_path / "merged_model")
    torch.testing.assert_close(logits(load(tmp_path / "merged_model")), adapted, rtol=1e-5, atol=1e-5)
    stored, first = load_file(tmp_path / "merged_model" / "model.safetensors"), load_file(base / "model.safetensors")
    assert stored.keys() == first.keys()


def test_6_two_adapters(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {}
    for name, r in (("adapter_task_a", 3), ("adapter_task_b", 5)):
        torch.manual_seed(r)
        trained = get_peft_model(load(base), LoraConfig(r=r, lora_alpha=4, target_modules="all-linear"))
        randomize(trained)
        trained.save_pretrained(name)
        expected[name] = logits(trained)

    base_model = load(base)
    model = PeftModel.from_pretrained(base_model, "adapter_task_a")
    model.load_adapter("adapter_task_b", adapter_name="task_b")
    assert torch.equal(logits(model), expected["adapter_task_a"])
    model.set_adapter("task_b")
    assert torch.equal(logits(model), expected["adapter_task_b"])
    assert not torch.allclose(expected["adapter_task_a"], expected["adapter_task_b"], atol=1e-2)


@pytest.fixture
def texts() -> tuple[Dataset, Dataset]:
    """Words that follow one another by a rule that can be learned, in rows of several lengths."""
    rows = [{"text": " ".join(f"w{(i + 3 * j) % 53}" for j in range(5 + i % 7))} for i in range(53)]
    return Dataset.from_list(rows[:44]), Dataset.from_list(rows[44:])


def qlora_settings(output: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        lr_scheduler_type="cosine",
        warmup_steps=0.06,
        fp16=False,
        bf16=True,
        optim="paged_adamw_8bit",
        logging_steps=1,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_grad_norm=0.3,
        train_sampling_strategy="group_by_length",
        max_length=32,
        dataset_text_field="text",
        packing=True,
        report_to="none",
        disable_tqdm=True,
    )


def test_7_the_qlora_pipeline(base: Path, texts: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    train_dataset, eval_dataset = texts
    model = load(base, quantization_config=nf4(), device_map="auto", attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = prepare_model_for_kbit_training(model)
    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora_config)
    training_args = qlora_settings(tmp_path / "qlora-output")
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [4, 6]
    assert (tmp_path / "qlora-output" / "checkpoint-4").is_dir()

    trainer.save_model(str(tmp_path / "qlora-adapter"))
    assert json.loads((tmp_path / "qlora-adapter" / "adapter_config.json").read_text())["r"] == 16
    size = (tmp_path / "qlora-adapter" / "adapter_model.safetensors").stat().st_size
    assert 4 * lora_parameters(16) < size < 4 * lora_parameters(16) + 6000
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(base, quantization_config=nf4())),
                                      tmp_path / "qlora-adapter")  # fmt: skip
    assert torch.equal(logits(again), logits(model))
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "qlora-adapter")
    ours = PeftModel.from_pretrained(load(base), tmp_path / "qlora-adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.02, atol=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_flash_attention_on_a_cpu_is_refused_by_name(base: Path) -> None:
    """transformers says so itself, before anything is loaded."""
    with pytest.raises(ImportError, match=r"FlashAttention2 .* cannot be used"):
        load(base, quantization_config=nf4(), attn_implementation="flash_attention_2")


def test_8_many_adapters_on_one_base(base: Path, tmp_path: Path) -> None:
    for name, config in {"legal-lora": LoraConfig(r=64, target_modules=SEVEN), "other": IA3Config()}.items():
        adapted = get_peft_model(load(base), config)
        randomize(adapted)
        adapted.save_pretrained(tmp_path / name)
    short = tmp_path / "short"  # a context of 40 tokens, so that 512 of them are not made
    shutil.copytree(base, short)
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 40}))
    llm = LLM(
        model=str(short),
        enable_lora=True,
        max_loras=16,  # Number of adapters loaded simultaneously
        max_lora_rank=64,  # Maximum rank across all adapters
    )
    # Each request can target a different adapter
    output = llm.generate(
        "w1 w2 w3 w4 w5",
        SamplingParams(temperature=0.1, max_tokens=512),
        lora_request=LoRARequest("legal-adapter", 1, str(tmp_path / "legal-lora")),
    )
    assert output[0].finished
    assert output[0].outputs[0].token_ids
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    asked = [LoRARequest("other", 2, str(tmp_path / "other")), None, LoRARequest("x", 3, str(tmp_path / "legal-lora"))]
    together = [o.outputs[0].token_ids for o in llm.generate(["w1 w2 w3"] * 3, greedy, lora_request=asked)]
    assert len({tuple(answer) for answer in together}) == 3
