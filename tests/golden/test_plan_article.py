"""The article's tables of parameters and memory, each figure beside the planner's; what is wrong is marked, with why.

docs/claims.md names the command that gives each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from veneer.plan.architecture import config_of
from veneer.plan.plan import Plan, count_trained, plan_recipe
from veneer.recipe.recipe import Recipe, parse_recipe

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TOLERANCE = 0.05
LLAMA_2_7B = 6_738_415_616


@dataclass(frozen=True)
class Row:
    """A figure of the article, and ours in the same unit; ``wrong`` says why the two are apart."""

    text: str
    said: float
    ours: float
    wrong: str = ""


def recipe_of(source: str, adapter: dict[str, Any], **parts: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": source, **parts.get("model", {})}, "data": {"train": "rows.jsonl"}, "adapter": adapter,
        "training": {"max_length": 512, "per_device_train_batch_size": 1, **parts.get("training", {})},
        "output": "run",
    })  # fmt: skip


@cache
def lora(rank: int, targets: tuple[str, ...] | str = ATTENTION, source: str = "llama-2-7b") -> int:
    names = targets if isinstance(targets, str) else list(targets)
    return trained(source, {"method": "lora", "r": rank, "target_modules": names})


def trained(source: str, adapter: dict[str, Any]) -> int:
    recipe = recipe_of(source, adapter)
    return count_trained(recipe.model, recipe.adapter, config_of(source))


@cache
def planned(quantization: str = "none", checkpointing: bool = False, method: str = "lora") -> Plan:
    """A step of Llama-3-70B on one row of 512 tokens, LoRA on all linear layers."""
    adapter = {"method": method} | ({} if method == "full" else {"r": 16, "target_modules": "all-linear"})
    training = {"gradient_checkpointing": checkpointing}
    return plan_recipe(recipe_of("llama-3-70b", adapter, model={"quantization": quantization}, training=training))


@cache
def bits(double_quantization: bool) -> float:
    """Bits a parameter beyond the codes of 4 bits, of Llama-2-7B's linear layers."""
    model = {"quantization": "nf4", "double_quantization": double_quantization}
    adapter = {"method": "lora", "r": 4, "target_modules": "all-linear"}
    plan = plan_recipe(recipe_of("llama-2-7b", adapter, model=model, training={"max_length": 16}))
    return 8 * plan.held.kinds["base"] / 6_476_005_376 - 4


def share(rank: int) -> float:
    return 100 * lora(rank) / (LLAMA_2_7B + lora(rank))


LARGER = "its shares are those of a model of 7.1 B; Llama-2-7B has 6.74 B"
WEIGHTS = "those are the 16-bit weights: gradients and Adam's moments make it 16 bytes a parameter"
KEPT = "checkpointing saves activations and not a byte of the weights, which are 39.5 GB"


PREFIX = "with grouped key heads it is L 2 n kv_heads head_dim"
ROWS = "the weights alone are 141 GB, before a row of 512 tokens"


def rows() -> list[Row]:
    """Made when they are asked for: a plan takes seconds."""
    ranks = {4: (4e6, 0.06), 8: (8e6, 0.11), 16: (16.8e6, 0.23), 32: (33e6, 0.47), 64: (67e6, 0.96), 256: (268e6, 3.8)}
    apart = {8, 16, 32}
    seven, ia3 = lora(16, "all-linear"), trained("llama-2-7b", {
        "method": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
    })  # fmt: skip
    bottleneck = trained("llama-2-7b", {"method": "pfeiffer", "size": 64}) / 32
    prefix = {"method": "prefix_tuning", "num_virtual_tokens": 20}
    full = planned(method="full")
    return [
        *(Row(f"r={r}", said, lora(r)) for r, (said, _) in ranks.items()),
        *(Row(f"share, r={r}", said, share(r), LARGER if r in apart else "") for r, (_, said) in ranks.items()),
        Row("seven modules print", 16_777_216, seven, "that is q, k, v and o"),
        Row("the share printed beside it", 0.2484, share(16)),
        Row("all parameters printed beside it", 6_754_332_672, LLAMA_2_7B + lora(16)),
        Row("MB of an adapter, q, k, v, o, 16 bits", 30, 2 * lora(16) / 1e6, "33.6 MB"),
        Row("MB of an adapter, all linear layers, 16 bits", 30, 2 * seven / 1e6, "80 MB"),
        Row("bottleneck, d=4096, r=64", 2 * 4096 * 64 + 64 + 4096, bottleneck),
        Row("prefix of 20 tokens", 5e6, trained("llama-2-7b", prefix)),
        Row("prefix on 8 of 64 key heads", 80 * 2 * 20 * 8192, trained("llama-3-70b", prefix), PREFIX),
        Row("IA3 against LoRA r=8 on q and v", 10, lora(8, ("q_proj", "v_proj")) / ia3, "6.8 times"),
        Row("IA3 against LoRA r=8 on all layers", 10, lora(8, "all-linear") / ia3, "32.5 times"),
        Row("bits of scales", 0.5, bits(False)),
        Row("bits of scales, double quantization", 0.127, bits(True)),
        Row("70B, parameters of LoRA", 67e6, lora(16, source="llama-3-70b")),
        Row("70B, of the snippet's seven modules", 67e6, lora(16, "all-linear", "llama-3-70b"), "207 M, 0.29%"),
        Row("70B, full fine-tuning, GB", 140, full.peak.n_bytes / 1e9, WEIGHTS),
        Row("70B, LoRA, GB", 140, planned().peak.n_bytes / 1e9, ROWS),
        Row("70B, QLoRA, GB", 35, weights("nf4") / 1e9, "embeddings and head stay in 16 bits: 39.5 GB"),
        Row("70B, QLoRA and checkpointing, GB", 24, planned("nf4", True).peak.n_bytes / 1e9, KEPT),
    ]  # fmt: skip


def weights(quantization: str) -> int:
    kinds = planned(quantization).held.kinds
    return sum(kinds[kind] for kind in ("base", "embeddings", "head", "norms and biases"))


def test_every_figure_of_the_tables_holds_or_is_marked_wrong() -> None:
    found = rows()
    apart = {row.text: row.ours for row in found if abs(row.said - row.ours) > TOLERANCE * row.ours}
    assert sorted(apart) == sorted(row.text for row in found if row.wrong), apart


def test_our_figures_are_those_of_the_page() -> None:
    assert (lora(4), lora(16), lora(256), lora(16, "all-linear")) == (4_194_304, 16_777_216, 268_435_456, 39_976_960)
    assert weights("nf4") == pytest.approx(39.5e9, rel=0.002)
    full = planned(method="full").held.n_bytes, planned(method="full").peak.n_bytes
    assert full == (pytest.approx(4 * 70_553_706_496, rel=1e-6), pytest.approx(16 * 70.55e9, rel=0.03))


def test_checkpointing_saves_activations_and_nothing_of_the_weights() -> None:
    kept, again = planned("nf4"), planned("nf4", True)
    assert kept.held == again.held
    assert again.phases["backward"].kinds["activations"] < 0.2 * kept.phases["backward"].kinds["activations"]
