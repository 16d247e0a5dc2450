"""Bottlenecks on a model equal the same bottlenecks written out by hand around its modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.methods.bottleneck import BottleneckConfig
from veneer.model.sites.residual import ResidualAdapters

D, R, VOCAB, N_LAYERS = 24, 5, 67, 2
SMALL = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 37, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 3,
}  # fmt: skip
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=1)

# config, and for each sub-layer of layer i: the module around which it is written out, the module it reads in parallel
FAMILIES: dict[str, tuple[PreTrainedConfig, dict[str, tuple[str, str]]]] = {
    "llama": (LLAMA, {"attention": ("layers.{}.self_attn",) * 2, "mlp": ("layers.{}.mlp",) * 2}),
    "gemma2": (
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8),
        {
            "attention": ("layers.{}.post_attention_layernorm", "layers.{}.self_attn"),
            "mlp": ("layers.{}.post_feedforward_layernorm", "layers.{}.mlp"),
        },
    ),
    "gpt2": (
        GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=N_LAYERS, n_head=3, bos_token_id=1, eos_token_id=2),
        {"attention": ("h.{}.attn",) * 2, "mlp": ("h.{}.mlp",) * 2},
    ),
    "gpt-neox": (
        GPTNeoXConfig(**SMALL, eos_token_id=2),
        {"attention": ("layers.{}.attention",) * 2, "mlp": ("layers.{}.mlp",) * 2},
    ),
    "opt": (
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            word_embed_proj_dim=D,
            ffn_dim=37,
            num_hidden_layers=2,
            num_attention_heads=3,
        ),
        {
            "attention": ("decoder.layers.{}.self_attn",) * 2,
            "mlp": ("decoder.layers.{}.fc2", "decoder.layers.{}.fc1"),
        },
    ),
    "bert": (
        BertConfig(**SMALL),
        {
            "attention": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.attention.self"),
            "mlp": ("encoder.layer.{}.output.dense", "encoder.layer.{}.intermediate"),
        },
    ),
}


class ByHand(nn.Module):
    """A module with a bottleneck on its output, written out."""

    def __init__(self, module: nn.Module, params: dict[str, Tensor], act: Callable[[Tensor], Tensor], scale: float):
        super().__init__()
        self.module, self.params, self.act, self.scale = module, params, act, scale
        self.read: list[Tensor] = []  # the input in parallel placement

    def forward(self, *args, **kwargs):
        out = self.module(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        source = self.read[-1] if self.read else hidden
        inner = self.act(source @ self.params["down"].T + self.params["down_bias"])
        hidden = hidden + self.scale * (inner @ self.params["up"].T + self.params["up_bias"])
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def base(family: str) -> PreTrainedModel:
    torch.manual_seed(5)
    return AutoModel.from_config(FAMILIES[family][0]).eval()


def randomized(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f".adapters.{name}." in path:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def residual_adapters(model: nn.Module) -> list[ResidualAdapters]:
    return [module for module in model.modules() if isinstance(module, ResidualAdapters)]


def by_hand(
    family: str,
    adapted: nn.Module,
    config: BottleneckConfig,
    act: Callable[[Tensor], Tensor],
    name: str = "default",
    plain: nn.Module | None = None,
) -> nn.Module:
    """The bottlenecks of adapter ``name`` written out around the modules of ``plain``, or of a new base."""
    plain = plain or base(family)
    for holder in residual_adapters(adapted):
        output, read = (path.format(holder.site.layer) for path in FAMILIES[family][1][holder.site.sublayer])
        params = {key: value.detach() for key, value in holder.adapters[name].named_parameters()}
        wrapped = ByHand(plain.get_submodule(output), params, act, config.scaling)
        if config.placement == "parallel":
            plain.get_submodule(read).register_forward_pre_hook(
                lambda m, args, kwargs, into=wrapped.read: into.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        plain.set_submodule(output, wrapped)
    return plain


CONFIGS = [
    (BottleneckConfig.houlsby(size=R, scaling=0.7), nn.functional.silu),
    (BottleneckConfig(size=R, scaling=1.3), nn.functional.relu),
    (BottleneckConfig.parallel(size=R, after_attention=True, non_linearity="gelu"), nn.functional.gelu),
]


@pytest.mark.parametrize(("config", "act"), CONFIGS, ids=["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_bottleneck_written_out(family: str, config: BottleneckConfig, act: Callable[[Tensor], Tensor]):
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    adapted = get_peft_model(base(family), config)
    randomized(adapted)
    expected = by_hand(family, adapted, config, act)(ids).last_hidden_state
    assert len(residual_adapters(adapted)) == N_LAYERS * len(config.sublayers)
    torch.testing.assert_close(adapted(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, base(family)(ids).last_hidden_state, atol=1e-2)


def test_t5_has_bottlenecks_in_encoder_and_decoder_and_after_cross_attention():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=37, num_layers=2, num_decoder_layers=3, num_heads=3)
    model = get_peft_model(AutoModel.from_config(config), BottleneckConfig.houlsby(size=R, after_cross_attention=True))
    kinds = [holder.site.sublayer for holder in residual_adapters(model)]
    assert (kinds.count("attention"), kinds.count("cross_attention"), kinds.count("mlp")) == (5, 3, 5)


def test_unloading_gives_back_the_very_modules_without_a_hook():
    model = base("llama")
    modules, classes = dict(model.named_modules()), [type(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = get_peft_model(model, BottleneckConfig.houlsby(size=R)).unload()
    assert plain is model
    assert dict(model.named_modules()) == modules
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert state.keys() == model.state_dict().keys()


def test_the_start_is_near_the_base_and_exact_with_the_mam_start():
    ids = torch.arange(3, 14)[None]
    expected = base("llama")(ids).last_hidden_state
    near = get_peft_model(base("llama"), BottleneckConfig(size=R))(ids).last_hidden_state
    assert 0 < (near - expected).abs().max() < 0.02
    exact = get_peft_model(base("llama"), BottleneckConfig(size=R, init_weights="mam_adapter"))
    assert torch.equal(exact(ids).last_hidden_state, expected)


def test_counts_2dr_plus_r_plus_d_parameters_each():
    model = get_peft_model(base("llama"), BottleneckConfig.houlsby(reduction_factor=3))
    r = D // 3
    assert model.get_nb_trainable_parameters()[0] == N_LAYERS * 2 * (2 * D * r + r + D)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_bottlenecks_get_gradients_and_checkpointing_does_not_change_them(checkpointing: bool):
    ids = torch.arange(3, 14)[None]
    grads = []
    for on in (False, checkpointing):
        torch.manual_seed(5)
        model = get_peft_model(AutoModelForCausalLM.from_config(LLAMA), BottleneckConfig.parallel(size=R))
        randomized(model)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(".adapters.default." in name for name in grads[0])
    assert len(grads[0]) == N_LAYERS * 4
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_saved_and_loaded_bit_equal_and_usable_beside_lora(tmp_path: Path):
    ids = torch.arange(3, 14)[None]
    model = get_peft_model(base("opt"), BottleneckConfig.houlsby(size=R, scaling=0.7))
    randomized(model)
    expected = model(ids).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("opt"), tmp_path)
    assert torch.equal(loaded(ids).last_hidden_state, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).last_hidden_state, base("opt")(ids).last_hidden_state)


def test_two_adapters_on_one_sublayer_act_one_after_the_other():
    ids = torch.arange(3, 14)[None]
    model = get_peft_model(base("llama"), BottleneckConfig(size=R), "first")
    model.add_adapter("second", BottleneckConfig(size=3, scaling=0.5))
    randomized(model, "first", seed=1)
    randomized(model, "second", seed=2)
    one = model(ids).last_hidden_state
    relu = nn.functional.relu
    expected = base("llama")
    for name, config in model.peft_config.items():  # the second reads what the first gives
        expected = by_hand("llama", model, config, relu, name, expected)
    model.set_adapter(["first", "second"])
    both = model(ids).last_hidden_state
    torch.testing.assert_close(both, expected(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one, both, atol=1e-3)
    model.delete_adapter("second")
    assert torch.equal(model(ids).last_hidden_state, one)


def test_a_copied_model_has_adapters_of_its_own():
    ids = torch.arange(3, 14)[None]
    model = get_peft_model(base("llama"), BottleneckConfig(size=R))
    randomized(model)
    expected = model(ids).last_hidden_state
    twin = copy.deepcopy(model)
    randomized(twin, seed=9)
    assert torch.equal(model(ids).last_hidden_state, expected)
    assert not torch.allclose(twin(ids).last_hidden_state, expected, atol=1e-3)


def test_a_model_without_attention_is_an_error_that_says_so():
    model = AutoModel.from_config(MambaConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2))
    with pytest.raises(TargetError, match="blocks of MambaModel cannot be recognised"):
        get_peft_model(model, BottleneckConfig())
    assert not hasattr(model, "adapter_state")


def test_absent_sublayers_and_layers_are_errors():
    with pytest.raises(TargetError, match="no cross_attention"):
        get_peft_model(base("llama"), BottleneckConfig(after_cross_attention=True))
    for layers in (7, [7], [0, 7], []):
        with pytest.raises(TargetError, match=r"wants layers \[.*\] of LlamaModel, which has 0 to 1: give"):
            get_peft_model(base("llama"), BottleneckConfig(layers_to_transform=layers))


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        BottleneckConfig(
            after_mlp=False, size=0, reduction_factor=0, non_linearity="rel", scaling=0, init_weights="x", dropout=1,
            placement="between",
        )  # fmt: skip
    for word in ("no place", "size=0", "reduction_factor=0", "'rel'", "scaling=0", "'x'", "dropout=1", "'between'"):
        assert word in str(caught.value)
