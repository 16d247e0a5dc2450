"""Adapter files on their base's file in llama.cpp: the probabilities are PEFT's model's. Skips without xllamacpp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from veneer.adapters.peft_model import PeftModel
from veneer.export.gguf.adapter import export_lora
from veneer.export.gguf.model import GgufOptions, export_gguf

from .test_adapter import LORAS, trained
from .tiny import VOCAB

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
IDS = [(i * 29 + 7) % (VOCAB - 3) for i in range(23)]


CASES = [
    "rslora, patterns", "pissa", "conv1d, square too", "embeddings", "experts", "experts beside a shared one",
    "experts of a layer, down alone", "experts of gpt-oss",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_probabilities_are_those_of_the_adapted_model(tmp_path: Path, case: str) -> None:
    import transformers

    family, config, changes = LORAS[case]
    adapter = trained(tmp_path, family, config, **changes)
    export_gguf(tmp_path / "base", tmp_path / "base.gguf", GgufOptions(type="F32"))
    export_lora(adapter, tmp_path / "lora.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "base.gguf")
    params.n_ctx, params.n_gpu_layers, params.warmup = 256, 0, False
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = str(tmp_path / "lora.gguf"), 1.0
    params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    request = {"prompt": IDS, "max_tokens": 1, "n_probs": VOCAB, "temperature": -1.0, "cache_prompt": False}
    # The token that is drawn has to be a whole character, or the answer holds no probabilities; those are told from
    # before the bias.
    request["logit_bias"] = [[IDS[0], 100.0]]
    answer = server.handle_completions(request)
    found = {each["id"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = PeftModel.from_pretrained(base, adapter)
    expected = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    assert len(found) > 200
    torch.testing.assert_close(torch.tensor([found[i] for i in found]), expected[list(found)], rtol=0, atol=5e-2)
