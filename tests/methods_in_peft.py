"""A method beside PEFT's: files of each in the other, logits and gradients."""

from __future__ import annotations

import copy
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import veneer
from veneer.adapters import peft_model
from veneer.model.attach.attach import named_live_parameters
from veneer.records.sites import LinearSite

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.tensor([[5, 61, 2, 33, 17], [8, 8, 40, 1, 66]])


def site(name: str, out_features: int, in_features: int) -> LinearSite:
    return LinearSite(name=name, in_features=in_features, out_features=out_features)


def base() -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=71, attention_bias=True, **sizes)).eval()


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(5)
    sizes = {"hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 2, "vocab_size": 71}
    return GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=2, **sizes)).eval()


def biased() -> LlamaForCausalLM:
    """With biases at q, k, v and o that are not zero, none in the feed-forward part, and attention that is not even."""
    model = base()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.normal_(std=0.3)
    return model


BASES: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "llama": (base, TARGETS),
    "neox": (neox, ["query_key_value", "dense_4h_to_h"]),
    "table": (base, ["embed_tokens", "q_proj"]),
    "biased": (biased, TARGETS),
}
every_base = pytest.mark.parametrize("on", ["llama", "neox"])


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of trained parameters by their places and PEFT's names.

    The loss is made from whole logits in both, so that gradients whose terms cancel differ by the method alone.
    """
    model.zero_grad()
    with mock.patch.object(peft_model, "deferred_logits", return_value=nullcontext(False)):
        made = model(input_ids=TOKENS, labels=TOKENS, **inputs)
    made.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return made.logits.detach(), grads


def near(found: Tensor, expected: Tensor, least: float = 0.0) -> None:
    """``least`` is a norm by which a smaller one is judged."""
    assert (found - expected).norm() <= 1e-5 * max(float(expected.norm()), least)


def assert_equals_peft(
    ours: type,
    theirs: str,
    folder: Path,
    on: str = "llama",
    fixed: Sequence[str] = (),
    moved: bool = False,
    task: int | None = None,
    **fields: Any,
) -> None:
    """Files go both ways with all keys and values; logits and gradients are equal; merging changes nothing.

    ``on`` names the base. ``fixed`` are ends of the keys that are in the file and never trained. ``moved``: PEFT has no
    start away from the base, so that its parameters are moved. ``task``: that of all rows, and of the merge.
    """
    inputs = {} if task is None else {"task_ids": torch.full((len(TOKENS),), task)}
    torch.manual_seed(11)
    make, targets = BASES[on]
    reference = peft.get_peft_model(make(), getattr(peft, theirs)(target_modules=targets, **fields))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if moved and parameter.requires_grad else 0
    reference.save_pretrained(folder / "peft")
    model = veneer.PeftModel.from_pretrained(make(), folder / "peft", is_trainable=True)
    assert type(model.peft_config["default"]) is ours
    model.save_pretrained(folder / "ours")
    written, read = (load_file(folder / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert {key: (tuple(x.shape), x.dtype) for key, x in written.items()} == {
        key: (tuple(x.shape), x.dtype) for key, x in read.items()
    }
    assert all(torch.equal(read[key], value) for key, value in written.items())
    again = peft.PeftModel.from_pretrained(make(), folder / "ours", is_trainable=True)
    wanted, wanted_grads = step(again.eval(), **inputs)
    with torch.no_grad():
        near(model.eval()(input_ids=TOKENS, **inputs).logits, wanted)
        assert (make()(TOKENS).logits - wanted).norm() > 1e-3 * wanted.norm()
    logits, grads = step(model, **inputs)
    near(logits, wanted)
    trained = [key for key in written if not key.endswith(tuple(fixed))]
    assert len(grads) == len(wanted_grads) == len(trained)
    held, expected = named_live_parameters(model, "default"), _by_key(wanted_grads, trained)
    typical = statistics.median(float(grad.norm()) for grad in expected.values())
    for key in trained:
        # A gradient that is one number may be a sum of numbers that cancel, and is then as exact as these.
        near(held[key][1].grad, expected[key], typical if expected[key].numel() == 1 else 0.0)
    own = {key: value.clone() for key, value in make().state_dict().items()}
    if task is not None:
        model.set_task(task)
    model.merge_adapter()
    near(model(TOKENS).logits.detach(), wanted)
    model.unmerge_adapter()
    for key, value in model.get_base_model().state_dict().items():
        assert key not in own or torch.equal(value, own[key]), key
    merged = model.merge_and_unload()
    near(merged(TOKENS).logits.detach(), wanted)


def _by_key(grads: dict[str, Tensor], keys: Any) -> dict[str, Tensor]:
    """Gradients by the keys of a file. A parameter that all layers share has the name of one of them."""
    found = {_plain(name): grad for name, grad in grads.items()}
    return {key: found.get(_plain(key), _shared(found, _plain(key))) for key in keys}


def _shared(found: dict[str, Tensor], end: str) -> Tensor | None:
    return next((grad for name, grad in found.items() if name.endswith(f".{end}")), None)


def _plain(name: str) -> str:
    wrappers = ("default", "adapters", "base_model", "model", "weight", "psoft_R")
    return ".".join(part.replace("_embedding_", "_") for part in name.split(".") if part not in wrappers)


def convolutions() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(OrderedDict(first=nn.Conv2d(5, 7, 3), second=nn.Conv2d(7, 4, (1, 1), stride=2)))


def assert_convolutions_equal_peft(
    theirs: str,
    folder: Path,
    net: Callable[[], nn.Module] = convolutions,
    size: tuple[int, ...] = (9, 8),
    wrong: Sequence[str] = (),
    **fields: Any,
) -> None:
    """Files on convolutions go both ways; outputs and gradients are equal; merging changes nothing.

    ``wrong`` are ends of the keys whose gradient PEFT computes wrongly.
    """
    torch.manual_seed(11)
    reference = peft.get_peft_model(net(), getattr(peft, theirs)(target_modules=["first", "second"], **fields))
    reference.save_pretrained(folder / "peft")
    model = veneer.PeftModel.from_pretrained(net(), folder / "peft", is_trainable=True)
    model.save_pretrained(folder / "ours")
    written, read = (load_file(folder / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert written.keys() == read.keys()
    assert all(torch.equal(read[key], value) for key, value in written.items())
    again = peft.PeftModel.from_pretrained(net(), folder / "ours", is_trainable=True)
    x = torch.randn(2, net().first.in_channels, *size)
    wanted, found = again(x), model(x)
    assert (net()(x) - wanted).norm() > 1e-3 * wanted.norm()
    near(found, wanted)
    grads = []
    for adapted, output in ((model, found), (again, wanted)):
        output.square().sum().backward()
        named = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
        grads.append(_by_key(named, written))
    for key in written:
        if not key.endswith(tuple(wrong)):
            near(grads[0][key], grads[1][key])
    with torch.no_grad():
        near(model.merge_and_unload()(x), wanted)


def lines() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(OrderedDict(first=nn.Conv1d(5, 8, 3, padding=1), second=nn.Conv1d(8, 6, 1, stride=2)))


def lines_in_groups() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        OrderedDict(first=nn.Conv1d(15, 9, 3, padding=1, groups=3), second=nn.Conv1d(9, 6, 1, stride=2, groups=3))
    )


def planes_in_groups() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        OrderedDict(first=nn.Conv2d(6, 10, (3, 2), groups=2), second=nn.Conv2d(10, 20, 3, stride=2, groups=10))
    )


def assert_training_equals_peft(theirs: str, folder: Path, **fields: Any) -> None:
    """Outputs and gradients under the dropouts of a method that draws what PEFT draws, over several passes."""
    net = lambda: nn.Sequential(OrderedDict(first=nn.Linear(12, 18), act=nn.Tanh(), second=nn.Linear(18, 7)))  # noqa: E731
    torch.manual_seed(11)
    first = net()
    config = getattr(peft, theirs)(target_modules=["first", "second"], **fields)
    reference = peft.get_peft_model(copy.deepcopy(first), config).train()
    reference.save_pretrained(folder)
    model = veneer.PeftModel.from_pretrained(first, folder, is_trainable=True).train()
    keys, x = load_file(folder / "adapter_model.safetensors"), torch.randn(5, 12).requires_grad_()
    seen = []
    for seed in range(8):
        grads = []
        for adapted in (model, reference):
            torch.manual_seed(seed)
            adapted.zero_grad()
            y = adapted(x)
            y.square().sum().backward()
            grads.append((y.detach(), dict(adapted.named_parameters())))
        (found, own), (wanted, expected) = grads
        near(found, wanted)
        seen.append(wanted)
        named = [_by_key({name: p.grad for name, p in each.items()}, keys) for each in (own, expected)]
        for key in keys:
            ours, its = (torch.zeros(()) if each[key] is None else each[key] for each in named)
            near(ours, its)
    assert any((each - seen[0]).norm() > 1e-2 * seen[0].norm() for each in seen)
    near(model.eval()(x), reference.eval()(x))


def assert_drops_inputs(config: Any, layer: nn.Module | None = None, names: Sequence[str] = ()) -> None:
    """In training an input of the change is zeroed with probability 0.375 or divided by 0.625; the base sees all.

    ``layer`` has 67 inputs. ``config`` has the target "0" and a start away from the base. ``names``: adapters by row.
    """
    torch.manual_seed(5)
    layer = layer or nn.Linear(67, 7)
    plain = copy.deepcopy(layer)
    model = veneer.get_peft_model(nn.Sequential(layer), config)
    x = torch.eye(67).view(67, 67, *(1,) * (plain.weight.ndim - 2))
    given = {"adapter_names": list(names)} if names else {}
    change = (model.eval()(x, **given) - plain(x)).detach().flatten(1)
    y = model.train()(x, **given)
    found = (y - plain(x)).detach().flatten(1)
    kept = found.abs().sum(dim=1) > 0.01
    assert 0.4 < kept.float().mean() < 0.85
    torch.testing.assert_close(found, change * kept[:, None] / 0.625, atol=1e-5, rtol=1e-5)


def assert_two_act_as_in_peft(theirs: str, folder: Path, **fields: Any) -> None:
    """Two adapters of a method that maps features act together as in PEFT, with gradients in both, and merge so."""
    torch.manual_seed(11)
    reference = peft.get_peft_model(base(), getattr(peft, theirs)(target_modules=TARGETS, **fields))
    reference.add_adapter("other", getattr(peft, theirs)(target_modules=TARGETS, **fields))
    reference.save_pretrained(folder)
    model = veneer.PeftModel.from_pretrained(base(), folder, is_trainable=True)
    model.load_adapter(folder / "other", "other", is_trainable=True)
    logits, grads = [], []
    for each in (model, reference):
        (each if each is model else each.base_model).set_adapter(["default", "other"])
        found, own = step(each.eval())
        logits.append(found)
        grads.append(own)
    near(*logits)
    assert (base()(TOKENS).logits - logits[1]).norm() > 1e-3 * logits[1].norm()
    keys = load_file(folder / "adapter_model.safetensors")
    for name in ("default", "other"):
        held = named_live_parameters(model, name)
        expected = _by_key(
            {key.replace(f".{name}", ""): grad for key, grad in grads[1].items() if f".{name}" in key}, keys
        )
        for key in keys:
            near(held[key][1].grad, expected[key])
    model.merge_adapter()
    near(model(TOKENS).logits.detach(), logits[1])
