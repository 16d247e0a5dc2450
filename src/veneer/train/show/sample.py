"""One row as the model reads it, with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from veneer.data.encoding import IGNORED

TRAINED, CONTEXT = "bold green", "dim"


def shown_sample(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase, *, marks: bool = False) -> Text:
    """Return the text of an encoded row, with trained tokens in green. If ``marks``, also put them in 【】.

    The number of trained tokens follows. For a row without labels, it is the number of all tokens.
    """
    labels = row.get("labels")
    if labels is None:
        shown = Text(tokenizer.decode(list(row["input_ids"])))
        return shown.append(f"\n\n{len(row['input_ids'])} tokens", style="italic")
    shown = Text()
    pairs = zip(row["input_ids"], labels, strict=True)
    for trained, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in stretch])
        shown.append(f"【{text}】" if marks and trained else text, style=TRAINED if trained else CONTEXT)
    n_trained = sum(label != IGNORED for label in labels)
    shown.append(f"\n\n{n_trained} of {len(labels)} tokens are trained", style="italic")
    return shown
