"""Makes bottlenecks.safetensors with AdapterHub's adapters (in an environment that has it): ``python make.py FILE``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import adapters
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

SIZES = {"vocab_size": 29, "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 2}
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_attention_heads=3, num_key_value_heads=1)),
    "bert": lambda: BertModel(BertConfig(**SIZES, num_attention_heads=3, max_position_embeddings=17)),
}
# One setting for all: width 3, and no use of the base's own LayerNorm before the bottleneck.
CONFIGS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": SeqBnConfig(reduction_factor=4, original_ln_before=False),
    "parallel": ParBnConfig(reduction_factor=4),
}
IDS = torch.tensor([[3, 5, 7, 11, 13], [2, 17, 19, 23, 1]])


def main(output: str) -> None:
    found = {"ids": IDS}
    for family, make in MODELS.items():
        for name, config in CONFIGS.items():
            torch.manual_seed(3)
            model = make().eval()
            adapters.init(model)
            model.add_adapter("a", config=config)
            model.set_active_adapters("a")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                hidden = model(IDS).last_hidden_state
            weights = {f"{family}/{name}:{key}": value.clone() for key, value in model.state_dict().items()}
            found |= {**weights, f"{family}/{name}:output": hidden}
    save_file(found, output, {"adapters": version("adapters"), "sizes": json.dumps(SIZES)})


if __name__ == "__main__":
    main(sys.argv[1])
