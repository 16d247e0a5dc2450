"""GGUF files used as they lie: the values of a dense copy, training, merging, and files that are gone or changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from veneer import LLM, SamplingParams
from veneer.adapters.auto import AutoPeftModelForCausalLM, make_room_for
from veneer.adapters.loftq import replace_lora_weights_loftq
from veneer.adapters.peft_model import get_peft_model
from veneer.cli.app import app
from veneer.errors import ConfigError, FormatError
from veneer.export.gguf.mix import MixOptions
from veneer.export.gguf.model import GgufOptions, export_gguf
from veneer.export.merged import MergeOptions, merge_checkpoint
from veneer.methods.lora import LoraConfig
from veneer.model.attach.attach import adapted_layers
from veneer.model.fused.decoder import fuse, unfuse
from veneer.model.quantized.embedding import CodedEmbedding
from veneer.model.quantized.module import CodedModule
from veneer.model.quantized.packed_linear import unpack
from veneer.model.quantized.stack import CodedStack
from veneer.ops.ggml import quantize_ggml
from veneer.ops.packed_codes import PackedCodes
from veneer.store.checkpoint import Checkpoint
from veneer.store.gguf.blocks import described_file
from veneer.store.gguf.in_place import why_not_in_blocks
from veneer.store.gguf.model import convert_gguf
from veneer.store.source import load_model, load_tokenizer, resolve

from .tiny import VOCAB, tiny_folder

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TYPES = {"gpt2": "Q4_1", "gemma2": "Q4_0", "mixtral": "Q5_1", "qwen2_moe": "IQ4_NL"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


def file_of(folder: Path, family: str, kind: str, **changes: Any) -> Path:
    tiny_folder(folder / "model", family, **changes)
    export_gguf(folder / "model", folder / "x.gguf", GgufOptions(type=kind))
    return folder / "x.gguf"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A tied Llama with q and k permuted, in Q4_K and Q6_K; its table is Q6_K."""
    return file_of(tmp_path, "llama", "Q4_K_M", **WIDE)


@pytest.mark.parametrize(
    "family", ["llama-biases", "qwen2", "mixtral", "qwen2_moe", "gemma2", "gemma3", "phi3", "gpt2", "gptneox"]
)
@torch.no_grad()
def test_values_are_those_of_the_dense_copy(tmp_path: Path, family: str) -> None:
    """transformers' reader, or the export's inverse, made the copy: rows, norms, ties and stacks lie as there."""
    path = file_of(tmp_path, family, TYPES.get(family, "Q8_0"))
    convert_gguf(path, tmp_path / "copy")
    copied = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto").named_parameters())
    folder = resolve(path)
    assert isinstance(folder, Path)
    stored = Checkpoint.open(folder)
    assert stored.tensors.keys() == copied.keys()
    for name, expected in copied.items():
        assert torch.equal(stored.read(name).to(expected.dtype), expected), name
        assert torch.equal(torch.cat(list(stored.blocks(name, 700))).to(expected.dtype), expected), name
    model = load_model(path, dtype="float32")
    coded = {path: m for path, m in model.named_modules() if isinstance(m, CodedModule)}
    assert sum(m.spec.shape[0] for m in coded.values()) > 1000
    for at, module in coded.items():
        value = module.bound().dense(torch.bfloat16)
        expected = copied.get(at if isinstance(module, CodedStack) else f"{at}.weight", value)
        assert torch.equal(value.T if getattr(module, "is_transposed", False) else value, expected)
    stacks = [name for name, value in copied.items() if value.ndim == 3 and "experts" in name]
    assert [at for at, module in coded.items() if isinstance(module, CodedStack)] == stacks
    ids = torch.tensor([[3, 17, 41, 5, 29, 11, 7]])
    logits = model(ids).logits
    torch.testing.assert_close(model.dequantize()(ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_head_shares_the_blocks_of_its_table_and_nothing_is_copied(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    monkeypatch.setattr("veneer.store.in_blocks.waiting_for", told.append)
    model = load_model(mixed)
    assert told[-1].startswith(f"reading the blocks of {mixed.name}, matrix {len(told)} of {len(told)}")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, CodedEmbedding)
    assert head.weight is table.weight
    kinds = {m.spec.kind for m in model.modules() if isinstance(m, CodedModule)}
    assert kinds == {"Q4_K", "Q6_K"}
    assert "model.embed_tokens.like" not in model.state_dict()
    assert not load_model(mixed).load_state_dict(model.state_dict()).missing_keys
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"]))
    assert adapted.dtype == torch.bfloat16  # the adapter's is float32
    assert fuse(adapted)
    unfuse(adapted)
    model = adapted.unload()
    assert table(torch.tensor([[7, 2]])).dtype == torch.bfloat16
    for wrong in (-1, VOCAB):
        with pytest.raises(IndexError, match=rf"row {wrong} is not in the table: it has rows 0 to {VOCAB - 1}"):
            model(torch.tensor([[7, wrong]]))
    assert load_model(mixed, dtype="float32")(torch.tensor([[7, 2]])).logits.dtype == torch.float32
    dense = model.dequantize()
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight


@pytest.mark.parametrize("use_dora", [False, True])
def test_training_is_that_on_the_decoded_weights(mixed: Path, use_dora: bool) -> None:
    config = LoraConfig(
        r=3, lora_alpha=5, use_dora=use_dora, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]
    )
    ids = torch.arange(21).view(3, 7) * 11 % VOCAB

    def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.add_(torch.randn_like(p) * 0.1)
        assert fuse(adapted)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}

    loss, grads = step(load_model(mixed, dtype="float32"))
    expected, wanted = step(load_model(mixed, dtype="float32").dequantize())
    assert abs(float(loss - expected)) <= 1e-5 * float(expected)
    assert len(grads) == 2 * 4 * (3 if use_dora else 2)
    for name, grad in grads.items():
        assert float((grad - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()), name


@pytest.mark.parametrize(
    ("family", "mix"),
    [
        ("mixtral", [("_exps", "MXFP4")]),
        ("qwen3_moe", [("gate_exps", "Q5_0"), ("up_exps", "F16"), ("down_exps", "Q8_0")]),
        ("qwen2_moe", [("_exps", "IQ4_NL")]),
    ],
)
def test_experts_are_trained_and_merged_in_their_blocks(tmp_path: Path, family: str, mix: Any) -> None:
    """Gate and up in types of their own; nothing of a stack is copied, and the file keeps what a merge adds."""
    tiny_folder(tmp_path / "model", family)
    options = GgufOptions(type="Q4_0", mix=MixOptions(by_name=mix))
    export_gguf(tmp_path / "model", tmp_path / "x.gguf", options)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets)
    ids = torch.arange(21).view(3, 7) * 11 % VOCAB

    def step(model: Any) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.add_(torch.randn_like(p) * 0.1)
        logits = adapted(input_ids=ids).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        return adapted, logits.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}

    model = load_model(tmp_path / "x.gguf", dtype="float32")
    stacks = [m for m in model.modules() if isinstance(m, CodedStack)]
    kinds = {piece.kind for stack in stacks for piece in stack.stack_spec.pieces}
    assert kinds == {kind for _, kind in mix}
    adapted, logits, grads = step(model)
    _, expected, wanted = step(load_model(tmp_path / "x.gguf", dtype="float32").dequantize())
    assert float((logits - expected).norm()) <= 1e-5 * float(expected.norm())
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert float((grad - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()), name
    adapted.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "x.gguf", tmp_path / "adapter", tmp_path / "merged", MergeOptions(dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    plain = adapted.merge_and_unload()
    assert not any(isinstance(module, CodedModule) for module in plain.modules())
    torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_names_the_file_is_loaded_on_it_and_merges_into_16_bits(mixed: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    adapted = get_peft_model(load_model(mixed, dtype="float32"), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 17, 41, 5, 29]])
    logits = adapted.eval()(ids).logits
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert isinstance(again.get_input_embeddings(), CodedEmbedding)
    assert torch.equal(again(ids).logits, logits)
    copy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32, gguf="dense").eval()
    assert not isinstance(copy.get_input_embeddings(), CodedEmbedding)
    assert (copy(ids).logits - logits).norm() <= 0.05 * logits.norm()  # its weights are rounded to bfloat16
    with pytest.raises(ConfigError, match=r"blocks of .*x\.gguf cannot be quantized again.*veneer export gguf"):
        again.merge_and_unload(requantize=True)
    merge_checkpoint(mixed, tmp_path / "adapter", tmp_path / "merged", MergeOptions(dtype="float32"))
    assert not (tmp_path / "merged" / "blocks.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    plain = again.merge_and_unload()
    assert not any(isinstance(module, CodedModule) for module in plain.modules())
    torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")


def test_loftq_starts_from_the_16_bit_folder_and_refuses_the_file_itself(mixed: Path, tmp_path: Path) -> None:
    base = load_model(mixed, dtype="float32")
    model = get_peft_model(base, LoraConfig(r=5, lora_alpha=13, target_modules=["q_proj", "down_proj"]))
    with pytest.raises(ConfigError, match=r"hold the quantized weight itself.*model_path the folder"):
        replace_lora_weights_loftq(model)
    replace_lora_weights_loftq(model, tmp_path / "model")
    exact = load_file(tmp_path / "model" / "model.safetensors")
    for path, layer in adapted_layers(model).items():
        lost = exact[f"{path}.weight"].float() - layer.site(()).weight.dense()
        u, s, vt = torch.linalg.svd(lost, full_matrices=False)
        assert s[0] > 0
        torch.testing.assert_close(layer.record("default").added(), (u[:, :5] * s[:5]) @ vt[:5], rtol=1e-3, atol=1e-6)


def test_what_stays_in_the_file_is_not_saved_resized_or_trained_there(mixed: Path, tmp_path: Path) -> None:
    model = load_model(mixed)
    with pytest.raises(ConfigError, match=r"lie in the blocks of .*x\.gguf, and are not saved: copy that file"):
        model.save_pretrained(tmp_path / "saved")
    told = r"has 300 tokens, more than the 271 of the base's table\. It stays in the blocks"
    with pytest.raises(ConfigError, match=told):
        make_room_for(range(300), model)
    dense = load_model(mixed, gguf="dense")
    assert not any(isinstance(module, CodedModule) for module in dense.modules())


@pytest.mark.parametrize(
    "kind",
    ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"],
)
def test_served_from_packed_codes(tmp_path: Path, kind: str) -> None:
    """Same tokens as of the decoded weights, by the step in C++; the file's blocks are there again afterwards."""
    path = file_of(tmp_path, "llama", kind, **WIDE)
    prompts, greedy = [[3, 17, 41, 5, 29], [101, 7]], SamplingParams(temperature=0, max_tokens=9)
    dense = load_model(path, dtype="float32").dequantize()
    coded = LLM(path, dtype="float32")
    answers = [
        [each.outputs[0].token_ids for each in llm.generate(prompts, greedy, use_tqdm=False)]
        for llm in (coded, LLM(dense, tokenizer=load_tokenizer(path)))
    ]
    assert answers[0] == answers[1]
    runner: Any = coded.engine.runner
    groups = [linears.group for linears in runner.interpreter._linears]
    assert all(isinstance(part, PackedCodes) for group in groups for part in group.parts)
    unpack(runner.model)
    for at, module in load_model(path).named_modules():
        if isinstance(module, CodedModule):
            assert torch.equal(runner.model.get_submodule(at).weight, module.weight)


def test_files_that_go_or_change_are_told(mixed: Path) -> None:
    folder, model = resolve(mixed), load_model(mixed)
    assert isinstance(folder, Path)
    whole = mixed.read_bytes()
    mixed.write_bytes(whole[:-4096])  # cut while it is mapped
    with pytest.raises(
        FormatError, match=r"x\.gguf was written to while its weights were in use \(it had [\d,]+ bytes"
    ):
        model(torch.tensor([[7, 2]]))
    with pytest.raises(FormatError, match=r"x\.gguf is another file than the one that was opened"):
        described_file(folder)
    with pytest.raises(FormatError, match=r"damaged GGUF file, perhaps cut short"):
        load_model(mixed)
    mixed.unlink()
    with pytest.raises(FormatError, match=r"x\.gguf is gone: .*Put it back"):
        described_file(folder)


def test_files_that_cannot_stay_in_blocks_say_why(
    tmp_path: Path, mixed: Path, edited: Callable[[Path, str, str], Path]
) -> None:
    assert why_not_in_blocks(mixed) is None
    export_gguf(tmp_path / "model", tmp_path / "f16.gguf", GgufOptions(type="F16"))
    assert why_not_in_blocks(tmp_path / "f16.gguf") == ""
    assert why_not_in_blocks(edited(mixed, "IQ2_XXS", "llama")) == (
        "it holds matrices in IQ2_XXS, which are not multiplied in their blocks"
    )
    assert (
        why_not_in_blocks(edited(mixed, "Q4_K", "starcoder2")) == "no table describes the layout of starcoder2's files"
    )


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Path, str, str], Path]:
    """A file with a matrix of another type, and of another architecture."""

    def edit(path: Path, kind: str, architecture: str) -> Path:
        target = tmp_path / f"{kind}-{architecture}.gguf"
        writer = gguf.GGUFWriter(target, architecture)
        shape = gguf.quant_shape_to_byte_shape((3, 256), gguf.GGMLQuantizationType[kind])
        values = np.zeros(shape, np.uint8)
        writer.add_tensor("token_embd.weight", values, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return target

    return edit


def test_shapes_that_do_not_fit_are_refused(mixed: Path, tmp_path: Path) -> None:
    """A file whose config means another model."""
    other = tmp_path / "other.gguf"
    shutil.copyfile(mixed, other)
    data = bytearray(other.read_bytes())
    key = data.index(b"llama.feed_forward_length") + len(b"llama.feed_forward_length") + 4
    data[key : key + 4] = (768).to_bytes(4, "little")
    other.write_bytes(data)
    with pytest.raises(
        FormatError, match=r"gate_proj\.weight is \(768, 256\), and blk\.0\.ffn_gate\.weight \(512, 256\)"
    ):
        load_model(other)


def test_a_file_made_of_a_file_and_an_adapter_tells_what_is_left_of_the_update(mixed: Path, tmp_path: Path) -> None:
    """Blocks are read by gguf's own decoder; they are those of the exact sum, quantized afresh."""
    torch.manual_seed(5)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(load_model(mixed, dtype="float32"), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    layers = adapted_layers(adapted).items()
    exact = {path: layer.folded_weight(("default",), torch.float32)[0].detach() for path, layer in layers}
    options = GgufOptions(type="Q4_K_M", dtype="float32")
    report = export_gguf(mixed, tmp_path / "y.gguf", options, adapter=tmp_path / "adapter")
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (mixed, tmp_path / "y.gguf"))
    told = {found.path: found for found in report.survival}
    assert told.keys() == {f"blk.{n}.{leaf}.weight" for n in range(2) for leaf in ("attn_q", "ffn_down")}
    for n in range(2):
        wanted = exact[f"model.layers.{n}.mlp.down_proj"]
        name = f"blk.{n}.ffn_down.weight"
        first, last = (torch.tensor(gguf.quants.dequantize(t[name].data, t[name].tensor_type)) for t in (before, after))
        afresh = quantize_ggml(wanted, after[name].tensor_type.name).numpy()
        assert np.array_equal(after[name].data.reshape(-1), afresh.reshape(-1))
        update, change = (wanted - first).double(), (last - first).double()
        cosine = float((update * change).sum() / (update.norm() * change.norm()))
        assert 0 < told[name].share < 1
        assert told[name].share == pytest.approx(cosine, rel=1e-4)
        assert told[name].gain == pytest.approx(cosine * float(change.norm() / update.norm()), rel=1e-4)
        assert told[name].relative_size == pytest.approx(float(update.norm() / first.double().norm()), rel=1e-4)
    order = ("export", "gguf", mixed, "-a", tmp_path / "adapter", "-o", tmp_path / "z.gguf", "-t", "Q4_K_M")
    shown = CliRunner().invoke(app, [str(each) for each in order])
    assert "re-quantized 4 layers after merging an update of" in shown.stderr
    assert "veneer export lora" in shown.stderr
    assert export_gguf(mixed, tmp_path / "z.gguf", replace(options, overwrite=True)).survival == ()
