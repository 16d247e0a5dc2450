"""Awkward rows for ggml's quantizers: the same bits on every machine, made of whole numbers and exact products."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

COLUMNS = 768
ROWS = 3  # of each kind of data
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bell(seed: int, *shape: int) -> Tensor:
    """Sums of four whole numbers of 16 bits, nearly normal, of standard deviation 1.15."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))).astype(np.uint64).view(np.uint16).reshape(-1, 4)
    return torch.from_numpy(raw.astype(np.float32).sum(axis=1) / 32768 - 4).float().reshape(shape)


def _part(seed: int, share: int) -> Tensor:
    """True in one of ``share`` places."""
    raw = np.random.PCG64(seed).random_raw(ROWS * COLUMNS)
    return torch.from_numpy(raw % share == 0).reshape(ROWS, COLUMNS)


def awkward_rows() -> dict[str, Tensor]:
    """Float32 ``(ROWS, COLUMNS)`` by name. Every type can hold them, also after rounding to 16 bits."""
    x = bell(1, ROWS, COLUMNS)
    blocks = 2.0 ** torch.arange(-60, 12).float().repeat_interleave(32)
    outlier = x * 2.0**-7
    outlier[:, 5::97] = 31.0
    return {
        "normal": x * 2.0**-6,
        "heavy tails": x * x * x * x * x * 2.0**-3,
        "constant": x[:, :1].repeat(1, COLUMNS),
        "constant in groups": x[:, ::16].repeat_interleave(16, dim=1),
        "zero": torch.zeros(ROWS, COLUMNS),
        "negative zero": torch.where(_part(2, 2), 0.0, -0.0),
        "all negative": -x.abs(),
        "far from zero": x.abs() * 2.0**-12 - 5,
        "all positive": x.abs() * 2.0**-4 + 3,
        "tiny": x * 1e-38,
        "subnormal": x * 1e-41,
        "around the smallest": x * 1e-15,
        "huge": x * 8192,
        "sparse": torch.where(_part(3, 40), x, torch.zeros(())),
        "a block of zeros": torch.where(torch.arange(COLUMNS) % 512 < 290, x, torch.zeros(())),
        "gridded": (x * 4).round() / 8,
        "two values": torch.where(x > 0, 0.3, -0.7),
        "outliers": outlier,
        "every magnitude": (bell(4, ROWS * COLUMNS) * blocks).view(ROWS, COLUMNS),
    }


def importances() -> dict[str, Tensor | None]:
    """None, and float32 ``(COLUMNS,)`` by name."""
    heavy = bell(5, COLUMNS) * bell(6, COLUMNS)
    holes = bell(7, COLUMNS).abs()
    holes[:300:2], holes[512:] = 0, 0
    return {"none": None, "heavy tails": heavy * heavy, "holes": holes}


def digest(packed: list[Tensor]) -> str:
    """Twelve hexadecimal digits that tell the bytes apart."""
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in packed)).hexdigest()[:12]
