"""Hashes of the bytes that ggml's own quantizers make of tests/ggml_rows.py, through libgguf (built for x86-64).

pip install libgguf==0.2.2; PYTHONPATH=tests python tests/golden/ggml/make.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import libgguf
import torch

from ggml_rows import DTYPES, awkward_rows, digest, importances
from veneer.ops.ggml_types import GGML_TYPES


def main():
    made = {}
    for kind in (kind for kind in GGML_TYPES.values() if kind.block > 1):
        for named, importance in importances().items():
            weights = None if importance is None else importance.numpy()
            for name, rows in awkward_rows().items():
                sources = (rows.to(dtype).float().numpy() for dtype in DTYPES)
                packed = [torch.from_numpy(libgguf.quantize_rows(x, kind.number, weights)) for x in sources]
                made.setdefault(kind.name, {}).setdefault(named, {})[name] = digest(packed)
    text = json.dumps({"libgguf": version("libgguf"), "hashes": made}, indent=1)
    Path(__file__).with_name("hashes.json").write_text(text + "\n")


main()
