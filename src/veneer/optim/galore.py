"""GaLore: Adam in a low-rank projection of each gradient, over full weights.

Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.adamw import BLOCK_SIZE
from veneer.ops.blockwise import dequantize_blockwise, dynamic_map, quantize_blockwise
from veneer.ops.reference.adamw import adam_direction, adam_moments_
from veneer.optim.adam import LeanAdamW, Params, next_step


@dataclass(frozen=True, kw_only=True)
class GaLoreProjection:
    """Projection of GaLore. ``rank``: of the subspace. ``gap``: steps between new bases (one SVD each).

    ``scale``: of the update, the paper's alpha. ``side``: "shorter" projects the shorter side of the matrix (the
    paper's choice), "longer" the other.
    """

    rank: int = 128
    gap: int = 200
    scale: float = 0.25
    side: str = "shorter"

    def __post_init__(self) -> None:
        problems = [f"{n}={getattr(self, n)} must be at least 1" for n in ("rank", "gap") if getattr(self, n) < 1]
        if not 0 < self.scale < math.inf:
            problems.append(f"scale={self.scale} must be a number above 0")
        if self.side not in ("shorter", "longer"):
            problems.append(f"side={self.side!r} must be 'shorter' or 'longer'")
        if problems:
            raise ConfigError("GaLore: " + "; ".join(problems))

    def goes_right(self, shape: torch.Size) -> bool:
        """Return True if a matrix is projected from the right (``G V``), False for ``Uᵀ G``."""
        return (shape[0] >= shape[1]) == (self.side == "shorter")


class GaLoreAdamW(LeanAdamW):
    """AdamW whose moments live in a rank-r projection of the gradient for every matrix larger than the rank.

    A matrix (m, n) keeps moments of r·max(m, n) entries and a basis of r·min(m, n) instead of 2·m·n. Moments do not
    change when the basis does, as in the authors' code. With ``eight_bit`` they are stored in 8 bits. Weight decay acts
    on the full weight. Vectors, small matrices, and groups with ``projected`` False use plain AdamW.

    Difference from the authors' code: eps is added to the bias-corrected root, as in Adam's
    paper; the authors' code adds it before the correction.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        projection: GaLoreProjection | None = None,
        eight_bit: bool = False,
    ) -> None:
        self.projection, self.eight_bit = projection or GaLoreProjection(), eight_bit
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "projected": True}
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state as `LeanAdamW` does.

        Raises ConfigError if the state has another rank or side, or moments in another format. This optimizer is then
        unchanged.
        """
        flags = [group["projected"] for group in state_dict["param_groups"] for _ in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, saved in state_dict["state"].items():
            self._check_state(params[index], flags[index], saved)
        super().load_state_dict(state_dict)

    def _check_state(self, param: Tensor, flag: bool, saved: dict[str, Any]) -> None:
        wanted, kept = self._basis_shape(param, flag), tuple(saved["basis"].shape) if "basis" in saved else None
        if wanted != kept:
            raise ConfigError(
                f"GaLore: the saved state of a matrix {tuple(param.shape)} has "
                f"{'no basis' if kept is None else f'a basis {kept}'}, but rank={self.projection.rank} and "
                f"side={self.projection.side!r} need {'none' if wanted is None else wanted}: "
                "use the rank and side that it was trained with, or start a new run"
            )
        if ("state1" in saved) != self.eight_bit:
            raise ConfigError(
                f"GaLore: the saved moments are {'8-bit' if 'state1' in saved else 'float32'}, but this optimizer has "
                f"eight_bit={self.eight_bit}: use the setting that it was trained with, or start a new run"
            )

    def _is_projected(self, param: Tensor, flag: bool) -> bool:
        return flag and param.ndim == 2 and min(param.shape) > self.projection.rank

    def _basis_shape(self, param: Tensor, flag: bool) -> tuple[int, int] | None:
        if not self._is_projected(param, flag):
            return None
        return param.shape[1 if self.projection.goes_right(param.shape) else 0], self.projection.rank

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], cast(Tensor, param.grad).float()
        hyper = next_step(state, group)
        projected = self._is_projected(param, group["projected"])
        right = projected and self.projection.goes_right(param.shape)
        if projected and (state["step"] - 1) % self.projection.gap == 0:
            state["basis"] = basis(grad, self.projection.rank, right)
        low = project(grad, state["basis"], right) if projected else grad
        m, v = self._moments(state, low)
        adam_moments_(low, m, v, hyper.betas)
        self._keep(state, m, v)
        direction = adam_direction(m, v, hyper)
        if projected:
            direction = project_back(direction, state["basis"], right).mul_(self.projection.scale)
        updated = param.float().sub_(direction.mul_(hyper.lr))  # of a float32 parameter itself
        param.copy_(updated.mul_(1 - hyper.lr * hyper.weight_decay))

    def _moments(self, state: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        if "exp_avg" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        if "state1" not in state:
            return torch.zeros_like(like), torch.zeros_like(like)
        return _read(state, "1", like), _read(state, "2", like)

    def _keep(self, state: dict[str, Any], m: Tensor, v: Tensor) -> None:
        if not self.eight_bit:
            state["exp_avg"], state["exp_avg_sq"] = m, v
            return
        for key, value in (("1", m), ("2", v)):
            code = dynamic_map(key == "1").to(value.device)
            state[f"state{key}"], state[f"absmax{key}"] = quantize_blockwise(value.flatten(), code, BLOCK_SIZE)


def basis(grad: Float[Tensor, "m n"], rank: int, right: bool) -> Float[Tensor, "k r"]:
    """Return an orthonormal basis of the gradient's leading subspace.

    Its columns are right singular vectors (n, r) or left ones (m, r).
    """
    u, _, vt = torch.linalg.svd(grad, full_matrices=False)
    directions: Tensor = vt[:rank].T if right else u[:, :rank]
    return directions.contiguous()


def project(grad: Float[Tensor, "m n"], base: Float[Tensor, "k r"], right: bool) -> Float[Tensor, "p q"]:
    """Return the projected gradient: ``G V`` (m, r) if ``right``, otherwise ``Uᵀ G`` (r, n). V or U is ``base``."""
    low: Tensor = grad @ base if right else base.T @ grad
    return low


def project_back(low: Float[Tensor, "p q"], base: Float[Tensor, "k r"], right: bool) -> Float[Tensor, "m n"]:
    """Return the full-size update of a projected one N (``low``): ``N Vᵀ`` if ``right``, otherwise ``U N``."""
    full: Tensor = low @ base.T if right else base @ low
    return full


def _read(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    code = dynamic_map(key == "1").to(like.device)
    return dequantize_blockwise(state[f"state{key}"], state[f"absmax{key}"], code, BLOCK_SIZE).view_as(like)
