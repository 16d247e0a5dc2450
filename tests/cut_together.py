"""Steps of small models in several processes: with a whole base in each, and with one that is cut over them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from collectives import Sent
from launch import together

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
MIXTURES = ("nf4 experts", "fp8 experts", "mxfp4 experts")
N_BLOCKS, N_STEPS = 3, 2


def compared(folder: Path, n: int, cases: list[tuple[str, bool, str]], shard: int | None = None) -> list[Any]:
    """For each case the facts that `_case` found, one of each of ``n`` processes."""
    folder.mkdir(exist_ok=True)
    together(_run, folder, n, cases, shard)
    return list(zip(*(json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)), strict=True))


def _run(folder: Path, rank: int, n: int, cases: list[tuple[str, bool, str]], shard: int | None) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=n)
    try:
        found = [_case(*case, shard) for case in cases]
    except BaseException as error:
        (folder / f"{rank}.err").write_text(repr(error))
        raise
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def _case(storage: str, is_fused: bool, checkpointing: str, shard: int | None) -> dict[str, Any]:
    import warnings

    from veneer import shard_base
    from veneer.model.fused.decoder import fuse

    found: dict[str, Any] = {}
    weights, gradients = [], []
    for is_cut in (False, True):
        model = _adapted(storage, checkpointing)
        assert not is_fused or fuse(model)
        frozen, stacks = _block_bytes(model), _stack_bytes(model)
        if not is_cut:
            gradients.append(_of_one_process(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error" if is_cut else "default", UserWarning)
            if is_cut:
                shard_base(model, shard)
                assert any("lora_A" in key for key in model.state_dict())
                found |= {"held": _block_bytes(model) / frozen, "frozen": frozen}
                found["padding"] = _padding_bytes(model, shard or distributed.get_world_size())
                found |= {"stacks held": _stack_bytes(model) / stacks} if stacks else {}
            joined = DistributedDataParallel(model, broadcast_buffers=False)
            gradients.append(_of_this_process(joined))
            with Sent() as mode:
                losses = _steps(joined)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        found[f"sent {'cut' if is_cut else 'whole'}"] = _sums(mode.found)
        found.setdefault("losses", []).append(losses)
    whole, cut = weights
    found["equal"] = whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    found["error"] = max(_relative(each, gradients[0]) for each in gradients[1:])
    found["moved"] = max(float(tensor.abs().max()) for name, tensor in whole.items() if "lora_B" in name)
    return found


def _adapted(storage: str, checkpointing: str) -> Any:
    from veneer import LoraConfig, get_peft_model
    from veneer.model.memory.checkpointing import checkpoint_fully, checkpoint_selectively

    torch.manual_seed(3)
    if storage in MIXTURES:
        model, further = _mixture(storage), {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    else:
        model, further = _with_images() if storage == "text half" else _llama(storage), {"lora_dropout": 0.05}
    model.requires_grad_(False)
    targets = r".*language_model.*_proj" if storage == "text half" else "all-linear"
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, **further)
    adapted: Any = get_peft_model(model, config).train()
    if checkpointing != "none":
        (checkpoint_fully if checkpointing == "full" else checkpoint_selectively)(adapted)
    return adapted


def _llama(storage: str) -> Any:
    from transformers import LlamaForCausalLM

    from models import llama_config

    model = LlamaForCausalLM(llama_config(num_hidden_layers=N_BLOCKS, intermediate_size=96, hidden_size=72))
    for path, module in list(model.model.named_modules()) if storage != "dense" else ():
        if isinstance(module, nn.Linear):
            model.model.set_submodule(path, _packed(path, module) if storage == "gptq" else _coded(storage, module))
    return model


def _with_images() -> Any:
    """A model with a tower of images in front of the blocks."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    from models import llama_config

    small = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = llama_config(num_hidden_layers=N_BLOCKS, intermediate_size=96, hidden_size=72)
    tower = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text))


def _mixture(storage: str) -> Any:
    """Five experts a block in codes, which no number of processes here divides."""
    from transformers import AutoModelForCausalLM

    from quantized_folders import gpt_oss_config, qwen3_moe_config
    from veneer.model.adapted.experts import put_in_codes
    from veneer.model.quantized.stack import CodedStack, map_shape

    is_gpt_oss = storage == "mxfp4 experts"
    model = AutoModelForCausalLM.from_config(gpt_oss_config(N_BLOCKS) if is_gpt_oss else qwen3_moe_config(N_BLOCKS, 5))
    for path, experts in list(model.named_modules()):
        for name in ("gate_up_proj", "down_proj") if path.endswith(".experts") else ():
            spec, parts = _stack(storage, name, cast(Any, map_shape(experts, name)))
            stack = CodedStack(spec)
            stack.fill(spec, parts)
            put_in_codes(experts, name, stack)
    return model


def _stack(storage: str, name: str, shape: tuple[int, int, int]) -> tuple[Any, dict[str, Tensor]]:
    """The format of a stack, and random weights in it. FP8 has gate and up apart, and blocks that no width fills."""
    from veneer import BitsAndBytesConfig
    from veneer.quant.fp8 import Fp8Spec
    from veneer.quant.mxfp4_stack import Mxfp4StackSpec
    from veneer.quant.stack import StackSpec

    n_experts, o, i = shape
    if storage == "mxfp4 experts":
        codes, scales = torch.randint(256, (n_experts, o, i // 2)), torch.randint(119, 123, (n_experts, o, i // 32))
        parts = {"weight": codes.to(torch.uint8), "scale": scales.to(torch.uint8)}
        return Mxfp4StackSpec.of(name, shape, torch.float32), parts
    if storage == "nf4 experts":
        matrix: Any = BitsAndBytesConfig(**FORMATS["nf4"]).spec_of(name, (o, i), torch.float32)
        spec = StackSpec(n_experts, (matrix,), (name,))
    else:
        names = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
        spec = StackSpec(n_experts, tuple(Fp8Spec((o // len(names), i), block=(20, 36)) for _ in names), names)
    return spec, spec.quantize(torch.randn(shape) * 0.1)


def _coded(storage: str, module: nn.Linear) -> nn.Module:
    from veneer import BitsAndBytesConfig
    from veneer.model.quantized.quant_linear import QuantLinear

    config, shape = BitsAndBytesConfig(**FORMATS[storage]), (module.out_features, module.in_features)
    return QuantLinear.from_dense(module, cast(Any, config.spec_of("", shape, module.weight.dtype)))


def _packed(path: str, module: nn.Linear) -> nn.Module:
    """A layer of random codes as GPTQ's files hold them."""
    from quantized_folders import gptq
    from veneer.model.quantized.quant_linear import QuantLinear
    from veneer.store.stored_quantization import StoredQuantization

    stored, shape = gptq(4, 24, "gptq", shuffled=False), (module.out_features, module.in_features)
    spec: Any = StoredQuantization(stored.config).spec_of(path, shape, module.weight.dtype)
    if spec is None:
        return module  # one that the format leaves dense
    layer = QuantLinear(spec, module.bias)
    parts, _ = stored.encode(torch.Generator().manual_seed(len(path)), shape)
    layer.fill(*spec.from_disk(parts))
    return layer


def _of_one_process(model: nn.Module) -> list[Tensor]:
    """The gradients that one process has with the rows of all, without dropout."""
    n = distributed.get_world_size()
    model.eval()
    for rank in range(n):
        (_loss(model, _rows(rank)) / n).backward()
    return _taken(model)


def _of_this_process(joined: nn.Module) -> list[Tensor]:
    joined.eval()
    _loss(joined, _rows(distributed.get_rank())).backward()
    return _taken(joined)


def _taken(model: nn.Module) -> list[Tensor]:
    """The gradients of a model, which trains on without them."""
    model.train()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    ours, theirs = (torch.cat([each.flatten() for each in given]) for given in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


def _rows(seed: int) -> Tensor:
    return torch.randint(0, 67, (2, 13), generator=torch.Generator().manual_seed(seed))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _steps(joined: nn.Module) -> list[float]:
    rank, n = distributed.get_rank(), distributed.get_world_size()
    trained = [parameter for parameter in joined.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for step in range(N_STEPS):
        loss = _loss(joined, _rows(step * n + rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _block_bytes(model: Any) -> int:
    """Bytes of frozen weights of the blocks that this process holds."""
    blocks = model.get_decoder().layers
    frozen = [p for p in blocks.parameters() if not p.requires_grad]
    return sum(map(_held, [*frozen, *(b for b in blocks.buffers() if b.numel() > 1)]))


def _padding_bytes(model: Any, shard: int) -> int:
    """Bytes by which gathered weights of the blocks are longer, as each process sends as many rows of each."""
    from torch.distributed.tensor import DTensor

    cut = [p for p in model.get_decoder().layers.parameters() if isinstance(p, DTensor)]
    return sum(-len(p) % shard * (p.numel() // len(p)) * p.itemsize for p in cut)


def _stack_bytes(model: nn.Module) -> int:
    """Bytes of experts in codes that this process holds."""
    from veneer.model.quantized.stack import CodedStack

    return sum(
        _held(part) for each in model.modules() if isinstance(each, CodedStack) for part in each.parts().values()
    )


def _held(tensor: Tensor) -> int:
    from torch.distributed.tensor import DTensor

    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.nbytes


def _sums(sent: list[tuple[str, dict[str, int]]]) -> dict[str, list[int]]:
    """Collectives by name: how many, and the bytes of all their tensors."""
    counts: Counter[str] = Counter(name for name, _ in sent)
    n_bytes: Counter[str] = Counter()
    for name, each in sent:
        n_bytes[name] += sum(each.values())
    return {name: [counts[name], n_bytes[name]] for name in counts}
