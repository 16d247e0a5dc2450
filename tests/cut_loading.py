"""A quantized base that each of several processes cuts while it loads it: its memory, and steps on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from peak_memory import give_back_what_is_freed, high_water

N_BLOCKS, WIDTH, INNER = 12, 512, 1536


def base(folder: Path) -> None:
    """Save a base of 12 blocks of 6.8 MB in bfloat16."""
    from transformers import LlamaForCausalLM

    from models import llama_config

    torch.manual_seed(3)
    sizes = {"num_hidden_layers": N_BLOCKS, "hidden_size": WIDTH, "intermediate_size": INNER}
    config = llama_config(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def loaded(folder: Path, rank: int, n: int, storage: str) -> None:
    """Write what the memory rose by while a base was loaded, with its parts held, and a step's loss and gradients."""
    from veneer.model.sharding import BaseCutter
    from veneer.recipe.parts import ModelPart
    from veneer.train.base_model import load_base

    torch.set_num_threads(1)
    give_back_what_is_freed()
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=n)
    try:
        part = ModelPart(source=str(folder / "base"), quantization=storage)
        found: dict[str, Any] = {}
        for is_cut in (False, True):  # the first one imports, and makes what stays
            distributed.barrier()
            before = _forget_high_water()
            model = load_base(part, cutter=BaseCutter(n, "cpu") if is_cut else None)
            found["cut" if is_cut else "whole"] = {"rise": high_water() - before, **_step(model, is_cut)}
            del model
        (folder / f"{rank}.json").write_text(json.dumps(found))
    except BaseException as error:
        (folder / f"{rank}.err").write_text(repr(error))
        raise
    distributed.barrier()
    distributed.destroy_process_group()


def _forget_high_water() -> int:
    """Let the peak of this process's memory begin anew, at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return high_water()


def _step(model: Any, is_cut: bool) -> dict[str, Any]:
    from veneer import LoraConfig, get_peft_model, shard_base
    from veneer.model.fused.decoder import fuse
    from veneer.model.sharding import leave_apart

    torch.manual_seed(5)
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).train()
    fused = fuse(model)
    if is_cut:
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
        "held": sum(_own(tensor).nbytes for tensor in (*model.parameters(), *model.buffers())),
    }  # fmt: skip


def _own(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
