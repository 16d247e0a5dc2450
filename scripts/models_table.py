"""Write the rows of docs/models.md: ``python scripts/models_table.py [TYPE …]`` tries these types, or all.

The other rows stay. Each row comes from a tiny random model of that type.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from tests.tiny_types import CAUSAL, IMAGES, row_of, rows_in, table_of  # noqa: E402

TOP = """# Models

What becomes of transformers' own types, each tried on a tiny random model in float32. `scripts/models_table.py` writes
the rows; a test tries a sample of them in each run, and all in CI.

- **attach**: LoRA on `all-linear`, and the same logits as before. **train**: a backward pass reaches every tensor of
  the adapter.
- **serve**: by the [program](serving.md#which-models), by transformers' code over pages, or by transformers' own
  caches, with the way in which a sequence goes on.
- **greedy**: tokens of one prompt alone and of three together against `generate`. **plan**: the bytes of a sequence in
  `veneer plan --serve` against the engine's.
- **GGUF**: a merged model can be written as a GGUF file ([gguf.md](gguf.md)).

A type that was "not made here" has rules for its sizes that the test's tiny config does not keep, or needs a package:
nothing is known of it.

"""


def main(names: list[str]) -> None:
    """Try the types and write the page after each."""
    transformers.logging.set_verbosity_error()
    rows = rows_in(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    for name in names or [*CAUSAL, *IMAGES]:
        rows[name] = row_of(name)
        print(rows[name], file=sys.stderr, flush=True)
        PAGE.write_text(TOP + table_of(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
