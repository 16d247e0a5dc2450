"""One engine in a process of its own, which answers loads that `serve.py` names; any Python that has the engine.

    python -m bench.serving.serve_side SIDE JOB.json

The job holds ``model`` and what the side needs besides. Each line of standard input is a load: ``prompts`` (token ids),
``adapters`` (a name or null a prompt) and ``n_tokens``. Each is answered with one line of JSON behind `ANSWER`.
Of the engines with vLLM's signature, ``settings`` may hold sampling parameters, and ``structured`` a form of the text.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ANSWER = "serve_side answers: "
Prompts = list[list[int]]
Names = Sequence[str | None]
Answer = Callable[..., Prompts]  # of prompts, names and a number of tokens


def vllm_like(module: str, request_module: str, job: dict[str, Any], options: dict[str, Any]) -> Answer:
    """An `LLM` of vLLM's signature: vLLM's own or veneer's."""
    import importlib

    engine = importlib.import_module(module)
    request = importlib.import_module(request_module).LoRARequest
    with_adapters = {"enable_lora": True, "max_loras": job["max_loras"]}
    settings = {"model": job["model"], "dtype": job["dtype"], "seed": 0, **(with_adapters if job["adapters"] else {})}
    llm = engine.LLM(**settings | options)
    requests = {name: request(name, n, path) for n, (name, path) in enumerate(job["adapters"].items(), start=1)}

    def answer(prompts: Prompts, names: Names, n_tokens: int, **asked_for: Any) -> Prompts:
        given = {"temperature": 0.0, **asked_for.get("settings", {})}
        if "structured" in asked_for:
            form = importlib.import_module(request_module.replace("lora.request", "sampling_params"))
            given["structured_outputs"] = form.StructuredOutputsParams(**asked_for["structured"])
        params = engine.SamplingParams(max_tokens=n_tokens, ignore_eos=True, **given)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        adapters = [None if name is None else requests[name] for name in names] if job["adapters"] else None
        outputs = llm.generate(asked, params, lora_request=adapters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answer


def veneer(job: dict[str, Any]) -> Answer:
    options = {"enable_prefix_caching": False}  # as of the peers: the loads repeat their prompts
    return vllm_like("veneer", "veneer", job, options | job.get("options", {}))


def vllm(job: dict[str, Any]) -> Answer:
    return vllm_like("vllm", "vllm.lora.request", job, vllm_options(job))


def vllm_options(job: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's options, and set its environment before it is imported.

    Adapter rows are slow in chunks as long as vLLM makes them by itself: 256 tokens are the best of those tried. By
    itself it leaves one core to its scheduler, which on few cores is a large share of them.
    """
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    options = {"max_model_len": 2048, "enable_prefix_caching": False}
    if job["adapters"]:
        options |= {"enable_lora": True, "max_loras": job["max_loras"], "max_cpu_loras": job["max_loras"]}
        options |= {"max_num_batched_tokens": 256, "max_lora_rank": job.get("max_rank", 16)}
    return options | job.get("options", {})


def transformers(job: dict[str, Any]) -> Answer:
    """`generate` of one batch, PEFT's mixed batch where there are adapters. Prompts of a load are equally long."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    if job["adapters"]:
        from peft import PeftModel

        (first, path), *others = job["adapters"].items()
        model = PeftModel.from_pretrained(model, path, adapter_name=first).eval()
        for name, path in others:
            model.load_adapter(path, name)

    def answer(prompts: Prompts, names: Names, n_tokens: int) -> Prompts:
        ids = torch.tensor(prompts)
        mixed = {"adapter_names": [name or "__base__" for name in names]} if job["adapters"] else {}
        options = {"do_sample": False, "min_new_tokens": n_tokens, "max_new_tokens": n_tokens, "eos_token_id": None}
        with torch.inference_mode():
            whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **mixed)
        return whole[:, ids.shape[1] :].tolist()

    return answer


def openvino(job: dict[str, Any]) -> Answer:
    """OpenVINO GenAI's continuous batching over a 16-bit export. The base alone: it takes no adapter a request."""
    import numpy
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 2048
    scheduler.cache_size = 2
    pipeline = genai.ContinuousBatchingPipeline(job["export"], scheduler, "CPU")

    def answer(prompts: Prompts, names: Names, n_tokens: int) -> Prompts:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = n_tokens, True, False
        tensors = [Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        return [list(found.m_generation_ids[0]) for found in pipeline.generate(tensors, [config] * len(tensors))]

    return answer


def llama_cpp(job: dict[str, Any]) -> Answer:
    """llama.cpp through cyllama's bindings: the base alone, one request after another."""
    from cyllama.llama import llama_cpp as lib

    lib.disable_logging()
    lib.llama_backend_init()
    model = lib.LlamaModel(job["gguf"], lib.LlamaModelParams())
    params = lib.LlamaContextParams()
    params.n_ctx, params.n_batch = 2048, 2048
    params.n_threads = params.n_threads_batch = os.cpu_count()
    context = lib.LlamaContext(model, params)
    sampler = lib.LlamaSampler(lib.LlamaSamplerChainParams())
    sampler.add_greedy()

    def one(ids: list[int], n_tokens: int) -> list[int]:
        context.kv_cache_clear()
        found: list[int] = []
        batch = lib.llama_batch_get_one(ids)
        for _ in range(n_tokens):
            context.decode(batch)
            found.append(sampler.sample(context, -1))
            batch = lib.llama_batch_get_one(found[-1:], len(ids) + len(found) - 1)
        return found

    return lambda prompts, names, n_tokens: [one(ids, n_tokens) for ids in prompts]


SIDES: dict[str, Callable[[dict[str, Any]], Answer]] = {
    "veneer": veneer,
    "vllm": vllm,
    "transformers": transformers,
    "openvino": openvino,
    "llama.cpp": llama_cpp,
}


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> None:
    start = time.perf_counter()
    answer = SIDES[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    print(ANSWER + json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        start = time.perf_counter()
        more = {name: load[name] for name in ("settings", "structured") if name in load}
        tokens = answer(load["prompts"], load["adapters"], load["n_tokens"], **more)
        seconds = time.perf_counter() - start
        print(ANSWER + json.dumps({"tokens": tokens, "seconds": seconds, "resident_mb": resident_mb()}), flush=True)


if __name__ == "__main__":
    main()
