"""Bytes that processes send, as the plan counts them and as a step on torch's fake group sends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.fake_group import sent_in_a_step
from tests.models import llama_config

from veneer.plan.architecture import config_of
from veneer.plan.plan import plan_recipe
from veneer.plan.traffic import GroupTraffic, traffic_of
from veneer.recipe.recipe import parse_recipe
from veneer.train.gradients import _PART_BYTES

_SMALL = {
    "vocab_size": 67, "hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 64,
}  # fmt: skip
_MOST_BLOCKS = 6  # all are alike; the whole depth of 70B takes a minute


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # for kernels, which do not run
@pytest.mark.parametrize(
    ("source", "storage", "n", "shard"),
    [
        (None, "none", 8, 8),
        (None, "nf4", 12, 4),
        *(
            pytest.param(source, storage, 64, 64, marks=pytest.mark.full)
            for source in ("llama-3-8b", "llama-3-70b")
            for storage in ("none", "nf4")
        ),
    ],
)
def test_the_plan_counts_the_bytes_that_are_sent(
    source: str | None, storage: str, n: int, shard: int, tmp_path: Path
) -> None:
    if source is None:
        llama_config(**_SMALL).save_pretrained(tmp_path / "base")
    recipe = parse_recipe(
        {
            "model": {"source": source or str(tmp_path / "base"), "quantization": storage, "dtype": "bfloat16"},
            "data": {"train": "rows.jsonl"},
            "adapter": {"method": "lora", "r": 16 if source else 3, "target_modules": "all-linear"},
            "training": {
                "max_length": 17, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1 if source else 2,
                "gradient_checkpointing": True, "fused": "off",  # the fused path looks at values of masks
            },
            "output": str(tmp_path / "run"),
        }
    )  # fmt: skip
    config: Any = config_of(recipe.model.source)
    config.num_hidden_layers = min(config.num_hidden_layers, _MOST_BLOCKS)
    sent = sent_in_a_step(recipe, config, n, shard)
    gathers = [n_bytes for name, n_bytes in sent if name == "_allgather_base_"]
    sums = [n_bytes for name, n_bytes in sent if name == "allreduce_"]
    assert len(gathers) + len(sums) == len(sent)  # nothing is scattered, or sent from one to all
    n_batches = recipe.training_config().gradient_accumulation_steps
    assert len(gathers) == 2 * n_batches * config.num_hidden_layers  # one a block forward, and one backward
    traffic = traffic_of(plan_recipe(recipe, config=config), n, shard)
    assert traffic.gathered == pytest.approx(sum(gathers) / (1 + 1 / shard), rel=0.02)
    assert traffic.summed == pytest.approx(sum(sums), rel=0.02)
    assert sums
    assert all(n_bytes >= _PART_BYTES for n_bytes in sums[:-1])  # one a bucket, each of which is full but the last


def test_a_process_receives_what_others_hold() -> None:
    """Of a gathered block the parts of the others. In a ring each part comes by once to be summed, and once summed."""
    n, shard, block, part = 6, 3, 4_200, 700
    gathered = sum(block // shard for process in range(shard) if process != 0)
    ring = sum(part for _ in ("to be summed", "summed") for step in range(n - 1))
    traffic = GroupTraffic(gathered=block, summed=n * part, n_processes=n, shard=shard)
    assert (traffic.gathers, traffic.gradients, traffic.received) == (gathered, ring, gathered + ring)
    assert GroupTraffic(gathered=0, summed=n * part, n_processes=1, shard=1).received == 0
