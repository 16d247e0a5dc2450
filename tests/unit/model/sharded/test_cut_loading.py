"""Bases that are cut while they are loaded: a process holds its part and two blocks, whatever adapter follows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen3MoeForCausalLM

import cut_loading
from cut_loading import ADAPTERS, CASES, INNER, N_BLOCKS, WIDTH
from launch import together
from models import gpt2_config, llama_config
from quantized_folders import FORMATS, deepseek_config, deepseek_fp8, make_folder, make_gpt_oss, qwen3_moe_config

N = 4
N_VALUES = 4 * WIDTH**2 + 3 * WIDTH * INNER  # of a block
SLACK = 9_000_000  # allocator, and what loading imports


def test_a_process_holds_its_part_and_two_blocks_while_it_loads(tmp_path: Path) -> None:
    cut_loading.base(tmp_path / "base")
    together(cut_loading.loaded, tmp_path, N)
    for rank in range(N):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for case, held, read in (("int8", N_VALUES, 2 * N_VALUES), ("float32", 4 * N_VALUES, 4 * N_VALUES)):
            cut, whole = found[f"{case} cut"], found[f"{case} whole"]
            bound = N_BLOCKS * held / N + 2 * read + SLACK  # bytes of a block: held in its format, and read for it
            assert cut["rise"] < bound < 0.81 * N_BLOCKS * held < 0.81 * whole["rise"], case
            assert cut["fused"]
            assert {**cut, "rise": 0} == {**whole, "rise": 0}, case
    assert len(found) == 2 * len(CASES)


def test_an_adapter_that_reads_weights_is_the_same_on_a_base_that_is_cut(tmp_path: Path) -> None:
    config = llama_config(hidden_size=96, intermediate_size=160, attention_bias=True, tie_word_embeddings=False)
    torch.manual_seed(3)
    for name in {base for base, _ in ADAPTERS}:
        if name in FORMATS:
            make_folder(FORMATS[name], tmp_path / name)
        elif name == "gpt-oss":
            make_gpt_oss(tmp_path / name)
        elif name == "deepseek fp8":
            make_folder(deepseek_fp8(), tmp_path / name, config=deepseek_config())
        elif name == "nf4 experts":
            Qwen3MoeForCausalLM(qwen3_moe_config(2, 5)).save_pretrained(tmp_path / name / "coded")
        elif name == "gpt2":
            GPT2LMHeadModel(gpt2_config()).save_pretrained(tmp_path / name / "coded")
        else:
            LlamaForCausalLM(config).save_pretrained(tmp_path / name / "coded")
    together(cut_loading.attached, tmp_path, 3, ADAPTERS)
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for (base, part), (before, after) in zip(ADAPTERS, found, strict=True):
            assert before == after, (base, part)
            assert any(after["start"])
            assert sum(after["norms"]) > 0
