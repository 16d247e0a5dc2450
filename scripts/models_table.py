"""Write the rows of docs/models.md: ``python scripts/models_table.py [TYPE …]`` tries these types, or all.

The other rows stay. Each row comes from a tiny random model of that type.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from tests.tiny_configs import CAUSAL, CLASSES, IMAGES, SEQ2SEQ  # noqa: E402
from tests.tiny_types import row_of, rows_in, table_of  # noqa: E402

TOP = """# Models

The support for each model type of transformers, tried on a tiny random model in float32.
`scripts/models_table.py` writes the rows; a test tries a sample of them in each run, and all in CI.

- **attach**: LoRA on `all-linear`, and the same logits as before.
- **train**: the adapter's gradients, compared with those derived from transformers' gradients of the merged weights.
  Rows of text do not reach all layers: vision towers and cross-attention without an encoder have no gradient.
- **fused**: all halves of all blocks, parts of them, or none. "planned …" follows if `veneer plan` expects another.
- **serve**: by the [program](serving.md#which-models), by transformers' code over pages, or by transformers' own
  caches, with the way in which a sequence is continued.
- **greedy**: tokens of one prompt alone and of three together, two with an adapter, compared with `generate` of the
  base and of the merged model. **plan**: bytes of a sequence in `veneer plan --serve`, compared with the engine's.
  "more": the engine finds, by values, that the cache of transformers' code is wrong, and keeps only tokens.
- **GGUF**: a merged model can be written as a GGUF file ([gguf.md](gguf.md)).
- **not whole, because**: why halves of blocks run transformers' code in training, as the log says it.

`seq2seq/…` is an encoder with a decoder; the name without this prefix is its decoder alone. `classes/…` is an encoder
with a classification head. "not made here": the type was not tried, because the test's tiny config breaks its rules for
sizes, or because it needs a package or images. "transformers: …" is the error of transformers' own code.

"""


def main() -> None:
    """Try the types and write the page after each."""
    known = [*CAUSAL, *IMAGES, *(f"seq2seq/{name}" for name in SEQ2SEQ), *(f"classes/{name}" for name in CLASSES)]
    parser = argparse.ArgumentParser(description="Write rows of docs/models.md; the others stay.")
    parser.add_argument("types", metavar="TYPE", nargs="*", help="model type, as in the first column (default: all)")
    names = parser.parse_args().types
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such model type. Give types of the page's first column, as llama")
    transformers.logging.set_verbosity_error()
    rows = rows_in(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    for name in names or known:
        rows[name] = row_of(name)
        print(rows[name], file=sys.stderr, flush=True)
        PAGE.write_text(TOP + table_of(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
