"""Bases that each of several processes cuts before they get an adapter: memory while they are loaded, and steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from models import llama_config
from peak_memory import give_back_what_is_freed, high_water
from veneer import LoraConfig, get_peft_model, shard_base
from veneer.contract import MethodConfig
from veneer.model.fused.decoder import fuse
from veneer.model.sharded.sharding import BaseCutter, is_cut, leave_apart
from veneer.recipe.methods import adapter_config
from veneer.recipe.parts import ModelPart
from veneer.train.base_model import load_base

N_BLOCKS, WIDTH, INNER = 12, 512, 1536


def base(folder: Path) -> None:
    """Save a base of 12 blocks of 6.8 MB in bfloat16."""
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": N_BLOCKS, "hidden_size": WIDTH, "intermediate_size": INNER}
    config = llama_config(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "int8": ({"quantization": "int8"}, {}),
    "float32": ({"dtype": "float32"}, {"use_dora": True}),
}


STACKS = {"r": 3, "target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"method": "dora"}),
    ("nf4", {"method": "lora", "init_lora_weights": "pissa"}),
    ("gptq 4", {"method": "lora", "use_dora": True}),
    ("fp8 blocks", {"method": "lora"}),
    ("nvfp4", {"method": "lora"}),
    ("nf4 experts", {"method": "lora", **STACKS}),
    ("gpt-oss", {"method": "lora", **STACKS}),
    ("deepseek fp8", {"method": "lora", **STACKS}),
    ("gpt2", {"method": "dora", "r": 3}),
    ("dense", {"method": "psoft"}),
    ("dense", {"method": "hra"}),
    ("dense", {"method": "frod", "target_modules": ["q_proj", "up_proj"]}),
    ("dense", {"method": "lora", "bias": "all", "modules_to_save": ["input_layernorm", "lm_head"]}),
]


def loaded(folder: Path, rank: int, n: int) -> None:
    """Write what the memory rose by while bases were loaded, with their parts held, and a step's loss and gradients."""
    found: dict[str, Any] = {}
    with _met(folder, rank, n):
        give_back_what_is_freed()
        for case, (fields, adapter) in CASES.items():
            part = ModelPart(source=str(folder / "base"), **fields)
            for at_once in (False, True):  # the first one imports, and makes what stays
                distributed.barrier()
                before = _forget_high_water()
                model = load_base(part, cutter=BaseCutter(n, "cpu") if at_once else None)
                rise = high_water() - before
                step = _step(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, **adapter))
                found[f"{case} {'cut' if at_once else 'whole'}"] = {"rise": rise, **step}
                del model
        (folder / f"{rank}.json").write_text(json.dumps(found))


def attached(folder: Path, rank: int, n: int, adapters: list[tuple[str, dict[str, Any]]]) -> None:
    """Write what adapters start with, and a step, on a base that is cut afterwards, and on one that is cut before."""
    found: list[Any] = []
    with _met(folder, rank, n):
        for base, part in adapters:
            both = []
            for at_once in (False, True):
                source = ModelPart(source=str(folder / base / "coded"), quantization="nf4" if "nf4" in base else "none")
                model = load_base(source, cutter=BaseCutter(n, "cpu") if at_once else None)
                assert is_cut(model) == at_once
                both.append(_step(model, adapter_config(part)))
            found.append(both)
        (folder / f"{rank}.json").write_text(json.dumps(found))


@contextmanager
def _met(folder: Path, rank: int, n: int) -> Iterator[None]:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=n)
    try:
        yield
    except BaseException as error:
        (folder / f"{rank}.err").write_text(repr(error))
        raise
    distributed.barrier()
    distributed.destroy_process_group()


def _forget_high_water() -> int:
    """Let the peak of this process's memory begin anew, at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return high_water()


def _step(model: Any, config: MethodConfig | None) -> dict[str, Any]:
    """The values that an adapter starts with, as norms, and a step's loss and gradients; the base is cut by now."""
    assert config is not None
    torch.manual_seed(5)
    was_cut = is_cut(model)
    model = get_peft_model(model, config).train()
    start = [float(each.double().norm()) for _, each in sorted(_of_adapter(model))]
    fused = fuse(model)
    if was_cut:
        leave_apart(model)
    else:
        shard_base(model)
    joined: nn.Module = DistributedDataParallel(model, broadcast_buffers=False)
    ids = torch.randint(0, 67, (2, 13), generator=torch.Generator().manual_seed(distributed.get_rank()))
    loss = joined(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "fused": fused, "loss": loss.item(), "norms": [float(each.double().norm()) for each in gradients],
        "held": sum(_own(tensor).nbytes for tensor in (*model.parameters(), *model.buffers())), "start": start,
    }  # fmt: skip


def _of_adapter(model: nn.Module) -> list[tuple[str, Any]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, each) for name, each in named if ".adapters." in name or ".copies." in name]


def _own(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
