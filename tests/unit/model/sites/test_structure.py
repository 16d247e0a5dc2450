"""The sub-layers of models of many shapes, found without knowing the families."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    BloomConfig,
    DebertaV2Config,
    Dinov2Config,
    DistilBertConfig,
    FalconConfig,
    JambaConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    SwinConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
)

from veneer.errors import TargetError
from veneer.model.sites.structure import sublayers, watched_sublayers

SMALL = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3}
IMAGE = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}

# what the second layer's sub-layers read and give out, in the order in which they are added
EXPECTED: dict[str, tuple[PreTrainedConfig, list[tuple[str, str, str]]]] = {
    "qwen3": (
        Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
        [("attention", "layers.1.self_attn", "layers.1.self_attn"), ("mlp", "layers.1.mlp", "layers.1.mlp")],
    ),
    "norm behind": (
        Olmo2Config(**SMALL, num_key_value_heads=3),
        [
            ("attention", "layers.1.self_attn", "layers.1.post_attention_layernorm"),
            ("mlp", "layers.1.mlp", "layers.1.post_feedforward_layernorm"),
        ],
    ),
    "parallel, one dropout for both": (
        PhiConfig(**SMALL),
        [("attention", "layers.1.self_attn", "layers.1.self_attn"), ("mlp", "layers.1.mlp", "layers.1.mlp")],
    ),
    "parallel, added in place": (
        FalconConfig(vocab_size=67, hidden_size=24, num_hidden_layers=2, num_attention_heads=3),
        [("attention", "h.1.self_attention", "h.1.self_attention"), ("mlp", "h.1.mlp", "h.1.mlp")],
    ),
    "residual handed in": (
        BloomConfig(vocab_size=67, hidden_size=24, n_layer=2, n_head=3),
        [
            ("attention", "h.1.self_attention.query_key_value", "h.1.self_attention.dense"),
            ("mlp", "h.1.mlp.dense_h_to_4h", "h.1.mlp.dense_4h_to_h"),
        ],
    ),
    "residual handed to the feed-forward part": (
        MptConfig(vocab_size=67, d_model=24, n_layers=2, n_heads=3),
        [
            ("attention", "blocks.1.attn", "blocks.1.resid_attn_dropout"),
            ("mlp", "blocks.1.ffn.up_proj", "blocks.1.ffn.down_proj"),
        ],
    ),
    "experts": (
        MixtralConfig(**SMALL | {"intermediate_size": 40}, num_key_value_heads=3),
        [("attention", "layers.1.self_attn", "layers.1.self_attn"), ("mlp", "layers.1.mlp", "layers.1.mlp")],
    ),
    "norm after the sum": (
        DistilBertConfig(vocab_size=67, dim=24, hidden_dim=37, n_layers=2, n_heads=3),
        [
            ("attention", "transformer.layer.1.attention", "transformer.layer.1.attention"),
            ("mlp", "transformer.layer.1.ffn", "transformer.layer.1.ffn"),
        ],
    ),
    "deberta": (
        DebertaV2Config(**SMALL),
        [
            ("attention", "encoder.layer.1.attention.self", "encoder.layer.1.attention.output.dropout"),
            ("mlp", "encoder.layer.1.intermediate", "encoder.layer.1.output.dropout"),
        ],
    ),
    "vit": (
        ViTConfig(**IMAGE, num_attention_heads=3),
        [("attention", "layers.1.attention", "layers.1.attention"), ("mlp", "layers.1.mlp", "layers.1.mlp")],
    ),
    "scaled": (
        Dinov2Config(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3),
        [
            ("attention", "encoder.layer.1.attention", "encoder.layer.1.layer_scale1"),
            ("mlp", "encoder.layer.1.mlp", "encoder.layer.1.layer_scale2"),
        ],
    ),
}


def model_of(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(config).train()


@pytest.mark.parametrize("shape", EXPECTED)
def test_what_each_sublayer_reads_and_gives_out(shape: str):
    config, expected = EXPECTED[shape]
    model = model_of(config)
    found, watched = (
        [(s.kind, s.input_path, s.output_path) for s in each(model) if s.layer == 1]
        for each in (sublayers, watched_sublayers)
    )
    assert found == expected
    assert sorted(watched) == sorted(expected)  # parts of a parallel block are seen in the order of their sums


def test_a_layer_that_runs_several_times_is_one_place():
    config = AlbertConfig(**SMALL | {"num_hidden_layers": 3}, embedding_size=7)
    assert [s.kind for s in sublayers(model_of(config))] == ["attention", "mlp"]


def test_widths_may_differ_between_stages():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=24, depths=[1, 2], num_heads=[3, 3], window_size=2)
    assert [s.features for s in sublayers(model_of(config))] == [24, 24, 48, 48, 48, 48]


def test_an_encoder_decoder_has_cross_attention_in_its_decoder():
    config = T5Config(vocab_size=67, d_model=24, d_kv=8, d_ff=37, num_layers=1, num_decoder_layers=1, num_heads=3)
    kinds = [s.kind for s in sublayers(model_of(config))]
    assert kinds == ["attention", "mlp", "attention", "cross_attention", "mlp"]


def test_looking_leaves_the_model_as_it_was():
    model = model_of(EXPECTED["qwen3"][0])
    before = torch.get_rng_state()
    sublayers(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_without_attention_among_others_is_an_error():
    config = JambaConfig(
        **SMALL | {"intermediate_size": 40},
        num_key_value_heads=3,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
    )
    with pytest.raises(TargetError, match=r"'layers\.0\.mamba' adds to the residual stream outside any block"):
        sublayers(model_of(config))


def test_an_input_that_cannot_be_made_is_an_error():
    config = Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=37, conv_dim=[8], conv_kernel=[3],
        conv_stride=[2], num_feat_extract_layers=1, num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=1,
    )  # fmt: skip
    with pytest.raises(TargetError, match="takes 'input_values'"):
        sublayers(model_of(config))
