"""Amounts in a form that people read."""

from __future__ import annotations


def size(n_bytes: float) -> str:
    """Return bytes in GB from 1000 MB on, in kB below 50 kB, else in MB. A kB is 1000 bytes."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:,.2f} GB"
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 50_000 else f"{n_bytes / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """Return seconds as ``12 s``, ``4 min 28 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(n: int, noun: str) -> str:
    """Return a number with its noun: ``1 thread``, ``2 threads``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
