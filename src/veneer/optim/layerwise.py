"""GaLore with the update inside the backward pass: full gradients never coexist.

Sources: Zhao et al. 2024, arXiv:2403.03507, section 5.3 "per-layer weight updates", after Lv et al. 2023,
arXiv:2306.09782.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from veneer.errors import TrainingError
from veneer.optim.galore import GaLoreAdamW


class LayerwiseGaLoreAdamW(GaLoreAdamW):
    """`GaLoreAdamW` that updates each parameter as soon as its gradient is computed, and then frees that gradient.

    `step` has nothing left to do. One backward pass is one step, with the current learning rate. This excludes gradient
    accumulation over several passes, and clipping by the norm of all gradients.

    The backward pass raises TrainingError for a gradient that is not finite, before its weight is updated.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and hook its parameters."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        for param in self.param_groups[index]["params"]:
            self._watched().append(param.register_post_accumulate_grad_hook(lambda p: self.take_gradient(p, index)))

    def close(self) -> None:
        """Stop updating in backward passes. From then on `step` updates, as `GaLoreAdamW`'s does."""
        while self._watched():
            self._watched().pop().remove()

    def _watched(self) -> list[RemovableHandle]:
        """Return the list of handles of the hooks on parameters, created at the first call. torch's ``__init__`` adds
        parameter groups before this class can set an attribute.
        """
        return cast("list[RemovableHandle]", self.__dict__.setdefault("_hooks", []))

    @torch.no_grad()
    def take_gradient(self, param: Tensor, index: int) -> None:
        """Update a parameter of the group at ``index`` by its gradient, and free the gradient.

        Raises TrainingError if the gradient is not finite.
        """
        if not torch.isfinite(cast(Tensor, param.grad)).all():
            raise TrainingError(
                "a gradient is NaN or infinite: training stops before it reaches its weight, and earlier checkpoints "
                "stay. Lower the learning rate, or use bf16 or fp32"
            )
        self._update(param, self.param_groups[index])  # loading a state replaces the groups
        param.grad = None
