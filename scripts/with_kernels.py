"""Run pytest with another build of the C++ kernels: ``python scripts/with_kernels.py _kernels.so [arguments]``."""

from __future__ import annotations

import importlib.util
import sys

import pytest

path, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("veneer._kernels", path)
if spec is None or spec.loader is None:
    sys.exit(f"{path} is no extension module")
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
print(f"{path}: {', '.join(module.isas())}", flush=True)
sys.exit(pytest.main(arguments))
