"""llama.cpp's own logits: of every place of a text (cyllama), and of a text's end under an adapter (xllamacpp).

cyllama puts no adapter onto a context; xllamacpp's server tells the probabilities of the next token only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

has_cyllama = importlib.util.find_spec("cyllama") is not None
has_xllamacpp = importlib.util.find_spec("xllamacpp") is not None
N_CONTEXT = 512


def all_logits(file: Path, texts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Logits (n, vocabulary) of each text of token ids (n,); keys and values in float32, no flash attention."""
    import cyllama.llama.llama_cpp as llama

    llama.disable_logging()
    given = llama.LlamaModelParams()
    given.n_gpu_layers = 0

    class Model(llama.LlamaModel):  # type: ignore[misc,name-defined]
        n_vocab = property(lambda self: int(self.get_vocab().n_vocab))  # cyllama 0.2.18 asks for it in vain

    model: Any = Model(path_model=str(file), params=given, verbose=False)
    for ids in texts:
        params = llama.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = N_CONTEXT
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.type_k = params.type_v = params.flash_attn_type = 0
        context: Any = llama.LlamaContext(model=model, params=params, verbose=False)
        batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1, verbose=False)
        for place, token in enumerate(ids.tolist()):
            batch.add(token, place, [0], True)
        if context.decode(batch) != 0:
            raise RuntimeError(f"llama.cpp failed on {file}")
        yield torch.stack([torch.tensor(list(context.get_logits_ith(place))) for place in range(len(ids))])


def next_log_probs(
    file: Path, prompts: Sequence[list[int]], vocabulary: int, adapter: Path | None = None
) -> list[Tensor]:
    """Log-probabilities (1, vocabulary) of the token after each prompt, with an adapter's file beside the base's."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_gpu_layers, params.warmup, params.n_parallel = N_CONTEXT, 0, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = int(os.environ.get("LLAMA_VERBOSITY", "-1"))
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "max_tokens": 1, "n_probs": vocabulary, "temperature": -1.0, "cache_prompt": False}
        first = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        row = torch.full((1, vocabulary), -torch.inf)
        row[0, [each["id"] for each in first]] = torch.tensor([each["logprob"] for each in first])
        found.append(row)
    return found
