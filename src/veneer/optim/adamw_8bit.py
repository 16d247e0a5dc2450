"""AdamW with its two moments in 8 bits a parameter each (Dettmers et al. 2022, arXiv:2110.02861)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from veneer.errors import ConfigError
from veneer.ops.adamw import BLOCK_SIZE, AdamWStep, Moment8bit, adamw_8bit_
from veneer.ops.blockwise import dynamic_map
from veneer.ops.reference.adamw import adam_direction, adam_moments

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
MIN_8BIT_SIZE = 4096
"""Smaller tensors keep moments in float32 (section 2.3: small tensors are sensitive, and cost little)."""

_STATE_8BIT = ("state1", "absmax1", "state2", "absmax2")


class AdamW8bit(Optimizer):
    """AdamW whose moments take 2 bytes and 1/32 a parameter: codes in blocks of 256 with a float32 maximum each.

    Equal to bitsandbytes' AdamW8bit on the CPU to rounding. Parameters with fewer than ``min_8bit_size`` entries
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
        check_adam_settings(lr, betas, eps, weight_decay)
        self.min_8bit_size = min_8bit_size
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bit-exact: torch would cast float32 block maxima to the dtype of a 16-bit parameter."""
        super().load_state_dict(state_dict)
        order = [param for group in self.param_groups for param in group["params"]]
        for index, saved in state_dict["state"].items():
            self.state[order[index]] = {k: self._adopt(order[index], v) for k, v in saved.items()}

    def state_bytes(self) -> int:
        """Bytes that the moments take."""
        tensors = (v for state in self.state.values() for v in state.values() if torch.is_tensor(v))
        return sum(t.numel() * t.element_size() for t in tensors)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        if not self.state[param]:
            self.state[param] = self._new_state(param)
        state = self.state[param]
        state["step"] += 1
        hyper = AdamWStep(group["lr"], group["betas"], group["eps"], group["weight_decay"], state["step"])
        grad = cast(Tensor, param.grad)
        if "state1" in state:
            moments = Moment8bit(state["state1"], state["absmax1"]), Moment8bit(state["state2"], state["absmax2"])
            adamw_8bit_(param, grad, moments, hyper)
        else:
            _step_float32(param, grad, state, hyper)

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

    def _allocate(self, param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros for a state tensor of a parameter, in the place where this optimizer keeps state."""
        return torch.zeros(shape, dtype=dtype, device=param.device)

    def _adopt(self, param: Tensor, value: Any) -> Any:
        """A loaded piece of state, copied into that place."""
        return self._allocate(param, tuple(value.shape), value.dtype).copy_(value) if torch.is_tensor(value) else value


def moment_layout(param: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of the 8-bit state of one parameter; the names are bitsandbytes'."""
    n_blocks = -(param.numel() // -BLOCK_SIZE)
    shapes = {"state1": (param.numel(),), "absmax1": (n_blocks,), "state2": (param.numel(),), "absmax2": (n_blocks,)}
    return {key: (shapes[key], torch.uint8 if key.startswith("state") else torch.float32) for key in _STATE_8BIT}


def check_adam_settings(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise one ConfigError that lists every setting outside its range."""
    problems = [
        f"{name}={value} must be {allowed}"
        for name, value, allowed, ok in (
            ("lr", lr, "at least 0", lr >= 0),
            ("betas", betas, "two numbers in [0, 1)", len(betas) == 2 and all(0 <= b < 1 for b in betas)),
            ("eps", eps, "above 0", eps > 0),
            ("weight_decay", weight_decay, "at least 0", weight_decay >= 0),
        )
        if not ok
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def _step_float32(param: Tensor, grad: Tensor, state: dict[str, Any], hyper: AdamWStep) -> None:
    m, v = adam_moments(grad.float(), state["exp_avg"], state["exp_avg_sq"], hyper.betas)
    state["exp_avg"].copy_(m)
    state["exp_avg_sq"].copy_(v)
    decayed = param.float() * (1 - hyper.lr * hyper.weight_decay)
    param.copy_(decayed - hyper.lr * adam_direction(m, v, hyper))


def _code_of_zero(signed: bool) -> int:
    return int((dynamic_map(signed) == 0).nonzero().item())
