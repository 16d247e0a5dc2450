"""Hidden states of a prompt, pooled to one vector while they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.serve.schedule.pooling_params import PoolingParams


class Pooling:
    """Pooled hidden states so far.

    They are summed in a fixed order, so that the result does not depend on the pieces in which a prompt is computed.
    """

    def __init__(self, params: PoolingParams) -> None:
        self._params = params
        self._sum, self._n = torch.zeros((), dtype=torch.float64), 0

    def add(self, rows: Tensor) -> None:
        """Add the hidden states (n, width) of the next tokens."""
        values = rows.to("cpu", torch.float64)
        if self._params.pooling == "last":
            self._sum, self._n = values[-1], 1
            return
        for row in values:
            self._sum = self._sum + row
        self._n += len(values)

    def vector(self) -> list[float]:
        """Return the embedding, rounded to float32."""
        found = self._sum / self._n
        if self._params.normalize:
            found = found / found.norm().clamp_min(torch.finfo(torch.float64).tiny)
        return list(found.float().tolist())
