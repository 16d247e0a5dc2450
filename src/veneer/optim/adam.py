"""Base of the memory-efficient AdamW optimizers: settings, the loop over parameters, bit-exact restoring of state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from veneer.errors import ConfigError
from veneer.ops.adamw import AdamWStep

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class LeanAdamW(Optimizer):
    """AdamW whose subclass defines in `_update` how one parameter is updated, and its state.

    ``defaults`` of parameter groups: lr, betas, eps, weight_decay, and the subclass's own. Raises ConfigError for
    settings outside their range.
    """

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        check_adam_settings(defaults["lr"], defaults["betas"], defaults["eps"], defaults["weight_decay"])
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
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
        """Restore the state bit for bit. torch would cast float32 state to the dtype of a 16-bit parameter."""
        super().load_state_dict(state_dict)
        order = [param for group in self.param_groups for param in group["params"]]
        for index, saved in state_dict["state"].items():
            self.state[order[index]] = {k: self._adopt(order[index], v) for k, v in saved.items()}

    @abstractmethod
    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        """Update a parameter and its state in place from its gradient. ``group`` holds the settings."""

    def _allocate(self, param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate zeros for a parameter's state tensor, in the memory where this optimizer keeps state."""
        return torch.zeros(shape, dtype=dtype, device=param.device)

    def _adopt(self, param: Tensor, value: Any) -> Any:
        """Return a copy of a loaded state tensor in the memory where this optimizer keeps state. Other values are
        returned unchanged.
        """
        return self._allocate(param, tuple(value.shape), value.dtype).copy_(value) if torch.is_tensor(value) else value


def next_step(state: dict[str, Any], group: dict[str, Any]) -> AdamWStep:
    """Increment the step in a parameter's state, and return the settings of that step."""
    state["step"] = state.get("step", 0) + 1
    return AdamWStep(group["lr"], group["betas"], group["eps"], group["weight_decay"], state["step"])


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
