"""Implementation of ``veneer env``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch
import typer

from veneer.cli.facts import print_facts
from veneer.cli.pages.env import EnvArguments
from veneer.disk.cache import cache_dir
from veneer.model.memory.default_device import told_device
from veneer.model.memory.gpu_failure import unusable_gpu
from veneer.ops.dispatch import availability, kernel_build
from veneer.ops.matmul import float32_is_faster
from veneer.plain.units import count

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "gguf", "numpy")
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


def env(args: EnvArguments) -> None:
    """Print the facts about this installation."""
    facts = environment()
    if args.as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    print_facts(facts)


def environment() -> dict[str, str]:
    """Return the facts about this installation, by name."""
    facts = {"veneer": importlib.metadata.version("veneer"), "python": platform.python_version()}
    facts |= {package: _version(package) for package in PACKAGES}
    facts |= {"system": f"{platform.system()} {platform.release()} {platform.machine()}", "cpu": _cpu_model()}
    facts |= {"cpu features": " ".join(_cpu_features()) or "unknown"}
    facts |= {f"back end {name}": state for name, state in availability().items()}
    facts |= {"kernel build": kernel_build(), "cuda": _cuda()}
    facts |= {"16-bit products": "in float32, then rounded" if float32_is_faster() else "as torch computes them"}
    facts |= {"threads": f"{count(torch.get_num_threads(), 'thread')} on {count(os.cpu_count() or 1, 'processor')}"}
    return facts | {"cache folder": str(cache_dir())}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo; empty if the system has none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _cpu_model() -> str:
    return _cpuinfo().get("model name") or platform.processor() or "unknown"


def _cpu_features() -> list[str]:
    info = _cpuinfo()
    have = set(f"{info.get('flags', '')} {info.get('features', '')}".split())
    return [flag for flag in _CPU_FLAGS if flag in have]


def _cuda() -> str:
    if torch.cuda.is_available():
        return told_device(torch.device("cuda"))
    reason = unusable_gpu()
    return f"no device: {reason}" if reason else "no device"
