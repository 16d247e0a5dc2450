"""P-tuning: a network makes the n virtual embeddings in training (Liu et al. 2021, arXiv:2103.10385, section 3.2).

The network is an MLP or a bidirectional LSTM with an MLP on top. A plain save holds its output.

Difference from PEFT: the returned logits leave the virtual positions out unless ``keep_virtual_logits`` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.contract import Params, PromptMethod, Shapes
from veneer.records.deltas import PromptDelta
from veneer.records.sites import InputSite

STORED = "prompt_embeddings"
MOST = {"encoder_hidden_size": 2**20, "encoder_num_layers": 1000}  # the layers are made before a file is compared
ENCODER = "prompt_encoder."


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(PromptMethod):
    """Settings of P-tuning, with the names that PEFT gives them.

    ``encoder_reparameterization_type``: "MLP" (three layers) or "LSTM" (``encoder_num_layers``, then two layers).
    ``encoder_hidden_size`` is the inner width; None means the width of the embeddings. ``encoder_dropout`` must be 0,
    because the embeddings are a pure function of the parameters.
    """

    peft_type: ClassVar[str] = "P_TUNING"
    identity_at_start: ClassVar[bool] = False
    inert: ClassVar[frozenset[str]] = frozenset(
        {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
    )

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.encoder_dropout != 0:
            found.append(f"encoder_dropout={self.encoder_dropout!r} must be 0")
        found += [
            f"{name}={getattr(self, name)!r} must be at most {most:,}"
            for name, most in MOST.items()
            if (getattr(self, name) or 0) > most
        ]
        return found

    @property
    def has_network(self) -> bool:
        return not self.inference_mode

    def shapes(self, site: InputSite) -> Shapes:
        if not self.has_network:
            return {STORED: (self.n_rows, site.features)}
        modules = self._network(site.features)
        return {"embedding": (self.n_rows, site.features)} | {
            f"{part}__{name.replace('.', '__')}": tuple(value.shape)
            for part, module in modules.items()
            for name, value in module.named_parameters()
        }

    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        shapes = self.shapes(site)
        for name, shape in shapes.items():
            if name in (STORED, "embedding"):
                params[name] = torch.randn(shape, generator=generator)
                continue
            # torch's own starts: ±1/√hidden in an LSTM, ±1/√fan_in in a linear layer, weight and bias
            fan_in = self._hidden(site) if name.startswith("lstm") else shapes[name.replace("bias", "weight")][-1]
            params[name] = torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        return params

    def lower(self, site: InputSite, params: Params) -> PromptDelta:
        return PromptDelta(embeddings=self.stored(site, params)[STORED][: self.num_virtual_tokens])

    def stored(self, site: InputSite, params: Params) -> dict[str, Tensor]:
        if not self.has_network:
            return {STORED: params[STORED]}
        x = params["embedding"]
        for part, module in self._network(site.features).items():
            own = {n: params[f"{part}__{n.replace('.', '__')}"] for n, _ in module.named_parameters()}
            out = torch.func.functional_call(module, own, (x,))
            x = out[0] if part == "lstm_head" else out
        return {STORED: x}

    def disk_names(self, site: InputSite) -> dict[str, str]:
        if not self.has_network:
            return {STORED: STORED}
        names = {"embedding": f"{ENCODER}embedding.weight"}
        for part, module in self._network(site.features).items():
            names |= {f"{part}__{n.replace('.', '__')}": f"{ENCODER}{part}.{n}" for n, _ in module.named_parameters()}
        return names

    def _hidden(self, site: InputSite) -> int:
        return site.features if self.encoder_hidden_size is None else self.encoder_hidden_size

    def _network(self, width: int) -> Mapping[str, nn.Module]:
        """Return the network's layers by PEFT's names, on the meta device. Each call is given the parameters."""
        h = width if self.encoder_hidden_size is None else self.encoder_hidden_size
        with torch.device("meta"):
            if self.encoder_reparameterization_type == "MLP":
                layers = [nn.Linear(width, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, width)]
                return {"mlp_head": nn.Sequential(*layers)}
            lstm = nn.LSTM(width, h, num_layers=self.encoder_num_layers, bidirectional=True, batch_first=True)
            head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, width))
            return {"lstm_head": lstm, "mlp_head": head}
