"""Initialisation of a prompt's embeddings (n, d) from the model's own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError
from veneer.records.sites import InputSite

_SAMPLED = 4096  # tokens that the scale of the embeddings is measured on


def embeddings(site: InputSite, n: int, start: str, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
    """Return initial embeddings in float32 (Lester et al. 2021, arXiv:2104.08691, section 2).

    "SAMPLE_VOCAB" uses those of random tokens, "TEXT" those of the given text, cut or repeated to n. Any other start
    draws normal values. Difference from PEFT: values have the scale of the model's embeddings (PEFT: standard deviation
    1, about seven times that of SmolLM2's). Raises ConfigError before the base is loaded.
    """
    if site.embed is None:
        raise ConfigError("prompt tuning starts from the model's embeddings: load the base model before attaching")
    if start == "TEXT":
        ids = torch.tensor(site.text_ids)
        values = site.embed(ids.repeat(-(-n // len(ids)))[:n])
    elif start == "SAMPLE_VOCAB":
        values = site.embed(torch.randint(site.vocabulary, (n,), generator=generator))
    else:
        sample = site.embed(torch.randint(site.vocabulary, (min(site.vocabulary, _SAMPLED),), generator=generator))
        values = torch.randn(n, site.features, generator=generator) * sample.std()
    return values.float()
