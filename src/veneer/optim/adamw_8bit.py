"""AdamW with its two moments in 8 bits per parameter each (Dettmers et al. 2022, arXiv:2110.02861)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from veneer.ops.adamw import BLOCK_SIZE, AdamWStep, Moment8bit, adamw_8bit_, require_finite
from veneer.ops.blockwise import dynamic_map
from veneer.ops.reference.adamw import adam_moments_, adamw_update
from veneer.optim.adam import LeanAdamW, Params, next_step

MIN_8BIT_SIZE = 4096
"""Smaller tensors keep moments in float32 (section 2.3: small tensors are sensitive, and cost little)."""

_STATE_8BIT = ("state1", "absmax1", "state2", "absmax2")


class AdamW8bit(LeanAdamW):
    """AdamW whose moments take 2 bytes and 1/32 per parameter: codes in blocks of 256 with a float32 maximum each.

    Equal to bitsandbytes' AdamW8bit on the CPU up to rounding. Parameters with fewer than ``min_8bit_size`` entries
    keep float32 moments. Raises ConfigError for settings outside their range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        self.min_8bit_size = min_8bit_size
        self._unread: list[tuple[Tensor, Tensor]] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises NonFiniteError if a moment becomes NaN or infinite. On a GPU this is checked after all updates, with a
        single read by the host.
        """
        self._unread = []
        loss = super().step(closure)
        unread, self._unread = self._unread, []
        require_finite(unread)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(param)
        hyper = next_step(state, group)
        grad = cast(Tensor, param.grad)
        if "state1" in state:
            moments = Moment8bit(state["state1"], state["absmax1"]), Moment8bit(state["state2"], state["absmax2"])
            flag = adamw_8bit_(param, grad, moments, hyper)
            if flag is not None:
                self._unread.append((flag, param))
        else:
            _step_float32(param, grad, state, hyper)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """Return the parameter's state, creating it before the first step."""
        if not self.state[param]:
            self.state[param] = self._new_state(param)
        return cast(dict[str, Any], self.state[param])

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        if param.numel() < self.min_8bit_size:
            zeros = {key: torch.zeros_like(param, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
            return {"step": 0, **zeros}
        state: dict[str, Any] = {"step": 0}
        for key, (shape, dtype) in moment_layout(param).items():
            state[key] = self._allocate(param, shape, dtype)
        state["state1"].fill_(_code_of_zero(signed=True))
        state["state2"].fill_(_code_of_zero(signed=False))
        return state


def moment_layout(param: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return names, shapes and dtypes of the 8-bit state of one parameter. The names are bitsandbytes'."""
    n_blocks = -(param.numel() // -BLOCK_SIZE)
    shapes = {"state1": (param.numel(),), "absmax1": (n_blocks,), "state2": (param.numel(),), "absmax2": (n_blocks,)}
    return {key: (shapes[key], torch.uint8 if key.startswith("state") else torch.float32) for key in _STATE_8BIT}


def _step_float32(param: Tensor, grad: Tensor, state: dict[str, Any], hyper: AdamWStep) -> None:
    m, v = state["exp_avg"], state["exp_avg_sq"]
    adam_moments_(grad.float(), m, v, hyper.betas)
    param.copy_(adamw_update(param, m, v, hyper))


def _code_of_zero(signed: bool) -> int:
    return int((dynamic_map(signed) == 0).nonzero().item())
