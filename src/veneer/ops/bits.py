"""Codes of 1 to 8 bits in bytes, one after the other, the lowest bits first."""

from __future__ import annotations

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

TILE_CODES = 1 << 18
"""Codes that are packed at a time where a word is longer than a byte."""


def n_bytes(n: int, bits: int) -> int:
    """Return the number of bytes of ``n`` packed codes."""
    word, per_word = _word(bits)
    return -(-n // per_word) * word


def pack(codes: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Return codes packed row by row; the last bytes of a row are filled with zeros."""
    word, per_word = _word(bits)
    if bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    groups = codes.view(len(codes), -1, per_word)
    if word == 1:
        shifts = _shifts(bits, per_word, codes.device).to(torch.uint8)
        return (groups << shifts).sum(dim=-1, dtype=torch.uint8)
    step = max(1, TILE_CODES // max(1, codes.shape[1]))
    # wide numbers of some rows at a time: they are eight times as large as the codes
    packed = [_words_packed(part.to(torch.int64), bits, word) for part in torch.split(groups, step)]
    return torch.cat(packed).view(len(codes), -1)


def unpack(packed: UInt8[Tensor, "rows bytes"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """Return the first ``n`` codes of each row."""
    word, per_word = _word(bits)
    if bits == 8:
        return packed[:, :n]
    if word == 1:
        shifts = _shifts(bits, per_word, packed.device).to(torch.uint8)
        return (packed[:, :, None] >> shifts & (1 << bits) - 1).view(len(packed), -1)[:, :n]
    groups = packed.view(len(packed), -1, word).to(torch.int64)
    words = (groups << _shifts(8, word, packed.device)).sum(dim=-1, keepdim=True)
    codes = words >> _shifts(bits, per_word, packed.device) & (1 << bits) - 1
    return codes.to(torch.uint8).view(len(packed), -1)[:, :n]


def _words_packed(groups: Int64[Tensor, "rows words n"], bits: int, word: int) -> UInt8[Tensor, "rows words bytes"]:
    words = (groups << _shifts(bits, groups.shape[2], groups.device)).sum(dim=-1, keepdim=True)
    return (words >> _shifts(8, word, groups.device) & 0xFF).to(torch.uint8)


def _word(bits: int) -> tuple[int, int]:
    """Return a number of bytes that holds a whole number of codes, and that number of codes."""
    word = 1 if 8 % bits == 0 else bits
    return word, 8 * word // bits


def _shifts(step: int, n: int, device: torch.device) -> Tensor:
    return torch.arange(0, step * n, step, device=device)
